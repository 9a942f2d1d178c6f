"""docs/full_scale.md cannot rot: every command of ours in it is parsed by the parser that will read it, reads only what
an earlier one made, and finds its data where the drawn folders have it. Nothing is run.
"""

import argparse
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser

from train.config import RECIPES, LlavaConfig, PretrainConfig, ResolutionConfig, load_yaml, parse
from train.swap_config import SwapConfig

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "full_scale.md").read_text()
CONSOLE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
SCRIPTS = {
    "train/pretrain.py": PretrainConfig,
    "train/finetune_resolution.py": ResolutionConfig,
    "train/tune_llava.py": LlavaConfig,
    "train/swap.py": SwapConfig,
}
# Not ours; a program that is neither is a mistake.
OTHERS = {"make", "source", "python3", "mkdir", "mv", "wget", "unzip", "for", "hf", ".img2dataset/bin/img2dataset"}
OTHERS |= {".img2dataset/bin/pip"}
SBATCH = ("--nodes=", "--gpus-per-node=")


class Parsed(Exception):
    """What a parser made of a command."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands() -> Iterator[list[str]]:
    """The words of each command of ours, in order, without the variables that are set before it."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    for command in (part for line in lines for part in line.split(" && ")):
        words = shlex.split(command, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words and words[0] not in OTHERS:
            yield words


COMMANDS = list(commands())


def drawn() -> set[str]:
    """Every path below data/ in the drawings of folders."""
    found, above = set(), [""]
    for line in "".join(blocks("text")).splitlines():
        branch = re.match(r"((?:│   |    )*[├└]── |)(\S+)", line)
        assert branch is not None, line
        depth = len(branch[1]) // 4
        above[depth:] = [branch[2].rstrip("/")]
        found.add("/".join(above))
    return found - {"data"}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files that the document prints: their name in it -> where they lie now."""
    folder, files = tmp_path_factory.mktemp("printed"), {}
    for block in (*blocks("yaml"), *blocks("python")):
        name = re.match(r"# ([\w/.]+)", block)
        assert name is not None, f"a file's name must come first: {block[:60]}"
        files[name[1]] = str(folder / Path(name[1]).name)
        Path(files[name[1]]).write_text(block)
    return files


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def read(words: list[str], printed: dict[str, str]) -> dict[str, Any]:
    """The options of a command, as its own parser understands them."""
    program, *rest = [printed.get(word, word) for word in words]
    if program == "accelerate":
        assert rest.pop(0) == "launch"
        launch = launch_command_parser().parse_args(rest)
        assert (ROOT / launch.config_file).is_file()
        program, rest = "python", [launch.training_script, *launch.training_script_args]
    if program == "sbatch":
        while rest[0].startswith(SBATCH):
            del rest[0]
        batch, out, script, *options = rest
        assert (ROOT / batch).is_file()
        program, rest = "python", [script, "--run.out", out, *options, "--resume"]  # as it does
    if program == "python" and rest[0] in SCRIPTS:
        return asdict(parse(SCRIPTS[rest[0]], "none", rest[1:]))
    if program == "python" and rest[0] == "-m":
        package = (ROOT / rest[1].replace(".", "/")).is_dir()
        return stopped(f"{rest[1]}.__main__" if package else rest[1], "main", rest[2:])
    if program == "python":
        assert rest[0] in printed.values(), f"{rest[0]} is neither ours nor printed"
        return {}
    assert program in CONSOLE, f"pyproject.toml has no command {program}"
    module, _, entry = CONSOLE[program].partition(":")
    return stopped(module, entry, rest)


def stopped(module: str, entry: str, words: list[str]) -> dict[str, Any]:
    """Let a command parse its options, and no more."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *given: Any) -> None:
        raise Parsed(vars(parse_args(self, *given)))

    command = getattr(importlib.import_module(module), entry)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed) as caught:
        patch.setattr(sys, "argv", [module, *words])
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        command()
    options: dict[str, Any] = caught.value.args[0]
    return options


def paths(value: Any, below: str) -> Iterator[str]:
    """Every path below a folder in nested options."""
    if isinstance(value, dict | list | tuple):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from paths(entry, below)
    elif str(value).startswith(below):
        yield str(value)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_a_command_is_understood(words: list[str], printed: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        read(words, printed)
    except SystemExit:
        pytest.fail(f"{' '.join(words)}\n{capsys.readouterr().err}")


def test_what_is_read_was_made_before_or_is_drawn(printed: dict[str, str]) -> None:
    made, layout = set[str](), drawn()
    whole = {path for path in layout if not any(other.startswith(f"{path}/") for other in layout)}  # drawn no deeper
    for words in COMMANDS:
        options = read(words, printed)
        out = options.pop("out", None) or options.get("run", {}).pop("out", None) or options.pop("work", None)
        for path in paths(options, "runs/"):
            assert path in made, f"nothing makes {path} before {' '.join(words)}"
        for path in paths(options, "data/"):
            there = path in layout or whole & set(map(str, Path(path).parents))
            assert there, f"no drawing has {path}, read by {' '.join(words)}"
        made.add(str(out))


def test_every_full_size_recipe_has_its_hours() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| `")]
    for recipe in RECIPES.glob("*.yaml"):
        content = load_yaml(recipe)
        name = content.get("stage", recipe.stem)
        assert recipe.stem.endswith("demo") or "arms" in content or any(f"`{name}`" in row for row in rows), (
            f"{recipe.name} is in no table"
        )
