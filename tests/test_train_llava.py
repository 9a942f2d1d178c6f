"""LLaVA stages as runs: resumed, split over processes and micro-batches, packed, planned without being run."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import write_encoder, write_llm
from llava_runs import CONVERSATIONS, STEPS, config, losses, sealed, train, write_chats
from pair_runs import ROOT, finish, torchrun
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig

from encoders import manifest
from encoders.errors import DataError, SwapError, UsageError
from llava_adapter import quantised
from llava_adapter.compose import compose
from llava_adapter.save import load_llava, save_llava
from train import llava_plan, llava_task, tune_llava
from train.config import LlavaConfig, parse

STAGES = ("projector", "full", "lora", "qlora", "tower")
Sources = Callable[[str], dict[str, Path]]


@pytest.fixture
def sources(tiny_llava: Path, tiny_encoder: Path, tiny_llm: Path, tmp_path: Path) -> Sources:
    """What a stage reads."""
    given = {"encoder": tiny_encoder, "llm": tiny_llm}
    return lambda stage: given if stage == "projector" else {"llava": one(tiny_llava, tmp_path / "llava")}


def one(llava: Path, folder: Path) -> Path:
    return folder if folder.exists() else sealed(llava, folder)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "chats")


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_resumes_from_any_checkpoint(stage: str, sources: Sources, chats: Path, tmp_path: Path) -> None:
    """With LoRA's dropout; weights and losses to the bit. The finished folder and its adapter are there again."""
    if stage == "projector":
        chats = write_chats(tmp_path / "captions", captions=True)
    out = tmp_path / "run"
    settings: dict[str, Any] = {"lora_dropout": 0.3, "run.micro_batches": 2, "held_out": chats}
    run = config(stage, out, chats, sources(stage), **settings)
    wanted = train(run, float32=False)
    assert len(wanted) == STEPS
    files = sorted(out.rglob("*.safetensors"))
    finished = {file: load_file(file) for file in files if "checkpoints" not in file.parts}
    assert (out / "adapter" / "adapter_model.safetensors" in finished) == (stage in ("lora", "qlora", "tower"))
    assert {tensor.dtype for tensor in finished[out / "model.safetensors"].values()} == {torch.bfloat16}
    seal = manifest.read(out, "llava")
    assert seal.metrics["held_out_loss"] > 0
    assert seal.config[stage]["optim"]["lr"] == 1e-3
    for step in (2, 4):
        for path in out.iterdir():
            if path.name not in ("checkpoints", "metrics.jsonl"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for later in range(step + 1, STEPS + 1):
            shutil.rmtree(out / "checkpoints" / f"step-{later:08d}", ignore_errors=True)
        again = config(stage, out, chats, sources(stage), **settings, **{"run.resume": True})
        assert train(again, float32=False) == wanted
        for file, tensors in finished.items():
            found = load_file(file)
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items()), (step, file)


def test_a_run_through_its_command_line(sources: Sources, chats: Path, tmp_path: Path) -> None:
    settings = {"run.steps": 2, "run.batch_size": 4, "run.workers": 0, "run.threads": 1, "lora_r": 4}
    settings |= {"data.chats": chats, "data.images": chats.parent, "run.out": tmp_path / "lora", **sources("lora")}
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "train" / "tune_llava.py")]
    command += ["--stage", "lora", *(f"--{name}={value}" for name, value in settings.items())]
    dry = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert dry.returncode == 0, dry.stderr[-3000:]
    assert "2 of 4 conversations" in dry.stdout
    assert not (tmp_path / "lora").exists()
    done = finish(command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "first step with a picture: what should train has moved" in done.stdout
    assert load_llava(tmp_path / "lora", torch.float32)


def test_one_loss_series_however_a_step_is_split(sources: Sources, chats: Path, tmp_path: Path) -> None:
    """Micro-batches, padding, checkpointing and two processes, one of which meets batches without pictures."""

    def run(name: str, **settings: Any) -> list[float]:
        return train(config("tower", tmp_path / name, chats, sources("tower"), **{"language": "full", **settings}))

    wanted = run("whole")
    assert wanted[-1] < wanted[0] - 1e-3
    found = {
        "accumulated": run("accumulated", **{"run.micro_batches": 4}),
        "padded": run("padded", packing=False),
        "padded and accumulated": run("both", packing=False, **{"run.micro_batches": 2}),
        "computed again": run("selective", checkpointing="selective"),
        "two processes": two(sources("tower"), chats, tmp_path / "two"),
    }
    for case, series in found.items():
        assert series == pytest.approx(wanted, abs=1e-5), case


def two(
    sources: dict[str, Path], chats: Path, out: Path, float32: bool = True, sharded: bool = False, **settings: Any
) -> list[float]:
    """The same run in two processes, two micro-batches each."""
    asked = {
        "stage": "tower",
        "out": str(out),
        "chats": str(chats),
        "sources": {name: str(path) for name, path in sources.items()},
        "settings": {"language": "full", "run.micro_batches": 2, **settings},
        "float32": float32,
        "sharded": sharded,
    }
    out.with_suffix(".json").write_text(json.dumps(asked))
    done = finish([*torchrun(2, ROOT / "tests" / "llava_runs.py"), str(out.with_suffix(".json"))])
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(out)


@pytest.mark.slow
@pytest.mark.parametrize("float32", [True, False], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("language", ["full", "lora"])
def test_sharded_training_gives_the_same_losses_and_folder(
    language: str, float32: bool, sources: Sources, chats: Path, tmp_path: Path
) -> None:
    """FSDP2 on two CPU processes: tower and LLM layer by layer, with LoRA and without; also with frozen weights in
    bfloat16 beside float32 ones that train."""
    settings: dict[str, Any] = {"language": language}
    alone = train(config("tower", tmp_path / "alone", chats, sources("tower"), **settings), float32)
    sharded = two(sources("tower"), chats, tmp_path / "sharded", float32, sharded=True, **settings)
    assert sharded == pytest.approx(alone, abs=1e-5 if float32 else 2e-2)
    wanted, found = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "sharded"))
    for name, tensor in wanted.items():
        close = {"rtol": 1e-3, "atol": 1e-4} if float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(found[name], tensor, **close, msg=name)  # type: ignore[arg-type]


def test_what_does_not_fit_is_counted_over_the_whole_run(sources: Sources, chats: Path, tmp_path: Path) -> None:
    """Three epochs, of which one step is logged and one comes after a resume."""
    settings: dict[str, Any] = {"data.max_length": 176, "run.batch_size": CONVERSATIONS, "run.steps": 3}
    settings |= {"run.log_every": 3, "run.save_every": 1}
    run = config("lora", tmp_path / "run", chats, sources("lora"), **settings)
    processor = load_llava(sources("lora")["llava"], torch.float32)[1]
    samples = llava_task.Sets.read(run, processor, "llama3").train
    one_epoch = Counter({name: sum(samples[i][name] for i in range(len(samples))) for name in llava_task.SHORTENED})
    assert one_epoch["lost_turns"] > 1
    train(run, float32=False)
    for _ in range(2):
        metrics = manifest.read(run.run.out, "llava").metrics
        assert {name: metrics[name] for name in one_epoch} == {name: 3 * number for name, number in one_epoch.items()}
        (run.run.out / manifest.MANIFEST).unlink()
        shutil.rmtree(run.run.out / "checkpoints" / "step-00000003")
        train(replace(run, run=replace(run.run, resume=True)), float32=False)


def test_a_model_says_all_of_the_training_behind_it(sources: Sources, chats: Path, tmp_path: Path) -> None:
    """Two arms of which one had more of it, or other conversations under the same path, were not trained alike."""

    def built(stage: str, given: dict[str, Path], **settings: Any) -> dict[str, Any]:
        run = config(stage, tmp_path / "out", chats, given, **settings)
        return json.loads(json.dumps(llava_task.build(run).config, default=str))  # type: ignore[no-any-return]

    fresh = sources("lora")["llava"]
    once = built("lora", {"llava": fresh})
    known = {"path": str(chats), "fingerprint": manifest.fingerprint(chats), "conversations": CONVERSATIONS}
    assert once["lora"]["data"]["chats"] == known
    assert "before" not in once["lora"]
    manifest.seal(fresh, "llava", once)
    twice = built("lora", {"llava": fresh}, **{"run.steps": 3})
    assert twice["lora"]["before"] == {"lora": once["lora"]}
    assert "before" not in built("full", {"llava": fresh})["full"]  # what it had stands beside it

    (chats.parent / "3-0.png").unlink()
    fewer = built("lora", {"llava": fresh}, **{"data.missing": "skip"})
    assert fewer["lora"]["data"]["chats"] == {**known, "conversations": CONVERSATIONS - 1}
    chats.write_text(json.dumps(json.loads(chats.read_text())[:3]))
    assert built("lora", {"llava": fresh})["lora"]["data"]["chats"]["fingerprint"] != known["fingerprint"]

    began = built("projector", sources("projector"))
    folder = tmp_path / "projector"
    save_llava(*compose(*sources("projector").values(), "llama3", torch.bfloat16), folder)
    manifest.seal(folder, "llava", {**began, "lora": once["lora"]})
    warm = built("projector", {**sources("projector"), "projector": folder})
    assert warm["projector"]["before"] == {"projector": began["projector"], "lora": once["lora"]}


def test_the_plan_of_a_run_is_what_the_run_does(sources: Sources, chats: Path, tmp_path: Path) -> None:
    """Steps, tokens, checkpoint and operations against the run's own, counted by torch."""
    run = config(
        "tower", tmp_path / "run", chats, sources("tower"), **{"run.batch_size": CONVERSATIONS, "run.steps": 1}
    )
    text = llava_plan.describe(run, 1)
    assert "1 of 12 conversations: 1.00 epochs" in text
    model, processor = load_llava(sources("tower")["llava"], torch.float32)
    sets = llava_task.Sets.read(run, processor, "llama3")
    lengths = llava_plan.measure(sets.train)
    task = llava_task.LlavaTask(run, {}, model, processor, sets, sources("tower"))
    batch = task.collate([task.dataset[0, i] for i in range(CONVERSATIONS)])
    assert lengths.tokens * CONVERSATIONS == pytest.approx(batch["input_ids"].numel())
    assert lengths.supervised * CONVERSATIONS == pytest.approx((batch["labels"] != -100).sum().item())
    assert lengths.images * CONVERSATIONS == pytest.approx(len(batch["pixel_values"]))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counted:
        task.module(batch)["loss_sum"].backward()
    assert llava_plan.step_flops(task.model, run, lengths) == pytest.approx(counted.get_total_flops(), rel=0.15)
    train(run, float32=False)
    saved = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoints").rglob("[mo]*.safetensors"))
    planned = float(text.split("checkpoint  ")[1].split(" MiB")[0])
    assert planned == pytest.approx(saved / 2**20, abs=0.06)


def test_a_full_size_plan_needs_no_weights(tmp_path: Path) -> None:
    """LLaMA-3-8B and CLIP L/14-336 from their configs. A sample of 581 tokens takes about 17 TFLOP: the tower's 0.35,
    the projector's 0.07, and 6.98 G weights of LLaMA's blocks forward and back to their inputs."""
    encoder, llm = write_encoder(tmp_path / "encoder", image_size=336), write_llm(tmp_path / "llm")
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    CLIPVisionConfig(image_size=336, patch_size=14, architectures=["CLIPVisionModel"], **vision).save_pretrained(
        encoder
    )
    text = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    LlamaConfig(vocab_size=128_256, num_key_value_heads=8, **text).save_pretrained(llm)
    for folder in (encoder, llm):
        (folder / "model.safetensors").unlink()
    chats, long = write_chats(tmp_path / "chats", captions=True), {"data.max_length": 2048}
    run = config("projector", tmp_path / "run", chats, {"encoder": encoder, "llm": llm}, **long)
    plan = llava_plan.describe(run, 1)
    assert "llm          8,030,261,248         frozen" in plan
    assert "checkpoint  240.1 MiB, 9 kept; finished folder 15.6 GiB" in plan
    tokens = float(plan.split("conversations of ")[1].split()[0])
    wanted = 4 * (4 * 6.98e9 * tokens + 2 * 0.302e9 * 577 + 6 * 21e6 * 576) / 1e12
    assert float(plan.split("of its speed; ")[1].split()[0]) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("stage", STAGES)
def test_a_missing_picture_is_told_before_any_weight_is_read(
    stage: str, tiny_llava: Path, tiny_encoder: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    """Of folders without weights: whoever reads them first fails otherwise."""
    folders = {"encoder": tiny_encoder, "llm": tiny_llm}
    if stage != "projector":
        folders = {"llava": sealed(tiny_llava, tmp_path / "sealed")}
    for name, folder in folders.items():
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    chats = write_chats(tmp_path / "chats", captions=True)
    (chats.parent / "3-0.png").unlink()
    run = config(stage, tmp_path / "run", chats, {name: tmp_path / name for name in folders})
    with pytest.raises(DataError, match=r"entry 3 .*3-0\.png does not exist"):
        llava_task.build(run)


def test_a_plan_refuses_what_the_run_would(sources: Sources, chats: Path, tiny_llava: Path, tmp_path: Path) -> None:
    for settings, said in (
        ({"held_out": tmp_path / "none.json"}, r"none\.json does not exist"),
        ({"run.batch_size": 6}, "batch_size 6 does not divide into 4 rank"),
        ({"llava": tiny_llava}, "has no manifest.json: its stage did not finish"),
    ):
        with pytest.raises(SwapError, match=said):
            llava_plan.describe(config("lora", tmp_path / "run", chats, sources("lora"), **settings), 4)


def test_a_resume_on_other_weights_is_refused(sources: Sources, chats: Path, tmp_path: Path) -> None:
    """The same settings and the same folder, with another LLaVA in it: checkpoints hold nothing of what is frozen."""
    folders, out = sources("lora"), tmp_path / "run"
    train(config("lora", out, chats, folders), float32=False)
    (out / manifest.MANIFEST).unlink()
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS:08d}")
    file = folders["llava"] / "model.safetensors"
    weights = load_file(file)
    weights["language_model.model.norm.weight"] += 1
    save_file(weights, file, metadata={"format": "pt"})
    again = config("lora", out, chats, folders, **{"run.resume": True})
    with pytest.raises(DataError, match=r"model\.safetensors is not the file that .*manifest\.json describes"):
        llava_task.build(again)
    manifest.seal(folders["llava"], "llava", manifest.read(folders["llava"]).config)
    with pytest.raises(UsageError, match=r"cannot resume .*base\.llava: "):
        train(again, float32=False)


def test_the_plan_shows_pictures_as_the_run_does(
    sources: Sources, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the recipe's geometry, whatever the LLaVA was saved with."""
    run = config("lora", tmp_path / "run", chats, sources("lora"), **{"data.geometry": "pad"})
    llava_task.build(run)
    for text in (capsys.readouterr().out, llava_plan.describe(run, 1)):
        assert "padded to a square with the mean colour" in text


def test_held_out_batches_are_those_of_one_process(sources: Sources, chats: Path, tmp_path: Path) -> None:
    run = config("lora", tmp_path / "run", chats, sources("lora"), held_out=chats, **{"run.micro_batches": 2})
    task = llava_task.build(replace(run, run=replace(run.run, batch_size=8)))
    assert task.held_out is not None
    four = SimpleNamespace(num_processes=4, device=torch.device("cpu"))
    sizes = [len(batch["id"]) for batch in task._held_out_batches(task.held_out, four)]  # type: ignore[arg-type]
    assert sizes == [1] * CONVERSATIONS


def test_qlora_without_bitsandbytes_or_under_fsdp_is_refused_at_once(
    sources: Sources, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    llava = str(sources("qlora")["llava"])
    monkeypatch.setattr(sys, "argv", ["x", "--stage=qlora", f"--llava={llava}", f"--run.out={tmp_path / 'run'}"])
    with pytest.raises(UsageError, match="stage qlora needs bitsandbytes"):
        tune_llava.main()
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(sys, "argv", ["x", "--stage=qlora", f"--llava={llava}", f"--run.out={tmp_path / 'run'}"])
    with pytest.raises(UsageError, match=r"stage qlora does not run under FSDP2.*profiles/ddp\.yaml"):
        tune_llava.main()
    assert not (tmp_path / "run").exists()


def test_a_weight_decay_is_refused_rather_than_forgotten() -> None:
    plain = parse(LlavaConfig, "unused", ["--stage=lora", "--llava=x", "--optim.lr=1e-4"])
    assert (plain.optim.lr, plain.optim.weight_decay) == (1e-4, 0.0)
    with pytest.raises(UsageError, match=r"optim\.weight_decay is 0\.1 but a LLaVA stage has none"):
        parse(LlavaConfig, "unused", ["--stage=lora", "--llava=x", "--optim.weight_decay=0.1"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--stage=full"], "stage full needs `llava`"),
        (["--stage=qlora", "--llava=x", "--llm=y"], "stage qlora takes no `llm`"),
        (["--stage=lora", "--llava=x", "--projector=y"], "stage lora takes no `projector`"),
        (["--stage=tower", "--llava=x", "--vision=lora", "--language=full"], "does not go with `language: full`"),
        (["--stage=lora", "--llava=x", "--projector_lr=-1"], "projector_lr is -1.0 but must be above 0"),
        (["--stage=lora", "--llava=x", "--lora_r=0"], "lora_r is 0 but must be above 0"),
        (["--stage=lora", "--llava=x", "--lora_dropout=1.5"], "lora_dropout is 1.5 but must be from 0"),
        (["--stage=lora", "--llava=x", "--optim.clip_norm=-1"], "optim.clip_norm is -1.0 but must be positive"),
        (["--stage=lora", "--llava=x", "--optim.betas=[0.9,1]"], "but must be from 0 to below 1"),
        (["--stage=lora", "--llava=x", "--optim.warmup_steps=-1"], "optim.warmup_steps is -1"),
    ],
)
def test_impossible_stages(options: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(LlavaConfig, "unused", options)
