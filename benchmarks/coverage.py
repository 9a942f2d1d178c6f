"""Do the 95 % intervals of compare-runs hold what they say? Simulated swaps with the structure of POPE, GQA and MME.

Both models answer a question right when skill + what a picture and a question do to all models + what they do to this
model + noise is above zero, all normal: so the true difference is known. New pictures are drawn for every swap.

    python benchmarks/coverage.py [--swaps 2000]
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.comparing.bootstrap import Design, Floats, Sample, bootstrap, difference

BATCH = 250  # swaps whose models share the draws of pictures
PICTURE = 0.8  # spread of what a picture does to a model's answers, beside a spread of 1 between its questions
SHARED = 0.7  # share of the variance that is common to all models
SKILL, GAIN = 0.5, 0.06
MME_PICTURES = {
    "existence": 30,
    "count": 30,
    "position": 30,
    "color": 30,
    "posters": 147,
    "celebrity": 170,
    "scene": 200,
    "landmark": 200,
    "artwork": 200,
    "OCR": 20,
    "commonsense_reasoning": 70,
    "numerical_calculation": 20,
    "text_translation": 20,
    "code_reasoning": 20,
}
PERCEPTION = 10  # the first of them
Sums = dict[str, Floats]  # what a picture adds to a metric's sums, (models, pictures) each
Metric = Callable[[Sums, Floats], Floats]  # weights (draws, pictures) -> (models, draws)


@dataclass(frozen=True)
class Arms:
    """Swaps x (arm, seed) models, and their true differences (swaps,) by metric."""

    skills: Floats  # (swaps, 2, seeds)
    luck: float  # spread of the skill over seeds


def latent(rng: np.random.Generator, skills: Floats, pictures: int, questions: int) -> NDArray[np.bool_]:
    """Which answers are right: (swaps, 2, seeds, pictures, questions)."""
    swaps, arms, seeds = skills.shape
    one, each = (swaps, 1, 1, pictures), (swaps, arms, seeds, pictures)
    own = (1 - SHARED) ** 0.5
    value = own * rng.standard_normal((*each, questions), dtype=np.float32)
    value += SHARED**0.5 * rng.standard_normal((*one, questions), dtype=np.float32)
    of_picture = SHARED**0.5 * rng.standard_normal(one, dtype=np.float32)
    of_picture = of_picture + own * rng.standard_normal(each, dtype=np.float32)
    value += PICTURE * of_picture[..., None]
    return value + skills[..., None, None].astype(np.float32) > 0


def chance(skill: float, luck: float = 0.0) -> float:
    """The probability that an answer is right."""
    return NormalDist().cdf(skill / (1 + PICTURE**2 + luck**2) ** 0.5)


def both(skill: float) -> float:
    """The probability that both answers on a picture are right."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    right = np.array([NormalDist().cdf(skill + PICTURE * node) for node in nodes])
    return float((weights * right**2).sum() / weights.sum())


def pope(rng: np.random.Generator, arms: Arms) -> tuple[Sums, Design]:
    """500 pictures, 18 questions each: 3 yes and 3 no in each of three splits, which share the pictures."""
    right = latent(rng, arms.skills, 500, 18)
    yes, no = right[..., :9], right[..., 9:]
    hits, missed, false = yes.sum(-1), (~yes).sum(-1), (~no).sum(-1)
    return {"hits": hits, "missed": missed, "false": false}, _one_stratum(500)


def gqa(rng: np.random.Generator, arms: Arms) -> tuple[Sums, Design]:
    """398 pictures, 1 to 120 questions each, 31.6 in the mean."""
    counts = np.clip(rng.gamma(2.2, 14.6, (len(arms.skills), 1, 1, 398)).round(), 1, 120)
    right = latent(rng, arms.skills, 398, 120)
    right &= np.arange(120) < counts[..., None]
    return {"right": right.sum(-1), "asked": np.broadcast_to(counts, right.shape[:-1])}, _one_stratum(398)


def mme(rng: np.random.Generator, arms: Arms) -> tuple[Sums, Design]:
    """1,187 pictures in 14 categories, a yes and a no question each."""
    right = latent(rng, arms.skills, sum(MME_PICTURES.values()), 2).sum(-1)
    return {"score": 50 * right + 100 * (right == 2)}, Design.of(*_mme_pictures())


def _mme_pictures() -> tuple[list[str], list[str]]:
    categories = [category for category, count in MME_PICTURES.items() for _ in range(count)]
    return [f"{at:06}" for at in range(len(categories))], categories


def _one_stratum(pictures: int) -> Design:
    return Design(np.arange(pictures), np.zeros(pictures, dtype=np.int64))


def accuracy(sums: Sums, weights: Floats) -> Floats:
    """Of POPE: right answers of 18 a picture."""
    right = sums["hits"] + 9 - sums["false"]
    return (right @ weights.T) / (18 * weights.sum(axis=1))


def f1(sums: Sums, weights: Floats) -> Floats:
    """2 TP / (2 TP + FN + FP)."""
    hits, missed, false = (sums[name] @ weights.T for name in ("hits", "missed", "false"))
    return 2 * hits / (2 * hits + missed + false)


def yes_ratio(sums: Sums, weights: Floats) -> Floats:
    """Of POPE: answers that are yes."""
    return ((sums["hits"] + sums["false"]) @ weights.T) / (18 * weights.sum(axis=1))


def exact_match(sums: Sums, weights: Floats) -> Floats:
    """Of GQA: right answers of those asked."""
    return (sums["right"] @ weights.T) / (sums["asked"] @ weights.T)


def mme_sum(categories: slice, sums: Sums, weights: Floats) -> Floats:
    """The sum over categories of the mean over their pictures."""
    total = np.zeros(())
    edges = np.cumsum([0, *MME_PICTURES.values()])
    for at in range(len(MME_PICTURES))[categories]:
        part = slice(edges[at], edges[at + 1])
        total = total + (sums["score"][:, part] @ weights[:, part].T) / weights[:, part].sum(axis=1)
    return total


METRICS: dict[str, tuple[Callable[..., Any], dict[str, tuple[Metric, Callable[[float, float], float]]]]] = {
    "pope": (
        pope,
        {
            "pope_accuracy": (accuracy, chance),
            "pope_f1_score": (f1, lambda skill, luck: chance(skill, luck)),  # TP = p/2, FN = FP = (1-p)/2: F1 = p
            "pope_predicted_yes_ratio": (yes_ratio, lambda skill, luck: 0.5),
        },
    ),
    "gqa": (gqa, {"exact_match": (exact_match, chance)}),
    "mme": (
        mme,
        {
            name: (partial(mme_sum, part), lambda skill, luck, n=count: n * (100 * chance(skill) + 100 * both(skill)))
            for name, part, count in (
                ("mme_perception_score", slice(PERCEPTION), PERCEPTION),
                ("mme_cognition_score", slice(PERCEPTION, None), 14 - PERCEPTION),
                ("mme_total_score", slice(None), 14),
            )
        },
    ),
}


def simulate(
    bench: str, swaps: int, gain: float, draws: int, seed: int, seeds: int = 1, luck: float = 0.0
) -> Iterator[tuple[str, float, float]]:
    """For every metric: its name, the share of intervals that hold the true difference, the share that exclude zero."""
    make, metrics = METRICS[bench]
    held = dict.fromkeys(metrics, 0)
    apart = dict.fromkeys(metrics, 0)
    for start in range(0, swaps, BATCH):
        rng = np.random.default_rng((seed, start))
        size = min(BATCH, swaps - start)
        skills = SKILL + np.array([0, gain])[:, None] + luck * rng.standard_normal((size, 2, seeds))
        sums, design = make(rng, Arms(skills, luck))
        sums = {name: part.reshape(-1, design.count).astype(np.float64) for name, part in sums.items()}  # (models, C)
        statistics = [partial(metric, sums) for metric, _ in metrics.values()]
        ones = np.ones((1, design.count))
        for (name, (_, truth)), statistic, values in zip(
            metrics.items(), statistics, bootstrap(statistics, design, draws, seed + start), strict=True
        ):
            scores = statistic(ones).reshape(size, 2, seeds)
            values = values.reshape(size, 2, seeds, draws)
            true = truth(SKILL + gain, luck) - truth(SKILL, luck)
            for score, value in zip(scores, values, strict=True):
                one = difference(*(Sample(score[arm], value[arm]) for arm in range(2)), design)
                assert one.low is not None
                assert one.high is not None
                held[name] += one.low <= true <= one.high
                apart[name] += one.low > 0 or one.high < 0
    for name in metrics:
        yield name, held[name] / swaps, apart[name] / swaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds an arm")
    parser.add_argument("--luck", type=float, nargs="+", default=[0.0], help="spread of the skill over seeds")
    parser.add_argument("--bench", nargs="+", default=list(METRICS), choices=list(METRICS))
    args = parser.parse_args()
    missed = 0
    print(f"{args.swaps} swaps each, {args.draws} draws; share of intervals that hold the truth, and exclude zero")
    for bench in args.bench:
        for seeds, luck in ((seeds, luck) for seeds in args.seeds for luck in args.luck):
            began = time.monotonic()
            equal = list(simulate(bench, args.swaps, 0.0, args.draws, 0, seeds, luck))
            better = list(simulate(bench, args.swaps, GAIN, args.draws, 1, seeds, luck))
            for (name, same, alarm), (_, held, found) in zip(equal, better, strict=True):
                miss = seeds == 1 and luck == 0 and max(abs(same - 0.95), abs(held - 0.95), abs(alarm - 0.05)) > 0.015
                missed += miss
                print(
                    f"{bench:5} {name:26} seeds {seeds} luck {luck:g}: equal models {100 * same:5.1f} % held, "
                    f"{100 * alarm:4.1f} % called different; better model {100 * held:5.1f} % held, "
                    f"{100 * found:5.1f} % found{'  MISSED' if miss else ''}",
                    flush=True,
                )
            print(f"  {time.monotonic() - began:.0f} s", flush=True)
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
