"""What is known of the encoders alone, to stand beside the scores of the LLaVAs: retrieval, eval-encoder's figures, and
whether an exported encoder computes what its source computes (parity.json)."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoders import manifest
from encoders.errors import DataError
from encoders.weights.headers import read_header
from eval.comparing.results import Arm, read_jsonl
from eval.zero_shot.measures import MEASURES

PARITY = "parity.json"
LAYER = "hidden_states[-2]"  # what a LLaVA reads


@dataclass(frozen=True)
class Parity:
    """The certificate of an arm's exported encoder, or why there is none."""

    source: str
    missing: str = ""
    origin: str = ""  # of published weights: the repository, and the commit that was taken
    relative_error: float | None = None  # largest of the layer that a LLaVA reads, in float32
    bound: float | None = None
    cosine: float | None = None  # smallest


@dataclass(frozen=True)
class ZeroShot:
    """A figure of eval-encoder: one set, one measure, a score per arm, and what guessing gives."""

    name: str
    measure: str
    pictures: int
    chance: float | None
    scores: list[float]


@dataclass(frozen=True)
class Ranks:
    """Held-out retrieval of an encoder run: chance at R@1, and the ranks (n, 2) of image to text, text to image."""

    chance: float
    keys: list[str]
    ranks: NDArray[np.int64]


def read_ranks(paths: Sequence[Path]) -> list[Ranks] | None:
    """The ranks of encoder runs on the same held-out pairs; None if one of them is an exported encoder.

    Raises DataError if runs were scored on different pairs or not at all, or if something else is named.
    """
    kinds = [manifest.read(path).kind for path in paths]
    for path, kind in zip(paths, kinds, strict=True):
        if kind not in ("encoder", "encoder-run"):
            raise DataError(f"{path} holds a {kind!r} artifact where 'encoder-run' or 'encoder' is needed")
    if "encoder" in kinds:
        return None
    tables = [_ranks(path) for path in paths]
    for path, table in zip(paths[1:], tables[1:], strict=True):
        if table.keys != tables[0].keys or not math.isclose(table.chance, tables[0].chance):
            raise DataError(f"{paths[0]} and {path} were not scored on the same held-out pairs; score them on one set")
    return tables


def _ranks(path: Path) -> Ranks:
    seal = manifest.read(path, "encoder-run")
    file = path / "retrieval.jsonl"
    if "retrieval" not in seal.metrics or not file.is_file():
        raise DataError(f"{path} has no retrieval scores; train it with held-out scenes")
    rows = {row["key"]: row for _, row in read_jsonl(file, ("key", "i2t_rank", "t2i_rank"))}
    if len(rows) != seal.metrics["retrieval"]["queries"]:
        raise DataError(f"{file} has {len(rows)} of {seal.metrics['retrieval']['queries']} pairs; score the run again")
    keys = sorted(rows)
    ranks = np.array([(rows[key]["i2t_rank"], rows[key]["t2i_rank"]) for key in keys])
    return Ranks(float(seal.metrics["retrieval"]["chance_r1"]), keys, ranks)


def read_zero_shot(files: Sequence[Path], arms: Sequence[Arm], exported: Sequence[Path | None]) -> list[ZeroShot]:
    """The figures of eval-encoder's result files, one per arm. Raises DataError unless all are of the same sets, or if
    one is of another arm's encoder."""
    what = "a result file of eval-encoder (--out)"
    contents = [_read_json(file, what) for file in files]
    for file, content in zip(files, contents, strict=True):
        if lacking := [key for key in ("run", "sets") if key not in content]:
            raise DataError(f"{file} is not {what}: it has no {' and no '.join(lacking)}")
    known = [_fingerprints(arm, folder) for arm, folder in zip(arms, exported, strict=True)]
    for file, content, arm, own in zip(files, contents, arms, known, strict=True):
        scored = content["run"]["fingerprint"]
        if theirs := [other.name for other, of_other in zip(arms, known, strict=True) if scored in of_other - own]:
            raise DataError(
                f"{file} is of the encoder of {theirs[0]}, not of {arm.name}; name the files in the order of the arms"
            )
        described = [(one["set"], one["sizes"], one["protocol"]) for one in content["sets"]]
        if described != [(one["set"], one["sizes"], one["protocol"]) for one in contents[0]["sets"]]:
            raise DataError(
                f"{files[0]} and {file} are not of the same sets; run eval-encoder on both with one command"
            )
    figures = []
    for entries in zip(*(content["sets"] for content in contents), strict=True):
        for key, (label, chance) in MEASURES.items():
            if key in entries[0]["metrics"]:
                figures.append(
                    ZeroShot(
                        name=entries[0]["name"],
                        measure=label,
                        pictures=entries[0]["sizes"]["pictures"],
                        chance=entries[0]["metrics"][chance] if chance is not None else None,
                        scores=[entry["metrics"][key] for entry in entries],
                    )
                )
    return figures


def _fingerprints(arm: Arm, exported: Path | None) -> set[str]:
    """What an arm's encoder may have been scored as: the folder that its LLaVAs were made from, or the run before."""
    made_from = [run.results["settings"]["model"].get("encoder") for run in arm.runs]
    origin = manifest.read(exported).parents.get("run") if exported is not None else None
    return {one["fingerprint"] for one in (*made_from, vars(origin) if origin is not None else None) if one is not None}


def encoder_folder(arm: Arm, named: Path | None) -> Path | None:
    """The exported folder of an arm's encoder: as named, or where the LLaVA says it came from, if it is still there."""
    if named is not None and manifest.read(named).kind == "encoder":
        return named
    made_from = arm.runs[0].results["settings"]["model"].get("encoder")
    if made_from is None:
        return None
    # Its path may be relative to where the LLaVA was trained: somewhere above the LLaVA, as a rule.
    model = Path(arm.runs[0].results["model"]["path"])
    for start in (Path(), *model.parents):
        path = start / made_from["path"]
        if (path / manifest.MANIFEST).is_file() and manifest.fingerprint(path) == made_from["fingerprint"]:
            return path
    return None


def check_origin(named: Sequence[Path], exported: Sequence[Path | None]) -> None:
    """Raise DataError if a named encoder run is not the one that its arm's encoder was exported from."""
    for path, folder in zip(named, exported, strict=bool(named)):
        if folder is None or manifest.read(path).kind != "encoder-run":
            continue
        origin = manifest.read(folder).parents.get("run")
        if origin is not None and origin.fingerprint != manifest.fingerprint(path):
            raise DataError(
                f"{path} is not the run that {folder} was exported from ({origin.path}); name the encoders in the "
                "order of the arms"
            )


def read_parity(arm: Arm, folder: Path | None) -> Parity:
    """The certificate of the encoder that an arm's LLaVA was made from. Raises DataError if it is damaged."""
    if folder is None:
        return Parity("", "the exported encoder is not where the LLaVA says it came from; name it with --encoders")
    made_from = arm.runs[0].results["settings"]["model"].get("encoder")
    if made_from is None:
        return Parity("", "the LLaVA does not say which encoder it was made from")
    if manifest.fingerprint(folder) != made_from["fingerprint"]:
        raise DataError(f"{folder} is not the encoder that {arm.runs[0].results['model']['path']} was made from")
    if not (folder / PARITY).is_file():
        return Parity(str(folder), f"it holds no {PARITY}")
    content = _read_json(folder / PARITY, "a parity certificate")["float32"]
    layer = content["layers"][LAYER]
    weights = folder / "model.safetensors"
    told = read_header(weights).metadata if weights.is_file() else {}
    return Parity(
        source=str(folder),
        origin=f"{told['source']} at {told['commit']}" if "commit" in told else "",
        relative_error=layer["max_relative_error"],
        bound=content["bound"]["max_relative_error"],
        cosine=layer["min_cosine"],
    )


def _read_json(file: Path, what: str) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file} cannot be read as {what} ({error})") from error
