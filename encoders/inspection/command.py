"""`inspect-encoder PATH`: what an encoder is, from its configs and the header of its weights, in well under a second.

Reads folders of transformers (CLIPVisionModel, CLIPModel, LLaVA), of open_clip and of our runs, and single weights
files. Nothing is loaded, run or guessed: what no file states is "not stated". `--full` also reads every value.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from encoders.errors import ModelError, run_command
from encoders.inspection.layouts import Tower, find_tower
from encoders.inspection.loads_on import loads_on
from encoders.inspection.stated import TRANSFORMERS_WEIGHTS, Stated, read_configs
from encoders.sources.open_clip_config import OPEN_CLIP_WEIGHTS
from encoders.weights.headers import Header, read_header
from encoders.weights.values import is_folded, non_finite

WEIGHTS = (*TRANSFORMERS_WEIGHTS, *OPEN_CLIP_WEIGHTS)
NOT_STATED = "not stated"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Description:
    """An image tower in words and numbers; None where no file of the encoder states it."""

    family: str
    """What the config says it is; "weights only" without a config."""
    weights: str
    parameters: int
    """Of the image tower."""
    image_size: int | None
    patch_size: int
    layers: int
    width: int
    heads: int | None
    mlp_width: int | None
    position_table: str
    activation: str | None
    norm_eps: float | None
    norm_before_blocks: str
    pooling: str | None
    key_layout: str
    dtype: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    resize: str | None
    finite: str
    loads_on: str
    problems: tuple[str, ...]
    """What is wrong with it; empty if nothing was found."""


def cli() -> None:
    """Console entry point."""
    parser = argparse.ArgumentParser(prog="inspect-encoder", description=__doc__)
    parser.add_argument("path", type=Path, metavar="PATH", help="a folder, or a weights file")
    parser.add_argument(
        "--diff", type=Path, metavar="OTHER", help="line it up with another encoder; exit 1 if they differ"
    )
    parser.add_argument("--full", action="store_true", help="also read every value: NaN and Inf are counted")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    run_command(lambda: _print(arguments.path, arguments.diff, arguments.full, arguments.json))


def _print(path: Path, other: Path | None, full: bool, as_json: bool) -> None:
    described = [describe(each, full) for each in (path, other) if each is not None]
    if as_json:
        shown = [asdict(each) for each in described]
        print(json.dumps(shown[0] if other is None else shown, indent=2))
    elif other is None:
        print(table([path.resolve().name], described))
    else:
        print(table([path.resolve().name, other.resolve().name], described))
    if other is not None and differences(*described):
        raise SystemExit(1)


def describe(path: Path, full: bool = False) -> Description:
    """Describe the image tower in a folder or weights file; `full` also looks for values that are not finite.

    Raises ModelError if there are no weights, if they are damaged or hold code, or if no image tower of CLIP's kind is
    among them.
    """
    file = _weights_file(path)
    header = read_header(file)
    tower = find_tower(header.tensors)
    if tower is None:
        some = ", ".join(sorted(header.tensors)[:3])
        raise ModelError(
            f"{file} holds no ViT image tower of CLIP, open_clip or a run of ours (of {len(header.tensors)} tensors "
            f"{some}, ...); towers of other architectures (ResNet, timm, SigLIP) are not described"
        )
    stated = read_configs(path if path.is_dir() else path.parent, file)
    problems = _problems(stated, tower)
    versions = loads_on(stated.family, tower, header.metadata, file, problems)
    bad = non_finite(tower.tensors) if full else {}
    if bad:
        problems += tuple(f"{count:,} values of {name} are not finite" for name, count in bad.items())
    return Description(
        family=stated.family,
        weights=f"{file.name}, {len(header.tensors)} tensors, {_bytes(header) / 2**20:,.1f} MiB",
        parameters=sum(tensor.count for tensor in tower.tensors.values()),
        image_size=stated.image_size,
        patch_size=tower.patch_size,
        layers=tower.layers,
        width=tower.width,
        heads=stated.heads,
        mlp_width=tower.mlp_width,
        position_table=_position_table(tower),
        activation=stated.activation,
        norm_eps=stated.norm_eps,
        norm_before_blocks=_norm_before_blocks(stated, tower),
        pooling=stated.pooling,
        key_layout=tower.layout.title,
        dtype=_dtypes(tower),
        mean=stated.mean,
        std=stated.std,
        resize=stated.resize,
        finite=("yes" if not bad else "NO") if full else "not read (--full)",
        loads_on=versions,
        problems=problems,
    )


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        hint = (
            f"; for a repository on the Hub: hf download {path} --local-dir FOLDER"
            if HUB_ID.fullmatch(str(path))
            else ""
        )
        raise ModelError(f"{path} does not exist{hint}")
    found = [path / name for name in WEIGHTS if (path / name).is_file()]
    if not found:
        raise ModelError(f"{path} holds none of {', '.join(WEIGHTS)}; name the weights file itself")
    return found[0]


def _problems(stated: Stated, tower: Tower) -> tuple[str, ...]:
    """What disagrees between the configs and the weights, or within one of them."""
    problems = [stated.refusal] if stated.refusal else []
    if tower.missing:
        problems.append(f"{len(tower.missing)} tensors are missing ({', '.join(tower.missing[:3])})")
    if tower.misshapen:
        others = f" and {len(tower.misshapen) - 1} more" if len(tower.misshapen) > 1 else ""
        problems.append(f"{tower.misshapen[0]}{others}")
    if _is_folded(stated, tower) and any(tensor.dtype == "F16" for tensor in tower.tensors.values()):
        problems.append("it is folded and stored in float16, below whose range its patch kernel is: outputs are wrong")
    if not tower.class_token:
        problems.append("no class token, which CLIPVisionModel always has")
    for name in ("width", "layers", "patch_size", "mlp_width"):
        said, found = getattr(stated, name), getattr(tower, name)
        if said is not None and found is not None and said != found:
            problems.append(f"the config says {name} {said}, the weights have {found}")
    if stated.image_size is not None and tower.positions is not None:
        side = stated.image_size // tower.patch_size
        if tower.positions != 1 + side * side:
            problems.append(
                f"image_size {stated.image_size} needs a position table of {1 + side * side} rows, the weights have "
                f"{tower.positions}" + (f" ({tower.grid * tower.patch_size} px)" if tower.grid else "")
            )
    if stated.pre_norm is not None and stated.pre_norm != tower.pre_norm:
        there = "has one" if tower.pre_norm else "has none"
        problems.append(
            f"the config {'needs' if stated.pre_norm else 'excludes'} a norm before the blocks, the file {there}"
        )
    taken = stated.image_size or (tower.grid * tower.patch_size if tower.grid else None)
    if stated.pictures is not None and taken is not None and stated.pictures != (taken, taken):
        height, width = stated.pictures
        problems.append(f"the image processor gives {height} x {width} px, the tower takes {taken} x {taken}")
    if stated.uneven:
        problems.append("the image processor gives pictures of any shape (no center crop), the tower takes squares")
    return tuple(problems)


def _position_table(tower: Tower) -> str:
    if tower.positions is None:
        return "none"
    grid = f"class + {tower.grid} x {tower.grid} patches" if tower.grid else "not a class position and a square"
    return f"{tower.positions} rows: {grid}"


def _norm_before_blocks(stated: Stated, tower: Tower) -> str:
    if not tower.pre_norm:
        return "no"
    return "folded away (never train it further; float16 fails)" if _is_folded(stated, tower) else "yes"


def _is_folded(stated: Stated, tower: Tower) -> bool:
    """By the config, as a float16 copy has lost the constant, or by the norm's own values."""
    name = tower.layout.names["before"]
    parts = [tower.tensors.get(f"{name}.{part}") for part in ("weight", "bias")]
    if not all(part is not None and part.shape == (tower.width,) for part in parts):
        return False
    return bool(stated.folded) or is_folded(*(part for part in parts if part is not None))


def _dtypes(tower: Tower) -> str:
    counts = Counter(tensor.dtype for tensor in tower.tensors.values())
    return ", ".join(kind if len(counts) == 1 else f"{count} x {kind}" for kind, count in counts.most_common())


def _bytes(header: Header) -> int:
    return sum(tensor.size for tensor in header.tensors.values())


def differences(one: Description, other: Description) -> list[str]:
    """The fields in which two encoders differ, what their files are called aside."""
    return [
        f.name for f in fields(Description) if f.name != "weights" and getattr(one, f.name) != getattr(other, f.name)
    ]


def table(titles: Sequence[str], described: Sequence[Description]) -> str:
    """One line per field and one column per encoder; of two, lines that differ are marked."""
    differ = differences(*described) if len(described) == 2 else []
    rows = [["", *map(_printable, titles)]]
    for entry in fields(Description):
        marked = ("* " if entry.name in differ else "  ") if len(described) == 2 else ""
        rows.append([marked + entry.name.replace("_", " "), *(_shown(getattr(each, entry.name)) for each in described)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _shown(value: Any) -> str:
    if value is None:
        return NOT_STATED
    if isinstance(value, tuple):
        return "; ".join(_printable(str(each)) for each in value) or "none found"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else _printable(str(value))


def _printable(text: str) -> str:
    """A file's words must not steer the terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


if __name__ == "__main__":
    cli()
