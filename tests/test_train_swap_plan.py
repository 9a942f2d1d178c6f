"""Plans of train/swap.py: what runs for any number of encoders, LLMs and seeds, what is refused before the first stage,
and what --dry-run tells. Nothing is trained."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_encoder
from encoder_runs import write_run
from hub_server import serve
from llava_runs import write_chats

from encoders import manifest
from encoders.errors import DataError, ModelError, SwapError, UsageError
from train.config import parse
from train.pipeline import Runner, Stage, stage_key
from train.swap import show
from train.swap_check import check
from train.swap_config import SwapConfig
from train.swap_plan import plan

ROOT = Path(__file__).resolve().parent.parent
BENCHES = ("MME", "POPE", "GQA", "textvqa")


@pytest.fixture(scope="module")
def folder(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whatever a plan can name: recipes, data, encoders of all kinds, an LLM."""
    folder = tmp_path_factory.mktemp("plans")
    captions, chats = write_chats(folder / "captions", captions=True), write_chats(folder / "chats")
    (folder / "shards").mkdir()
    pairs = dict.fromkeys(("train", "val", "test"), str(folder / "shards"))
    recipes = {
        "clip": {"model": {"objective": "clip"}, "data": pairs},
        "nowhere": {"model": {"objective": "clip"}, "data": {**pairs, "val": str(folder / "no")}},
        "resolution": {"image_size": 96, "data": pairs},
        "projector": {
            "stage": "projector",
            "encoder": "-",
            "llm": "-",
            "data": {"chats": str(captions), "images": str(captions.parent)},
        },
        "lora": {"stage": "lora", "llava": "-", "data": {"chats": str(chats), "images": str(chats.parent)}},
        "misspelt": {"stage": "lora", "llava": "-", "lora_rank": 4},
    }
    for name, content in recipes.items():
        (folder / f"{name}.yaml").write_text(json.dumps(content))
    write_run(folder / "run")
    write_encoder(folder / "plain")
    manifest.seal(shutil.copytree(folder / "plain", folder / "exported"), "encoder", {})
    manifest.seal(shutil.copytree(folder / "plain", folder / "a_llava"), "llava", {})
    (folder / "siglip").mkdir()
    (folder / "siglip" / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    timm = {"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_224"}, "text_cfg": {}}
    (folder / "open_clip_siglip").mkdir()
    (folder / "open_clip_siglip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": timm}))
    (folder / "empty").mkdir()
    (folder / "weights.pt").write_bytes(b"x")
    for name in BENCHES:
        (folder / "benches" / "lmms-lab-encoder" / name).mkdir(parents=True)
        (folder / "benches" / "lmms-lab-encoder" / name / "README.md").write_text("---\nconfigs: []\n---\n")
    (folder / "llm").symlink_to(tiny_llm)
    return folder


def config(folder: Path, **changes: Any) -> SwapConfig:
    """A plan of two arms that works; `changes` go over it."""
    content: dict[str, Any] = {
        "work": str(folder / "work"),
        "arms": {"clip": {"recipe": str(folder / "clip.yaml")}, "run": {"source": str(folder / "run")}},
        "llm": str(folder / "llm"),
        "projector": str(folder / "projector.yaml"),
        "tune": str(folder / "lora.yaml"),
        "bench_data": str(folder / "benches"),
        **changes,
    }
    file = folder / "swap.yaml"
    file.write_text(json.dumps(content))
    return parse(SwapConfig, "unused", ["--config", str(file)])


def words(stages: list[Stage], name: str) -> str:
    [stage] = [stage for stage in stages if stage.name == name]
    return " ".join(stage.command)


def source(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    """`arms` whose second one is a source in the folder."""
    second = {"source": str(folder / name) if "/" not in name else name, **more}
    return {"clip": {"recipe": str(folder / "clip.yaml")}, "other": second}


def test_any_number_of_encoders_llms_and_seeds(folder: Path) -> None:
    arms = {
        "clip": {"recipe": str(folder / "clip.yaml")},
        "run": {"source": str(folder / "run")},
        "exported": {"source": str(folder / "exported")},
        "hub": {"source": "someone/encoder", "revision": "v1", "image_size": 96},
    }
    llms = {"eight": {"model": "someone/llm"}, "small": {"template": "chatml"}}
    asked = config(folder, arms=arms, llm=None, llms=llms, seeds=[3, 7], resolution=str(folder / "resolution.yaml"))
    stages = plan(asked)
    names = [stage.name for stage in stages]
    assert len(names) == len(set(names)) == 3 + 2 + 1 + 4 * 2 * 2 * 3 + 2 + 1
    assert names[:2] == ["run/encoder", "hub/encoder"]  # what others made, before anything is trained
    assert "exported/encoder" not in names
    work = asked.work
    assert (
        words(stages, "hub/encoder") == f"someone/encoder {work}/hub/encoder --revision v1 --image-size 96 --overwrite"
    )
    assert f"--init {work}/clip/pretrain" in words(stages, "clip/resolution")
    assert words(stages, "clip/encoder").startswith(f"{work}/clip/resolution {work}/clip/encoder")
    projector = words(stages, "exported/small/seed-7/projector")
    assert f"--encoder {folder}/exported --llm {work}/llm --run.seed 7 --template chatml" in projector
    assert "--llm someone/llm --run.seed 3" in words(stages, "hub/eight/seed-3/projector")
    assert "--template" not in words(stages, "hub/eight/seed-3/projector")
    assert f"--llava {work}/clip/eight/seed-3/projector --run.seed 3" in words(stages, "clip/eight/seed-3/llava")
    compared = words(stages, "report-small")
    assert compared.startswith(",".join(f"{work}/clip/small/seed-{seed}/results" for seed in (3, 7)) + " ")
    assert "--name clip run exported hub --encoders" in compared
    assert compared.endswith(f"{work}/run/encoder {folder}/exported {work}/hub/encoder")  # not all are runs
    assert words(stages, "matrix") == (
        f"{work}/report-eight.json {work}/report-small.json --out {work}/matrix.html --name eight small"
    )
    before: set[str] = set()
    for stage in stages:
        assert {waited.name for waited in stage.after} <= before
        before.add(stage.name)
    check(asked, stages, hub=False)


def test_arms_that_are_all_trained_here_are_compared_by_retrieval_too(folder: Path) -> None:
    arms = {name: {"recipe": str(folder / "clip.yaml")} for name in ("one", "two")}
    asked = config(folder, arms=arms)
    compared = words(plan(asked), "report")
    assert compared.endswith(f"--encoders {asked.work}/one/pretrain {asked.work}/two/pretrain")


def test_options_go_over_the_recipe_and_what_they_name_is_an_input(folder: Path) -> None:
    chats = folder / "chats" / "chats.json"
    options = {"projector": ["--run.micro_batches=4", f"--data.chats={chats}"]}
    stages = plan(config(folder, options=options))
    [stage] = [stage for stage in stages if stage.name == "run/projector"]
    assert f"--run.micro_batches=4 --data.chats={chats} --run.out" in " ".join(stage.command)
    assert chats in stage.inputs
    assert "micro_batches" not in words(stages, "run/llava")


def test_data_of_an_option_and_of_a_recipe_that_names_none_are_inputs(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bare.yaml").write_text(json.dumps({"model": {"objective": "clip"}}))
    arms = {"bare": {"recipe": str(tmp_path / "bare.yaml")}, "run": {"source": str(folder / "run")}}
    options = {"pretrain": ["--data.train.path=elsewhere", "--data.train.format=parquet"]}
    cases: tuple[tuple[dict[str, list[str]], str], ...] = (
        ({}, "runs/demo/scenes/shards/train"),
        (options, "elsewhere"),
    )
    for given, train in cases:
        stages = plan(config(folder, arms=arms, options=given))
        [stage] = [stage for stage in stages if stage.name == "bare/pretrain"]
        others = (f"runs/demo/scenes/shards/{split}" for split in ("val", "test"))
        assert set(map(str, stage.inputs)) == {train, *others}


FAULTS: dict[str, tuple[type[SwapError], str, dict[str, Any]]] = {
    "one arm": (UsageError, "at least two", {"arms": {"a": {"source": "run"}}}),
    "neither recipe nor source": (UsageError, "either `recipe`", {"arms": {"a": {}, "b": {"source": "run"}}}),
    "both": (UsageError, "either `recipe`", {"arms": {"a": {"recipe": "x", "source": "y"}, "b": {"source": "run"}}}),
    "a revision of a recipe": (
        UsageError,
        "takes no `revision`",
        {"arms": {"a": {"recipe": "x", "revision": "v1"}, "b": {"source": "run"}}},
    ),
    "a slash in a name": (
        UsageError,
        "'a/b' must be letters",
        {"arms": {"a/b": {"source": "x"}, "b": {"source": "y"}}},
    ),
    "a comma in a name": (
        UsageError,
        "'a,b' must be letters",
        {"arms": {"a,b": {"source": "x"}, "b": {"source": "y"}}},
    ),
    "a name that is an option": (UsageError, "'-a' must be", {"arms": {"-a": {"source": "x"}, "b": {"source": "y"}}}),
    "a name of a folder": (UsageError, "name of a folder", {"arms": {"logs": {"source": "x"}, "b": {"source": "y"}}}),
    "names that differ in case": (UsageError, "one folder", {"arms": {"A": {"source": "x"}, "a": {"source": "y"}}}),
    "an LLM named as a stage": (UsageError, "name of a folder", {"llm": None, "llms": {"llava": {}}}),
    "an LLM named as a seed": (UsageError, "name of a folder", {"llm": None, "llms": {"seed-1": {}}}),
    "llm and llms": (UsageError, "exclude each other", {"llms": {"a": {}}}),
    "a dot in a name": (UsageError, r"arms\.report\.html", {"arms": {"report.html": {"source": "x"}}}),
    "no question": (UsageError, "limit is 0 but must be at least 1", {"limit": 0}),
    "an empty batch": (UsageError, "eval_batch_size is 0 but must be at least 1", {"eval_batch_size": 0}),
    "a comma in work": (UsageError, "has a comma", {"work": "runs/a,b"}),
    "a seed twice": (UsageError, "must differ", {"seeds": [1, 1]}),
    "a bench twice": (UsageError, "name each once", {"bench": ["mme", "mme"]}),
    "an unknown bench": (UsageError, "no-such-bench", {"bench": ["mme", "no-such-bench"]}),
    "options of an unknown stage": (UsageError, "did you mean `tune`", {"options": {"tun": ["--a=b"]}}),
    "an option without a value": (UsageError, "--key=value", {"options": {"tune": ["--lora_r"]}}),
    "an unknown key of an arm": (UsageError, r"arms\.a\.recip`", {"arms": {"a": {"recip": "x"}, "b": {"source": "y"}}}),
    "an unknown option": (UsageError, "clip/llava: unknown option `--lora_rr`", {"options": {"tune": ["--lora_rr=4"]}}),
    "an unknown template": (UsageError, "projector: .*template", {"llm": None, "llms": {"a": {"template": "llama9"}}}),
    "a misspelt recipe": (UsageError, r"llava: .*unknown key `lora_rank`", {"tune": "{folder}/misspelt.yaml"}),
    "the stages' recipes swapped": (UsageError, "takes no `encoder`", {"projector": "{folder}/lora.yaml"}),
    "a recipe that is not there": (UsageError, "cannot be read", {"tune": "{folder}/missing.yaml"}),
    "pretraining data": (
        DataError,
        r"a/pretrain: data\.val is .*/no, which does not exist",
        {"arms": {"a": {"recipe": "{folder}/nowhere.yaml"}, "b": {"source": "{folder}/run"}}},
    ),
    "chats": (DataError, r"data\.chats is /no, which", {"options": {"tune": ["--data.chats=/no"]}}),
    "benchmark data": (DataError, "MME is missing", {"bench_data": "{folder}/empty"}),
    "an LLM of another kind": (ModelError, "needed is a Llama", {"llm": "{folder}/siglip"}),
    "an LLM that is not there": (UsageError, "no folder, and no id", {"llm": "{folder}/nowhere"}),
    "a source that is not there": (DataError, "no id on the Hub", {"source": "nowhere"}),
    "an empty source": (ModelError, r"has no config\.json", {"source": "empty"}),
    "SigLIP": (ModelError, r"arms\.other: .* model_type is 'siglip'", {"source": "siglip"}),
    "SigLIP of open_clip": (ModelError, "no class token and pools by attention", {"source": "open_clip_siglip"}),
    "a LLaVA": (ModelError, "'llava' artifact", {"source": "a_llava"}),
    "a file without its model": (UsageError, "`model_name`", {"source": "weights.pt"}),
    "another size of what is exported": (
        UsageError,
        "export its source again",
        {"source": "exported", "image_size": 64},
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_plan_that_cannot_work_is_refused_before_it_starts(name: str, folder: Path) -> None:
    error, message, changes = FAULTS[name]
    changes = json.loads(json.dumps(changes).replace("{folder}", str(folder)))
    if "source" in changes:
        changes = {"arms": source(folder, changes.pop("source"), **changes)}
    for hub in (True, False):  # --dry-run refuses the same
        with pytest.raises(error, match=message):
            asked = config(folder, **changes)
            check(asked, plan(asked), hub)
    assert not (folder / "work").exists()


def test_an_arm_that_stands_twice_in_the_yaml_is_refused(folder: Path) -> None:
    file = folder / "twice.yaml"
    file.write_text("arms:\n  a: {source: x}\n  b: {source: y}\n  a: {source: z}\n")
    with pytest.raises(UsageError, match=r"twice\.yaml: `a` stands there twice"):
        parse(SwapConfig, "unused", ["--config", str(file)])


def test_an_encoder_on_the_hub_is_judged_by_its_config(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the Hub (--dry-run) it is taken as it is."""
    asked = config(folder, arms=source(folder, "google/siglip"))
    check(asked, plan(asked), hub=False)
    with serve("hf_" + "loopback" * 4) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        with pytest.raises(ModelError, match="google/siglip is neither on this machine nor to be had from the Hub"):
            check(asked, plan(asked), hub=True)


WRITER = (
    "import sys, pathlib; out = pathlib.Path(sys.argv[1]); out.write_text(sys.argv[2]); sys.exit(len(sys.argv) - 3)"
)


def test_a_dry_run_tells_what_would_run_and_changes_nothing(tmp_path: Path) -> None:
    program = (sys.executable, "-c", WRITER)
    data = tmp_path / "data"
    data.write_text("one")

    def stages(word: str, *more: str) -> list[Stage]:
        first = Stage("a/first", [str(tmp_path / "1"), word, *more], [data], tmp_path / "1", program=program)
        second = Stage("a/second", [str(tmp_path / "2"), "x"], [tmp_path / "1"], tmp_path / "2", [first], program)
        return [first, second]

    runner = Runner(tmp_path / "work", jobs=1)
    seen = []

    def told(word: str = "x") -> list[str]:
        states = list(runner.states(stages(word)).values())
        seen.append(sorted(path.name for path in tmp_path.rglob("*")))
        return states

    assert told() == ["runs", "after a/first"]
    assert seen[-1] == ["data"]  # nothing was written
    assert f"a/first: runs\n    {sys.executable}" in show(stages("x"), runner)
    assert runner.run(stages("x")) == 2
    assert told() == ["up to date", "up to date"]
    assert show(stages("x"), runner).endswith("a/second: up to date\n0 of 2 stages to run")
    assert told("y") == ["runs again: its settings or inputs have changed", "after a/first"]
    data.write_text("two")
    assert told() == ["runs again: its settings or inputs have changed", "after a/first"]
    data.write_text("one")
    (tmp_path / "1").write_text("somebody else's")
    assert told() == ["runs again: its output was changed", "after a/first"]
    with pytest.raises(SwapError, match="a/first ended with code 1"):
        runner.run(stages("x", "fails"))
    assert list(runner.states(stages("x", "fails")).values()) == ["runs: it did not finish", "after a/first"]
    assert seen[-1] == seen[-2] == seen[-3]


def test_free_settings_of_a_run_do_not_make_it_another(folder: Path) -> None:
    def key(*options: str) -> str:
        stages = plan(config(folder, options={"projector": list(options)}, arms=source(folder, "exported")))
        [stage] = [stage for stage in stages if stage.name == "other/projector"]
        return stage_key(stage)

    assert key("--run.workers=4") == key("--run.workers=8") == key()
    assert key("--run.steps=4") != key("--run.steps=8")


def test_a_dry_run_is_quick_and_loads_nothing(folder: Path) -> None:
    """Nor does it reach for the Hub."""
    asked = config(folder, arms=source(folder, "someone/encoder"), llm="someone/llm")
    command = [sys.executable, "-X", "importtime", "train/swap.py", "--config", str(folder / "swap.yaml"), "--dry-run"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "other/encoder: runs" in finished.stdout
    assert finished.stdout.splitlines()[-1] == "10 of 10 stages to run"
    loaded = {line.split("|")[-1].strip() for line in finished.stderr.splitlines() if line.startswith("import time:")}
    assert not loaded & {"torch", "transformers", "lmms_eval", "huggingface_hub"}
    assert not asked.work.exists()
