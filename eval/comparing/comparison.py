"""What `compare-runs` works out: scores, paired differences with intervals, what flipped, what differs in the settings.

Arms are paired question by question with the first one, the baseline. An arm's score is the mean over its seeds.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from encoders.errors import UsageError
from eval.benches.benchmarks import Bench
from eval.benches.metrics import weighted_mean
from eval.comparing.bootstrap import Design
from eval.comparing.encoder_figures import (
    Parity,
    Ranks,
    ZeroShot,
    check_origin,
    encoder_folder,
    read_parity,
    read_ranks,
    read_zero_shot,
)
from eval.comparing.flips import FLIPS_SHOWN, Flips, choose_flips
from eval.comparing.measures import Measure, Subtask, measures_of, paired, picture_of, subtasks_of, verdict_of
from eval.comparing.published import Published, published_for
from eval.comparing.results import Arm, Run, check_comparable, load_picture
from eval.comparing.settings import Setting, check_seeds, check_settings, compare_settings

SPENT = ("seconds_encode", "seconds_answer", "seconds_score", "prompt_tokens", "new_tokens", "answers_reused")
TOO_FEW_RUNS = "nothing to compare: name at least two results folders, the baseline first"


@dataclass(frozen=True)
class Cost:
    """What a benchmark took: per arm the mean over its seeds; memory is the highest.

    `answers_reused` came from an earlier, interrupted evaluation: their time is not in the seconds.
    """

    seconds_encode: float
    seconds_answer: float
    seconds_score: float
    prompt_tokens: float
    new_tokens: float
    answers_reused: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class BenchComparison:
    """One benchmark. Counts are sums over an arm's seeds; `flips` and `verdicts` are of the arms after the first.

    `points` are further figures that lmms-eval printed (per arm and seed) and that no interval can be given for.
    """

    bench: str
    protocol: dict[str, Any]
    dataset: Any
    questions: int
    images: int
    full_questions: int  # 0: not known
    empty: list[int]
    unparsed: list[int]
    failed: list[int]
    measures: list[Measure]
    subtasks: list[Subtask]
    verdicts: list[str]  # better | worse | mixed | differs | within noise | few images
    points: dict[str, list[list[float | None]]]
    flips: list[Flips]
    costs: list[Cost]
    published: list[Published]


@dataclass(frozen=True)
class RetrievalComparison:
    """Zero-shot retrieval of the encoders alone; `chance_r1` is R@1 of a random order."""

    queries: int
    chance_r1: float
    measures: list[Measure]


@dataclass(frozen=True)
class Comparison:
    """Everything the report says; `pictures` (image_id -> JPEG) stays out of the JSON.

    `seeds` is the number of runs of each arm; `allowed` says that other settings differ and were let pass.
    """

    names: list[str]
    seeds: list[int]
    runs: list[dict[str, Any]]  # provenance
    benches: list[BenchComparison]
    retrieval: RetrievalComparison | None
    zero_shot: list[ZeroShot]
    parity: list[Parity]
    differing: list[Setting]
    shared: dict[str, Any]
    same_encoder: bool
    allowed: bool
    draws: int
    seed: int
    pictures: dict[str, bytes] = field(repr=False)


def compare(
    arms: Sequence[Arm],
    encoders: Sequence[Path] = (),
    encoder_scores: Sequence[Path] = (),
    draws: int = 10_000,
    seed: int = 0,
    flips: int = FLIPS_SHOWN,
    allow_differences: bool = False,
) -> Comparison:
    """Compare every arm with the first one.

    encoders: encoder runs or exported encoders in the order of the arms; encoder_scores: files of eval-encoder.
    Raises UsageError for fewer than two arms, DataError if the runs do not compare or, unless `allow_differences`, were
    made under settings that differ besides the encoder.
    """
    if len(arms) < 2:
        raise UsageError(TOO_FEW_RUNS)
    for option, given in (("--encoders", encoders), ("--encoder-scores", encoder_scores)):
        if given and len(given) != len(arms):
            raise UsageError(f"{option} names {len(given)} for {len(arms)} arms; name one for each")
    runs = [run for arm in arms for run in arm.runs]
    check_comparable(runs)
    settings = [[{**run.results["settings"], "encoder": run.results["encoder"]} for run in arm.runs] for arm in arms]
    for arm, of_arm in zip(arms, settings, strict=True):
        check_seeds(of_arm, arm.name)
    differing, shared = compare_settings(settings)
    if not allow_differences:
        check_settings(differing, [arm.name for arm in arms])
    benches = [_compare_bench(name, arms, draws, seed, flips) for name in runs[0].rows]
    shown = {flip.image_id for bench in benches for side in bench.flips for flip in side.shown if flip.image_id}
    ranks = read_ranks(encoders) if encoders else None
    named_encoders: Sequence[Path | None] = encoders or [None for _ in arms]
    exported = [encoder_folder(arm, named) for arm, named in zip(arms, named_encoders, strict=True)]
    check_origin(encoders, exported)
    return Comparison(
        names=[arm.name for arm in arms],
        seeds=[len(arm.runs) for arm in arms],
        runs=[_provenance(run) for run in runs],
        benches=benches,
        retrieval=compare_retrieval(ranks, draws, seed) if ranks is not None else None,
        zero_shot=read_zero_shot(encoder_scores, arms, exported) if encoder_scores else [],
        parity=[read_parity(arm, folder) for arm, folder in zip(arms, exported, strict=True)],
        differing=differing,
        shared=shared,
        same_encoder=len({run.results["encoder"]["fingerprint"] for run in runs}) == 1,
        allowed=any(setting.role == "other" for setting in differing),
        draws=draws,
        seed=seed,
        pictures={image_id: load_picture(runs[0].path, image_id) for image_id in sorted(shown)},
    )


def compare_retrieval(tables: Sequence[Ranks], draws: int, seed: int) -> RetrievalComparison:
    """R@1/5/10 of encoder runs on the same held-out pairs, in both directions; the bootstrap resamples the pairs."""
    count = len(tables[0].keys)
    hits = [table.ranks[None] < np.array([1, 5, 10])[:, None, None] for table in tables]  # (3, n, 2)
    arms = {
        f"{direction} R@{k}": [[partial(weighted_mean, hit[at, :, side].astype(np.float64))] for hit in hits]
        for side, direction in enumerate(("image to text", "text to image"))
        for at, k in enumerate((1, 5, 10))
    }
    design = Design(np.arange(count), np.zeros(count, dtype=np.int64))
    measures = [
        Measure(name, True, name.endswith("R@1"), 1.0, *sampled)
        for name, sampled in paired(arms, design, draws, seed).items()
    ]
    return RetrievalComparison(count, tables[0].chance, measures)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON, without the pictures."""
    content = asdict(replace(comparison, pictures={}))
    del content["pictures"]
    return content


def _compare_bench(name: str, arms: Sequence[Arm], draws: int, seed: int, shown: int) -> BenchComparison:
    first = arms[0].runs[0]
    bench, entry = first.bench(name), first.results["benches"][name]
    order = sorted(first.rows[name])
    tables = [[[run.rows[name][index] for index in order] for run in arm.runs] for arm in arms]
    measures = measures_of(bench, tables, draws, seed)
    return BenchComparison(
        bench=name,
        protocol={"task": bench.task, **entry["protocol"]},
        dataset=entry.get("dataset"),
        questions=len(order),
        images=len({picture_of(row) for row in tables[0][0]}),
        full_questions=bench.questions,
        empty=[sum(bool(row["empty"]) for table in of_arm for row in table) for of_arm in tables],
        unparsed=[sum(bool(row["unparsed"]) for table in of_arm for row in table) for of_arm in tables],
        failed=[sum(len(run.results["benches"][name]["failed"]) for run in arm.runs) for arm in arms],
        measures=measures,
        subtasks=subtasks_of(bench, tables, draws, seed),
        verdicts=[verdict_of(measures, arm) for arm in range(1, len(arms))],
        points=_points(bench, name, arms),
        flips=[choose_flips(tables[0][0], of_arm[0], shown, seed) for of_arm in tables[1:]],
        costs=[_cost(name, arm) for arm in arms],
        published=published_for(name),
    )


def _points(bench: Bench, name: str, arms: Sequence[Arm]) -> dict[str, list[list[float | None]]]:
    printed = [[run.results["benches"][name]["metrics"] for run in arm.runs] for arm in arms]
    further = [key for key in printed[0][0] if key not in bench.metrics]
    return {key: [[one.get(key) for one in of_arm] for of_arm in printed] for key in further}


def _cost(name: str, arm: Arm) -> Cost:
    costs = [run.results["benches"][name]["cost"] for run in arm.runs]
    return Cost(
        **{key: float(np.mean([cost[key] for cost in costs])) for key in SPENT},
        peak_memory_bytes=max(cost["peak_memory_bytes"] for cost in costs),
    )


def _provenance(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "path": str(run.path),
        "created": run.manifest.created,
        "results": run.manifest.fingerprint,
        "model": run.results["model"],
        "encoder": run.results["encoder"],
        "training_recorded": bool(run.results["settings"]["model"]),
        "made_from": run.results["settings"]["model"].get("encoder", {}).get("fingerprint"),
    }
