"""The rules of the house that a machine can check: who may import whom, and how."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["encoders", "llava_adapter", "eval", "train"]  # a room imports only from itself and from rooms to its left
FILES = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]


def imports(file: Path) -> list[tuple[str, bool]]:
    """(imported module, whether by a plain `import x`), functions' own imports included."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, True) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.append((node.module or "", False))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file: Path) -> None:
    room = ROOMS.index(file.relative_to(ROOT).parts[0])
    for module, plain in imports(file):
        top = module.split(".")[0]
        if top in ROOMS:
            assert ROOMS.index(top) <= room, f"{ROOMS[room]} must not import {module}"
            assert not (plain and top == "eval"), "`import eval.x` would shadow the builtin; use `from eval.x import y`"


def test_every_package_is_listed_for_installation() -> None:
    listed = (ROOT / "pyproject.toml").read_text()
    for init in ROOT.glob("*/**/__init__.py"):
        parts = init.parent.relative_to(ROOT).parts
        if parts[0] in ROOMS:
            assert f'"{".".join(parts)}"' in listed


def test_every_file_that_is_no_module_is_listed_for_installation() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    shipped = {
        file for package, patterns in listed.items() for pattern in patterns for file in _of(package).glob(pattern)
    }
    files = {file for room in ROOMS for file in (ROOT / room).rglob("[!.]*") if file.is_file()}
    assert {file for file in files if file.suffix not in (".py", ".pyc")} <= shipped


def _of(package: str) -> Path:
    return ROOT.joinpath(*package.split("."))


def test_no_module_is_named_like_a_dependency() -> None:
    # A script's folder comes first on sys.path, so train/datasets.py would hide the library.
    names = {file.stem for room in ("train", "eval") for file in (ROOT / room).glob("*.py")}
    assert not names & {"datasets", "evaluate", "accelerate", "tokenizers", "transformers", "peft", "torch", "rich"}


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["-m", "encoders.export.command", "--help"], 0),
        (["-m", "encoders.export.command"], 2),
        (["-m", "encoders.inspection.command", "--help"], 0),
        (["-m", "llava_adapter.publish", "--help"], 0),
        (["-m", "llava_adapter.data", "--help"], 0),
        (["-m", "eval.chat", "--help"], 0),
        (["-m", "eval.run", "--help"], 0),
        (["-m", "eval.compare", "--help"], 0),
        (["-m", "eval.encoder", "--help"], 0),
        (["-m", "eval.fetch", "--help"], 0),
        (["-m", "eval.view", "--help"], 0),
        (["-m", "eval.matrix", "--help"], 0),
        (["train/swap.py", "--config", "train/recipes/demo.yaml", "--dry-run"], 0),
        (["train/pretrain.py", "--help"], 0),
        (["train/pretrain.py", "--run.stepz", "3"], 2),
        (["train/tune_llava.py", "--stage", "lora"], 2),
        (["train/swap.py", "--help"], 0),
        (["-m", "encoders.data.index", "--help"], 0),
        (["-m", "encoders.data.check", "--help"], 0),
        (["-m", "encoders.data.recaption", "--help"], 0),
        (["-m", "train.signals", "--help"], 0),
    ],
)
def test_help_and_usage_errors_do_not_wait_for_torch(command: list[str], code: int) -> None:
    finished = subprocess.run(
        [sys.executable, "-X", "importtime", *command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert finished.returncode == code, finished.stderr[-2000:]
    loaded = {line.split("|")[-1].strip() for line in finished.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in loaded  # the listing itself works
    assert not loaded & {"torch", "transformers", "lmms_eval"}
