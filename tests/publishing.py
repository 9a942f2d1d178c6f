"""What the tests of publishing share: a hub that this process's client talks to, and a finished encoder folder."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_encoder
from hub_server import HubServer, serve

from encoders import manifest
from encoders.publish.publishable import check

TOKEN = "hf_" + "loopback" * 4
REPO = "someone/encoder"
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-feature-extraction
---
# An encoder
"""
WITHIN = {"max_relative_error": 1e-7, "min_cosine": 1.0, "rounding_ratio": 1.0}
CERTIFICATE = {
    "keys": {"missing": 0, "unexpected": 0},
    "float32": {"bound": {"max_relative_error": 1e-5, "min_cosine": 0.99999}, "layers": {"hidden_states[-2]": WITHIN}},
    "bfloat16": {"bound": {"rounding_ratio": 2.0}, "layers": {"hidden_states[-2]": WITHIN}},
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub that this process's client talks to."""
    with serve(TOKEN) as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def finish(folder: Path, kind: str = "encoder", **config: Any) -> Path:
    """Seal a folder as it is, as if it were made from its own config file."""
    manifest.seal(folder, kind, config, {"source": folder / "config.json"} if kind == "encoder" else None)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished encoder folder; do not write into it."""
    folder = write_encoder(tmp_path_factory.mktemp("made") / "encoder")
    (folder / "parity.json").write_text(json.dumps(CERTIFICATE))
    (folder / "README.md").write_text(CARD)
    return finish(folder, source=str(folder), objective="clips")


@pytest.fixture
def encoder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "encoder"))


def content(folder: Path) -> dict[str, bytes]:
    """The published form of an encoder folder: its files as they are, and a manifest without paths."""
    published = check(folder, REPO).contents["manifest.json"]
    assert isinstance(published, bytes)
    files = {name: (folder / name).read_bytes() for name in manifest.read(folder).files}
    return files | {"manifest.json": published}


def at(server: HubServer, revision: str = "main") -> dict[str, bytes]:
    """What the repository holds, git's own file aside."""
    files = server.repos[REPO].files(revision)
    return {name: blob.content for name, blob in files.items() if name != ".gitattributes"}


def sent(server: HubServer) -> list[tuple[str, str]]:
    return [(method, path) for method, path in server.log if method not in ("GET", "HEAD")]


def client(server: HubServer, tmp_path: Path, *command: str) -> subprocess.Popen[str]:
    """A fresh process whose client talks to the server."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",  # eval-mllm --data, run in this process by another test, leaves it at 1
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    environment |= {"HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
