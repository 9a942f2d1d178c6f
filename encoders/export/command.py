"""`export-encoder SOURCE OUT`: an encoder from anywhere -> a plain `CLIPVisionModel` folder with proof that it computes
the same.

Writes config.json, model.safetensors (`vision_model.*` keys, which transformers 4 and 5 both read), the image
processor, what makes image embeddings of its output, parity.json and a model card; docs/encoders.md explains them.
"""

import argparse
import ctypes
import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encoders import manifest
from encoders.errors import UsageError, run_command
from encoders.publish import hub
from encoders.publish.publishable import LICENSE_ID

if TYPE_CHECKING:
    from encoders.config import PreprocessConfig, VisionConfig
    from encoders.export.fold import Fold
    from encoders.sources.source import Source
    from encoders.vision import VisionTower

WEIGHTS_FILE, PARITY_FILE, CARD_FILE = "model.safetensors", "parity.json", "README.md"
RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def parser() -> argparse.ArgumentParser:
    """The options of export-encoder."""
    options = argparse.ArgumentParser(
        prog="export-encoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = "an encoder run, a Hub id, a folder in the Hub's layout (open_clip or transformers), or a weights file"
    options.add_argument("source", metavar="SOURCE", help=source)
    options.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    options.add_argument("--overwrite", action="store_true", help="replace an encoder that OUT already holds")
    options.add_argument("--model-name", metavar="NAME", help="of a weights file: its open_clip model, as ViT-B-16")
    options.add_argument("--revision", metavar="COMMIT", help="of a Hub id: branch, tag or commit")
    options.add_argument("--image-size", type=int, metavar="N", help="fit the position table to N pixels, untrained")
    resize = "how a learned table is fitted: as open_clip does (default) or as transformers interpolates"
    options.add_argument("--resize", choices=("open_clip", "hf"), help=resize)
    text = "also write both towers for open_clip, and as a CLIPModel where the architecture allows"
    options.add_argument("--with-text", action="store_true", help=text)
    push = options.add_argument_group("publishing (docs/publishing.md)")
    push.add_argument("--push-to-hub", metavar="ORG/NAME", help="publish OUT there once it is written")
    push.add_argument("--public", action="store_true", help="make a new repository public")
    push.add_argument("--create-pr", action="store_true", help="as a pull request, a new one each time")
    push.add_argument("--license", metavar="ID", help="for the card, of a source that states none: apache-2.0, ...")
    push.add_argument("--dry-run", action="store_true", help="write OUT, but only list what would be published")
    return options


def main() -> None:
    """Export, then publish, as told by the command line."""
    asked = parser().parse_args()
    if asked.push_to_hub is None and (asked.public or asked.create_pr or asked.dry_run):
        raise UsageError("--public, --create-pr and --dry-run belong to --push-to-hub ORG/NAME")
    if asked.push_to_hub is not None:
        hub.check_name(asked.push_to_hub)  # now, not after the export
    export(
        asked.source,
        asked.out,
        overwrite=asked.overwrite,
        image_size=asked.image_size,
        resize=asked.resize,
        with_text=asked.with_text,
        model_name=asked.model_name,
        revision=asked.revision,
        license=asked.license,
    )
    if asked.push_to_hub is not None:
        hub.publish(asked.out, asked.push_to_hub, public=asked.public, dry_run=asked.dry_run, create_pr=asked.create_pr)


def export(
    source: str | Path,
    out: Path,
    *,
    overwrite: bool = False,
    image_size: int | None = None,
    resize: str | None = None,
    with_text: bool = False,
    model_name: str | None = None,
    revision: str | None = None,
    license: str | None = None,
) -> None:
    """Write the image tower of `source` to `out`; all of it or nothing. `license` is for a source that states none.

    Raises UsageError if `out` is taken or the options contradict each other, ModelError (or DataError, of a run) if the
    source is not what it claims or cannot be a CLIPVisionModel, ParityError if what was written does not compute what
    the source computes.
    """
    if resize is not None and image_size is None:
        raise UsageError("--resize belongs to --image-size; without it the position table stays as it is")
    if license is not None and not LICENSE_ID.fullmatch(license):
        raise UsageError(f"--license {license!r} is none of the Hub's names (apache-2.0, mit, llama3, other, ...)")
    manifest.refuse_to_clobber(out, "encoder", overwrite)
    from encoders.sources.source import open_source

    # Handed over without a name here, so that `_write` can let go of it.
    _write(
        _licensed(open_source(str(source), model_name, revision), license),
        out,
        overwrite,
        image_size,
        resize or "open_clip",
        with_text,
    )


def _licensed(source: "Source", license: str | None) -> "Source":
    if license is None:
        return source
    if (stated := source.provenance.get("license")) not in (None, "unknown"):
        raise UsageError(f"{source.provenance['source']} states the license {stated}, which stays; leave out --license")
    return replace(source, provenance={**source.provenance, "license": license})


def _write(source: "Source", out: Path, overwrite: bool, image_size: int | None, resize: str, with_text: bool) -> None:
    from encoders.export import card, parity, two_towers

    if with_text:
        two_towers.refuse(source)
    native = source.tower.config.grid
    if image_size is None or image_size == source.tower.config.image_size:
        expected, steps = parity.expect(source), {}
    else:
        expected, proof = parity.expect_resized(source, image_size, resize == "hf")
        steps = {"resize": _resize_facts(source.tower, resize, native), "source_before_resize": proof}
    tower, fold = source.tower, _fold(source.tower, expected.pixels)
    facts = encoder_facts(tower, source.preprocess, source.family, fold, steps.get("resize"))
    with manifest.create(out, "encoder", facts, source.parents, overwrite) as draft:
        write_folder(tower, source.preprocess, facts, source.provenance, fold, draft.path)
        if with_text:
            steps["two_towers"] = two_towers.write(source, expected, draft.path)
        provenance = source.provenance
        del source, tower  # the folder is loaded next: one copy of the weights at a time
        _return_freed_memory()
        certificate = {**parity.certify(expected, draft.path), **steps, "fold": facts["fold"]}
        manifest.write_json(draft.path / PARITY_FILE, certificate)
        card.write(draft.path, provenance, facts, certificate)
        draft.metrics["parity"] = certificate
    worst = max(layer["max_relative_error"] for layer in certificate["float32"]["layers"].values())
    print(
        f"wrote {out}: CLIPVisionModel at {facts['vision']['image_size']} px, parity {worst:.1e} "
        f"(bound {parity.MAX_RELATIVE_ERROR:.0e})" + (", folded: not for float16" if fold else "")
    )


def write_folder(
    tower: "VisionTower",
    preprocess: "PreprocessConfig",
    facts: dict[str, Any],
    provenance: dict[str, Any],
    fold: "Fold | None",
    folder: Path,
) -> None:
    """What transformers reads (config, weights, image processor) and what makes an image embedding of its output."""
    from encoders.export import image_head
    from encoders.export.fold import folded_state
    from encoders.weights import safetensors_file

    state = folded_state(tower, fold) if fold else tower.model.state_dict()
    # Written here and not by save_pretrained: transformers 5 drops the prefix, and 4.x then loads a random tower.
    weights = {f"vision_model.{name.removeprefix('vision_model.')}": value.float() for name, value in state.items()}
    origin = metadata(provenance)
    safetensors_file.write(folder / WEIGHTS_FILE, weights, origin)
    if facts["embed_dim"] is not None:
        projection = {image_head.PROJECTION: tower.projection.weight}
        safetensors_file.write(folder / image_head.PROJECTION_FILE, projection, origin)
    config = model_config(tower.config, facts["embed_dim"], folded=fold is not None)
    manifest.write_json(folder / "config.json", config)
    manifest.write_json(folder / "preprocessor_config.json", processor_config(preprocess, tower.config.image_size))
    manifest.write_json(folder / image_head.FACTS_FILE, facts)


def model_config(vision: "VisionConfig", embed_dim: int | None, folded: bool) -> dict[str, Any]:
    """config.json of a CLIPVisionModel: every value spelled out, since defaults differ and may change."""
    from encoders.vision import ACTIVATIONS

    config: dict[str, Any] = {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_width,
        "projection_dim": embed_dim or vision.width,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": ACTIVATIONS[vision.activation],
        "layer_norm_eps": vision.norm_eps,
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "dtype": "float32",
        "torch_dtype": "float32",  # transformers 4's name for it
    }
    return config | {"folded": True} if folded else config


def processor_config(preprocess: "PreprocessConfig", size: int) -> dict[str, Any]:
    """CLIPImageProcessor settings that repeat the source's evaluation transform."""
    square = {"height": size, "width": size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if preprocess.resize == "squash" else {"shortest_edge": size},
        "resample": RESAMPLE[preprocess.interpolation],
        "do_center_crop": True,  # of a squashed picture it takes all; LLaVA code reads crop_size
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def encoder_facts(
    tower: "VisionTower",
    preprocess: "PreprocessConfig",
    family: str,
    fold: "Fold | None",
    resize: dict[str, Any] | None,
) -> dict[str, Any]:
    """encoder.json, and the config in the manifest: the encoder as trained, before any fold."""
    from torch import nn

    return {
        "family": family,
        "embed_dim": tower.projection.out_features if isinstance(tower.projection, nn.Linear) else None,
        "vision": asdict(tower.config),
        "preprocess": asdict(preprocess),
        "folded": fold is not None,
        "fold": {**asdict(fold), "error": fold.error} if fold else None,
        "resize": resize,
    }


def metadata(provenance: dict[str, Any]) -> dict[str, str]:
    """What of the provenance goes into the safetensors headers, which hold strings only."""
    return {name: str(value) for name, value in provenance.items() if isinstance(value, str | int | float)}


def _fold(tower: "VisionTower", pixels: Any) -> "Fold | None":
    from encoders.export import fold

    if tower.config.pre_norm:
        return None
    return fold.choose(fold.largest_variance(tower, pixels), tower.config.norm_eps)


def _resize_facts(tower: "VisionTower", mode: str, native: int) -> dict[str, Any]:
    learned = tower.config.position_table == "learned"
    return {"mode": mode if learned else "regenerated", "from_grid": native, "to_grid": tower.config.grid}


def _return_freed_memory() -> None:
    """To the system: glibc would keep a tower's worth of it for itself, beside the one that is loaded next."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def cli() -> None:
    """Console entry point."""
    run_command(main)


if __name__ == "__main__":
    cli()
