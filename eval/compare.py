"""`compare-runs A B [C ...]`: did the swap help? Reads results folders, writes one page and the same as JSON.

Runs are paired question by question with the first one, the baseline. Uncertainty is a bootstrap over pictures:
questions about one picture stand or fall together, and all runs share each draw, so what they have in common cancels.
"""

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoders import manifest
from encoders.errors import DataError, UsageError, run_command
from eval.benchmarks import BENCHES, Bench, Columns, point, weighted_mean
from eval.bootstrap import Difference, Statistic, bootstrap, difference
from eval.results import Run, check_same_questions, load_picture, load_ranks, load_run

ENCODER_SETTINGS = re.compile(r"(model\.)?encoder(\.|$)")
ABSENT = "(not set)"
FLIPS_SHOWN = 8
TOO_FEW_RUNS = "nothing to compare: name at least two results folders, the baseline first"


@dataclass(frozen=True)
class Measure:
    """One metric: a score per run and a difference per run after the first. `ceiling` is a perfect run's score."""

    name: str
    percent: bool
    headline: bool
    ceiling: float
    scores: list[float]
    differences: list[Difference]


@dataclass(frozen=True)
class Flip:
    """A question that one of two runs answers correctly. `answers`: the baseline's, then the other run's."""

    index: int
    image_id: str
    category: str
    prompt: str
    target: str
    answers: tuple[str, str]
    gained: bool


@dataclass(frozen=True)
class Flips:
    """How many answers of one run went from wrong to right and back, and some of them drawn at random."""

    gained: int
    lost: int
    shown: list[Flip]


@dataclass(frozen=True)
class BenchComparison:
    """One benchmark; `empty` per run, `flips` per run after the first."""

    bench: str
    protocol: dict[str, Any]
    questions: int
    images: int
    full_questions: int
    empty: list[int]
    measures: list[Measure]
    flips: list[Flips]


@dataclass(frozen=True)
class RetrievalComparison:
    """Zero-shot retrieval of the encoders alone; `chance_r1` is R@1 of a random order."""

    queries: int
    chance_r1: float
    measures: list[Measure]


@dataclass(frozen=True)
class Setting:
    """A setting that is not equal in all runs; `encoder` marks those that describe the swap itself."""

    key: str
    values: list[Any]
    encoder: bool


@dataclass(frozen=True)
class Comparison:
    """Everything the report says; `pictures` (image_id -> JPEG) stays out of the JSON."""

    names: list[str]
    runs: list[dict[str, Any]]  # provenance
    benches: list[BenchComparison]
    retrieval: RetrievalComparison | None
    differing: list[Setting]
    shared: dict[str, Any]
    same_encoder: bool
    draws: int
    seed: int
    pictures: dict[str, bytes] = field(repr=False)


def compare(
    runs: Sequence[Run], encoders: Sequence[Path] = (), draws: int = 10_000, seed: int = 0, flips: int = FLIPS_SHOWN
) -> Comparison:
    """Compare every run with the first one.

    encoders: encoder-run folders in the order of the runs, for the retrieval section.
    Raises UsageError for fewer than two runs, DataError if the runs did not answer the same questions.
    """
    if len(runs) < 2:
        raise UsageError(TOO_FEW_RUNS)
    if encoders and len(encoders) != len(runs):
        raise UsageError(f"--encoders names {len(encoders)} encoder runs for {len(runs)} results; name one for each")
    check_same_questions(runs)
    benches = [_compare_bench(BENCHES[name], runs, draws, seed, flips) for name in runs[0].rows]
    shown = {flip.image_id for bench in benches for side in bench.flips for flip in side.shown}
    settings = [{**run.results["settings"], "encoder": run.results["encoder"]} for run in runs]
    differing, shared = compare_settings(settings)
    return Comparison(
        names=[run.name for run in runs],
        runs=[_provenance(run) for run in runs],
        benches=benches,
        retrieval=compare_retrieval(encoders, draws, seed) if encoders else None,
        differing=differing,
        shared=shared,
        same_encoder=len({run.results["encoder"]["fingerprint"] for run in runs}) == 1,
        draws=draws,
        seed=seed,
        pictures={image_id: load_picture(runs[0].path, image_id) for image_id in sorted(shown)},
    )


def compare_settings(settings: Sequence[Mapping[str, Any]]) -> tuple[list[Setting], dict[str, Any]]:
    """The settings that differ between runs, under dotted names, and those that all share."""
    flat = [dict(_flatten(one)) for one in settings]
    differing, shared = [], {}
    for key in sorted(set().union(*flat)):
        values = [one.get(key, ABSENT) for one in flat]
        if all(value == values[0] for value in values):
            shared[key] = values[0]
        else:
            differing.append(Setting(key, values, encoder=bool(ENCODER_SETTINGS.match(key))))
    return differing, shared


def compare_retrieval(paths: Sequence[Path], draws: int, seed: int) -> RetrievalComparison:
    """R@1/5/10 of encoder runs on the same held-out pairs, in both directions; the bootstrap resamples the pairs."""
    tables = [load_ranks(path) for path in paths]
    keys = sorted(tables[0][1])
    for path, (chance, ranks) in zip(paths[1:], tables[1:], strict=True):
        if ranks.keys() != tables[0][1].keys() or not math.isclose(chance, tables[0][0]):
            raise DataError(f"{paths[0]} and {path} were not scored on the same held-out pairs; score them on one set")
    hits = [np.array([ranks[key] for key in keys])[None] < np.array([1, 5, 10])[:, None, None] for _, ranks in tables]
    measures = []
    for side, direction in enumerate(("image to text", "text to image")):
        for at, k in enumerate((1, 5, 10)):
            statistics = [partial(weighted_mean, hit[at, :, side].astype(np.float64)) for hit in hits]  # hit (3, n, 2)
            scores, differences = _paired(statistics, np.arange(len(keys)), draws, seed)
            measures.append(Measure(f"{direction} R@{k}", True, k == 1, 1.0, scores, differences))
    return RetrievalComparison(len(keys), tables[0][0], measures)


def _compare_bench(bench: Bench, runs: Sequence[Run], draws: int, seed: int, shown: int) -> BenchComparison:
    order = sorted(runs[0].rows[bench.name])
    tables = [[run.rows[bench.name][index] for index in order] for run in runs]
    pictures, clusters = np.unique([row["image_id"] for row in tables[0]], return_inverse=True)
    columns = [Columns.of(table) for table in tables]
    perfect = point(bench, [{**row, "correct": 1.0, "prediction": row["target"]} for row in tables[0]])
    measures = []
    for name, highest in perfect.items():
        statistics = [partial(bench.metrics[name], column) for column in columns]
        scores, differences = _paired(statistics, clusters, draws, seed, name in bench.undirected)
        ceiling = 1.0 if bench.percent else highest  # MME's depends on the categories asked
        measures.append(Measure(name, bench.percent, name in bench.headline, ceiling, scores, differences))
    return BenchComparison(
        bench=bench.name,
        protocol={"task": bench.task, **bench.protocol, **runs[0].results["benches"][bench.name]["protocol"]},
        questions=len(order),
        images=len(pictures),
        full_questions=bench.questions,
        empty=[sum(bool(row["empty"]) for row in table) for table in tables],
        measures=measures,
        flips=[_flips(tables[0], table, shown, seed) for table in tables[1:]],
    )


def _paired(
    statistics: Sequence[Statistic], clusters: NDArray[np.int64], draws: int, seed: int, undirected: bool = False
) -> tuple[list[float], list[Difference]]:
    """The statistic of every run, and the difference of each run after the first to it."""
    scores = [float(statistic(np.ones((1, len(clusters))))[0]) for statistic in statistics]
    values = bootstrap(statistics, clusters, draws, seed)
    count = int(clusters.max()) + 1
    return scores, [
        difference(score - scores[0], value - values[0], count, undirected)
        for score, value in zip(scores[1:], values[1:], strict=True)
    ]


def _flips(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], shown: int, seed: int) -> Flips:
    """Answers that changed sides; of them, if there are enough, as many gains as losses, each of another picture."""
    changed = [
        Flip(
            index=old["index"],
            image_id=old["image_id"],
            category=str(old["category"]),
            prompt=str(old["prompt"]),
            target=str(old["target"]),
            answers=(str(old["answer"]), str(new["answer"])),
            gained=new["correct"] >= 0.5,
        )
        for old, new in zip(before, after, strict=True)
        if (old["correct"] >= 0.5) != (new["correct"] >= 0.5)
    ]
    order = [changed[at] for at in np.random.default_rng(seed).permutation(len(changed))]
    turn: Counter[str | bool] = Counter()
    keyed = []
    for flip in order:
        keyed.append((turn[flip.image_id], turn[flip.gained], flip))
        turn.update([flip.image_id, flip.gained])
    chosen = [flip for _, _, flip in sorted(keyed, key=lambda item: item[:2])[:shown]]
    gained = sum(flip.gained for flip in changed)
    return Flips(gained, len(changed) - gained, sorted(chosen, key=lambda flip: (not flip.gained, flip.index)))


def _provenance(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "path": str(run.path),
        "created": run.manifest.created,
        "results": run.manifest.fingerprint,
        "model": run.results["model"],
        "encoder": run.results["encoder"],
    }


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, compare, write report.html and report.json, print the table."""
    parser = argparse.ArgumentParser(prog="compare-runs", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="results folders, the baseline first")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="the page; JSON goes beside it")
    parser.add_argument("--name", nargs="+", help="what to call the runs in the report (default: the folders' names)")
    parser.add_argument("--encoders", nargs="+", type=Path, default=[], metavar="ENCODER_RUN", help="adds retrieval")
    parser.add_argument("--draws", type=int, default=10_000, help="bootstrap draws (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap and the gallery (default: 0)")
    args = parser.parse_args(argv)
    if len(args.runs) < 2:
        raise UsageError(TOO_FEW_RUNS)
    if args.out.suffix != ".html":
        raise UsageError(f"--out {args.out} must end in .html; the JSON is written beside it")
    if args.draws < 100:
        raise UsageError(f"--draws {args.draws} is too few for a 95 % interval; use at least 100")
    names = args.name or _names(args.runs)
    if len(names) != len(args.runs) or len(set(names)) != len(names):
        raise UsageError(f"--name gives {len(set(names))} different names to {len(args.runs)} runs; name each once")
    runs = [load_run(path, name) for path, name in zip(args.runs, names, strict=True)]
    comparison = compare(runs, args.encoders, args.draws, args.seed)

    from eval.report import render
    from eval.summary import show

    page = render(comparison)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_json(args.out.with_suffix(".json"), to_json(comparison))
    args.out.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    show(comparison, args.out)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON, without the pictures."""
    content = asdict(replace(comparison, pictures={}))
    del content["pictures"]
    return content


def cli() -> None:
    """Console entry point."""
    run_command(main)


def _names(paths: Sequence[Path]) -> list[str]:
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


if __name__ == "__main__":
    cli()
