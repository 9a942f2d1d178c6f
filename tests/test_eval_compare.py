"""compare-runs: scores, sub-tasks, seeds, refusals, settings, and what is known of the encoders alone."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from result_folders import COST, SETTINGS, changed, mme_rows, pope_rows, rewrite, two_runs, write_results

from encoders import manifest
from encoders.errors import DataError, UsageError
from eval.compare import main
from eval.comparing.bootstrap import Difference
from eval.comparing.comparison import Comparison, compare, to_json
from eval.comparing.flips import Flips, choose_flips
from eval.comparing.measures import Measure, verdict_of
from eval.comparing.published import published_for
from eval.comparing.report import render
from eval.comparing.results import load_arm, load_run
from eval.comparing.settings import compare_settings, role_of
from eval.comparing.summary import attestation, number, signed
from eval.comparing.views import draw_views
from train.config import FREE_RUN_KEYS


def compared(*arms: Path | list[Path], **options: Any) -> Comparison:
    """Compare folders, or lists of them, named after the first of each."""
    folders = [arm if isinstance(arm, list) else [arm] for arm in arms]
    return compare([load_arm(of_arm, of_arm[0].name) for of_arm in folders], **{"draws": 300} | options)


def measure_of(measures: list[Measure], name: str) -> Measure:
    return next(measure for measure in measures if measure.name == name)


def write_ranks(path: Path, ranks: list[tuple[int, int]], chance: float = 0.01) -> Path:
    """An encoder run with held-out ranks."""
    path.mkdir()
    rows = [{"key": str(at), "i2t_rank": i2t, "t2i_rank": t2i} for at, (i2t, t2i) in enumerate(ranks)]
    (path / "retrieval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest.seal(path, "encoder-run", {}, metrics={"retrieval": {"chance_r1": chance, "queries": len(rows)}})
    return path


def test_a_run_against_itself_differs_by_exactly_nothing(tmp_path: Path) -> None:
    a, _ = two_runs(tmp_path)
    comparison = compared(a, a)
    (bench,) = comparison.benches
    for measure in [*bench.measures, *(one for part in bench.subtasks for one in part.measures)]:
        (one,) = measure.differences
        assert (one.value, one.low, one.high, one.detectable, one.verdict) == (0, 0, 0, None, "within noise")
    assert bench.verdicts == ["within noise"]
    assert bench.flips[0].shown == []
    assert comparison.differing == []
    assert "same encoder" in render(comparison)


def test_scores_flips_and_verdict(tmp_path: Path) -> None:
    a, b = two_runs(tmp_path)
    comparison = compared(a, b)
    (bench,) = comparison.benches
    accuracy = measure_of(bench.measures, "pope_accuracy")
    (one,) = accuracy.differences
    assert (one.verdict, bench.verdicts) == ("better", ["better"])
    assert one.value == pytest.approx(accuracy.scores[1] - accuracy.scores[0])
    assert (bench.flips[0].gained - bench.flips[0].lost) / bench.questions == pytest.approx(one.value)
    (backwards,) = measure_of(compared(b, a).benches[0].measures, "pope_accuracy").differences
    assert one.low is not None
    assert one.high is not None
    assert (backwards.value, backwards.low, backwards.high, backwards.verdict) == pytest.approx(
        (-one.value, -one.high, -one.low, "worse")
    )
    assert {flip.gained for flip in bench.flips[0].shown} == {True, False}
    assert (bench.questions, bench.images, bench.empty, bench.unparsed, bench.failed) == (360, 60, *[[0, 0]] * 3)
    assert compared(a, b).benches == comparison.benches  # deterministic
    assert list(bench.points) == ["printed_only"]


def test_more_yes_is_neither_better_nor_worse(tmp_path: Path) -> None:
    always = write_results(tmp_path / "0a", pope_rows(60, 6, lambda _, question: question % 2 == 0))
    half = write_results(tmp_path / "0b", pope_rows(60, 6, lambda image, _: image % 3 > 0), encoder="0b")
    (bench,) = compared(always, half).benches
    measure = measure_of(bench.measures, "pope_predicted_yes_ratio")
    assert measure.scores == [1, 0.5]
    assert measure.differences[0].verdict == "differs"


def test_subtasks_equal_their_own_rows(tmp_path: Path) -> None:
    """POPE's splits, which share pictures: each is scored as if it were a benchmark of its own."""
    a, b = two_runs(tmp_path)
    (bench,) = compared(a, b).benches
    assert [part.name for part in bench.subtasks] == ["adversarial", "popular", "random"]
    for part in bench.subtasks:
        assert (part.questions, part.images) == (120, 60)
        for path, score in zip((a, b), measure_of(part.measures, "pope_accuracy").scores, strict=True):
            rows = [row for row in load_run(path, "x").rows["pope"].values() if row["category"] == part.name]
            assert score == pytest.approx(np.mean([row["correct"] for row in rows]))
        assert {"pope_f1_score", "pope_predicted_yes_ratio"} <= {measure.name for measure in part.measures}


def test_mme_sums_and_small_categories(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = {"existence": 20, "scene": 60, "code_reasoning": 51}
    paths = [
        write_results(
            tmp_path / name, mme_rows(sizes, lambda *_, skill=skill: bool(rng.random() < skill)), encoder=f"0{at}"
        )
        for at, (name, skill) in enumerate((("a", 0.5), ("b", 0.95)))
    ]
    (bench,) = compared(*paths).benches
    rows = load_run(paths[1], "b").rows["mme"].values()

    def score(category: str) -> float:
        """acc + acc+, from the rows."""
        pairs = np.array([row["correct"] for row in rows if row["category"] == category]).reshape(-1, 2)
        return 100 * float(pairs.mean()) + 100 * float(pairs.all(axis=1).mean())

    assert measure_of(bench.measures, "mme_perception_score").scores[1] == pytest.approx(
        score("existence") + score("scene")
    )
    assert measure_of(bench.measures, "mme_total_score").scores[1] == pytest.approx(sum(map(score, sizes)))
    existence, scene, code = bench.subtasks
    assert (existence.images, scene.images, code.images) == (20, 60, 51)
    assert {one.differences[0].verdict for one in existence.measures} == {"few images"}
    assert measure_of(scene.measures, "mme_perception_score").scores[1] == pytest.approx(score("scene"))
    assert measure_of(scene.measures, "mme_perception_score").differences[0].verdict == "better"
    assert code.measures[0].name == "mme_cognition_score"
    assert measure_of(bench.measures, "mme_perception_score").ceiling == 400


def test_one_word_for_a_benchmark() -> None:
    def said(*words: str) -> str:
        """Of headline measures with these verdicts, and a further measure that is worse."""
        measures = [
            Measure(word, True, at < len(words), 1.0, [], [], [Difference(0, 0, 0, 0, None, 0, word)])
            for at, word in enumerate((*words, "worse"))
        ]
        return verdict_of(measures, 1)

    assert said("better", "within noise") == "better"
    assert said("within noise", "worse") == "worse"
    assert said("better", "worse") == "mixed"
    assert said("within noise", "few images") == "within noise"
    assert said("few images") == "few images"


def test_several_arms_with_several_seeds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def arm(name: str, skills: tuple[float, ...]) -> list[Path]:
        paths = []
        for seed, skill in enumerate(skills):
            right = rng.random((60, 6)) < skill
            rows = pope_rows(60, 6, lambda image, question, right=right: bool(right[image, question]))
            settings = changed(model={"lora": {"run": {"seed": seed, "out": name + str(seed)}}})
            paths.append(write_results(tmp_path / f"{name}{seed}", rows, settings, encoder=name))
        return paths

    arms = [arm("0a", (0.6, 0.7, 0.65)), arm("0b", (0.66, 0.62, 0.67)), arm("0c", (0.95, 0.93, 0.94))]
    comparison = compared(*arms)
    assert comparison.seeds == [3, 3, 3]
    assert {setting.role for setting in comparison.differing} == {"encoder", "idle"}  # seeds differ within arms only
    accuracy = measure_of(comparison.benches[0].measures, "pope_accuracy")
    for of_arm, score, seeds in zip(arms, accuracy.scores, accuracy.seeds, strict=True):
        own = [load_run(path, "x").results["benches"]["pope"]["metrics"]["pope_accuracy"] for path in of_arm]
        assert seeds == pytest.approx(own)
        assert score == pytest.approx(np.mean(own))
    noise, better = accuracy.differences
    assert (noise.verdict, better.verdict) == ("within noise", "better")
    assert noise.luck is not None
    single = compared(*[of_arm[:1] for of_arm in arms])
    alone = measure_of(single.benches[0].measures, "pope_accuracy").differences[0]
    assert alone.luck is None
    page = render(comparison)
    assert "the luck of training (seeds: 0a0 3, 0b0 3, 0c0 3)" in page
    assert "do not cover the luck of training" in render(single)
    mixed = compared(arms[0], arms[1][:1])
    assert "not the luck of 0b0, trained with one seed" in render(mixed)

    with pytest.raises(DataError, match="not two seeds of 'x'"):
        load_arm([arms[0][0], arms[0][0]], "x")
    again = changed(model={"lora": {"run": {"seed": 0, "out": "elsewhere"}}})  # on a GPU that rounded otherwise
    twin = write_results(tmp_path / "twin", pope_rows(60, 6, lambda *_: True), again, encoder="0a")
    with pytest.raises(DataError, match="two runs of '0a0' have the same seed"):
        compared([arms[0][0], twin], arms[1][0], allow_differences=True)
    strangers = write_results(
        tmp_path / "s", pope_rows(60, 6, lambda *_: True), changed(eval={"dtype": "float32"}, model={"lora": {}})
    )
    with pytest.raises(DataError, match="eval.dtype"):
        compared([arms[0][0], strangers], arms[1][0])
    with pytest.raises(DataError, match="model.lora.run.seed"):
        compared(arms[0][0], arms[1][1])


def test_a_measure_is_shown_once_but_never_lost(tmp_path: Path) -> None:
    """ChartQA's human questions are a metric and a sub-task; perfect models score 1 in every metric."""
    rows = [
        {**row, "bench": "chartqa", "category": ("human_test", "augmented_test")[row["index"] % 2]}
        for row in pope_rows(60, 2, lambda image, question: (image + question) % 3 > 0)
    ]
    paths = [write_results(tmp_path / name, rows, encoder=name) for name in ("0a", "0b")]
    (bench,) = compared(*paths).benches
    assert len(bench.measures) == 3
    assert [[measure.name for measure in part.measures] for part in bench.subtasks] == [["relaxed_overall"]] * 2
    perfect = [write_results(tmp_path / name, pope_rows(60, 2, lambda *_: True), encoder=name) for name in ("1a", "1b")]
    assert len(compared(*perfect).benches[0].measures) == 5


def test_one_picture_gives_no_interval(tmp_path: Path) -> None:
    a, b = (
        write_results(tmp_path / name, pope_rows(1, 6, lambda _, q, n=n: q < n), encoder=name)
        for name, n in (("0a", 2), ("0b", 5))
    )
    comparison = compared(a, b)
    assert all(measure.differences[0].low is None for measure in comparison.benches[0].measures)
    assert comparison.benches[0].verdicts == ["few images"]
    assert "one picture" in render(comparison)


def test_questions_without_picture_stand_alone(tmp_path: Path) -> None:
    a, b = (
        write_results(tmp_path / name, pope_rows(60, 1, lambda i, _, n=n: i % n > 0), encoder=name)
        for name, n in (("0a", 2), ("0b", 6))
    )
    for path in (a, b):
        rewrite(path, lambda rows: [{**row, "image_id": "" if at % 2 else "0001_0002"} for at, row in enumerate(rows)])
    comparison = compared(a, b)
    assert comparison.benches[0].images == 31
    assert set(comparison.pictures) <= {"0001"}
    render(comparison)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "samples.jsonl").unlink(), "no samples.jsonl"),
        (lambda path: (path / "results.json").unlink(), "no results.json"),
        (lambda path: rewrite(path, lambda rows: rows[:-1]), "359 of 360 answers"),
        (lambda path: rewrite(path, lambda rows: []), "0 of 360 answers"),
        (lambda path: rewrite(path, lambda rows: [*rows[:-1], rows[0]]), "there twice"),
        (lambda path: rewrite(path, lambda rows: [*rows[:-1], {"bench": "pope"}]), "jsonl:360 lacks"),
        (lambda path: rewrite(path, lambda rows: [{**row, "correct": 0.0} for row in rows]), "results.json says"),
        (lambda path: (path / "samples.jsonl").write_text("{"), "samples.jsonl"),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    path, _ = two_runs(tmp_path)
    damage(path)
    with pytest.raises(DataError, match=message):
        load_run(path, "a")


def test_what_does_not_compare_is_refused(tmp_path: Path) -> None:
    rows = pope_rows(60, 6, lambda *_: True)
    a = write_results(tmp_path / "a", rows)

    def refused(name: str, message: str, *given: Any, **options: Any) -> None:
        with pytest.raises(DataError, match=message):
            compared(a, write_results(tmp_path / name, *given, **options), allow_differences=True)

    refused("prompt", "question 0 differs in 'prompt'", [{**row, "prompt": "Is there a dog?"} for row in rows])
    refused("image", "question 0 differs in 'image_id'", [{**row, "image_id": "ffff"} for row in rows])
    refused("shorter", "pope question 354 is not in both", pope_rows(59, 6, lambda *_: True))
    refused("protocol", "the protocol is .*different protocols do not compare", rows, protocol={"max_new_tokens": 128})
    refused("task", "the task is", rows, task="pope_adv")
    refused("scorer", "by lmms-eval 0.7.3, .* by 0.7.4", rows, changed(versions={"lmms-eval": "0.7.4"}))
    refused("bench", r"has the benchmarks \['pope'\]", mme_rows({"scene": 4}, lambda *_: True))


def test_failed_questions_compare_only_if_all_allow_them(tmp_path: Path) -> None:
    allowing = changed(eval={"allow_errors": True})
    rows = pope_rows(60, 6, lambda *_: True)
    a, b = write_results(tmp_path / "a", rows), write_results(tmp_path / "b", rows, allowing, "0b", failed=(3, 4))
    with pytest.raises(
        DataError, match="2 questions of pope failed and count as wrong, but .*/a was evaluated without"
    ):
        compared(a, b, allow_differences=True)
    comparison = compared(write_results(tmp_path / "c", rows, allowing), b)
    assert comparison.benches[0].failed == [0, 2]
    assert "2 questions failed and count as wrong" in render(comparison)


def test_settings_besides_the_encoder_are_refused_or_marked(tmp_path: Path) -> None:
    a, _ = two_runs(tmp_path)
    rows = pope_rows(60, 6, lambda *_: True)
    swap = {"encoder": {"objective": "clips", "fingerprint": "0b", "path": "else", "pre_norm": False}}
    b = write_results(tmp_path / "c", rows, changed(eval={"dtype": "float32"}, model=swap), encoder="0b")
    with pytest.raises(DataError, match='eval.dtype: a "bfloat16", c "float32"') as refusal:
        compared(a, b)
    assert "--allow-differences" in str(refusal.value)
    assert "model.encoder" not in str(refusal.value)
    comparison = compared(a, b, allow_differences=True)
    assert {setting.key: setting.role for setting in comparison.differing} == {
        "eval.dtype": "other",
        "encoder.fingerprint": "encoder",
        "model.encoder.fingerprint": "encoder",
        "model.encoder.objective": "encoder",
        "model.encoder.path": "encoder",
        "model.encoder.pre_norm": "encoder",
    }
    assert next(s for s in comparison.differing if s.key == "model.encoder.pre_norm").values == ["(not set)", False]
    page = render(comparison)
    assert page.index("Not a clean comparison") < page.index("<h1>")
    assert "1 setting besides the encoder differs" in page
    assert to_json(comparison)["allowed"] is True

    clean = compared(a, write_results(tmp_path / "d", rows, changed(model=swap), encoder="0b"))
    assert "Everything but the encoder is equal" in render(clean)
    assert to_json(clean)["allowed"] is False


def test_roles_of_settings() -> None:
    for key, role in {
        "encoder.fingerprint": "encoder",
        "encoder.vision_config.image_size": "encoder",
        "encoder.vision_feature_select_strategy": "encoder",
        "encoder.vision_feature_layer": "other",
        "model.encoder.path": "encoder",
        "processor.image_mean": "encoder",
        "eval.image_tokens": "encoder",
        "image_processor.do_pad": "other",  # geometry is the recipe's
        "processor.do_center_crop": "other",
        "model.lora.data.geometry": "other",
        "model.lora.data.chats": "other",
        "model.lora.data.chats.path": "idle",
        "model.lora.data.chats.fingerprint": "other",
        "model.lora.data.chats.conversations": "other",
        "model.lora.data.images": "other",
        "model.projector.held_out": "idle",
        "model.projector.before.projector.run.steps": "other",
        "model.lora.run.seed": "seed",
        "model.lora.run.out": "idle",
        "model.lora.run.steps": "other",
        "encoders": "other",  # names that merely begin like the encoder's
        "model.encoder_lr": "other",
        "eval.processors": "other",
        "versions.torch": "other",
    }.items():
        assert role_of(key) == role, key
    for name in FREE_RUN_KEYS:
        assert role_of(f"model.projector.run.{name}") == "idle"
    differing, shared = compare_settings([[{"a": {"seed": 1}}, {"a": {"seed": 0}}], [{"a": {"seed": 0}}]])
    assert (differing, shared) == ([], {"a.seed": [0, 1]})


def test_retrieval_parity_and_zero_shot(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ranks = [[(int(i), int(t)) for i, t in rng.geometric(p, (200, 2)) - 1] for p in (0.1, 0.5)]
    encoders = [write_ranks(tmp_path / f"e{at}", table) for at, table in enumerate(ranks)]
    a, b = two_runs(tmp_path)
    comparison = compared(a, b, encoders=encoders)
    assert comparison.retrieval is not None
    for side, direction in enumerate(("image to text", "text to image")):
        for k in (1, 5, 10):
            expected = [sum(row[side] < k for row in table) / 200 for table in ranks]
            assert measure_of(comparison.retrieval.measures, f"{direction} R@{k}").scores == pytest.approx(expected)
    assert comparison.retrieval.measures[0].differences[0].verdict == "better"
    assert comparison.parity[0].missing
    with pytest.raises(DataError, match="same held-out pairs"):
        compared(a, b, encoders=[encoders[0], write_ranks(tmp_path / "fewer", ranks[1][:150])])
    with pytest.raises(UsageError, match="--encoders names 1 for 2 arms"):
        compared(a, b, encoders=encoders[:1])
    with pytest.raises(DataError, match="b holds a 'results' artifact"):
        compared(a, b, encoders=[encoders[0], b])

    exported = _exported(tmp_path / "export")
    fingerprint = manifest.fingerprint(exported)
    made_from = {"encoder": {"path": "export", "fingerprint": fingerprint}}  # relative to a folder above the model
    c = write_results(tmp_path / "c", pope_rows(60, 6, lambda *_: True), changed(model=made_from))
    scores = [_zero_shot(tmp_path / f"{at}.json", at / 4) for at in range(2)]
    comparison = compared(c, c, encoders=[encoders[0], exported], encoder_scores=scores)
    assert comparison.retrieval is None  # one of them is no run of ours
    assert [one.relative_error for one in comparison.parity] == [2e-6, 2e-6]
    assert [(one.measure, one.scores, one.chance) for one in comparison.zero_shot] == [
        ("image->text R@1", [0.0, 0.25], 0.01)
    ]
    page = render(comparison)
    assert "2.0e-06" in page
    assert "image-&gt;text R@1" in page
    with pytest.raises(DataError, match="is not the encoder that"):
        compared(a, c, encoders=[exported, exported])
    with pytest.raises(DataError, match="not of the same sets"):
        compared(c, c, encoder_scores=[scores[0], _zero_shot(tmp_path / "x.json", 0.5, pictures=7)])
    for content in ("[1, 2]", "{}", '{"sets": []}'):
        (tmp_path / "no.json").write_text(content)
        with pytest.raises(DataError, match=r"no\.json .*a result file of eval-encoder"):
            compared(c, c, encoder_scores=[scores[0], tmp_path / "no.json"])


def test_zero_shot_figures_are_of_their_own_arm(tmp_path: Path) -> None:
    """Scored as the exported folder or as the run that it came from; a stranger may be another export of it."""
    runs = [write_ranks(tmp_path / f"run{at}", [(at, 1)] * 20) for at in range(2)]
    exported = [_exported(tmp_path / f"export{at}", run) for at, run in enumerate(runs)]
    for at, folder in enumerate(exported):
        (folder / "weights").write_text(str(at))
        manifest.seal(folder, "encoder", {}, {"run": runs[at]})
    arms = [
        write_results(
            tmp_path / f"c{at}",
            pope_rows(60, 6, lambda *_: True),
            changed(model={"encoder": {"path": folder.name, "fingerprint": manifest.fingerprint(folder)}}),
            encoder=f"0{at}",
        )
        for at, folder in enumerate(exported)
    ]
    for scored in (runs, exported):
        files = [
            _zero_shot(tmp_path / f"{at}.json", at / 4, run=manifest.fingerprint(one)) for at, one in enumerate(scored)
        ]
        assert compared(*arms, encoder_scores=files).zero_shot[0].scores == [0.0, 0.25]
        with pytest.raises(DataError, match=r"1\.json is of the encoder of c1, not of c0"):
            compared(*arms, encoder_scores=files[::-1])


def test_parity_retrieval_and_views_are_of_the_encoder_that_was_evaluated(tmp_path: Path) -> None:
    """Not of whatever folder was named, or now lies where the model was."""
    run, other = (write_ranks(tmp_path / name, [(at, 1)] * 20) for at, name in enumerate(("run", "other")))
    exported = _exported(tmp_path / "export", run)
    unknown = write_results(tmp_path / "a", pope_rows(60, 6, lambda *_: True), SETTINGS | {"model": {}})
    assert "does not say" in compared(unknown, unknown, encoders=[exported, exported]).parity[0].missing
    made_from = {"encoder": {"path": "export", "fingerprint": manifest.fingerprint(exported)}}
    b = write_results(tmp_path / "b", pope_rows(60, 6, lambda *_: True), changed(model=made_from))
    assert compared(b, b, encoders=[run, run]).retrieval is not None
    with pytest.raises(DataError, match="other is not the run that .*export was exported from"):
        compared(b, b, encoders=[run, other])

    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "config.json").write_text("{}")
    missing = draw_views([load_arm([b], "b")] * 2, compared(b, b), 1).missing
    assert missing == f"the model folder {tmp_path / 'llava'} was changed after its evaluation"


def test_a_task_without_scores_has_no_flips() -> None:
    """Its answers have none, but for a question that failed."""
    failed, answered = ([row | {"correct": score} for row in pope_rows(1, 1, lambda *_: True)] for score in (0.0, None))
    for before, after in ((failed, answered), (answered, failed), (answered, answered)):
        assert choose_flips(before, after, 8, 0) == Flips(0, 0, [])


def test_nothing_is_attested_of_models_that_say_nothing_of_their_training(tmp_path: Path) -> None:
    rows = pope_rows(60, 6, lambda *_: True)
    a, b = (write_results(tmp_path / name, rows, SETTINGS | {"model": {}}, name) for name in ("0a", "0b"))
    equal, sentence = attestation(compared(a, b))
    assert not equal
    assert "how 0a and 0b were trained, and with which language model, is not recorded" in sentence


def test_seeds_whose_encoders_differ_are_named(tmp_path: Path) -> None:
    rows = pope_rows(60, 6, lambda *_: True)
    a, b, c = (write_results(tmp_path / name, rows, encoder=name) for name in ("0a", "0b", "0c"))
    assert "the runs of 0a have different encoders" in attestation(compared([a, b], c))[1]


def test_a_task_scored_from_0_to_1_keeps_its_digits(tmp_path: Path) -> None:
    """A task of lmms-eval's that is not built in: its scores may be fractions."""
    paths = []
    for name, n in (("0a", 3), ("0b", 4)):
        rows = [{**row, "bench": "pope"} for row in pope_rows(60, 1, lambda image, _, n=n: image % n > 0)]
        path = write_results(tmp_path / name, rows, encoder=name, scored_by=["anls"], metrics={})
        results = json.loads((path / "results.json").read_text())
        results["benches"] = {"docvqa_val": results["benches"]["pope"]}
        (path / "results.json").write_text(json.dumps(results))
        rewrite(path, lambda rows: [{**row, "bench": "docvqa_val"} for row in rows])
        paths.append(path)
    comparison = compared(*paths)
    (measure,) = comparison.benches[0].measures
    assert (number(measure, measure.scores[0]), signed(measure, measure.differences[0].value)) == ("0.667", "+0.083")
    page = render(comparison)
    assert page.count(">0.667<") == 2  # in the table and in the figure


def test_the_cost_of_a_question_counts_those_that_were_asked(tmp_path: Path) -> None:
    cost = {"seconds_encode": 1.0, "seconds_answer": 2.0, "seconds_score": 0.36, "answers_reused": 300}
    a, b = (
        write_results(tmp_path / name, pope_rows(60, 6, lambda *_: True), encoder=name, cost={**COST, **cost, **more})
        for name, more in (("0a", {}), ("0b", {"answers_reused": 360}))
    )
    page = render(compared(a, b))
    assert "<td>51.0</td>" in page  # 3 s for 60 questions, 1 ms each for scoring
    rows = page[page.index("<h2>Cost</h2>") :].split("</tr>")
    assert "<td>0.4</td><td></td>" in rows[2]  # none was asked: there is nothing to tell


def _exported(path: Path, run: Path | None = None) -> Path:
    path.mkdir()
    layer = {"max_relative_error": 2e-6, "min_cosine": 0.9999999}
    certificate = {"float32": {"bound": {"max_relative_error": 1e-5}, "layers": {"hidden_states[-2]": layer}}}
    (path / "parity.json").write_text(json.dumps(certificate))
    manifest.seal(path, "encoder", {}, {"run": run} if run is not None else {})
    return path


def _zero_shot(file: Path, score: float, pictures: int = 100, run: str = "stranger") -> Path:
    entry = {
        "name": "COCO",
        "set": {"task": "retrieval"},
        "sizes": {"pictures": pictures},
        "protocol": "hits",
        "metrics": {"i2t_r1": score, "chance_r1": 0.01},
    }
    file.write_text(json.dumps({"run": {"fingerprint": run}, "sets": [entry]}))
    return file


def test_published_figures_stand_beside_a_whole_benchmark_only(tmp_path: Path) -> None:
    part = compared(*two_runs(tmp_path))
    (bench,) = part.benches
    bench = replace(bench, full_questions=bench.questions)
    whole = replace(part, benches=[bench])
    assert {(row.model, row.scores["pope_f1_score"]) for row in bench.published} >= {
        ("OpenAI CLIP L/14-336", 83.8),
        ("CLIPS L/14-336", 86.7),
    }
    page = render(whole)
    section = page[page.index("Published figures</h2>") : page.index("The encoders alone</h2>")]
    assert section.count("(ours)") == 2
    assert section.count('class="published">published') == len(bench.published)
    assert "arXiv 2411.16828" in section
    assert "does not say accuracy or F1" in section
    page = render(part)
    section = page[page.index("Published figures</h2>") : page.index("The encoders alone</h2>")]
    assert "(ours)" not in section
    assert "they do not compare" in section
    assert not published_for("textvqa")  # the published ones are with OCR tokens


def test_a_picture_cannot_be_any_file(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    paths = []
    for name, right in (("0a", True), ("0b", False)):
        path = write_results(tmp_path / name, pope_rows(2, 2, lambda *_, right=right: right), encoder=name)
        rewrite(path, lambda rows: [{**row, "image_id": "../../secret"} for row in rows])
        paths.append(path)
    with pytest.raises(DataError, match="impossible image_id"):
        compared(*paths)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = two_runs(tmp_path)
    out = tmp_path / "out" / "report.html"
    main([str(a), str(b), "--out", str(out), "--draws", "200"])
    printed = capsys.readouterr().out
    torch_free = "import sys, eval.compare, eval.comparing.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", torch_free], check=False).returncode == 0
    assert "POPE accuracy" in printed
    assert "better" in printed
    assert "do not cover the luck of training" in " ".join(printed.split())
    content = json.loads(out.with_suffix(".json").read_text())
    assert content["names"] == ["a", "b"]
    assert sorted(file.name for file in out.parent.iterdir()) == ["report.html", "report.json"]
    seeds = [
        write_results(
            tmp_path / f"s{at}",
            pope_rows(60, 6, lambda i, q, at=at: (i + q) % (4 + at) > 0),
            changed(model={"run": {"seed": at}}),
        )
        for at in (0, 1, 2)
    ]
    arms = [",".join(map(str, seeds)), str(seeds[0])]
    main([*arms, "--out", str(out), "--draws", "100", "--views", "0", "--name", "three", "one"])
    assert json.loads(out.with_suffix(".json").read_text())["seeds"] == [3, 1]
    for arguments, message in (
        (["nowhere", "--out", "r.html"], "at least two"),
        ([str(a), ",", "--out", "r.html"], "names no folder"),
        ([str(a), str(b), "--out", "r.txt"], "must end in .html"),
        ([str(a), str(b), "--out", "r.html", "--name", "x"], "--name gives 1"),
        ([str(a), str(b), "--out", "r.html", "--draws", "5"], "too few"),
        ([str(a), str(b), "--out", "r.html", "--views", "-1"], "must not be negative"),
        ([str(a), str(b), "--out", f"{a}/results.json/r.html", "--draws", "100", "--views", "0"], "cannot be written"),
    ):
        with pytest.raises(UsageError, match=message):
            main(arguments)
    assert SETTINGS["eval"]["dtype"] == "bfloat16"  # no test has changed the common settings
