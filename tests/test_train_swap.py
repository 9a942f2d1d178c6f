"""The whole thread, tiny: scenes -> two encoders -> two LLaVAs -> four benchmarks -> a report; and nothing twice."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from encoders import manifest
from encoders.errors import Preempted
from train import ranks
from train.pipeline import Runner, Stage, StageFailed
from train.swap import show

ROOT = Path(__file__).resolve().parent.parent


def write_recipes(folder: Path, llm: Path) -> Path:
    """Every recipe of the demo, shrunk; returns the one for train/swap.py."""
    work = folder / "work"
    scenes = work / "scenes"
    run = {"workers": 0, "threads": 1, "log_every": 1, "save_every": 2}
    pairs = {split: str(scenes / "shards" / split) for split in ("train", "val", "test")}
    model = {
        "embed_dim": 16,
        "vision": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "heads": 2, "mlp_width": 64},
        "text": {"vocab_size": 400, "length": 16, "width": 32, "layers": 1, "heads": 2},
    }
    captioner = {"tokens": 24, "width": 32, "layers": 1, "heads": 2}
    chats = {"images": str(scenes), "max_length": 512}
    pretrain = {"run": {**run, "steps": 4, "batch_size": 16}, "optim": {"warmup_steps": 1}, "data": pairs}
    tune = {"run": {**run, "steps": 3, "batch_size": 4}, "optim": {"weight_decay": 0.0}}
    recipes = {
        "clip": {**pretrain, "model": {**model, "objective": "clip"}},
        "clips": {
            **pretrain,
            "model": {
                **model,
                "objective": "clips",
                "captioner": captioner,
                "clips": {"cut": "sub_caption", "cut_tokens": 8},
            },
        },
        "resolution": {"image_size": 48, **pretrain, "run": {**pretrain["run"], "steps": 2}},
        "projector": {**tune, "data": {**chats, "chats": str(scenes / "chats_caption.json")}},
        "lora": {**tune, "stage": "lora", "lora_r": 4, "data": {**chats, "chats": str(scenes / "chats.json")}},
    }
    placeholders = {"projector": {"encoder": "-", "llm": "-"}, "lora": {"llava": "-"}}  # the pipeline fills them in
    for name, content in recipes.items():
        (folder / f"{name}.yaml").write_text(json.dumps({**content, **placeholders.get(name, {})}))
    sizes = {"classes": 12, "image-size": 48, "train": 64, "val": 8, "test": 12, "chats": 12, "bench-images": 2}
    swap = {
        "work": str(work),
        "arms": {arm: {"recipe": str(folder / f"{arm}.yaml")} for arm in ("clip", "clips")},
        **{stage: str(folder / f"{stage}.yaml") for stage in ("resolution", "projector")},
        "tune": str(folder / "lora.yaml"),
        "llm": str(llm),
        "scenes": sizes,
        "launch": ["--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"],
        "jobs": 2,
    }
    (folder / "swap.yaml").write_text(json.dumps(swap))
    return folder / "swap.yaml"


def swap(recipe: Path, *options: str) -> str:
    command = [sys.executable, str(ROOT / "train" / "swap.py"), "--config", str(recipe), *options]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    return finished.stdout


WRITER = """
import sys, pathlib
from encoders import manifest
from train.pipeline import Runner, Stage, StageFailed
out = pathlib.Path(sys.argv[sys.argv.index("--run.out") + 1])
out.mkdir(parents=True, exist_ok=True)
with (out / "runs.txt").open("a") as stream:
    stream.write(" ".join(sys.argv[1:]) + chr(10))
if "--fail" in sys.argv and "--resume" not in sys.argv:
    sys.exit(3)
manifest.seal(out, "encoder-run", {})
"""


def test_runner_skips_resumes_and_sets_aside(tmp_path: Path) -> None:
    data, recipe, out = tmp_path / "data.txt", tmp_path / "recipe.yaml", tmp_path / "work" / "arm" / "pretrain"
    data.write_text("one")
    recipe.write_text("{run: {steps: 3, log_every: 1}}")

    def run(*words: str) -> int:
        command = ["--run.out", str(out), *words]
        stage = Stage("arm/pretrain", command, [data], out, program=(sys.executable, "-c", WRITER), recipe=recipe)
        return Runner(tmp_path / "work", jobs=1).run([stage])

    assert [run(), run()] == [1, 0]
    recipe.write_text("# a comment\n{run: {steps: 3, log_every: 5}}")  # nothing that decides the result
    assert run() == 0
    data.write_text("two")
    assert run() == 1
    [old] = (tmp_path / "work" / "old").iterdir()
    assert (old / "runs.txt").read_text().count("\n") == 1  # the first run is still there
    with pytest.raises(StageFailed, match="arm/pretrain ended with code 3"):
        run("--fail")
    assert run("--fail") == 1  # and "two" has been set aside too
    assert len(list((tmp_path / "work" / "old").iterdir())) == 2
    assert "--resume" in (out / "runs.txt").read_text().splitlines()[-1]


TRAINER = """
import json, os, signal, sys, time, pathlib
from encoders import manifest
from train.ranks import Rank, _started
import socket
out = pathlib.Path(sys.argv[sys.argv.index("--run.out") + 1])
out.mkdir(parents=True, exist_ok=True)
if "--resume" in sys.argv:
    manifest.seal(out, "encoder-run", {})
    sys.exit()
if os.fork():  # the launcher: a signal would kill it and leave its rank
    os.wait()
    sys.exit(1)
def leave(number, frame):
    time.sleep(0.3)
    (out / "checkpoint").write_text(str(number))
    os._exit(75)
signal.signal(signal.SIGUSR1, leave)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
rank = Rank(0, socket.gethostname(), os.getpid(), _started(os.getpid()))
manifest.write_json(out / "ranks.json", [rank.__dict__])
print("steps", flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_swap_asked_to_stop_leaves_no_stage_behind(tmp_path: Path, number: int) -> None:
    """The rank writes its checkpoint, the launcher and a stage without ranks end, and the next run goes on."""
    recipe, out, work = tmp_path / "recipe.yaml", tmp_path / "work" / "a" / "pretrain", tmp_path / "work"
    recipe.write_text("{run: {steps: 3}}")
    other = (sys.executable, "-c", "import os, time; print('asks', os.getpid(), flush=True); time.sleep(300)")
    stages = [
        Stage("a/pretrain", ["--run.out", str(out)], [], out, [], (sys.executable, "-c", TRAINER), recipe),
        Stage("b/results", [], [], work / "b" / "results", [], other),
    ]
    asked: list[int] = []

    def stop() -> None:
        logs = [work / "logs" / f"{stage.name}.log" for stage in stages]
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not all(log.is_file() and log.read_text() for log in logs):
            time.sleep(0.05)
        asked.append(int(logs[1].read_text().split()[-1]))
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Preempted, match="run the same command again"):
        Runner(work, jobs=2).run(stages)
    assert signal.getsignal(number) == before
    assert (out / "checkpoint").read_text() == str(int(signal.SIGUSR1))
    [rank] = ranks.read(out)
    assert not rank.alive
    with pytest.raises(ProcessLookupError):
        os.kill(asked[0], 0)
    assert Runner(work, jobs=1).states(stages) == {"a/pretrain": "continues", "b/results": "runs: it did not finish"}
    assert "--resume" in show(stages, Runner(work, jobs=1))
    assert Runner(work, jobs=1).run(stages[:1]) == 1


def test_two_runs_do_not_work_in_one_folder(tmp_path: Path) -> None:
    inner = (
        "from pathlib import Path; from train.pipeline import Runner; from encoders.errors import run_command\n"
        f"run_command(lambda: Runner(Path({str(tmp_path / 'work')!r}), 1).run([]))"
    )
    stage = Stage("a/one", [], [], tmp_path / "out", program=(sys.executable, "-c", inner))
    with pytest.raises(StageFailed, match="ended with code 2"):
        Runner(tmp_path / "work", jobs=1).run([stage])
    assert "another train/swap.py works in" in (tmp_path / "work" / "logs" / "a" / "one.log").read_text()


@pytest.fixture(scope="module")
def recipe(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipes(tmp_path_factory.mktemp("swap"), tiny_llm)


@pytest.fixture(scope="module")
def work(recipe: Path) -> Path:
    output = swap(recipe)
    assert "report.html" in output
    return recipe.parent / "work"


def test_every_artifact_loads_in_stock_transformers_and_holds_together(work: Path) -> None:
    for arm in ("clip", "clips"):
        encoder, info = CLIPVisionModel.from_pretrained(work / arm / "encoder", output_loading_info=True)
        assert not any(info.values())
        assert encoder.config.image_size == 48
        llava, info = LlavaForConditionalGeneration.from_pretrained(work / arm / "llava", output_loading_info=True)
        assert not any(info.values())
        tower = llava.model.vision_tower.state_dict()
        for name, tensor in encoder.state_dict().items():  # frozen through both stages, bfloat16 on the way
            assert tower[name.removeprefix("vision_model.")].equal(tensor.bfloat16().to(tower[name].dtype))
        parents = manifest.read(work / arm / "results", "results").parents
        assert parents["model"].fingerprint == manifest.read(work / arm / "llava", "llava").fingerprint
    weights = [load_file(work / arm / "llava" / "model.safetensors") for arm in ("clip", "clips")]
    assert any(not weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_every_question_has_a_row_and_the_report_compares_the_arms(work: Path) -> None:
    for arm in ("clip", "clips"):
        results = json.loads((work / arm / "results" / "results.json").read_text())
        rows = [json.loads(line) for line in (work / arm / "results" / "samples.jsonl").read_text().splitlines()]
        assert set(results["benches"]) == {"mme", "pope", "gqa", "textvqa"}
        for name, bench in results["benches"].items():
            assert bench["answered"] == bench["questions"] == sum(row["bench"] == name for row in rows) > 0
    page = (work / "report.html").read_text()
    assert "clips" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert json.loads((work / "report.json").read_text())["names"] == ["clip", "clips"]
    assert "Everything but the encoder is equal" in page


def test_a_second_run_does_nothing_and_a_change_only_what_depends_on_it(recipe: Path, work: Path) -> None:
    again = swap(recipe)
    assert "all is up to date" in again
    assert " starts" not in again
    assert "clips against clip" in again  # the table is shown all the same
    samples = work / "clips" / "results" / "samples.jsonl"
    samples.write_text(samples.read_text() + "\n")  # somebody touches a result
    mended = swap(recipe)
    ran = [line.split("]")[0][1:] for line in mended.splitlines() if line.endswith(" starts")]
    assert ran == ["clips/results"] or ran == ["clips/results", "report"]
