"""compare-runs: intervals against a naive loop, refusals, settings, retrieval, and a page that no answer can script."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from encoders import manifest
from encoders.errors import DataError, UsageError
from eval.benchmarks import BENCHES, point
from eval.bootstrap import bootstrap, difference
from eval.compare import compare, compare_settings, load_run, main
from eval.report import render

Row = dict[str, Any]
SETTINGS = {
    "eval": {"batch_size": 8, "dtype": "bfloat16", "limit": None},
    "model": {"llm": "tiny", "encoder": {"objective": "clip", "fingerprint": "0a"}},
    "data": {"fingerprint": "d0"},
}


def pope_rows(images: int, per_image: int, right: Callable[[int, int], bool], **extra: Any) -> list[Row]:
    """Yes/no questions in turn, answered as `right(image, question)` says."""
    rows = []
    for index in range(images * per_image):
        image, question = divmod(index, per_image)
        target = ("yes", "no")[index % 2]
        correct = right(image, question)
        prediction = target if correct else {"yes": "no", "no": "yes"}[target]
        rows.append(
            {
                "bench": "pope",
                "index": index,
                "question_id": str(index),
                "image_id": f"{image:04x}",
                "category": "random",
                "prompt": f"Is there a cat in picture {image}?\nAnswer the question using a single word or phrase.",
                "answer": prediction.title(),
                "prediction": prediction,
                "target": target,
                "correct": float(correct),
                "empty": False,
            }
            | extra
        )
    return rows


def write_results(path: Path, rows: list[Row], settings: Row | None = None, encoder: str = "0a") -> Path:
    """A results folder as eval-mllm leaves it."""
    benches = {}
    for name in dict.fromkeys(row["bench"] for row in rows):
        of_bench = [row for row in rows if row["bench"] == name]
        benches[name] = {
            "task": BENCHES[name].task,
            "metrics": point(BENCHES[name], of_bench),
            "questions": len(of_bench),
            "images": len({row["image_id"] for row in of_bench}),
            "answered": len(of_bench),
            "empty": 0,
            "protocol": {"max_new_tokens": 16},
        }
    results = {
        "model": {"path": str(path), "fingerprint": "3c" * 32},
        "encoder": {"fingerprint": encoder * 32, "image_size": 96},
        "settings": settings or SETTINGS,
        "benches": benches,
    }
    path.mkdir(parents=True)
    (path / "results.json").write_text(json.dumps(results))
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "images").mkdir()
    for image_id in {row["image_id"] for row in rows}:
        Image.new("RGB", (8, 8), "teal").save(path / "images" / f"{image_id}.jpg")
    manifest.seal(path, "results", {})
    return path


def two_runs(folder: Path) -> tuple[Path, Path]:
    """A good run and a bad one on the same 30 pictures with 4 questions each."""
    rng = np.random.default_rng(0)
    skill = rng.random((2, 30, 4)) < np.array([0.5, 0.9])[:, None, None]
    tables = [pope_rows(30, 4, lambda image, question, of=run: bool(skill[of, image, question])) for run in range(2)]
    return write_results(folder / "a", tables[0]), write_results(folder / "b", tables[1], encoder="0b")


def write_ranks(path: Path, ranks: list[tuple[int, int]], chance: float = 0.01) -> Path:
    """An encoder run with held-out ranks."""
    path.mkdir()
    rows = [{"key": str(at), "i2t_rank": i2t, "t2i_rank": t2i} for at, (i2t, t2i) in enumerate(ranks)]
    (path / "retrieval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest.seal(path, "encoder-run", {}, metrics={"retrieval": {"chance_r1": chance, "queries": len(rows)}})
    return path


def test_interval_equals_a_naive_loop() -> None:
    """The same draws, one at a time, with the rows of each drawn picture copied into a list."""
    rng = np.random.default_rng(5)
    pictures = np.array([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])
    runs = rng.integers(0, 2, (2, 10)).astype(np.float64)
    draws = 400
    values = bootstrap([lambda w, run=run: (w @ run) / w.sum(axis=1) for run in runs], pictures, draws, seed=9)

    naive = []
    source = np.random.default_rng(9)
    for _ in range(draws):
        rows = [row for picture in source.integers(4, size=4) for row in np.flatnonzero(pictures == picture)]
        naive.append([np.mean([run[row] for row in rows]) for run in runs])
    np.testing.assert_allclose(values.T, naive, atol=1e-12)

    value = float(runs[1].mean() - runs[0].mean())
    one = difference(value, values[1] - values[0], clusters=4)
    naive_spread = (np.diff(np.array(naive))[:, 0] - value) * np.sqrt(4 / 3)
    assert (one.low, one.high) == pytest.approx(tuple(value + np.quantile(naive_spread, [0.025, 0.975])), abs=1e-12)


def test_interval_covers_and_clustering_matters() -> None:
    """Where the 8 questions of a picture share its fate, resampling pictures covers the truth and rows do not."""
    rng = np.random.default_rng(0)
    covered = {"pictures": 0, "rows": 0}
    trials, pictures, per_picture = 150, 60, 8
    for _ in range(trials):
        effect = np.repeat(rng.normal(0.2, 1, pictures), per_picture) + rng.normal(0, 0.5, pictures * per_picture)
        for name, clusters in (("pictures", np.arange(effect.size) // per_picture), ("rows", np.arange(effect.size))):
            values = bootstrap([lambda w, effect=effect: (w @ effect) / w.sum(axis=1)], clusters, 300, seed=1)
            one = difference(float(effect.mean()), values[0], int(clusters.max()) + 1)
            assert one.low is not None
            assert one.high is not None
            covered[name] += one.low <= 0.2 <= one.high
    assert 0.88 < covered["pictures"] / trials <= 1
    assert covered["rows"] / trials < 0.75


def test_a_run_against_itself_differs_by_exactly_nothing(tmp_path: Path) -> None:
    a, _ = two_runs(tmp_path)
    comparison = compare([load_run(a, "one"), load_run(a, "two")], draws=200)
    (bench,) = comparison.benches
    for measure in bench.measures:
        (one,) = measure.differences
        assert (one.value, one.low, one.high, one.verdict) == (0, 0, 0, "within noise")
    assert bench.flips[0].shown == []
    assert comparison.differing == []
    assert "same encoder" in render(comparison)


def test_scores_flips_and_verdict(tmp_path: Path) -> None:
    a, b = two_runs(tmp_path)
    comparison = compare([load_run(a, "clip"), load_run(b, "clips")], draws=500)
    (bench,) = comparison.benches
    accuracy = next(measure for measure in bench.measures if measure.name == "pope_accuracy")
    one = accuracy.differences[0]
    assert one.verdict == "better"
    assert one.low is not None
    assert one.high is not None
    assert one.value == pytest.approx(accuracy.scores[1] - accuracy.scores[0])
    assert (bench.flips[0].gained - bench.flips[0].lost) / bench.questions == pytest.approx(one.value)
    (backwards,) = compare([load_run(b, "clips"), load_run(a, "clip")], draws=500).benches[0].measures[0].differences
    assert backwards.verdict == "worse"
    assert (backwards.value, backwards.low, backwards.high) == pytest.approx(
        (-one.value, -one.high, -one.low), abs=1e-9
    )
    assert {flip.gained for flip in bench.flips[0].shown} == {True, False}
    assert (bench.questions, bench.images, bench.empty) == (120, 30, [0, 0])
    yes = next(measure for measure in bench.measures if measure.name == "pope_predicted_yes_ratio")
    assert yes.differences[0].verdict in ("differs", "within noise")  # more yes is neither better nor worse
    assert compare([load_run(a, "x"), load_run(b, "y")], draws=500).benches == comparison.benches  # deterministic


def test_one_picture_gives_no_interval(tmp_path: Path) -> None:
    runs = [
        load_run(write_results(tmp_path / name, pope_rows(1, 6, lambda _, q, n=n: q < n)), name)
        for name, n in (("a", 2), ("b", 5))
    ]
    comparison = compare(runs, draws=100)
    assert all(measure.differences[0].low is None for measure in comparison.benches[0].measures)
    assert "one picture" in render(comparison)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "samples.jsonl").unlink(), "no samples.jsonl"),
        (lambda path: (path / "results.json").unlink(), "no results.json"),
        (lambda path: _rewrite(path, lambda rows: rows[:-1]), "119 of 120 answers"),
        (lambda path: _rewrite(path, lambda rows: []), "0 of 120 answers"),
        (lambda path: _rewrite(path, lambda rows: [*rows[:-1], rows[0]]), "there twice"),
        (lambda path: _rewrite(path, lambda rows: [*rows[:-1], {"bench": "pope"}]), "jsonl:120 lacks"),
        (lambda path: _rewrite(path, lambda rows: [{**row, "correct": 0.0} for row in rows]), "results.json says"),
        (lambda path: (path / "samples.jsonl").write_text("{"), "samples.jsonl"),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    path, _ = two_runs(tmp_path)
    damage(path)
    with pytest.raises(DataError, match=message):
        load_run(path, "a")


def _rewrite(path: Path, change: Callable[[list[Row]], list[Row]]) -> None:
    rows = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    manifest.seal(path, "results", {})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": "Is there a dog?"}, "question 0 differs in 'prompt'"),
        ({"image_id": "ffff"}, "question 0 differs in 'image_id'"),
    ],
)
def test_other_questions_are_refused(tmp_path: Path, changed: Row, message: str) -> None:
    a, _ = two_runs(tmp_path)
    other = write_results(tmp_path / "other", pope_rows(30, 4, lambda *_: True, **changed))
    with pytest.raises(DataError, match=message):
        compare([load_run(a, "a"), load_run(other, "other")])
    shorter = write_results(tmp_path / "shorter", pope_rows(29, 4, lambda *_: True))
    with pytest.raises(DataError, match="pope question 116 is not in both"):
        compare([load_run(a, "a"), load_run(shorter, "shorter")])


def test_settings_besides_the_encoder_are_marked(tmp_path: Path) -> None:
    a, _ = two_runs(tmp_path)
    changed = json.loads(json.dumps(SETTINGS))
    changed["eval"]["batch_size"] = 4
    changed["model"]["encoder"] = {"objective": "clips", "fingerprint": "0b", "pre_norm": False}
    rows = pope_rows(30, 4, lambda *_: True)
    b = write_results(tmp_path / "c", rows, changed, encoder="0b")
    comparison = compare([load_run(a, "clip"), load_run(b, "clips")], draws=100)
    assert {setting.key: setting.encoder for setting in comparison.differing} == {
        "eval.batch_size": False,
        "encoder.fingerprint": True,
        "model.encoder.fingerprint": True,
        "model.encoder.objective": True,
        "model.encoder.pre_norm": True,
    }
    assert next(s for s in comparison.differing if s.key == "model.encoder.pre_norm").values == ["(not set)", False]
    page = render(comparison)
    assert "1 setting besides the encoder differs" in page
    assert "Everything but the encoder is equal" not in page

    equal = write_results(tmp_path / "d", rows, SETTINGS | {"model": changed["model"] | {"llm": "tiny"}}, encoder="0b")
    assert "Everything but the encoder is equal" in render(compare([load_run(a, "clip"), load_run(equal, "clips")]))
    # a name that merely begins like the encoder's is another setting
    differing, _ = compare_settings([{"encoders": 1, "model": {"encoder_lr": 1}}, {"encoders": 2, "model": {}}])
    assert [setting.encoder for setting in differing] == [False, False]


def test_retrieval(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ranks = [[(int(i), int(t)) for i, t in rng.geometric(p, (200, 2)) - 1] for p in (0.1, 0.5)]
    encoders = [write_ranks(tmp_path / f"e{at}", table) for at, table in enumerate(ranks)]
    a, b = two_runs(tmp_path)
    comparison = compare([load_run(a, "clip"), load_run(b, "clips")], encoders, draws=300)
    assert comparison.retrieval is not None
    measures = {measure.name: measure for measure in comparison.retrieval.measures}
    for side, direction in enumerate(("image to text", "text to image")):
        for k in (1, 5, 10):
            expected = [sum(row[side] < k for row in table) / 200 for table in ranks]
            assert measures[f"{direction} R@{k}"].scores == pytest.approx(expected)
    assert measures["image to text R@1"].differences[0].verdict == "better"
    assert "retrieval" in render(comparison)

    runs = [load_run(a, "clip"), load_run(b, "clips")]
    with pytest.raises(DataError, match="same held-out pairs"):
        compare(runs, [encoders[0], write_ranks(tmp_path / "fewer", ranks[1][:150])])
    with pytest.raises(UsageError, match="1 encoder runs for 2 results"):
        compare(runs, encoders[:1])


def test_no_text_can_become_markup(tmp_path: Path) -> None:
    evil = "</p><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\ud800\u202e"
    texts = {"prompt": evil + "\n" + evil, "answer": evil, "category": evil}
    shared = SETTINGS | {"data": {f"shared{evil}": evil}}
    a = write_results(tmp_path / "a", pope_rows(4, 2, lambda *_: True, **texts), shared | {"versions": {evil: evil}})
    b = write_results(tmp_path / "b", pope_rows(4, 2, lambda image, _: image > 1, **texts), shared)
    out = tmp_path / "report.html"
    main([str(a), str(b), "--out", str(out), "--draws", "100", "--name", "<b>one[/]", "two&"])
    page = out.read_text(encoding="utf-8")
    for piece in ("<script", "<img src=x", "<b>one", "http://", "https://", "url("):
        assert piece not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "default-src 'none'" in page
    assert page.count("data:image/jpeg;base64,") == 4
    assert json.loads(out.with_suffix(".json").read_text())["names"] == ["<b>one[/]", "two&"]


def test_a_picture_cannot_be_any_file(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    runs = []
    for name, right in (("a", True), ("b", False)):
        path = write_results(tmp_path / name, pope_rows(2, 2, lambda *_, right=right: right))
        _rewrite(path, lambda rows: [{**row, "image_id": "../../secret"} for row in rows])
        runs.append(load_run(path, name))
    with pytest.raises(DataError, match="impossible image_id"):
        compare(runs, draws=100)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = two_runs(tmp_path)
    main([str(a), str(b), "--out", str(tmp_path / "out" / "report.html"), "--draws", "200"])
    printed = capsys.readouterr().out
    torch_free = "import sys, eval.compare, eval.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", torch_free], check=False).returncode == 0
    assert "POPE accuracy" in printed
    assert "better" in printed
    assert (tmp_path / "out" / "report.json").is_file()
    for arguments, message in (
        (["nowhere", "--out", "r.html"], "at least two"),
        ([str(a), str(b), "--out", "r.txt"], "must end in .html"),
        ([str(a), str(b), "--out", "r.html", "--name", "x"], "--name gives 1"),
        ([str(a), str(b), "--out", "r.html", "--draws", "5"], "too few"),
    ):
        with pytest.raises(UsageError, match=message):
            main(arguments)
