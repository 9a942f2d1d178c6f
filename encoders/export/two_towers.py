"""`export-encoder --with-text`: image and text tower together, for the zero-shot tools of others and for eval-encoder.

Written in open_clip's form beside the CLIPVisionModel and, where the architecture allows, as a CLIPModel in `clip/`;
then loaded again by open_clip and transformers and compared. Shapes: B texts or pictures, L slots.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors
from torch import Tensor
from transformers import CLIPModel

from encoders.config import EncoderConfig, TextConfig
from encoders.data.tokenizers import BOS, END, EOS, PAD, START, CaptionTokenizer, pad_texts
from encoders.data.tokenizers import FILE as TOKENIZER_FILE
from encoders.dual_encoder import DualEncoder
from encoders.errors import ModelError, ParityError, UsageError
from encoders.export import clip_model as clip_model_export
from encoders.export import open_clip as open_clip_export
from encoders.export.image_head import PROJECTION, PROJECTION_FILE
from encoders.export.parity import EMBEDDING, MAX_RELATIVE_ERROR, Expected
from encoders.manifest import write_json
from encoders.pretrained import load_strict
from encoders.sources.open_clip import open_clip_class, read_text, read_vision
from encoders.sources.source import Source
from encoders.sources.tower_weights import build_towers, build_vision
from encoders.weights import safetensors_file
from encoders.weights.files import Weights

CONFIG_FILE = "two_towers.json"
"""The EncoderConfig of both towers; their weights are open_clip's file."""
CAPTIONS = (
    "a red square on a blue background",
    "Two dogs and a cat play in the grass, while a small child laughs; the sky is grey.",
    "text",
)


def refuse(source: Source) -> None:
    """Raise before anything is written: ModelError if the source has no text tower that others can run, UsageError if
    open_clip, which has to prove it, is not installed."""
    if source.model is None or source.tokenizer is None:
        raise ModelError(
            "--with-text: this source has no text tower or no tokenizer that ours can represent: "
            + "; ".join(source.provenance["notes"])
            + "; export it without --with-text"
        )
    why = open_clip_export.why_not(source.tower, source.model.config.text)
    if why is not None:
        raise ModelError(f"--with-text: open_clip cannot run this source: {why}")
    if find_spec("open_clip") is None:
        raise UsageError(
            "--with-text is proved by open_clip, which is not installed; pip install 'encoder-swap[open-clip]'"
        )


def write(source: Source, expected: Expected, folder: Path) -> dict[str, Any]:
    """Add both towers to an exported folder and return how far each reader is from the source.

    Raises ParityError if open_clip or transformers computes something else than the source.
    """
    model, tokenizer, tower = source.model, source.tokenizer, source.tower
    assert model is not None  # refuse() saw to it
    assert tokenizer is not None
    text = model.config.text
    own_tokenizer = _write_tokenizer(tokenizer, text, folder)
    bos, eot = tokenizer.encode("", text.length)[:2]
    config = open_clip_export.model_config(tower, text, source.preprocess, eot, own_tokenizer)
    write_json(folder / open_clip_export.CONFIG_FILE, config)
    state = open_clip_export.state_dict(tower, model.text, model.logit_scale)
    safetensors_file.write(folder / open_clip_export.WEIGHTS_FILE, state, {})
    both = replace(model.config, vision=tower.config, preprocess=source.preprocess)
    write_json(folder / CONFIG_FILE, both.to_dict())

    rows = [tokenizer.encode(caption, text.length) for caption in CAPTIONS]
    ids = pad_texts(rows, text)  # (B,L)
    texts = source.reference_text(ids, [len(row) for row in rows])
    wanted = {"image": expected.float32[EMBEDDING], "text": texts}
    found = {"open_clip": _check_open_clip(folder, rows, ids, expected.pixels, wanted)}
    why = clip_model_export.why_not(tower.config, text)
    if why is None:
        _write_clip_model(folder, source, bos, eot)
        found["clip_model"] = _check_clip_model(folder, rows, ids, expected.pixels, wanted)
    return {**found, "bound": MAX_RELATIVE_ERROR, "no_clip_model_because": why}


def read(folder: Path) -> tuple[DualEncoder, CaptionTokenizer]:
    """Both towers, unfolded, of a folder exported --with-text, with their tokenizer, in float32 on the CPU.

    Raises ModelError if the folder holds no text tower or its files disagree.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ModelError(f"{folder} holds no {CONFIG_FILE}: it has no text tower; export the encoder again --with-text")
    config = EncoderConfig.read(folder / CONFIG_FILE)
    weights = Weights(folder / open_clip_export.WEIGHTS_FILE)
    state, vision = read_vision(weights, config.vision)
    text = read_text(weights, config.text)
    if isinstance(text, str):
        raise ModelError(f"{weights.file}: {text}; export the encoder again")
    tower, logit_scale = build_vision(state, vision, weights.file), weights.tensor("logit_scale")
    model = build_towers(tower, (text, config.text), logit_scale, config.preprocess, weights.file)
    return model, CaptionTokenizer.read(folder, config.text.kind)


def _write_tokenizer(tokenizer: CaptionTokenizer, text: TextConfig, folder: Path) -> bool:
    """tokenizer.json that frames texts by itself, and what transformers wants to know of it. Returns False if it is the
    vocabulary that open_clip has built in."""
    tokenizer.save(folder)
    file = folder / TOKENIZER_FILE
    backend = Tokenizer.from_file(str(file))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config["split_special_tokens"] = True  # a caption that spells one is text
    if text.kind == "bert":
        bos, eos, pad = (backend.id_to_token(i) for i in (BOS, EOS, PAD))
        config |= {"bos_token": bos, "eos_token": eos, "pad_token": pad, "cls_token": "[CLS]"}
    else:
        ends = [(token, backend.token_to_id(token)) for token in (START, END)]
        backend.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
        backend.save(str(file))
        config |= {"bos_token": START, "eos_token": END, "pad_token": END, "model_max_length": text.length}
    write_json(folder / "tokenizer_config.json", config)
    return text.kind == "bert" or not _is_openai_vocabulary(file)


def _is_openai_vocabulary(file: Path) -> bool:
    built_in = open_clip_class("tokenizer").SimpleTokenizer().encoder
    words: dict[str, int] = json.loads(file.read_text())["model"]["vocab"]
    return {word for word, i in words.items() if built_in.get(word) == i} >= built_in.keys() - {
        "<start_of_text>",
        "<end_of_text>",
    }


def _write_clip_model(folder: Path, source: Source, bos: int, eot: int) -> None:
    assert source.model is not None
    inside = folder / clip_model_export.FOLDER
    inside.mkdir()
    vision_config = json.loads((folder / "config.json").read_text())
    write_json(
        inside / "config.json", clip_model_export.model_config(vision_config, source.model.config.text, bos, eot)
    )
    for name in ("preprocessor_config.json", TOKENIZER_FILE, "tokenizer_config.json"):
        shutil.copy(folder / name, inside / name)
    state = clip_model_export.state_dict(
        load_file(folder / "model.safetensors"),
        load_file(folder / PROJECTION_FILE)[PROJECTION],
        source.model.text,
        source.model.logit_scale,
    )
    safetensors_file.write(inside / "model.safetensors", state, {})


def _check_open_clip(
    folder: Path, rows: list[list[int]], ids: Tensor, pixels: Tensor, wanted: dict[str, Tensor]
) -> dict[str, float]:
    where = f"local-dir:{folder}"
    loaded, _ = open_clip_class("create_model_from_pretrained")(where)
    _check_tokens("open_clip", open_clip_class("get_tokenizer")(where)(list(CAPTIONS)), rows)
    return _errors("open_clip", wanted, lambda: (loaded.eval().encode_image(pixels), loaded.encode_text(ids)))


def _check_clip_model(
    folder: Path, rows: list[list[int]], ids: Tensor, pixels: Tensor, wanted: dict[str, Tensor]
) -> dict[str, float]:
    loaded = load_strict(CLIPModel, folder / clip_model_export.FOLDER, torch.float32).eval()

    def embed() -> tuple[Tensor, Tensor]:
        output = loaded(input_ids=ids, pixel_values=pixels)  # whose embeddings are of length 1
        return output.image_embeds, output.text_embeds

    unit = {name: value / value.norm(dim=-1, keepdim=True) for name, value in wanted.items()}
    return _errors("CLIPModel", unit, embed)


def _check_tokens(reader: str, found: Tensor, rows: list[list[int]]) -> None:
    for caption, ids, row in zip(CAPTIONS, found.tolist(), rows, strict=True):
        if ids[: len(row) - 1] != row[:-1]:  # a class token stands in the last slot
            raise ParityError(f"{reader} tokenizes {caption!r} as {ids[: len(row)]}, the source as {row}")


def _errors(reader: str, wanted: dict[str, Tensor], embed: Callable[[], tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Largest absolute differences over the largest value. Raises ParityError above MAX_RELATIVE_ERROR."""
    with torch.inference_mode():
        found = dict(zip(("image", "text"), embed(), strict=True))
    errors = {name: ((found[name] - value).abs().max() / value.abs().max()).item() for name, value in wanted.items()}
    for name, error in errors.items():
        if not error <= MAX_RELATIVE_ERROR:
            raise ParityError(
                f"{reader} computes other {name} embeddings than the source: {error:.2g} of the largest value, allowed "
                f"is {MAX_RELATIVE_ERROR}"
            )
    return errors
