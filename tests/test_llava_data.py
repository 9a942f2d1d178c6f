"""LLaVA json reader, samples and batches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import IMAGE_SIZE, IMAGE_TOKENS
from PIL import Image
from transformers import LlavaProcessor

from encoders.errors import DataError
from llava_adapter.chat import IGNORED, TEMPLATES, encode
from llava_adapter.data import ChatDataset, collate, read_chats


@pytest.fixture(scope="module")
def processor(tiny_llava: Path) -> LlavaProcessor:
    return LlavaProcessor.from_pretrained(tiny_llava)


def entry(**changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a dog"}]
    return {"id": "e1", "image": "a.jpg", "conversations": turns} | changes


def write(folder: Path, *entries: Any) -> Path:
    Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 20).convert("RGB").save(folder / "a.jpg")
    (folder / "chats.json").write_text(json.dumps(entries))
    return folder / "chats.json"


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def test_read_and_batch(tmp_path: Path, processor: LlavaProcessor) -> None:
    text_only = entry(id="e2", image=None, conversations=turns("Where?", "left", "How many?", "two"))
    chats = read_chats(write(tmp_path, entry(), text_only), tmp_path)
    dataset = ChatDataset(chats, processor, TEMPLATES["llama3"], max_length=512)
    batch = collate([dataset[0], dataset[1]], processor.tokenizer.pad_token_id)
    assert batch["id"] == ["e1", "e2"]
    assert batch["pixel_values"].shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert (batch["input_ids"] == processor.tokenizer.image_token_id).sum(dim=1).tolist() == [IMAGE_TOKENS, 0]
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    for row, length in enumerate(lengths):
        assert torch.equal(batch["input_ids"][row, :length], dataset[row]["input_ids"])
        assert (batch["input_ids"][row, length:] == processor.tokenizer.pad_token_id).all()
        assert (batch["labels"][row, length:] == IGNORED).all()
    assert max(lengths) == batch["input_ids"].shape[1]
    # The stock processor makes the same ids and pixels of the same conversation.
    question = [{"type": "image", "path": str(tmp_path / "a.jpg")}, {"type": "text", "text": "What is it?"}]
    answer = [{"type": "text", "text": "a dog"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    stock = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(stock["input_ids"][0], dataset[0]["input_ids"])
    assert torch.equal(stock["pixel_values"], dataset[0]["pixel_values"])


def test_a_pad_id_inside_a_conversation_stays_visible() -> None:
    sample = {"id": "x", "input_ids": torch.tensor([5, 0, 5]), "labels": torch.tensor([5, 0, 5])}
    short = {"id": "y", "input_ids": torch.tensor([5]), "labels": torch.tensor([5])}
    pixels = {"pixel_values": torch.zeros(0, 3, 4, 4)}
    assert collate([sample | pixels, short | pixels], 0)["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_too_long_conversations_lose_whole_trailing_turns(tmp_path: Path, processor: LlavaProcessor) -> None:
    long = entry(conversations=turns("<image>\nWhat?", "a dog", "Where?", "left", "How?", "red " * 50))
    chats = read_chats(write(tmp_path, long), tmp_path)
    two_turns = ChatDataset([chats[0] | {"messages": chats[0]["messages"][:4]}], processor, TEMPLATES["llama3"], 512)[0]
    fits = ChatDataset(chats, processor, TEMPLATES["llama3"], len(two_turns["input_ids"]))[0]
    assert torch.equal(fits["input_ids"], two_turns["input_ids"])
    shorter = ChatDataset(chats, processor, TEMPLATES["llama3"], len(two_turns["input_ids"]) - 1)[0]
    one_turn = encode(processor.tokenizer, TEMPLATES["llama3"], chats[0]["messages"][:2], IMAGE_TOKENS)
    assert (shorter["input_ids"].tolist(), shorter["labels"].tolist()) == one_turn
    with pytest.raises(DataError, match=r"'e1'.*max_length"):
        ChatDataset(chats, processor, TEMPLATES["llama3"], 40)[0]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (entry(image="none.jpg"), r"e1.*none\.jpg does not exist"),
        (entry(image=None), "1 <image> marks"),
        (entry(conversations=turns("What?", "a dog")), "0 <image> marks"),
        (entry(conversations=turns("<image> <image>", "a dog")), "2 <image> marks"),
        (entry(conversations=turns("What?", "a <image>")), "1 <image> marks"),
        (entry(conversations=turns("<image>")), "turns must be"),
        (entry(conversations=[]), "turns must be"),
        (entry(conversations=[{"from": "bot", "value": "x"}]), "'bot'"),
        (entry(conversations=[{"from": "human", "value": 3}]), "text"),
        ({"id": "e1"}, "conversations"),
    ],
)
def test_bad_entries_are_named(broken: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"entry 1.*" + message):
        read_chats(write(tmp_path, entry(), broken), tmp_path)


def test_bad_files(tmp_path: Path, processor: LlavaProcessor) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_chats(tmp_path / "chats.json", tmp_path)
    file = write(tmp_path, entry())
    chats = read_chats(file, tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"'e1'.*a\.jpg"):
        ChatDataset(chats, processor, TEMPLATES["llama3"], 512)[0]
    file.write_text("[]")
    with pytest.raises(DataError, match="non-empty"):
        read_chats(file, tmp_path)
    file.write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        read_chats(file, tmp_path)
