"""eval-mllm on tiny data in the benchmarks' own schemas: complete rows, lmms-eval's figures, no network, no secrets."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from bench_sets import picture, questions_of, write_benches
from lmms_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from tokenizers import processors

from encoders import manifest
from encoders.errors import DataError, EvaluationIncomplete
from eval import run
from eval.answering.chat_model import ChatModel
from eval.answering.lmms_model import EncoderSwapLlava
from eval.benches.answers import checked_metrics
from eval.benches.benchmarks import BENCHES
from eval.identity import encoder_facts
from llava_adapter import chat
from llava_adapter.chat import TEMPLATES

NAMES = ("mme", "pope", "gqa", "mmmu")
SUFFIX = "\nAnswer the question using a single word or phrase."
SECRET = "hf_" + "Q" * 34


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benches(tmp_path_factory.mktemp("benches"))


def evaluate(model: Path, benches: Path, out: Path, *more: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """eval-mllm in this process: results.json and the rows."""
    run.main(["--model", str(model), "--data", str(benches), "--out", str(out), "--dtype", "float32", *more])
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return json.loads((out / "results.json").read_text()), rows


def test_eval_mllm_answers_every_question_twice_alike_without_network_or_secrets(
    tiny_llava: Path, benches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    dialled: list[object] = []

    def refuse(self: socket.socket, address: object) -> None:
        dialled.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    before = sorted(benches.rglob("*"))
    first, rows = evaluate(tiny_llava, benches, tmp_path / "first", "--bench", ",".join(NAMES), "--self-check", "4")
    assert not dialled
    assert "HF_TOKEN" not in os.environ
    told = capfd.readouterr()
    files = [file.read_bytes() for file in (tmp_path / "first").rglob("*") if file.is_file()]
    assert not any(SECRET.encode() in text for text in [*files, told.out.encode(), told.err.encode()])

    counts = {name: len(questions_of(name)) for name in NAMES}
    assert {name: entry["questions"] for name, entry in first["benches"].items()} == counts
    assert [(row["bench"], row["index"]) for row in rows] == [
        (name, at) for name in NAMES for at in range(counts[name])
    ]
    shown = {name for row in rows for name in row["image_id"].split("_")}
    assert {file.stem for file in (tmp_path / "first" / "images").iterdir()} == shown
    assert sorted(len(row["image_id"].split("_")) for row in rows if row["bench"] == "mmmu") == [1] * 6 + [3]
    assert first["settings"]["eval"]["dtype"] == "float32"
    sealed = manifest.verify(tmp_path / "first", full=True)
    read = {folder for name in NAMES for folder in BENCHES[name].folders}
    assert (sealed.kind, set(sealed.parents)) == ("results", {"model", *read})  # not the folder with all data in it
    for name, entry in first["benches"].items():
        assert entry["self_check"] == {"questions": 4, "different": 0, "flip_rate": 0.0, "flips": []}
        assert entry["failed"] == []
        assert entry["cost"]["new_tokens"] > 0
        assert entry["cost"]["pictures"] == len(
            {i for r in rows if r["bench"] == name for i in r["image_id"].split("_")}
        )
    assert sorted(tmp_path.iterdir()) == [tmp_path / "first"]  # nothing is left of the journal

    # Other batches, other padding: in float32 the answers stay the same.
    second, again = evaluate(tiny_llava, benches, tmp_path / "second", "--bench", ",".join(NAMES), "--batch-size", "1")
    assert again == rows
    assert len({row["answer"] for row in rows}) > 10
    for key in ("model", "encoder"):
        assert second[key] == first[key]
    assert second["settings"]["data"] == first["settings"]["data"]
    for name, entry in first["benches"].items():
        assert second["benches"][name]["metrics"] == entry["metrics"]
    assert sorted(benches.rglob("*")) == before


def test_limit_takes_whole_pairs_of_mme(
    tiny_llava: Path, benches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, rows = evaluate(tiny_llava, benches, tmp_path / "out", "--bench", "mme", "--limit", "3")
    assert [(row["bench"], row["index"]) for row in rows] == [("mme", index) for index in range(4)]
    # The scores of a part say so wherever they stand.
    assert results["benches"]["mme"]["of_questions"] == 2374
    assert "4 of 2,374" in " ".join(capsys.readouterr().out.split())


def test_the_encoder_is_that_of_the_weights_that_are_loaded(tiny_llava: Path, tmp_path: Path) -> None:
    """Not of what lies beside them, and alike in one file or in shards."""
    config = json.loads((tiny_llava / "config.json").read_text())
    first = encoder_facts(tiny_llava, config)
    folder = shutil.copytree(tiny_llava, tmp_path / "llava")
    state = load_file(folder / "model.safetensors")
    other = {name: tensor + 1 for name, tensor in state.items() if "vision_tower." in name}
    save_file(other, folder / "model-00002-of-00002.safetensors")
    save_file(other, folder / "zzz.safetensors")
    assert encoder_facts(folder, config) == first
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    placed = dict.fromkeys(state, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    assert encoder_facts(folder, config) == first
    save_file(state | other, folder / "model-00001-of-00001.safetensors")
    assert encoder_facts(folder, config) != first


def test_a_path_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    run.print_table({"model": {"path": "a[/b]/[final]"}, "benches": {}})
    assert "a[/b]/[final]" in capsys.readouterr().out


def test_the_table_fits_a_terminal_and_tells_what_is_amiss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    sound = {"questions": 446, "of_questions": 12_578, "images": 60, "empty": 0, "unparsed": 0, "failed": []}
    mme = {"metrics": {"mme_perception_score": 1317.35}, "headline": ["mme_perception_score"], "percent": False}
    entries = {"mme": {**mme, **sound, "seconds": 11.0}, "textvqa": {**mme, **sound, "seconds": 1000.0}}
    run.print_table({"model": {"path": "llava"}, "benches": entries})
    told = capsys.readouterr().out
    assert "  mme       perception_score       1317.35   446 of 12,578       60     11" in told
    assert "every question is answered" in told
    assert "failed" not in told
    entries["mme"]["unparsed"] = 3
    run.print_table({"model": {"path": "llava"}, "benches": entries})
    told = capsys.readouterr().out
    assert re.search(r"images +unread +s *\n", told)
    assert re.search(r" mme .* 60 +3 +11 *\n", told)
    assert "every question is answered" not in told


def test_in_bfloat16_the_rate_of_flips_is_stated(tiny_llava: Path, benches: Path, tmp_path: Path) -> None:
    words = ["--bench", "pope", "--dtype", "bfloat16", "--self-check", "99"]
    results, rows = evaluate(tiny_llava, benches, tmp_path / "out", *words)
    check = results["benches"]["pope"]["self_check"]
    assert check["questions"] == len(rows)
    assert check["flip_rate"] == check["different"] / len(rows) == len(check["flips"]) / len(rows)


def test_failures_are_listed_and_withhold_the_scores(
    tiny_llava: Path, benches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One question fails: exit 5, nothing written but what was answered; with --allow-errors it counts as wrong;
    mended, only its batch is asked again."""
    from eval.answering import rounds

    greedy, asked = rounds.greedy, []

    def broken(model: Any, memory: Any, places: Any, suffixes: Any, *more: Any) -> Any:
        asked.append(len(suffixes))
        if bad in suffixes:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return greedy(model, memory, places, suffixes, *more)

    monkeypatch.setattr(rounds, "greedy", broken)
    model = ChatModel(tiny_llava, "cpu", "float32")
    text = questions_of("pope")[4]["question"] + "\nAnswer the question using a single word or phrase."
    ids = model.prompt_ids(model.prompt(text), 16)
    bad = tuple(ids[len(ids) - ids[::-1].index(model.config.image_token_id) :])
    words = ["--bench", "pope", "--batch-size", "3"]
    with pytest.raises(EvaluationIncomplete, match=r"pope 1 of 9; .*failed.json.*row 4: RuntimeError: CUDA error"):
        evaluate(tiny_llava, benches, tmp_path / "out", *words)
    (listed,) = json.loads((tmp_path / ".out.answers" / "failed.json").read_text())["pope"]
    assert listed["index"] == 4
    assert [file.name for file in tmp_path.iterdir()] == [".out.answers"]

    results, rows = evaluate(tiny_llava, benches, tmp_path / "allowed", *words, "--allow-errors")
    assert results["benches"]["pope"]["failed"] == [listed]
    assert results["benches"]["pope"]["answered"] == 8
    assert (rows[4]["correct"], rows[4]["answer"]) == (0, "")
    assert results["settings"]["eval"]["allow_errors"]

    asked.clear()
    bad = ()
    results, rows = evaluate(tiny_llava, benches, tmp_path / "out", *words)
    assert asked == [3]
    assert results["benches"]["pope"]["cost"]["answers_reused"] == 6
    assert all(row["answer"] for row in rows)


def test_plain_lmms_eval_can_use_the_model_and_fails_loudly(tiny_llava: Path) -> None:
    """By its entry point: no journal, no --allow-errors; a question without answer is an error."""
    from lmms_eval.models import get_model

    model = get_model("encoder_swap_llava")
    assert model is EncoderSwapLlava
    lm = model.create_from_arg_string(f"pretrained={tiny_llava},dtype=float32,device=cpu", {"batch_size": 4})
    split = datasets.Dataset.from_list([{"question": "a"}])
    lm.task_dict = {"task": {"test": split}}
    metadata = {"task": "task", "doc_id": 0, "repeats": 1}
    ask = Instance("generate_until", ("a", {}, lambda doc: [doc["nothing"]], 0, "task", "test"), 0, metadata)
    with pytest.raises(EvaluationIncomplete, match=r"task: no answer to 1 of 1 questions: row 0 \('a'\): .*KeyError"):
        lm.generate_until([ask])


def test_figures_that_the_rows_do_not_give_are_no_score() -> None:
    rows = [{"correct": 1.0, "prediction": "a", "target": "a", "category": "", "question_id": "0"}]
    assert checked_metrics(BENCHES["gqa"], rows, {"exact_match": 1.0}) == {"exact_match": 1.0}
    for printed in ({"exact_match": 1 - 1e-6}, {"exact_match": float("nan")}, {"bleu": 1.0}):
        with pytest.raises(EvaluationIncomplete, match="gqa"):
            checked_metrics(BENCHES["gqa"], rows, printed)


def test_missing_data_is_named_before_anything_is_loaded(tiny_llava: Path, benches: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lmms-lab-encoder/MME is missing"):
        evaluate(tiny_llava, tmp_path, tmp_path / "out")


def test_prompt_ids_are_those_of_training_and_of_the_processor(tiny_llava: Path) -> None:
    model = ChatModel(tiny_llava, "cpu", "float32")
    question = "Is there a star in the picture?" + SUFFIX
    ids = model.prompt_ids(model.prompt(question), image_tokens=16)
    messages = [{"role": "user", "content": f"<image>\n{question}"}]
    assert ids == chat.encode_prompt(model.tokenizer, TEMPLATES["llama3"], messages, image_tokens=16)
    # Even with the tokenizer of most published models, which adds a BOS of its own.
    bos, bos_id = model.tokenizer.bos_token, model.tokenizer.bos_token_id
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bos_id)]
    )
    assert model.tokenizer("a")["input_ids"][0] == bos_id
    assert model.prompt_ids(model.prompt(question), image_tokens=16) == ids
    assert ids.count(bos_id) == 1
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture(0)}, {"type": "text", "text": question}]
    stock = model.processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert ids == list(np.ravel(stock["input_ids"]))


def test_answers_are_those_of_the_stock_generate(tiny_llava: Path) -> None:
    """One encode, our prompt and left padding against pixel_values through transformers, one question at a time."""
    model = ChatModel(tiny_llava, "cpu", "float32")
    pictures = [picture(0), picture(1)]
    prompts = [
        model.prompt(question) for question in ("Is there a star?", "What colour is the big house? Answer" + SUFFIX)
    ]
    answers = model.answer(prompts, model.encode(pictures), max_new_tokens=8)
    for prompt, shown, answer in zip(prompts, pictures, answers, strict=True):
        inputs = model.processor(text=prompt, images=shown, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            new = model.model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        assert answer == model.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert answers[0] != answers[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--help"], 0, "--bench"),
        (["--bench", "mme,pope"], 2, "--model DIR"),
        (["--model", ".", "--bench", "mmee"], 2, "known: mme, pope, gqa, textvqa"),
        (["--model", "."], 4, "config.json"),
        (["--lmit", "3"], 2, "--lmit"),
    ],
)
def test_help_and_usage_errors_import_no_torch(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom eval.run import cli\ntry:\n    cli()\nfinally:\n"
        "    assert not {'torch', 'transformers', 'lmms_eval'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stdout + done.stderr
