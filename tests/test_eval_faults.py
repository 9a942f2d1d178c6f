"""Faults injected into eval-mllm, one at a time: none is silent, each has its exit code, and no results are written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from bench_sets import pope, write_benches, write_repository
from PIL import Image
from safetensors.torch import load_file, save_file

from encoders.errors import SwapError
from eval import bench_run, run
from eval.answering import journal, rounds, workers
from eval.answering.asking import Asking
from eval.answering.chat_model import ChatModel
from eval.answering.lmms_model import EncoderSwapLlava


class Case:
    """A run that would succeed, for a fault to spoil."""

    def __init__(self, llava: Path, benches: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.llava, self.benches, self.place, self.patch = llava, benches, place, monkeypatch
        self.options = {"--model": str(llava), "--data": str(benches), "--bench": "pope", "--dtype": "float32"}
        self.options |= {"--out": str(place / "out"), "--device": "cpu"}

    def set(self, **options: str) -> None:
        self.options |= {"--" + name.replace("_", "-"): value for name, value in options.items()}

    def own_model(self) -> Path:
        folder = shutil.copytree(self.llava, self.place / "llava")
        self.set(model=str(folder))
        return folder

    def own_pope(self) -> Path:
        home = self.place / "data" / "lmms-lab-encoder" / "POPE"
        shutil.copytree(self.benches / "lmms-lab-encoder" / "POPE", home)
        self.set(data=str(self.place / "data"))
        return home

    def edit_json(self, name: str, **changes: object) -> None:
        file = self.own_model() / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    def edit_weights(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        file = self.own_model() / "model.safetensors"
        state = load_file(file)
        change(state)
        save_file(state, file, metadata={"format": "pt"})

    def greedy(self, breaks: Callable[[int], Exception | None]) -> None:
        """Let the decoding of `breaks`(rows) fail."""
        works = rounds.greedy

        def greedy(model: Any, memory: Any, places: Any, suffixes: Sequence[Any], *more: Any) -> Any:
            if (error := breaks(len(suffixes))) is not None:
                raise error
            return works(model, memory, places, suffixes, *more)

        self.patch.setattr(rounds, "greedy", greedy)


def raising(error: Exception) -> Callable[..., Any]:
    def raise_it(*_: object, **__: object) -> Any:
        raise error

    return raise_it


def damage(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])


def no_column(case: Case) -> None:
    rows = [{key: value for key, value in row.items() if key != "question"} for row in pope()]
    home = case.own_pope()
    shutil.rmtree(home)
    write_repository(home, {("default", "test"): rows})


def undecodable(case: Case) -> None:
    """Torn in the middle, which lmms-eval makes Pillow overlook."""
    home = case.own_pope()
    (file,) = home.rglob("*.parquet")
    table = datasets.Dataset.from_parquet(str(file)).cast_column("image", datasets.Image(decode=False))
    rows = table.to_list()
    rows[4]["image"]["bytes"] = rows[4]["image"]["bytes"][:3000]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
    table.cast(datasets.Features({**table.features, "image": datasets.Image()})).to_parquet(str(file))


def held_by_another(case: Case) -> None:
    holder = journal.working_place(case.place / "out")
    holder.__enter__()
    case.patch.setattr(case, "keep", holder, raising=False)


def wrong_size(case: Case) -> None:
    folder = case.own_model()
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).write_text((folder / name).read_text().replace("32", "40"))


def no_image_processor(case: Case) -> None:
    folder = case.own_model()
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink()


def killed_worker(case: Case) -> None:
    """By the system, while it answers."""

    class Died(workers.Here):
        def answers(self, rounds: Any) -> Any:
            raise workers.EvaluationIncomplete("worker 1 (process 4711, cuda:1) died (exit code -9)")

    case.patch.setattr(workers, "Here", Died)


def no_room_for(case: Case, name: str) -> None:
    works = Path.open

    def full(self: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
        if self.name == name and "w" in mode:
            raise OSError(28, "No space left on device", str(self))
        return works(self, mode, *more, **options)

    case.patch.setattr(Path, "open", full)


FULL = OSError(28, "No space left on device")
CUDA_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
LM_HEAD = "language_model.lm_head.weight"
FAULTS: dict[str, tuple[Callable[[Case], object], int, str]] = {
    # Asked for something impossible.
    "no such bench": (lambda case: case.set(bench="popes"), 2, "unknown benchmark 'popes'"),
    "no question": (lambda case: case.set(limit="0"), 2, "--limit must be at least 1"),
    "no batch": (lambda case: case.set(batch_size="0"), 2, "--batch-size must be at least 1"),
    "no process": (lambda case: case.set(processes="0"), 2, "--processes must be at least 1"),
    "no self-check": (lambda case: case.set(self_check="-1"), 2, "--self-check must be at least 0"),
    "no gpu": (lambda case: case.set(device="cuda"), 2, "no GPU"),
    "output is in use": (held_by_another, 2, "another eval-mllm"),
    "output is something else": (
        lambda case: (case.place / "out").mkdir() or (case.place / "out" / "thesis.tex").touch(),
        2,
        "not an artifact",
    ),
    "output below a file": (
        lambda case: case.set(out=str(case.own_model() / "config.json" / "out")),
        2,
        "answers cannot be kept .*Not a directory.*--out",
    ),
    # Data.
    "no data": (lambda case: case.set(data=str(case.place)), 3, "POPE is missing"),
    "no card": (lambda case: (case.own_pope() / "README.md").unlink(), 3, "README.md"),
    "card that is no yaml": (lambda case: (case.own_pope() / "README.md").write_text("---\na: [\n---\n"), 3, "POPE"),
    "no split": (lambda case: next(case.own_pope().rglob("*.parquet")).unlink(), 3, "POPE"),
    "no column": (no_column, 3, "question"),
    "torn table": (lambda case: damage(next(case.own_pope().rglob("*.parquet")), 3000), 3, "POPE"),
    # The model.
    "no model": (lambda case: case.set(model=str(case.place)), 4, "no config.json"),
    "config is no json": (lambda case: (case.own_model() / "config.json").write_text("{"), 4, "config.json"),
    "another kind of model": (lambda case: case.edit_json("config.json", model_type="llama"), 4, "not 'llava'"),
    "torn weights": (lambda case: damage(case.own_model() / "model.safetensors", 5000), 4, "model.safetensors"),
    "a weight is missing": (lambda case: case.edit_weights(lambda state: state.pop(LM_HEAD)), 4, "lm_head.weight"),
    "a weight is not a number": (
        lambda case: case.edit_weights(lambda state: state[LM_HEAD].fill_(float("nan"))),
        4,
        "NaN or infinite",
    ),
    "no tokenizer": (lambda case: (case.own_model() / "tokenizer.json").unlink(), 4, "no tokenizer.json"),
    "no template": (lambda case: (case.own_model() / "chat_template.jinja").unlink(), 4, "no chat template"),
    "template without picture": (
        lambda case: (case.own_model() / "chat_template.jinja").write_text("{{ messages[0]['role'] }}"),
        4,
        "0 image placeholders",
    ),
    "template that fails": (
        lambda case: (case.own_model() / "chat_template.jinja").write_text("{{ nothing.at.all }}"),
        4,
        "cannot be used",
    ),
    "pictures of the wrong size": (wrong_size, 4, "cannot be asked about a picture"),
    "no image processor": (no_image_processor, 4, "llava.*processor.*cannot be read"),
    "processor is no json": (
        lambda case: (case.own_model() / "processor_config.json").write_text("{"),
        4,
        "llava.*processor.*cannot be read",
    ),
    "tokenizer is no json": (
        lambda case: (case.own_model() / "tokenizer.json").write_text("{"),
        4,
        "llava.*processor.*cannot be read",
    ),
    "generation config is no json": (
        lambda case: (case.own_model() / "generation_config.json").write_text("{"),
        4,
        "generation_config.json.*cannot be read",
    ),
    # On the way.
    "every answer fails": (lambda case: case.greedy(lambda rows: RuntimeError("kernel")), 5, "pope 9 of 9"),
    "too little memory for one": (lambda case: case.greedy(lambda rows: CUDA_FULL), 5, "out of memory"),
    "a batch gives too few answers": (
        lambda case: case.patch.setattr(rounds, "greedy", lambda *_: []),
        5,
        "0 answers to 1",
    ),
    "picture that cannot be decoded": (undecodable, 5, "pope 1 of 9.*row 4 cannot be read"),
    "worker killed": (killed_worker, 5, "worker 1"),
    "disk full: answers": (lambda case: case.patch.setattr(os, "fsync", raising(FULL)), 5, "No space left"),
    "disk full: pictures": (lambda case: case.patch.setattr(Image.Image, "save", raising(FULL)), 5, "No space left"),
    "disk full: samples": (lambda case: no_room_for(case, "samples.jsonl"), 5, "No space left"),
    "an answer is lost": (
        lambda case: case.patch.setattr(
            EncoderSwapLlava, "generate_until", lambda self, requests: ["yes"] * (len(requests) - 1)
        ),
        5,
        "8 answers to 9",
    ),
    "scoring fails": (
        lambda case: case.patch.setattr("lmms_eval.evaluator.evaluate", raising(ValueError("no gold"))),
        5,
        "could not score.*no gold",
    ),
    "rows and figures differ": (
        lambda case: case.patch.setattr(bench_run, "printed_metrics", lambda printed: {"pope_accuracy": 0.99}),
        5,
        "printed 0.99",
    ),
    "self-check finds another answer": (
        lambda case: case.set(self_check="3") or case.patch.setattr(Asking, "_alone", lambda *_: "no, alone"),
        5,
        "3 of 3 questions have another answer",
    ),
    "self-check breaks down": (
        lambda case: case.set(self_check="3") or case.patch.setattr(Asking, "_alone", raising(CUDA_FULL)),
        5,
        "pope: the self-check failed.*out of memory",
    ),
}


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benches(tmp_path_factory.mktemp("benches"))


@pytest.fixture(scope="module")
def loaded(tiny_llava: Path) -> ChatModel:
    return ChatModel(tiny_llava, "cpu", "float32")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_with_its_exit_code(
    fault: str,
    tiny_llava: Path,
    benches: Path,
    loaded: ChatModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil, code, message = FAULTS[fault]
    case = Case(tiny_llava, benches, tmp_path, monkeypatch)
    # The model that works is loaded once for all.
    load = workers.ChatModel
    monkeypatch.setattr(
        workers, "ChatModel", lambda folder, *how: loaded if folder == tiny_llava else load(folder, *how)
    )
    spoil(case)
    with pytest.raises(SwapError, match=f"(?s){message}") as told:
        run.main([word for pair in case.options.items() for word in pair])
    assert told.value.exit_code == code
    assert not (tmp_path / "out" / "results.json").exists()
    assert not list(tmp_path.glob(".out.*.partial"))


def test_there_are_thirty() -> None:
    assert len(FAULTS) >= 30


def test_the_command_itself_ends_with_the_code(tmp_path: Path) -> None:
    """And says nothing but what is wrong."""
    done = subprocess.run([sys.executable, "-m", "eval.run", "--model", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 4
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_hub_that_cannot_be_reached_is_an_error_of_the_data(tiny_llava: Path, tmp_path: Path) -> None:
    """Another process: the Hub's address is read on import."""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret"}
    done = subprocess.run(
        [sys.executable, "-m", "eval.run", "--model", str(tiny_llava), "--bench", "pope", "--out", str(tmp_path / "o")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 3, done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
