"""The commands that publish, over loopback: encoders that load by their id, LLaVAs and adapters with their cards."""

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from publishing import REPO, client, finish
from publishing import encoder as encoder
from publishing import made as made
from publishing import server as server
from safetensors.torch import save_file
from transformers import CLIPVisionModel

from encoders import manifest
from encoders.errors import DataError, ModelError, UsageError
from encoders.export import command as export
from encoders.manifest import Manifest
from encoders.publish import hub
from encoders.sources.source import open_source
from llava_adapter import publish as publish_model
from llava_adapter.card import adapter_card, llava_card
from llava_adapter.save import load_llava, save_adapter
from llava_adapter.tuning import LORA_TARGETS, STAGES, apply
from train.config import LlavaConfig, OptimConfig, RunConfig


def test_the_command_publishes_and_transformers_and_we_load_it_by_its_id(
    server: HubServer, encoder: Path, tmp_path: Path
) -> None:
    published = client(server, tmp_path, "-m", "llava_adapter.publish", str(encoder), REPO, "--public")
    out, errors = published.communicate(timeout=300)
    assert published.returncode == 0, errors
    commit = server.repos[REPO].refs["main"]
    assert f"published {server.url}/{REPO}/commit/{commit}" in out

    local = CLIPVisionModel.from_pretrained(encoder).eval()
    model, info = CLIPVisionModel.from_pretrained(REPO, output_loading_info=True)
    assert not any(info.values())
    source = open_source(REPO)
    assert source.family == "hf-clip"
    assert commit in json.dumps(source.provenance)  # a branch moves, a commit does not
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = local(pixels).last_hidden_state
        torch.testing.assert_close(model.eval()(pixels).last_hidden_state, expected, rtol=0, atol=0)
        torch.testing.assert_close(source.tower.model(pixels).last_hidden_state, expected)
    with pytest.raises(ModelError, match="revision v9"):
        open_source(REPO, revision="v9")


def test_from_one_repository_to_another_in_one_command(
    server: HubServer, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(encoder, REPO)
    line = f"export-encoder {REPO} {tmp_path / 'out'} --push-to-hub someone/exported"
    monkeypatch.setattr(sys, "argv", [*line.split(), "--dry-run"])
    export.main()
    assert "someone/exported" not in server.repos
    monkeypatch.setattr(sys, "argv", [*line.split(), "--overwrite"])
    export.main()
    files = server.repos["someone/exported"].files("main")
    card = ModelCard(files["README.md"].content.decode())
    assert card.data.base_model == REPO
    assert card.data.license == "apache-2.0"  # the source's own
    assert server.repos[REPO].refs["main"] in card.content
    assert card.data.pipeline_tag == "image-feature-extraction"


def test_what_cannot_be_published_is_refused_before_the_export(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, match in (
        ("--push-to-hub a/b/c", "does not name a repo"),
        ("--license Mine!", "none of the Hub's names"),
    ):
        monkeypatch.setattr(sys, "argv", ["export-encoder", str(encoder), str(tmp_path / "out"), *options.split()])
        with pytest.raises(UsageError, match=match):
            export.main()
    assert not (tmp_path / "out").exists()


def test_an_export_takes_a_licence_where_its_source_states_none(
    server: HubServer, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"export-encoder {encoder} {tmp_path / 'out'} --license mit --push-to-hub {REPO}"
    monkeypatch.setattr(sys, "argv", line.split())
    export.main()
    card = ModelCard(server.repos[REPO].files("main")["README.md"].content.decode())
    assert card.data.license == "mit"
    assert f'name = "{REPO}"' in card.content
    assert "ORG/NAME" not in card.content
    assert "model_name" not in card.data.to_dict()
    line = f"export-encoder {REPO} {tmp_path / 'again'} --license apache-2.0"
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(UsageError, match="states the license mit, which stays"):
        export.main()


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["publish-model", *command.split()])
    publish_model.main()


@pytest.fixture
def llava(tiny_llava: Path, tmp_path: Path) -> Path:
    """As training leaves it: the model, its adapter, and the run's own records."""
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "llava"))
    (folder / "adapter").mkdir()
    save_file({"lora": torch.ones(2)}, folder / "adapter" / "adapter_model.safetensors")
    lora = {
        "r": 4,
        "lora_alpha": 8,
        "modules_to_save": ["multi_modal_projector"],
        "target_modules": LORA_TARGETS["llm"],
        "base_model_name_or_path": str(folder),
    }
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(lora))
    (folder / "adapter" / "README.md").write_text(f"---\nbase_model: {folder}\n---\n[More Information Needed]\n")
    run = {"steps": 3, "batch_size": 2, "precision": "bf16", "seed": 0}
    stage = {"run": run, "optim": {"lr": 1e-3}, "projector_lr": 2e-5, "lora_r": 4, "lora_alpha": 8}
    origin = {"encoder": {"fingerprint": "e" * 64, "path": str(folder)}, "llm": {"fingerprint": "a" * 64}}
    finish(folder, "llava", projector=stage, lora=stage, **origin)
    (folder / "status.json").write_text("{}")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "optimizer.pt").write_bytes(b"x")
    (folder / "checkpoints" / "latest").symlink_to("optimizer.pt")
    return folder


def results(folder: Path, model: Path, limit: int | None = None, failed: int = 0) -> Path:
    """Of POPE as it was fetched, and of questions that lay in a folder."""
    benches: dict[str, Any] = {}
    for name, repository, revision in (("pope", "lmms-lab-encoder/POPE", "c" * 40), ("mmmu", "lmms/MMMU", "local")):
        bench = {"task": name, "questions": 9000, "metrics": {f"{name}_accuracy": 0.861}, "failed": [{}] * failed}
        bench["dataset"] = {"repository": repository, "config": "Full", "split": "test", "revision": revision}
        bench["dataset"]["fingerprint"] = "d" * 64
        benches[name] = {**bench, "protocol": {"split": "test", "scoring": "exactly yes or no"}}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"benches": benches}))
    manifest.seal(folder, "results", {"limit": limit}, {"model": model})
    return folder


def test_a_llava_brings_a_card_and_leaves_its_run_behind(
    server: HubServer, llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = results(tmp_path / "results", llava)
    bases = f"--base-model {REPO} --base-model meta/llm"
    with pytest.raises(UsageError, match="a card needs --license"):
        run(f"{llava} someone/llava", monkeypatch)
    run(f"{llava} someone/llava --license llama3 {bases} --results {scores}", monkeypatch)
    files = {name: blob.content for name, blob in server.repos["someone/llava"].files("main").items()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "manifest.json", "README.md"} < files.keys()
    assert not any(name.startswith(("adapter", "checkpoints", "status")) for name in files)
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "llama3",
        "transformers",
        "image-text-to-text",
    )
    assert (card.data.base_model, card.data.base_model_relation) == ([REPO, "meta/llm"], "finetune")
    told = [(r.dataset_type, r.dataset_revision, r.metric_type, r.metric_value) for r in card.data.eval_results]
    assert told == [
        ("lmms-lab-encoder/POPE", "c" * 40, "pope_accuracy", 0.861),
        ("custom", None, "mmmu_accuracy", 0.861),
    ]
    assert "\n| pope | pope_accuracy |" in card.content
    assert "\n| mmmu-shaped questions from a local folder (dddddddddddd) | mmmu_accuracy |" in card.content
    assert "* lora: projector (lr 2e-05), language model (LoRA r 4 alpha 8, lr 0.001); 3 steps of 2" in card.content
    assert not (llava / "README.md").exists()  # the folder is as it was
    assert str(tmp_path).encode() not in b"".join(files.values())


def test_scores_of_another_model_or_of_a_few_questions_are_not_published(
    llava: Path, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = results(tmp_path / "other", tiny_llava)
    with pytest.raises(DataError, match="holds the scores of another model"):
        run(f"{llava} someone/llava --license mit --results {other}", monkeypatch)
    part = results(tmp_path / "part", llava, limit=10)
    with pytest.raises(DataError, match="answered only 10 questions"):
        run(f"{llava} someone/llava --license mit --results {part}", monkeypatch)
    unanswered = results(tmp_path / "unanswered", llava, failed=3)
    with pytest.raises(DataError, match="3 questions of pope had no answer"):
        run(f"{llava} someone/llava --license mit --results {unanswered}", monkeypatch)


def test_an_adapter_names_the_published_model_it_belongs_to(
    server: HubServer, llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="an adapter needs --base-model"):
        run(f"{llava / 'adapter'} someone/adapter --license mit", monkeypatch)
    run(f"{llava / 'adapter'} someone/adapter --license mit --base-model someone/stage1", monkeypatch)
    files = {name: blob.content for name, blob in server.repos["someone/adapter"].files("main").items()}
    assert files.keys() - {".gitattributes"} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    }
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "someone/stage1"
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("peft", ["someone/stage1"])
    assert card.data.base_model_relation == "adapter"
    assert "model_name" not in card.data.to_dict()
    assert "More Information Needed" not in card.content
    assert "LoRA of rank 4 (alpha 8) on the language model of\n[someone/stage1]" in card.content


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stage": "projector"}, ["* projector: projector (lr 0.0001); 7 steps of 4, bf16, seed 0"]),
        ({"stage": "full"}, ["* full: projector (lr 2e-05), language model (in full, lr 0.0001); 7 steps"]),
        ({"stage": "qlora"}, ["language model (LoRA r 4 alpha 256 on weights of 4 bits, lr 0.0001)"]),
        (
            {"stage": "tower", "language": "full"},
            ["vision tower (in full, lr 2e-06), projector (lr 2e-05), language model (in full, lr 0.0001)"],
        ),
        (
            {"stage": "tower", "vision": "lora", "language": "frozen"},
            [
                "* tower: vision tower (LoRA r 4 alpha 256, lr 2e-06), projector (lr 2e-05);",
                "`e`, trained further since",
            ],
        ),
    ],
)
def test_a_card_tells_what_every_stage_trained(settings: dict[str, Any], said: list[str], tiny_llava: Path) -> None:
    """From the settings that a run leaves in its manifest."""
    source = {"encoder": Path("x"), "llm": Path("y")} if settings["stage"] == "projector" else {"llava": Path("x")}
    run = RunConfig(steps=7, batch_size=4)
    stage = LlavaConfig(**source, **settings, lora_r=4, run=run, optim=OptimConfig(lr=1e-4, weight_decay=0.0))
    encoder = {"fingerprint": "e"} | ({"trained_further": True} if stage.stage == "tower" else {})
    config = {"encoder": encoder, "llm": {"fingerprint": "l"}, stage.stage: asdict(stage)}
    card = llava_card(tiny_llava, "someone/llava", Manifest("llava", config, {}), "mit", [], {})
    assert all(text in card for text in said), card
    assert ("trained further" in card) == (stage.stage == "tower")


def test_an_adapters_card_names_the_parts_it_is_on(tiny_llava: Path, tmp_path: Path) -> None:
    """Of adapters as PEFT writes them: LoRA on the tower as well, or the tower in full."""
    config = {"encoder": {"fingerprint": "e"}, "llm": {"fingerprint": "l"}}
    for vision, said in (
        (
            "lora",
            "on the vision tower and the language model of\n[a/b](https://huggingface.co/a/b), and in full: multi_",
        ),
        ("full", "on the language model of\n[a/b](https://huggingface.co/a/b), and in full: vision_tower, multi_modal"),
    ):
        plan = replace(STAGES["tower"], vision=vision, lora_r=4)  # type: ignore[arg-type]
        save_adapter(apply(load_llava(tiny_llava, torch.float32)[0], plan), tmp_path / vision)  # type: ignore[arg-type]
        assert said in adapter_card(tmp_path / vision, "a/c", Manifest("llava", config, {}), "mit", "a/b", {})
