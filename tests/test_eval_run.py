"""eval-mllm on tiny data in the benchmarks' own schemas: complete rows, lmms-eval's figures, loud failures."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tokenizers import processors

from encoders import manifest
from encoders.errors import DataError, EvaluationIncomplete
from eval import run
from eval.answers import checked_metrics
from eval.benchmarks import BENCHES
from eval.chat_model import ChatModel
from eval.lmms_model import EncoderSwapLlava, picture_id
from eval.staging import staged
from llava_adapter import chat
from llava_adapter.chat import TEMPLATES

PICTURES = 3
QUESTIONS = {"mme": 6, "pope": 6, "gqa": 6, "textvqa": 6}
SUFFIX = "\nAnswer the question using a single word or phrase."


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def write_dataset(folder: Path, configs: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]]) -> None:
    """A local dataset repository: a parquet per config (name -> split, rows) and the README that lists them."""
    lines = ["---", "configs:"]
    for name, (split, rows) in configs.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_list([dict(row) for row in rows])
        if "image" in table.column_names:
            table = table.cast_column("image", datasets.Image())
        table.to_parquet(folder / name / f"{split}-0.parquet")
        lines += [f"- config_name: {name}", "  data_files:", f"  - split: {split}", f"    path: {name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six questions of each benchmark on three pictures that all share."""
    folder = tmp_path_factory.mktemp("benches")
    home = folder / "lmms-lab-encoder"
    shown = [picture(index // 2) for index in range(6)]
    yes_no = ["yes", "no", "yes", "no", "no", "yes"]
    rows = [
        {
            "id": str(i),
            "question_id": str(i),
            "question": f"Is there a star {i}?",
            "answer": yes_no[i],
            "category": "popular",
        }
        for i in range(6)
    ]
    pope = [{**rows[i], "image": shown[(2 * i) % 5]} for i in range(6)]
    mme = [
        {
            "question_id": f"{i // 2}.png",
            "question": f"Is the dog red {i}? Please answer yes or no.",
            "answer": ["Yes", "No"][i % 2],
            "category": ["existence", "count", "code_reasoning"][i // 2],
            "image": shown[i],
        }
        for i in range(6)
    ]
    words = ["red", "green", "café", "dog", "two", "tree"]
    gqa = [
        {"id": f"g{i}", "imageId": f"n{i // 2}", "question": f"What is it {i}?", "answer": words[i]} for i in range(6)
    ]
    gqa_images = [{"id": f"n{i}", "image": picture(i)} for i in range(PICTURES)]
    textvqa = [
        {
            "question_id": f"{34602 + i}",
            "question": f"what is written {i}?",
            "answers": [words[i]] * 8 + ["apple", "the car"],
            "image": shown[i],
        }
        for i in range(6)
    ]
    write_dataset(home / "POPE", {"default": ("test", pope)})
    write_dataset(home / "MME", {"default": ("test", mme)})
    write_dataset(
        home / "GQA",
        {"testdev_balanced_instructions": ("testdev", gqa), "testdev_balanced_images": ("testdev", gqa_images)},
    )
    write_dataset(home / "textvqa", {"default": ("validation", textvqa)})
    return folder


def evaluate(model: Path, benches: Path, out: Path, *more: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """eval-mllm in this process: results.json and the rows."""
    run.main(["--model", str(model), "--data", str(benches), "--out", str(out), "--dtype", "float32", *more])
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return json.loads((out / "results.json").read_text()), rows


class Scripted(lmms):
    """Says what it is told, in the order of the rows."""

    def __init__(self, answers: Sequence[str]) -> None:
        super().__init__()
        self.answers = answers
        self.max_new_tokens = 0
        self.image_ids: dict[tuple[str, int], str] = {}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.image_ids |= {(request.args[4], request.args[3]): "picture" for request in requests}
        return [self.answers[request.args[3]] for request in requests if request.args[3] < len(self.answers)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError


# Right, wrong, odd-cased, empty, almost right, not ASCII.
ANSWERS = {
    "pope": (["yes", "yes", " YES", "", "No.", "ja ☂"], {"pope_accuracy": 2 / 6, "pope_precision": 2 / 3}),
    "mme": (["Yes.", "no", "NO", "nope", "", "ÿes"], {"mme_perception_score": 200 + 50.0, "mme_cognition_score": 0.0}),
    "gqa": (["Red.", "blue", "CAFÉ", "", "two", "a tree"], {"exact_match": 3 / 6}),
    "textvqa": (["red", "green!", "café", "", "2", "apple"], None),
}


@pytest.mark.parametrize("name", BENCHES)
def test_rows_give_back_the_figures_that_lmms_eval_printed(name: str, benches: Path) -> None:
    bench, (answers, expected) = BENCHES[name], ANSWERS[name]
    # run_bench itself raises if a figure from the rows differs by more than 1e-9 from lmms-eval's.
    with staged(benches, bench.folders):
        rows, entry = run.run_bench(bench, run.load_task(bench), Scripted(answers), None)
    assert [row["answer"] for row in rows] == answers
    assert entry["empty"] == 1
    assert entry["answered"] == entry["questions"] == QUESTIONS[name]
    for metric, value in (expected or {}).items():
        assert entry["metrics"][metric] == pytest.approx(value, abs=1e-9)
    if name == "textvqa":
        assert [row["target"] for row in rows] == ["red", "green", "café", "dog", "2", "tree"]
        assert [row["correct"] for row in rows][:4] == [1, 1, 1, 0]


def test_an_unanswered_question_is_no_score(benches: Path) -> None:
    with (
        staged(benches, BENCHES["pope"].folders),
        pytest.raises(EvaluationIncomplete, match=r"pope: 5 answers to 6 .*\[5\]"),
    ):
        run.run_bench(BENCHES["pope"], run.load_task(BENCHES["pope"]), Scripted(["yes"] * 5), None)


def test_eval_mllm_answers_every_question_twice_alike(tiny_llava: Path, benches: Path, tmp_path: Path) -> None:
    before = sorted(benches.rglob("*"))
    first, rows = evaluate(tiny_llava, benches, tmp_path / "first")
    assert {name: entry["questions"] for name, entry in first["benches"].items()} == QUESTIONS
    assert [row["index"] for row in rows] == [index for count in QUESTIONS.values() for index in range(count)]
    assert sorted({file.stem for file in (tmp_path / "first" / "images").iterdir()}) == sorted(
        {row["image_id"] for row in rows}
    )
    assert len({row["image_id"] for row in rows}) == PICTURES
    assert first["settings"]["eval"]["dtype"] == "float32"
    assert manifest.verify(tmp_path / "first", full=True).kind == "results"
    assert "16" in first["benches"]["textvqa"]["protocol"]["max_new_tokens"]

    # Other batches, other padding: in float32 the answers stay the same.
    second, again = evaluate(tiny_llava, benches, tmp_path / "second", "--batch-size", "1")
    assert again == rows
    assert {row["answer"] for row in rows} != {""}
    for key in ("model", "encoder"):
        assert second[key] == first[key]
    assert second["settings"]["data"] == first["settings"]["data"]
    for name, entry in first["benches"].items():
        assert second["benches"][name]["metrics"] == entry["metrics"]
    assert sorted(benches.rglob("*")) == before


def test_limit_takes_whole_pairs_of_mme(tiny_llava: Path, benches: Path, tmp_path: Path) -> None:
    _, rows = evaluate(tiny_llava, benches, tmp_path / "out", "--bench", "mme,gqa", "--limit", "3")
    assert [(row["bench"], row["index"]) for row in rows] == [
        *(("mme", index) for index in range(4)),
        *(("gqa", index) for index in range(3)),
    ]


def test_each_picture_is_encoded_once_and_each_answer_is_to_its_question(tiny_llava: Path, benches: Path) -> None:
    lm = EncoderSwapLlava(str(tiny_llava), batch_size=2, device="cpu", dtype="float32")
    encoded: list[int] = []
    lm.chat.model.model.vision_tower.register_forward_hook(
        lambda tower, args, output: encoded.append(len(output.last_hidden_state))
    )
    bench = BENCHES["pope"]  # whose pictures come in the order 0 1 2 0 1 0
    with staged(benches, bench.folders):
        rows, entry = run.run_bench(bench, run.load_task(bench), lm, None)
    assert sum(encoded) == entry["images"] == PICTURES
    pictures = [picture(index) for index in range(PICTURES)]
    features = dict(zip(map(picture_id, pictures), lm.chat.encode(pictures), strict=True))
    for row in rows:
        alone = lm.chat.answer([lm.chat.prompt(row["prompt"])], [features[row["image_id"]]], bench.max_new_tokens)
        assert [row["answer"]] == alone
    assert len({row["answer"] for row in rows}) > 1


def test_figures_that_the_rows_do_not_give_are_no_score() -> None:
    rows = [{"correct": 1.0, "prediction": "a", "target": "a", "category": "", "question_id": "0"}]
    assert checked_metrics(BENCHES["gqa"], rows, {"exact_match": 1.0}) == {"exact_match": 1.0}
    for printed in ({"exact_match": 1 - 1e-6}, {"exact_match": float("nan")}, {"bleu": 1.0}):
        with pytest.raises(EvaluationIncomplete, match="gqa"):
            checked_metrics(BENCHES["gqa"], rows, printed)


def test_a_raised_generation_ends_the_run_without_results(
    tiny_llava: Path, benches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: ChatModel, *args: object) -> list[str]:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(ChatModel, "answer", broken)
    with pytest.raises(EvaluationIncomplete, match=r"mme.*row 0.*Is the dog red.*picture \w{16}.*CUDA out of memory"):
        evaluate(tiny_llava, benches, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_missing_data_is_named_before_anything_is_loaded(tiny_llava: Path, benches: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lmms-lab-encoder/MME is missing"):
        evaluate(tiny_llava, tmp_path, tmp_path / "out")


def test_data_written_anew_is_read_anew(tmp_path: Path) -> None:
    """The datasets library would give the questions of the first folder to all that look like it."""
    asked = []
    for place, question in (("a", "Is it old?"), ("a", "Is it new?"), ("b", "Is it elsewhere?")):
        row = {"question_id": "0", "question": question, "answer": "no", "category": "popular", "image": picture(0)}
        write_dataset(tmp_path / place / "lmms-lab-encoder" / "POPE", {"default": ("test", [row])})
        with staged(tmp_path / place, BENCHES["pope"].folders):
            asked.append(run.load_task(BENCHES["pope"]).eval_docs[0]["question"])
    assert asked == ["Is it old?", "Is it new?", "Is it elsewhere?"]


def test_unreadable_data_is_an_error_of_the_data(tiny_llava: Path, tmp_path: Path) -> None:
    rows = [{"question_id": "0", "question": "Is it?", "answer": "maybe", "category": "popular", "image": picture(0)}]
    write_dataset(tmp_path / "lmms-lab-encoder" / "POPE", {"default": ("train", rows)})
    with pytest.raises(DataError, match=r"pope: cannot load lmms-lab-encoder/POPE .*test"):
        evaluate(tiny_llava, tmp_path, tmp_path / "out", "--bench", "pope")


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
