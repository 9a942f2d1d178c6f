"""train/recipes/swap_clips_llama3.yaml as it is shipped, end to end: a hub on loopback has tiny models under the ids
that the recipe names, and options of the command line shrink the training. Every stage runs, in this process.
"""

import importlib
import json
import runpy
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import open_clip
import pytest
import torch
from accelerate.state import AcceleratorState
from bench_sets import write_benches
from hub_repos import Blob, Repo
from hub_server import HubServer, serve
from llava_runs import write_chats
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModel, LlavaForConditionalGeneration

from encoders import manifest
from encoders.errors import DataError, ModelError
from train.config import RECIPES, load_yaml, parse
from train.pipeline import Stage
from train.swap_check import check
from train.swap_config import SwapConfig
from train.swap_plan import plan

FLAGSHIP = RECIPES / "swap_clips_llama3.yaml"
OPENAI, CLIPS = "openai/clip-vit-large-patch14-336", "UCSC-VLAA/ViT-L-14-CLIPS-Recap-DataComp-1B"
LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"
SIZE, PATCH, TOKEN = 32, 8, "hf_" + "loopback" * 4
TRAINING = ["steps=2", "batch_size=4", "micro_batches=1", "workers=0", "threads=1", "save_every=0"]


def perturb(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def write_openai(folder: Path) -> Path:
    """A CLIPModel with its image processor, as OpenAI's lie on the Hub."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_act": "quick_gelu"}
    vision = sizes | {"intermediate_size": 64, "image_size": SIZE, "patch_size": PATCH}
    text = sizes | {"intermediate_size": 128, "vocab_size": 60, "max_position_embeddings": 12}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    perturb(model)
    model.save_pretrained(folder)
    square = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=square).save_pretrained(folder)
    return folder


def write_clips(folder: Path) -> Path:
    """open_clip's layout, as UCSC-VLAA publishes CLIPS: no norm before the blocks, mean pool, squashed pictures."""
    torch.manual_seed(1)
    eps = {"norm_kwargs": {"eps": 1e-6}}
    pool = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
    vision = {"image_size": SIZE, "patch_size": PATCH, "width": 32, "layers": 3, "head_width": 16, **pool, **eps}
    text = {"context_length": 80, "vocab_size": 90, "width": 32, "heads": 2, "layers": 1, "no_causal_mask": True}
    text |= {"pool_type": "last", "hf_tokenizer_name": "bert-base-uncased", "act_kwargs": {"approximate": "tanh"}}
    model_cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text | eps | {"tokenizer_mode": "clips"}}
    model = open_clip.CLIP(**model_cfg)
    perturb(model)
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    seen = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    seen |= {"interpolation": "bilinear", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": seen}))
    return folder


def publish(server: HubServer, name: str, folder: Path) -> None:
    repo = server.repos[name] = Repo(private=False)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    repo.commit("main", {name: Blob(content, lfs=name.endswith(".safetensors")) for name, content in files.items()})


@pytest.fixture
def hub(tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Small models under the ids of the recipe."""
    with serve(TOKEN) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        publish(server, OPENAI, write_openai(tmp_path / "openai"))
        publish(server, CLIPS, write_clips(tmp_path / "clips"))
        publish(server, LLAMA, tiny_llm)
        yield server


def options(folder: Path, benches: str) -> list[str]:
    """What shrinks the recipe: where the data lies, and how long is trained."""
    captions, chats = write_chats(folder / "captions", captions=True), write_chats(folder / "chats")
    steps = [f"--run.{setting}" for setting in TRAINING] + ["--optim.warmup_steps=0", "--data.max_length=400"]
    stages = {
        "projector": [*steps, f"--data.chats={captions}", f"--data.images={captions.parent}"],
        "tune": [*steps, f"--data.chats={chats}", f"--data.images={chats.parent}", "--lora_r=4"],
    }
    small = {"work": folder / "work", "bench_data": write_benches(folder / "benches"), "bench": f"[{benches}]"}
    small |= {"options": json.dumps(stages), "eval_batch_size": 4, "launch": "[]"}
    return ["--config", str(FLAGSHIP), *(f"--{key}={value}" for key, value in small.items())]


def execute(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage's command in this process, which has imported all it needs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    program = stage.program[-1]
    monkeypatch.setattr(sys, "argv", [program, *stage.command])
    if stage.recipe is not None:
        runpy.run_path(program)["main"]()
    else:
        importlib.import_module(program).main()


def test_the_recipe_is_the_papers_comparison() -> None:
    """On a machine that has nothing yet."""
    config = parse(SwapConfig, "unused", ["--config", str(FLAGSHIP)])
    names = [stage.name for stage in plan(config)]
    stages = ("projector", "llava", "results")
    assert names[:2] == ["openai/encoder", "clips/encoder"]  # fetched and proved before anything is trained
    assert names[2:] == [*(f"{arm}/{stage}" for arm in ("openai", "clips") for stage in stages), "report"]
    assert {arm.source for arm in config.arms.values()} == {OPENAI, CLIPS}
    assert config.llm == LLAMA
    assert {"mme", "pope", "gqa", "textvqa", "mmmu", "chartqa", "nocaps"} < set(config.bench)
    recipes = [load_yaml(recipe) for recipe in (config.projector, config.tune)]
    assert [recipe["stage"] for recipe in recipes] == ["projector", "lora"]
    assert [Path(recipe["data"]["chats"]).name[-9:] for recipe in recipes] == ["558k.json", "665k.json"]


def test_the_recipe_is_refused_where_something_is_missing(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thing at a time; the plan that lacks nothing passes."""
    words, caches = options(tmp_path, "mme,pope"), count()

    def checked(*more: str) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / f"cache-{next(caches)}"))
        config = parse(SwapConfig, "unused", [*words, *more])
        check(config, plan(config), hub=True)

    checked()
    with pytest.raises(DataError, match=r"openai/projector: data\.chats is data/llava/blip_laion_cc_sbu_558k\.json"):
        checked("--options={}")
    with pytest.raises(DataError, match=r"POPE"):
        checked(f"--bench_data={tmp_path}", "--bench=[pope]")
    with pytest.raises(ModelError, match="neither on this machine nor to be had from the Hub"):
        checked("--arms.clips.revision=nosuchbranch")
    hub.repos[LLAMA].private = True  # as a gated model is without a login
    with pytest.raises(ModelError, match="hf auth login"):
        checked()
    hub.repos[LLAMA].private = False
    siglip = json.dumps({"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}).encode()
    hub.repos[CLIPS].commit("main", {"config.json": Blob(siglip, lfs=False)})
    with pytest.raises(ModelError, match=r"arms\.clips: .* cannot become a CLIPVisionModel: .*siglip"):
        checked()


@pytest.mark.parametrize(
    "benches",
    [
        "pope",
        pytest.param("mme,pope,gqa,textvqa,textvqa_ocr,mmmu,chartqa,nocaps", marks=pytest.mark.slow),
    ],
)
def test_the_recipe_runs_shrunk(benches: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse(SwapConfig, "unused", options(tmp_path, benches))
    stages = plan(config)
    check(config, stages, hub=True)
    for stage in stages:
        execute(stage, monkeypatch)
    work = config.work
    for arm, source in (("openai", OPENAI), ("clips", CLIPS)):
        seal = manifest.read(work / arm / "encoder", "encoder")
        assert source in (work / arm / "encoder" / "README.md").read_text()
        assert seal.config["folded"] == (arm == "clips")
        encoder = CLIPVisionModel.from_pretrained(work / arm / "encoder").state_dict()
        llava = LlavaForConditionalGeneration.from_pretrained(work / arm / "llava").model.vision_tower.state_dict()
        for name, tensor in llava.items():  # frozen through both stages
            assert tensor.equal(encoder[name].to(torch.bfloat16).to(tensor.dtype))
        results = json.loads((work / arm / "results" / "results.json").read_text())
        assert set(results["benches"]) == set(benches.split(","))
        assert all(bench["answered"] == bench["questions"] > 0 for bench in results["benches"].values())
    report = json.loads((work / "report.json").read_text())
    assert report["names"] == ["openai", "clips"]
    assert {bench["bench"] for bench in report["benches"]} == set(benches.split(","))
    page = (work / "report.html").read_text()
    for arm, source in enumerate((OPENAI, CLIPS)):  # which commit was taken
        assert report["parity"][arm]["origin"] == f"{source} at {hub.repos[source].refs['main']}"
        assert report["parity"][arm]["origin"] in page
    assert report["shared"]["model.llm.commit"] == hub.repos[LLAMA].refs["main"]
    assert "openai" in page
    assert "clips" in page
