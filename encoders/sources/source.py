"""A vision encoder from anywhere as our own tower: our runs, open_clip weights (CLIPS, CLIPA, DreamLIP), CLIP models of
transformers. `open_source` finds out which; what cannot become a CLIPVisionModel is refused with the reason."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoders import encoder_run, manifest
from encoders.config import PreprocessConfig, TextConfig, VisionConfig
from encoders.data.tokenizers import CaptionTokenizer
from encoders.data.transforms import eval_transform
from encoders.dual_encoder import DualEncoder
from encoders.errors import ModelError, UsageError
from encoders.sources import hf as hf_import
from encoders.sources import hf_reference
from encoders.sources import open_clip as open_clip_import
from encoders.sources.download import Download, download
from encoders.sources.open_clip_config import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    family,
    preprocess_config,
    silence,
    text_end,
    text_plan,
    tokenizer_repo,
    vision_config,
)
from encoders.sources.tokenizers import open_clip_tokenizer, read_tokenizer
from encoders.sources.tower_weights import build_towers, build_vision
from encoders.vision import VisionTower
from encoders.weights.files import Weights, inside

CLIP_VOCABULARY = 49408
TOKENIZER_HINT = {
    "clip": "tokenizer.json, or vocab.json and merges.txt; the extra [open-clip] has CLIP's own",
    "bert": "tokenizer.json or vocab.txt, which CLIPS has from google-bert/bert-base-uncased",
}
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """A vision encoder from anywhere, as our own tower, with what it takes to prove and to describe it."""

    tower: VisionTower
    """Unfolded, float32, on the CPU, in eval mode. Its `projection` is nn.Identity where the source has none."""
    preprocess: PreprocessConfig
    """The source's own mean, std and interpolation, and whether it crops or squashes."""
    model: DualEncoder | None
    """Both towers (`tower` is its image tower) where the source has a text tower that ours can represent."""
    tokenizer: CaptionTokenizer | None
    reference: Callable[[Tensor], dict[str, Tensor]]
    """Normalised pixels (B,3,H,W) -> `hidden_states[-2]` and `last_hidden_state` (B,1+N,D), `pooler_output` (B,D: the
    final norm of the class token), and `image_embeds` (B,E: the source's image embedding, not normalised; where it
    has a projection); computed by the source's own implementation from its own weights."""
    reference_text: Callable[[Tensor, Sequence[int]], Tensor]
    """Where there is a `model`: ids (B,L) and their numbers of real tokens -> text embeddings (B,E), not normalised, by
    the same implementation."""
    reference_pixels: Callable[[Tensor], Tensor]
    """A picture, uint8 (3,H,W) -> normalised pixels (1,3,S,S) as the source itself makes them."""
    family: str
    """run, open_clip, clips, clipa, dreamlip or hf-clip."""
    provenance: dict[str, Any]
    """What goes into the card and the weights' metadata. Always `source`, `family`, `weights_sha256` and `notes` (what
    was left out, and why); of a Hub id `base_model`, `commit` and its license's fields; of a run `objective` and
    `metrics`; of a bare file `architecture`."""
    parents: dict[str, Path]
    """For the manifest."""


def open_source(source: str | Path, model_name: str | None = None, revision: str | None = None) -> Source:
    """Open a run's folder, a Hub id (at `revision`), a folder in the Hub's layout, or open_clip's weights in a file,
    for which `model_name` names the config in open_clip's package.

    Raises UsageError for a source that is nothing of these, ModelError for one that cannot become a CLIPVisionModel.
    """
    path = Path(source)
    if path.is_file() != (model_name is not None):
        what = "is a file of weights, which says nothing of its model" if path.is_file() else "is no file of weights"
        way = "add --model-name, such as ViT-B-16" if path.is_file() else "leave out --model-name"
        raise UsageError(f"{source} {what}; {way}")
    if path.exists() and revision is not None:
        raise UsageError(f"{source} is on this machine and has no revision {revision}; that is for ids on the Hub")
    if model_name is not None:
        return _open_file(path, model_name)
    if path.is_dir():
        if (path / manifest.MANIFEST).is_file() and manifest.read(path).kind == "encoder-run":
            return _open_run(path)
        return _open_folder(path, {"source": path.resolve().name})
    if path.is_absolute() or not HUB_ID.fullmatch(str(source)):
        raise UsageError(f"{source} does not exist, and it is no id on the Hub (organisation/name)")
    return _open_hub(download(str(source), revision, choose_weights))


def evaluation_pixels(preprocess: PreprocessConfig, image_size: int, picture: Tensor) -> Tensor:
    """A picture, uint8 (3,H,W) -> normalised pixels (1,3,S,S) by our own evaluation transform."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    return (eval_transform(picture, image_size, preprocess)[None].float() / 255 - mean) / std


def choose_weights(names: frozenset[str]) -> tuple[str, ...]:
    """Of the names of a folder's small files: the weights to look for, best first. open_clip's come before those of
    transformers, as they are what was trained where a repository has both."""
    theirs = OPEN_CLIP_WEIGHTS if OPEN_CLIP_CONFIG in names else ()
    return (*theirs, *hf_import.WEIGHTS) if not theirs or "config.json" in names else theirs


def _open_run(folder: Path) -> Source:
    model, tokenizer = encoder_run.load(folder)
    told = manifest.read(folder)
    tower = model.vision
    provenance = {
        "source": folder.resolve().name,
        "family": "run",
        "weights_sha256": told.files[encoder_run.WEIGHTS_FILE].sha256,
        "objective": model.config.objective,
        "metrics": told.metrics,
        "notes": [],
    }
    return Source(
        tower=tower,
        preprocess=model.config.preprocess,
        model=model,
        tokenizer=tokenizer,
        reference=partial(_run_reference, tower),
        reference_text=torch.inference_mode()(model.text),
        reference_pixels=partial(evaluation_pixels, model.config.preprocess, tower.config.image_size),
        family="run",
        provenance=provenance,
        parents={"run": folder},
    )


@torch.inference_mode()
def _run_reference(tower: VisionTower, pixels: Tensor) -> dict[str, Tensor]:
    output = tower.model(pixel_values=pixels, output_hidden_states=True)
    return {
        "hidden_states[-2]": output.hidden_states[-2],
        "last_hidden_state": output.last_hidden_state,
        "pooler_output": output.pooler_output,
        "image_embeds": tower.embed(output.last_hidden_state),
    }


def _open_hub(got: Download) -> Source:
    told = {"source": got.repo, "base_model": got.repo, "commit": got.commit, **got.license}
    return _open_folder(got.folder, told, got.notes)


def _open_folder(folder: Path, told: Mapping[str, Any], notes: tuple[str, ...] = ()) -> Source:
    found = [file for name in OPEN_CLIP_WEIGHTS if (file := inside(folder, name)).is_file()]
    transformers_too = inside(folder, "config.json").is_file()
    if inside(folder, OPEN_CLIP_CONFIG).is_file() and (found or not transformers_too):
        config = hf_import.read_json(folder, OPEN_CLIP_CONFIG)
        where = str(folder / OPEN_CLIP_CONFIG)
        if not isinstance(config.get("model_cfg"), dict):
            raise ModelError(f"{where} has no `model_cfg`; it is not the config that open_clip writes")
        if not found:
            raise ModelError(f"{folder} has {OPEN_CLIP_CONFIG} but none of {', '.join(OPEN_CLIP_WEIGHTS)}")
        parts = _open_clip(found[0], config["model_cfg"], config.get("preprocess_cfg") or {}, where)
        return _assemble(parts, folder, told, notes)
    if transformers_too:
        return _assemble(_open_hf(folder), folder, told, notes)
    raise ModelError(
        f"{folder} holds no {manifest.MANIFEST} of an encoder run, no {OPEN_CLIP_CONFIG} and no config.json; a file of "
        "weights can be named itself, with --model-name"
    )


def _open_file(file: Path, model_name: str) -> Source:
    model_cfg, preprocess_cfg = open_clip_import.named_config(model_name)
    parts = _open_clip(file, model_cfg, preprocess_cfg, f"open_clip's {model_name}.json")
    return _assemble(parts, file, {"source": file.name, "architecture": model_name}, ())


@dataclass(frozen=True)
class _Parts:
    """What a foreign format gives, before the towers are built."""

    weights: Weights
    vision: tuple[dict[str, Tensor], VisionConfig]
    text: Callable[[], TextConfig | str]
    """Its config, or why there is no text tower."""
    text_weights: Callable[[TextConfig], dict[str, Tensor] | str]
    text_end: Callable[[], int | None]
    """The id at which texts are pooled, where it is not the largest one."""
    preprocess: PreprocessConfig
    reference: Callable[[Tensor], dict[str, Tensor]]
    reference_text: Callable[[Tensor], Tensor]
    reference_pixels: Callable[[Tensor], Tensor]
    family: str
    tokenizer_repo: str | None = None
    """Where on the Hub the tokenizer lies if not beside the weights."""
    notes: tuple[str, ...] = ()


def _open_clip(file: Path, model_cfg: dict[str, Any], preprocess_cfg: Mapping[str, Any], where: str) -> _Parts:
    config = vision_config(model_cfg, where)  # refusals first: the file may be large
    weights = Weights(file)
    open_clip_import.refuse_openai_without_quick_gelu(weights, config)
    name: str = family(model_cfg)
    preprocess = preprocess_config(preprocess_cfg, name, where)
    notes = _left_out(open_clip_import.left_out(weights)) + [note for note in (silence(model_cfg),) if note]
    state, config = open_clip_import.read_vision(weights, config)
    if (width := len(state["projection.weight"])) != model_cfg.get("embed_dim"):
        raise ModelError(f"{where}: embed_dim is {model_cfg.get('embed_dim')}, but {file} projects to {width}")
    return _Parts(
        weights=weights,
        vision=(state, config),
        text=partial(text_plan, model_cfg, where),
        text_weights=partial(open_clip_import.read_text, weights),
        text_end=partial(text_end, model_cfg),
        preprocess=preprocess,
        reference=partial(open_clip_import.reference, weights, model_cfg),
        reference_text=partial(open_clip_import.reference_text, weights, model_cfg),
        reference_pixels=partial(open_clip_import.reference_pixels, preprocess_cfg, config.image_size),
        family="dreamlip" if name == "open_clip" and open_clip_import.is_dreamlip(weights) else name,
        tokenizer_repo=tokenizer_repo(model_cfg),
        notes=tuple(notes),
    )


def _open_hf(folder: Path) -> _Parts:
    config, text_config = hf_import.read_configs(folder)
    preprocess = hf_import.read_preprocess(folder, config.image_size)
    weights = Weights(hf_import.weights_file(folder))
    for file in weights.files():
        inside(folder, file.name)
    state = hf_import.read_vision(weights, config)
    return _Parts(
        weights=weights,
        vision=hf_import.exported_head(folder, state, config),
        text=lambda: text_config,
        text_weights=partial(hf_import.read_text, weights),
        text_end=partial(hf_import.text_end, folder),
        preprocess=preprocess,
        reference=partial(hf_reference.image_outputs, folder, "projection.weight" in state),
        reference_text=partial(hf_reference.text_embeddings, folder),
        reference_pixels=partial(hf_reference.pixels, folder),
        family="hf-clip",
        notes=tuple(_left_out(hf_import.left_out(weights))),
    )


def _left_out(names: list[str]) -> list[str]:
    return [f"{len(names)} tensors of neither tower are left out: {', '.join(names[:3])}"] if names else []


def _assemble(parts: _Parts, parent: Path, told: Mapping[str, Any], notes: tuple[str, ...]) -> Source:
    tower = build_vision(*parts.vision, parts.weights.file)
    model, tokenizer, text_notes = _text_side(parts, tower, parent, "base_model" in told)
    parts.weights.release()
    provenance = {
        **told,
        "family": parts.family,
        "weights_sha256": _sha256(parts.weights),
        "notes": [*notes, *parts.notes, *text_notes],
    }
    return Source(
        tower=tower,
        preprocess=parts.preprocess,
        model=model,
        tokenizer=tokenizer,
        reference=parts.reference,
        reference_text=lambda ids, lengths: parts.reference_text(ids),
        reference_pixels=parts.reference_pixels,
        family=parts.family,
        provenance=provenance,
        parents={"source": parent},
    )


def _text_side(
    parts: _Parts, tower: VisionTower, parent: Path, from_hub: bool
) -> tuple[DualEncoder | None, CaptionTokenizer | None, list[str]]:
    """Both towers and the tokenizer, where they can be had, and notes on why not: an image tower needs neither."""
    try:
        config = parts.text()
        state = config if isinstance(config, str) else parts.text_weights(config)
        if isinstance(config, str) or isinstance(state, str):
            return None, None, [f"the text tower is left out: {state}"]
        scale = parts.weights.tensor("logit_scale")
        model = build_towers(tower, (state, config), scale, parts.preprocess, parts.weights.file)
    except (ModelError, UsageError) as error:
        return None, None, [f"the text tower is left out: {error}"]
    try:
        tokenizer = _tokenizer(parent, config, parts.tokenizer_repo if from_hub else None)
    except ModelError as error:
        return model, None, [f"the tokenizer is left out: {error}"]
    if tokenizer is None:
        return model, None, [f"no tokenizer lies beside the weights ({TOKENIZER_HINT[config.kind]})"]
    if (end := parts.text_end()) not in (None, tokenizer.eos):
        why = f"its texts are pooled at id {end}, where its tokenizer ends them with {tokenizer.eos}"
        return None, None, [f"the text tower is left out: {why}"]
    return model, tokenizer, []


def _tokenizer(parent: Path, text: TextConfig, repo: str | None) -> CaptionTokenizer | None:
    """The one beside the weights, or else CLIP's own out of open_clip's package, or that of `repo` on the Hub."""
    tokenizer = read_tokenizer(parent, text.kind) if parent.is_dir() else None
    if tokenizer is None and text.kind == "clip" and text.vocab_size == CLIP_VOCABULARY and find_spec("open_clip"):
        tokenizer = open_clip_tokenizer()
    if tokenizer is None and repo is not None:
        tokenizer = read_tokenizer(download(repo, None, None).folder, text.kind)
    if tokenizer is not None and tokenizer.size > text.vocab_size:
        raise ModelError(f"{parent}: its tokenizer has {tokenizer.size} ids, its text tower {text.vocab_size} tokens")
    return tokenizer


def _sha256(weights: Weights) -> str:
    """Of the weights file; of several shards, of their hashes."""
    digests = []
    for file in weights.files():
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
