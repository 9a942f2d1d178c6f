"""What is refused before anything goes out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from publishing import CARD, REPO, TOKEN, at, finish
from publishing import encoder as encoder
from publishing import made as made
from publishing import server as server
from safetensors.torch import load_file, save_file

from encoders.errors import DataError, ModelError, ParityError, SwapError, UsageError
from encoders.publish import hub
from encoders.publish.private_text import in_json, in_text, without_paths
from encoders.publish.publishable import check


def rewrite(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_text(change((folder / name).read_text()))
        finish(folder)

    return spoil


def with_values(name: str, **values: Any) -> Callable[[Path], None]:
    return rewrite(name, lambda text: json.dumps(json.loads(text) | values))


def weights(change: Callable[[dict[str, torch.Tensor]], object], **metadata: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        state = load_file(file)
        change(state)
        save_file(state, file, metadata={"format": "pt", **metadata})
        finish(folder)

    return spoil


def parity(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        certificate = json.loads((folder / "parity.json").read_text())
        change(certificate)
        (folder / "parity.json").write_text(json.dumps(certificate))
        finish(folder)

    return spoil


def set_one(value: float, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(state: dict[str, torch.Tensor]) -> None:
        for name in state:
            state[name] = state[name].to(dtype)
        state["vision_model.post_layernorm.bias"][7] = value

    return change


def link(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to(folder.parent / "config.json")


LAYER = "hidden_states[-2]"
MISTAKES: list[tuple[str, Callable[[Path], object], type[SwapError], str]] = [
    ("no certificate", lambda f: ((f / "parity.json").unlink(), finish(f)), ParityError, "is no parity certificate"),
    ("no bfloat16", parity(lambda c: c.pop("bfloat16")), ParityError, "is no parity certificate"),
    (
        "failed",
        parity(lambda c: c["float32"]["layers"][LAYER].update(min_cosine=0.9)),
        ParityError,
        "min_cosine is 0.9",
    ),
    (
        "error",
        parity(lambda c: c["float32"]["layers"][LAYER].update(max_relative_error=1e-4)),
        ParityError,
        "bound 1e-05",
    ),
    (
        "nan",
        parity(lambda c: c["bfloat16"]["layers"][LAYER].update(rounding_ratio=float("nan"))),
        ParityError,
        "is nan",
    ),
    ("no layers", parity(lambda c: c["float32"].update(layers={})), ParityError, "no bounds or no layers"),
    ("keys", parity(lambda c: c["keys"].update(missing=2)), ParityError, "2 missing keys"),
    ("NaN weight", weights(set_one(float("nan"))), ModelError, r"1 values of vision_model\.post_layernorm\.bias"),
    ("Inf weight", weights(set_one(float("-inf"), torch.bfloat16)), ModelError, "are not finite"),
    (
        "hub token",
        rewrite("README.md", lambda t: t + f"login {TOKEN}\n"),
        ModelError,
        "line 7 holds what looks like a Hug",
    ),
    (
        "github token",
        with_values("config.json", x=["ghp_" + "a1B2" * 9]),
        ModelError,
        r"config\.json: x holds .* GitHub token",
    ),
    ("no json", rewrite("config.json", lambda t: t + "}"), ModelError, r"config\.json is not JSON"),
    ("api key", rewrite("README.md", lambda t: f"{t}sk-proj-{'a1B2' * 9}"), ModelError, "an API key"),
    (
        "token in the manifest",
        lambda f: finish(f, tracker={"key": TOKEN}),
        ModelError,
        r"manifest\.json: config\.tracker\.key",
    ),
    (
        "token as a key",
        lambda f: finish(f, tracker={TOKEN: 1}),
        ModelError,
        r"manifest\.json: config\.tracker\.\.\.\. holds",
    ),
    (
        "escaped home",
        rewrite("config.json", lambda t: t.replace("{", r'{"x": "\u002fhome\/someone/x",', 1)),
        ModelError,
        "machine: /home/someone",
    ),
    (
        "hidden behind a double",
        rewrite("config.json", lambda t: t.replace("{", f'{{"x": "{TOKEN}", "x": 1,', 1)),
        ModelError,
        "x holds what looks like a Hug",
    ),
    (
        "wandb key",
        rewrite("parity.json", lambda t: f'{t[:-1]}, "WANDB_API_KEY": "{"0a" * 20}"}}'),
        ModelError,
        "Weights & B",
    ),
    ("token in weights", weights(len, login=TOKEN), ModelError, r"model\.safetensors: login holds what looks like"),
    ("home", rewrite("README.md", lambda t: t + "from /home/someone/runs/a\n"), ModelError, "machine: /home/someone"),
    ("windows home", rewrite("README.md", lambda t: t + r"C:\Users\someone\runs"), ModelError, "a path of a machine"),
    (
        "path here",
        rewrite("README.md", lambda t: t + f"from {Path(__file__).parent}\n"),
        ModelError,
        "a path of a machine",
    ),
    ("path in weights", weights(len, source=str(Path(__file__).parent)), ModelError, "a path of a machine"),
    ("symlink", link, ModelError, r"config\.json is a symlink"),
    ("stranger", lambda f: (f / "notes.txt").write_text("x"), ModelError, r"notes\.txt is not part of the artifact"),
    ("changed", lambda f: (f / "config.json").write_text("{}"), ModelError, r"config\.json is not the file that"),
    ("pickle", lambda f: ((f / "old.bin").write_bytes(b"x"), finish(f)), ModelError, r"old\.bin is of a kind"),
    (
        "code",
        rewrite("config.json", lambda t: t.replace("{", r'{"x": [{"auto\u005fmap": {}}],', 1)),
        ModelError,
        "has an `auto_map`",
    ),
    ("no card", lambda f: ((f / "README.md").unlink(), finish(f)), ModelError, r"there is no README\.md"),
    ("no licence", rewrite("README.md", lambda t: t.replace("license", "licence")), ModelError, "states no `license`"),
    (
        "bad card",
        rewrite("README.md", lambda t: t.replace("---\nlic", "---\n: [\nlic")),
        ModelError,
        "metadata is not valid",
    ),
    ("license", rewrite("README.md", lambda t: t.replace("apache-2.0", "My own!")), ModelError, "license 'My own!' is"),
    (
        "base",
        rewrite("README.md", lambda t: t.replace("---\nlic", "---\nbase_model: a b\nlic")),
        ModelError,
        "'a b' is no id",
    ),
    ("no manifest", lambda f: (f / "manifest.json").unlink(), DataError, "did not finish"),
    ("a run", lambda f: finish(f, "encoder-run"), UsageError, "an artifact of kind 'encoder-run'"),
]


@pytest.mark.parametrize(
    ("spoil", "error", "match"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES]
)
def test_refused_before_anything_goes_out(
    server: HubServer, encoder: Path, spoil: Callable[[Path], object], error: type[SwapError], match: str
) -> None:
    spoil(encoder)
    with pytest.raises(error, match=match) as raised:
        hub.publish(encoder, REPO)
    assert server.log == []
    assert TOKEN not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "scenes:{}",
        "me@host:{}/x",
        "-I{}",
        "cat file:{}",
        "file://{}",
        '"{}"',
        "a={}",
        r"one\n{}",
        "({})",
        "--data {}/x",
    ],
)
@pytest.mark.parametrize("home", ["/home/someone", "/Users/some.one", "/root/runs", r"C:\Users\someone"])
def test_a_home_folder_is_found_wherever_it_stands(text: str, home: str) -> None:
    assert list(in_text(text.format(home))) == [f"line 1 holds a path of a machine: {home}"]
    assert list(in_json(json.dumps({"a": [{"b": text.format(home)}]}))) == [f"a.b holds a path of a machine: {home}"]
    assert list(in_json(json.dumps(without_paths({"a": text.format(home)})))) == []


def test_the_published_manifest_names_no_place_of_this_machine(encoder: Path) -> None:
    config = {
        "/home/someone/enc": 1,
        "home": "~/secret/a",
        "up": "../someone/secret/b",
        "drive": r"D:\secret\c",
        "spec": "scenes:/home/someone/secret/d,seed=1",
        "list": ["shards:/home/someone/secret/{0..9}.tar"],
        "end": "</s>",
        "url": "https://example.com/x/y",
    }
    published = json.loads(check(finish(encoder, **config), REPO).contents["manifest.json"])
    assert published["config"] == {
        "enc": 1,
        "home": "a",
        "up": "b",
        "drive": "c",
        "spec": "scenes:d,seed=1",
        "list": ["shards:{0..9}.tar"],
        "end": "</s>",
        "url": "https://example.com/x/y",
    }


def test_ordinary_texts_are_not_taken_for_secrets(server: HubServer, encoder: Path) -> None:
    text = (
        f"See https://example.com/home/page/x, /usr/bin/env, runs/home/x, a/home/b, sha {'0a' * 20}, hf_hub, ./tmp/x.\n"
    )
    (encoder / "README.md").write_text(CARD + text)
    hub.publish(encoder, REPO)
    assert text.encode() in at(server)["README.md"]
