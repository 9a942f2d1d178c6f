"""The intervals of compare-runs against scipy, a naive loop, textbook formulas and simulated swaps."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from eval.comparing.bootstrap import Design, Difference, Floats, Sample, bootstrap, difference, picture_weights


def simulations() -> Any:
    """The module benchmarks/coverage.py."""
    file = Path(__file__).parent.parent / "benchmarks" / "coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_of_intervals", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def one_stratum(clusters: Floats) -> Design:
    pictures = np.asarray(clusters, dtype=np.int64)
    return Design(pictures, np.zeros(int(pictures.max()) + 1, dtype=np.int64))


def paired(base: Floats, other: Floats, design: Design, draws: int = 4000, undirected: bool = False) -> Difference:
    """Of row scores (k seeds, n rows)."""
    runs = np.concatenate([base, other])
    values = bootstrap([lambda w: (runs @ w.T) / w.sum(axis=1)], design, draws, seed=3)[0]
    scores = runs.mean(axis=1)
    samples = [Sample(scores[part], values[part]) for part in (slice(len(base)), slice(len(base), None))]
    return difference(*samples, design, undirected)


def test_weights_equal_a_naive_loop() -> None:
    """The same draws, one at a time: copies of whole pictures, each stratum's deviations rescaled by hand."""
    rng = np.random.default_rng(5)
    pictures = np.array([0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 5, 5])
    strata = np.array([0, 0, 0, 0, 1, 1])
    values = rng.random(13)
    design = Design(pictures, strata)
    drawn = np.concatenate(list(picture_weights(design, 300, seed=9))) @ values

    source = np.random.default_rng(9)
    draws = {stratum: source.integers(n, size=(300, n)) for stratum, n in ((0, 4), (1, 2))}
    sums = np.array([values[pictures == picture].sum() for picture in range(6)])
    for at in range(300):
        total = 0.0
        for stratum, first, n in ((0, 0, 4), (1, 4, 2)):
            observed = sums[first : first + n].sum()
            resampled = sum(sums[first + one] for one in draws[stratum][at])
            total += observed + np.sqrt(n / (n - 1)) * (resampled - observed)
        assert drawn[at] == pytest.approx(total, abs=1e-12)


def test_error_equals_scipy_and_the_textbook() -> None:
    """One row per picture: the standard error of a mean; scipy's bootstrap does not rescale, else agrees."""
    rng = np.random.default_rng(2)
    effect = rng.normal(0.1, 1, 80)
    one = paired(np.zeros((1, 80)), effect[None], one_stratum(np.arange(80)), draws=20_000)
    assert one.error == pytest.approx(effect.std(ddof=1) / np.sqrt(80), rel=0.02)
    other = scipy_stats.bootstrap((effect,), np.mean, n_resamples=20_000, rng=np.random.default_rng(0))
    assert one.error == pytest.approx(other.standard_error * np.sqrt(80 / 79), rel=0.02)
    assert one.low is not None
    assert one.high is not None
    low, high = scipy_stats.t.interval(0.95, 79, effect.mean(), effect.std(ddof=1) / np.sqrt(80))
    assert (one.low, one.high) == pytest.approx((low, high), abs=0.01)


def test_clusters_of_unequal_size_equal_scipy() -> None:
    """The ratio of sums over pictures, which scipy resamples as pairs."""
    rng = np.random.default_rng(4)
    sizes = rng.integers(1, 30, 120)
    pictures = np.repeat(np.arange(120), sizes)
    effect = np.repeat(rng.normal(0, 1, 120), sizes) + rng.normal(0, 0.3, len(pictures))
    one = paired(np.zeros((1, len(effect))), effect[None], one_stratum(pictures), draws=20_000)
    sums = np.bincount(pictures, weights=effect)
    other = scipy_stats.bootstrap(
        (sums, sizes),
        lambda total, count, axis: total.sum(axis=axis) / count.sum(axis=axis),
        paired=True,
        n_resamples=10_000,
        rng=np.random.default_rng(0),
    )
    assert one.error == pytest.approx(other.standard_error * np.sqrt(120 / 119), rel=0.03)
    rows = paired(np.zeros((1, len(effect))), effect[None], one_stratum(np.arange(len(effect))), draws=2000)
    assert one.error > 2 * rows.error  # type: ignore[operator]


def test_strata_are_what_shares_no_picture() -> None:
    shared = Design.of(["p", "p", "q", "q"] * 3, ["adversarial", "random"] * 6)
    assert shared.strata.tolist() == [0, 0]
    apart = Design.of([f"p{at}" for at in range(9)], ["a"] * 2 + ["b"] * 3 + ["c"] * 4)
    assert np.bincount(apart.strata).tolist() == [2, 3, 4]
    assert apart.freedom == 6
    # joined by one picture that both have; one left alone goes with the smallest other
    joined = Design.of(["1", "2", "2", "3", "4", "5", "6", "7"], ["a", "a", "b", "b", "c", "d", "d", "d"])
    assert sorted(np.bincount(joined.strata).tolist()) == [3, 4]
    singles = Design.of(["1", "2", "3", "4"], ["a", "b", "c", "c"])
    assert np.bincount(singles.strata).tolist() == [2, 2]
    assert Design.of(["1"], ["a"]).count == 1


def test_strata_do_not_hang_on_the_order_of_a_set() -> None:
    """Two categories joined by a picture beside one of its own: Python hashes words anew in every process."""
    code = (
        "from eval.comparing.bootstrap import Design\n"
        "categories = ['a', 'b', 'c', 'c', 'b', 'a']\n"
        "print(Design.of([str(at) for at in range(12)] * 2, [one for one in categories for _ in range(4)]).strata)"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "2")
    ]
    assert found[0] == found[1]


def test_strata_lower_the_error_where_they_should() -> None:
    """Where categories differ and each has its pictures, how many of each are drawn must not vary."""
    values = np.concatenate([np.zeros(60), np.ones(60)]) + np.random.default_rng(0).normal(0, 0.01, 120)
    names = [str(at) for at in range(120)]
    flat = paired(np.zeros((1, 120)), values[None], Design.of(names, [""] * 120), 2000)
    apart = paired(np.zeros((1, 120)), values[None], Design.of(names, ["a"] * 60 + ["b"] * 60), 2000)
    assert apart.error < 0.05 * flat.error  # type: ignore[operator]


def test_seeds_equal_welchs_test_where_pictures_play_no_part() -> None:
    """Every picture reads the same within a run: all that differs is the luck of training."""
    scores = np.array([0.50, 0.53, 0.51]), np.array([0.58, 0.55])
    base, other = (np.repeat(one[:, None], 100, axis=1) for one in scores)
    one = paired(base, other, one_stratum(np.arange(100)), draws=200)
    welch = scipy_stats.ttest_ind(scores[1], scores[0], equal_var=False).confidence_interval(0.95)
    assert (one.low, one.high) == pytest.approx((welch.low, welch.high), rel=1e-3)
    assert one.luck == pytest.approx(one.error)


def test_luck_is_not_counted_twice() -> None:
    """Seeds that differ in nothing but the answers to single questions: pictures explain what they differ by."""
    rng = np.random.default_rng(1)
    runs = rng.integers(0, 2, (40, 400)).astype(np.float64)
    one = paired(runs[:20], runs[20:], one_stratum(np.arange(400)), draws=2000)
    assert one.error is not None
    assert one.luck is not None
    truth = np.sqrt(0.25 / 400 * 2 / 20)
    assert one.error == pytest.approx(truth, rel=0.25)
    shifted = runs + rng.normal(0, 0.2, (40, 1))
    lucky = paired(shifted[:20], shifted[20:], one_stratum(np.arange(400)), draws=2000)
    assert lucky.luck == pytest.approx(0.2 * np.sqrt(2 / 20), rel=0.35)
    single = paired(runs[:1], runs[1:2], one_stratum(np.arange(400)), draws=200)
    assert single.luck is None


def test_verdicts() -> None:
    rng = np.random.default_rng(0)
    effect = rng.normal(1, 1, (1, 200))
    zero = np.zeros((1, 200))
    design = one_stratum(np.arange(200))
    assert paired(zero, effect, design).verdict == "better"
    assert paired(effect, zero, design).verdict == "worse"
    assert paired(zero, effect, design, undirected=True).verdict == "differs"
    assert paired(zero, effect - effect.mean(), design).verdict == "within noise"
    assert paired(zero[:, :49], effect[:, :49], one_stratum(np.arange(49))).verdict == "few images"
    assert paired(zero[:, :50], effect[:, :50], one_stratum(np.arange(50))).verdict == "better"
    alone = paired(zero[:, :4], effect[:, :4], one_stratum(np.zeros(4)))
    assert (alone.low, alone.error, alone.verdict) == (None, None, "few images")


def test_detectable_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(0)
    design = one_stratum(np.arange(100))
    first = paired(np.zeros((1, 100)), rng.normal(0, 1, (1, 100)), design)
    assert first.detectable == pytest.approx(2.8 / 10, rel=0.15)
    trials = [paired(np.zeros((1, 100)), rng.normal(0.284, 1, (1, 100)), design, 200) for _ in range(300)]
    assert sum(one.verdict == "better" for one in trials) / 300 == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("bench", ["pope", "gqa", "mme"])
def test_coverage_of_simulated_swaps(bench: str) -> None:
    """Few swaps here; benchmarks/coverage.py has 2,000 and a band of 1.5 points, docs/report.md what it measured."""
    coverage = simulations()
    for gain in (0.0, coverage.GAIN):
        for name, held, apart in coverage.simulate(bench, 300, gain, 500, seed=2):
            assert pytest.approx(held, abs=0.04) == 0.95, name  # three standard errors of 300 swaps
            if gain == 0:
                assert apart == pytest.approx(1 - held)


def test_simulations_are_about_the_metrics_that_are_reported() -> None:
    """The sums per picture that the simulations work on give what the benchmarks' own metrics give for rows."""
    from eval.benches.benchmarks import BENCHES
    from eval.benches.metrics import Columns

    rng = np.random.default_rng(0)
    coverage = simulations()
    right = rng.random((500, 18)) < 0.7
    truth = np.tile(np.repeat(["yes", "no"], 9), (500, 1))
    said = np.where(right, truth, np.where(truth == "yes", "no", "yes"))
    columns = Columns(right.ravel() * 1.0, said.ravel(), truth.ravel(), np.full(9000, ""), np.arange(9000).astype(str))
    weights = rng.integers(0, 3, (5, 500)).astype(np.float64)
    of_rows = np.repeat(weights, 18, axis=1)
    yes, no = right[:, :9], right[:, 9:]
    sums = {"hits": yes.sum(1)[None], "missed": (~yes).sum(1)[None], "false": (~no).sum(1)[None]}
    for name, (metric, _) in coverage.METRICS["pope"][1].items():
        np.testing.assert_allclose(metric(sums, weights)[0], BENCHES["pope"].metrics[name](columns, of_rows))

    names, categories = coverage._mme_pictures()
    right = rng.random((len(names), 2)) < 0.6
    blank = np.full(2 * len(names), "")
    columns = Columns(right.ravel() * 1.0, blank, blank, np.repeat(categories, 2), np.repeat(names, 2))
    weights = rng.integers(0, 3, (3, len(names))).astype(np.float64)
    sums = {"score": (50 * right.sum(1) + 100 * (right.sum(1) == 2))[None]}
    for name, (metric, _) in coverage.METRICS["mme"][1].items():
        expected = BENCHES["mme"].metrics[name](columns, np.repeat(weights, 2, axis=1))
        np.testing.assert_allclose(metric(sums, weights)[0], expected)
