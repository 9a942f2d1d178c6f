"""python -m llava_adapter.data: what it counts, what it finds, what it shows."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import IMAGE_TOKENS
from PIL import Image

from encoders.errors import DataError, UsageError
from llava_adapter.chat import TEMPLATES, encode
from llava_adapter.data import __main__ as command
from llava_adapter.data.readers import read_chats
from llava_adapter.save import load_processor


def entry(name: str, image: str | None, *texts: str) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": name, "image": image, "conversations": turns}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four conversations: one too long, one text-only, one whose picture does not open, one whose picture is gone."""
    (tmp_path / "coco").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "coco" / "1.jpg")
    (tmp_path / "coco" / "2.jpg").write_bytes(b"no picture")
    entries = [
        entry("long", "coco/1.jpg", "<image>\nWhat?", "a dog", "Where?", "left", "How?", "red " * 40),
        entry("words", None, "Hi", "Hello"),
        entry("broken", "coco/2.jpg", "<image>\nWhat?", "a cat"),
        entry("gone", "gqa/3.jpg", "<image>\nWhat?", "a car"),
    ]
    (tmp_path / "chats.json").write_text(json.dumps(entries))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["data", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "200")
    command.main()


def test_counts_and_views(
    folder: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    processor, chats = load_processor(tiny_llava), read_chats(folder / "chats.json", folder, "skip")
    limit = len(encode(processor.tokenizer, TEMPLATES["llama3"], chats[0].messages[:4], IMAGE_TOKENS)[0])
    options = ["--images", folder, "--model", tiny_llava, "--max-length", limit, "--show", 2, "--open-images"]
    with pytest.raises(DataError, match="2 conversations are bad or lack a picture"):
        run(monkeypatch, folder / "chats.json", *options)
    out = capsys.readouterr().out
    for line in (
        "3 conversations: coco 2, (text only) 1",
        "left out, a picture is missing: 1 (gqa 1)",
        "3 read, 1 bad",
        "images      0: 1, 1: 1",
        f"1 conversations lose 1 turns at {limit} tokens (coco 1)",
        f"[1 image x {IMAGE_TOKENS} tokens]",
        "[[a dog<|eot_id|>]]<|start_header_id|>user",
        "[[left<|eot_id|>]]\n(1 turns and 0 tokens do not fit)",
        "[[Hello<|eot_id|>]]",
        "conversation 'broken': cannot read image",
    ):
        assert line in out, f"{line!r} in:\n{out}"
    assert "red red" not in out


def test_a_sound_set_passes_with_several_processes(
    folder: Path, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An LLM's folder will do, with the template said and the tokens of an image; captions need none of a chat."""
    good = [entry(str(i), "coco/1.jpg", "<image>\nWhat?", "a dog") for i in range(3)]
    (folder / "good.json").write_text(json.dumps(good))
    llm = ["--model", tiny_llm, "--template", "llama3", "--image-tokens", 7, "--workers", 2]
    run(monkeypatch, folder / "good.json", "--images", folder, *llm)
    chat = capsys.readouterr().out
    run(monkeypatch, folder / "good.json", "--images", folder, *llm, "--captions", "--show", 1)
    captions = capsys.readouterr().out
    assert "3 read, 0 bad" in chat
    assert "supervised  5 % 3, median 3" in chat  # a, dog and the end token
    assert "[1 image x 7 tokens][[a dog\n]]" in captions
    assert "tokens      5 % 11" in captions  # BOS, image, a, dog, newline
    run(monkeypatch, folder / "good.json", "--images", folder, "--every", 2)
    assert "2 read" in capsys.readouterr().out


def test_a_set_without_an_answer_that_fits(
    folder: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError):
        run(monkeypatch, folder / "chats.json", "--images", folder, "--model", tiny_llava, "--max-length", 30)
    assert "max_length 30 leaves no token of the first answer" in capsys.readouterr().out


def test_mistakes(folder: Path, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = folder / "chats.json"
    with pytest.raises(UsageError, match="--show needs --model"):
        run(monkeypatch, chats, "--images", folder, "--show", 1)
    with pytest.raises(UsageError, match="say which --template"):
        run(monkeypatch, chats, "--images", folder, "--model", tiny_llm)
    with pytest.raises(UsageError, match="not a chat template"):
        run(monkeypatch, chats, "--images", folder, "--model", tiny_llm, "--template", "plain")
    with pytest.raises(DataError, match=r"gqa/3\.jpg does not exist"):
        run(monkeypatch, chats, "--images", folder, "--missing", "error")
