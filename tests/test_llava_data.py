"""Readers, samples and batches of conversations: what is checked, mended, left out and counted."""

import json
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import IMAGE_SIZE, IMAGE_TOKENS
from PIL import Image
from transformers import LlavaProcessor

from encoders.data import tables
from encoders.data.order import StepOrder
from encoders.errors import DataError
from eval.answering.chat_model import ChatModel
from llava_adapter.chat import IGNORED, TEMPLATES, encode
from llava_adapter.data.batch import collate
from llava_adapter.data.conversations import Conversation
from llava_adapter.data.dataset import ChatDataset, TrainingChats
from llava_adapter.data.pictures import open_rgb
from llava_adapter.data.readers import read_chats
from llava_adapter.geometry import with_geometry

LLAMA3 = TEMPLATES["llama3"]


@pytest.fixture(scope="module")
def processor(tiny_llava: Path) -> LlavaProcessor:
    return LlavaProcessor.from_pretrained(tiny_llava)


def entry(**changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a dog"}]
    return {"id": "e1", "image": "a.jpg", "conversations": turns} | changes


def draw(file: Path, size: tuple[int, int] = (50, 40)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_mandelbrot(size, (-2, -1, 1, 1), 20).convert("RGB").save(file)
    return file


def write(folder: Path, *entries: Any) -> Path:
    draw(folder / "a.jpg")
    (folder / "chats.json").write_text(json.dumps(entries))
    return folder / "chats.json"


def turns(*texts: str, opening: str = "human") -> list[dict[str, str]]:
    roles = ("human", "gpt") if opening == "human" else ("gpt", "human")
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


class Listed(list[Conversation]):
    """Conversations in memory."""


def test_read_and_batch(tmp_path: Path, processor: LlavaProcessor) -> None:
    text_only = entry(id="e2", image=None, conversations=turns("Where?", "left", "How many?", "two"))
    chats = read_chats(write(tmp_path, entry(), text_only), tmp_path)
    dataset = ChatDataset(chats, processor, LLAMA3, max_length=512)
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
    """The image of a lost turn goes with it, so that images and their tokens always agree."""
    long = turns("<image>\nWhat?", "a dog", "Where?", "left", "<image> How?", "red " * 50)
    draw(tmp_path / "b.jpg")
    chats = read_chats(write(tmp_path, entry(image=["a.jpg", "b.jpg"], conversations=long)), tmp_path)
    assert len(ChatDataset(chats, processor, LLAMA3, 512)[0]["pixel_values"]) == 2
    messages = chats[0].messages
    two_turns = encode(processor.tokenizer, LLAMA3, messages[:4], IMAGE_TOKENS)
    for limit, kept, lost in ((len(two_turns[0]), messages[:4], 1), (len(two_turns[0]) - 1, messages[:2], 2)):
        sample = ChatDataset(chats, processor, LLAMA3, limit)[0]
        wanted = encode(processor.tokenizer, LLAMA3, kept, IMAGE_TOKENS)
        assert (sample["input_ids"].tolist(), sample["labels"].tolist()) == wanted
        assert (len(sample["pixel_values"]), sample["lost_turns"], sample["cut_tokens"]) == (1, lost, 0)
    # One answer alone is too long: its end is cut off, and the end token with it.
    one_turn = encode(processor.tokenizer, LLAMA3, messages[:2], IMAGE_TOKENS)[0]
    sample = ChatDataset(chats, processor, LLAMA3, len(one_turn) - 1)[0]
    assert (sample["input_ids"].tolist(), sample["cut_tokens"]) == (one_turn[:-1], 1)
    with pytest.raises(DataError, match=r"'e1'.*max_length"):
        ChatDataset(chats, processor, LLAMA3, 40)[0]


def test_a_bad_conversation_is_reported_and_replaced(tmp_path: Path, processor: LlavaProcessor) -> None:
    chats = read_chats(write(tmp_path, entry(), entry(id="e2", image="b.jpg")), draw(tmp_path / "b.jpg").parent)
    (tmp_path / "b.jpg").write_bytes(b"not a picture")
    training = TrainingChats(ChatDataset(chats, processor, LLAMA3, 512), seed=0)
    assert training[0, 0]["bad"] == []
    sample = training[0, 1]
    (report,) = sample["bad"]
    assert (sample["id"], sample["sample_id"], report["id"], report["spare"]) == ("e1", 0, 1, 0)
    assert "b.jpg" in report["detail"]
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="spares are all bad"):
        training[0, 1]


SHAREGPT = {"id": "s", "conversations": turns("Hi", "Hello <image>, dear"), "source": "sharegpt"}
OPENAI = {
    "id": "o",
    "images": ["a.jpg", "a.jpg"],
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Same <image>?"}]},
        {"role": "assistant", "content": "yes"},
    ],
}
PAIRS = {
    "images": ["a.jpg"],
    "texts": [{"user": "What?", "assistant": "a dog"}, {"user": "Where?", "assistant": "left"}],
}


def test_every_schema_and_format_gives_the_same(tmp_path: Path, processor: LlavaProcessor) -> None:
    """Json, json lines, and both kinds of tables with the picture inside, for every schema."""
    picture = draw(tmp_path / "a.jpg").read_bytes()
    expected = {
        "e1": ["<image>\nWhat is it?", "a dog"],
        "s": ["Hi", "Hello <image>, dear"],
        "o": ["Be short.", OPENAI["messages"][1]["content"], "yes"],
        "p": ["<image>\nWhat?", "a dog", "Where?", "left"],
    }
    for one in (entry(), SHAREGPT, OPENAI, {"id": "p", **PAIRS}):
        place = tmp_path / one["id"]
        place.mkdir()
        (place / "list.json").write_text(json.dumps([one, one]))
        (place / "lines.json").write_text(f"{json.dumps(one)}\n{json.dumps(one)}\n")
        names = one.get("images", [one["image"]] if "image" in one else [])
        inside = {key: value for key, value in one.items() if key not in ("image", "images")}
        if names:
            inside["images"] = [{"bytes": picture, "path": None} for _ in names]
        if one["id"] != "o":  # a column has one type
            table = datasets.Dataset.from_list([inside, inside])
            (place / "parquet").mkdir()
            table.to_parquet(place / "parquet" / "0.parquet")
            if names:
                table = table.cast_column("images", datasets.List(datasets.Image()))
            table.save_to_disk(place / "saved")
        seen = []
        for file in sorted(path for path in place.iterdir() if path.suffix != ".jpg"):
            chats = read_chats(file, tmp_path)
            assert len(chats) == 2
            chats = pickle.loads(pickle.dumps(chats))  # noqa: S301 - as a loader process gets them
            assert chats[1].id == one["id"]
            assert [message["content"] for message in chats[1].messages] == expected[one["id"]]
            sample = ChatDataset(chats, processor, LLAMA3, 512)[1]
            assert (sample["input_ids"] == processor.tokenizer.image_token_id).sum() == len(names) * IMAGE_TOKENS
            seen.append(sample)
        assert len(seen) == (2 if one["id"] == "o" else 4)
        for other in seen[1:]:
            assert torch.equal(seen[0]["input_ids"], other["input_ids"])
            assert torch.equal(seen[0]["pixel_values"], other["pixel_values"])


def test_an_epoch_reads_each_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order that training draws: 20 groups, of which a worker can hold about four."""
    rows = [{"id": str(i), "texts": [{"user": "What?", "assistant": f"{i} a dog" * 100}]} for i in range(200)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=10)
    group = read_chats(tmp_path, tmp_path)
    monkeypatch.setattr(tables, "GROUPS_BYTES", 4 * group._rows._load(0).nbytes)  # type: ignore[attr-defined]
    chats, opened = read_chats(tmp_path, tmp_path), []
    read = pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile, "read_row_group", lambda file, i, **o: opened.append(i) or read(file, i, **o)
    )
    shards = chats.shards
    seen = []
    for items in StepOrder(shards.sizes, 10, 20, 0, rank=0, world=1, window=shards.window):
        seen += [chats[index].id for _, index in items]
    assert sorted(seen, key=int) == [str(i) for i in range(200)]
    assert seen != [str(i) for i in range(200)]
    assert sorted(opened) == list(range(20))


def test_a_table_that_is_damaged_is_named(tmp_path: Path) -> None:
    for name, file in (("parquet", "0.parquet"), ("saved", "dataset_info.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
        with pytest.raises(DataError, match=rf"{file} (is no parquet file|does not tell the columns)"):
            read_chats(tmp_path / name, tmp_path)


def test_pictures_missing_or_under_another_suffix(tmp_path: Path) -> None:
    """OCR-VQA's entries all say .jpg; its files are .gif, .png, or gone."""
    draw(tmp_path / "ocr_vqa" / "images" / "1.GIF")
    draw(tmp_path / "ocr_vqa" / "images" / "2.png")
    (tmp_path / "ocr_vqa" / "images" / "3.jpg").write_bytes((tmp_path / "ocr_vqa" / "images" / "1.GIF").read_bytes())
    draw(tmp_path / "ocr_vqa" / "images" / "8.JPG")
    entries = [entry(id=str(i), image=f"ocr_vqa/images/{i}.jpg") for i in (1, 2, 3, 8)]
    gone = [
        entry(id="4", image="ocr_vqa/images/4.jpg"),
        entry(id="5", image="coco/5.jpg"),
        entry(id="9", image="A.jpg"),
    ]
    text_only = entry(id="6", image=None, conversations=turns("Hi", "Hello"))
    numbered = entry(id="7", image="00453/a.jpg")
    draw(tmp_path / "00453" / "a.jpg")
    file = write(tmp_path, *entries, *gone, text_only, numbered)
    with pytest.raises(DataError, match=r"entry 4 \(id '4'\).*4\.jpg does not exist.*missing: skip"):
        read_chats(file, tmp_path)
    chats = read_chats(file, tmp_path, "skip")
    assert [chats[i].id for i in range(len(chats))] == ["1", "2", "3", "8", "6", "7"]
    assert [picture.name for i in range(4) for picture in chats[i].pictures] == ["1.GIF", "2.png", "3.jpg", "8.JPG"]
    assert chats.findings.kept == {"ocr_vqa": 4, "(text only)": 1, "(numbered folders)": 1}
    assert chats.findings.missing == {"ocr_vqa": 1, "coco": 1, "images": 1}
    assert chats.findings.resuffixed == {"ocr_vqa": 3}
    assert "left out, a picture is missing: 3 (coco 1, images 1, ocr_vqa 1)" in str(chats.findings)
    with pytest.raises(IndexError):
        chats[6]
    with pytest.raises(DataError, match="leaves no conversation"):
        read_chats(write(tmp_path, *gone), tmp_path, "skip")


def test_turns_that_teach_nothing_are_taken_off_and_counted(tmp_path: Path) -> None:
    """As in the ShareGPT part of the 665K mix."""
    opened = entry(image=None, conversations=turns("Hello", "Where?", "left", opening="gpt"))
    open_ended = entry(image=None, conversations=turns("Where?", "left", "And now?"))
    chats = read_chats(write(tmp_path, opened, open_ended), tmp_path)
    for i in range(2):
        assert [message["content"] for message in chats[i].messages] == ["Where?", "left"]
    assert sorted(chats.findings.mended.values()) == [1, 1]
    assert "began with an answer" in str(chats.findings)


def test_an_image_mark_that_is_only_written_about(tmp_path: Path, processor: LlavaProcessor) -> None:
    about = entry(image=None, conversations=turns("What does <image> mean in RSS?", "a <image> tag"))
    sample = ChatDataset(read_chats(write(tmp_path, about), tmp_path), processor, LLAMA3, 512)[0]
    assert processor.tokenizer.image_token_id not in sample["input_ids"].tolist()
    assert "What does <image> mean" in processor.tokenizer.decode(sample["input_ids"])
    assert len(sample["pixel_values"]) == 0


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (entry(image="none.jpg"), r"e1.*none\.jpg does not exist"),
        (entry(image=None), r'1 <image> marks in human turns but no "image"'),
        (entry(conversations=turns("What?", "a dog")), "0 <image> marks"),
        (entry(conversations=turns("<image> <image>", "a dog")), "2 <image> marks"),
        (entry(conversations=turns("What?", "a <image>")), "0 <image> marks"),
        (entry(conversations=turns("<image>")), "turns must be"),
        (entry(conversations=turns("<image> x", "y", "z") + turns("w", "v")), "turns must be"),
        (entry(conversations=[]), "no turns"),
        (entry(conversations=["x"]), "not a list of turns"),
        (entry(conversations=[{"from": "bot", "value": "x"}]), "'bot'"),
        (entry(conversations=[{"from": [], "value": "x"}]), "one of human"),
        (entry(conversations=[{"from": "human", "value": 3}]), "text"),
        (entry(conversations=[{"from": "human", "value": [{"type": "video"}]}]), "text"),
        (entry(conversations=turns("<image> \ud83d", "x")), "half a character"),
        (entry(image=3), "path or the bytes"),
        (entry(image=""), 'no "image"'),
        (
            entry(conversations=[*turns("<image>\nx"), {"from": "gpt", "value": [{"type": "image"}]}]),
            "only a human turn",
        ),
        ({"id": "e1"}, "conversations"),
        ("x", "not an object"),
    ],
)
def test_bad_entries_are_named(broken: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"entry 1.*" + message):
        read_chats(write(tmp_path, entry(), broken), tmp_path)


def test_bad_files(tmp_path: Path, processor: LlavaProcessor) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_chats(tmp_path / "chats.json", tmp_path)
    file = write(tmp_path, entry())
    chats = read_chats(file, tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"'e1'.*a\.jpg"):
        ChatDataset(chats, processor, LLAMA3, 512)[0]
    for text, message in (("[]", "non-empty"), ("{", "not valid JSON"), ('{"a": 1}\n{', "not valid JSON")):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            read_chats(file, tmp_path)
    file.write_bytes(b"\xff")
    with pytest.raises(DataError, match="as text"):
        read_chats(file, tmp_path)
    with pytest.raises(DataError, match="neither a folder of Dataset"):
        read_chats(tmp_path, tmp_path)


def test_conversations_are_kept_packed(tmp_path: Path) -> None:
    """A loader process gets bytes, not a hundred objects per conversation."""
    one = entry(conversations=turns("<image>\nWhat?", "a dog", *["Where?", "left"] * 20))
    chats = read_chats(write(tmp_path, *[one] * 300), tmp_path)
    values = list(vars(chats).values())
    assert not [value for value in values if isinstance(value, list | dict | Sequence) and not isinstance(value, bytes)]
    assert chats[299] == chats[0]


@pytest.mark.parametrize("geometry", ["crop", "pad"])
@pytest.mark.parametrize("size", [(50, 40), (41, 97), (33, 32), (31, 64), (200, 7), (32, 32)])
def test_training_sees_what_evaluation_sees(
    geometry: Any, size: tuple[int, int], processor: LlavaProcessor, tiny_llava: Path, tmp_path: Path
) -> None:
    """Pixels of a training sample are those of the saved folder's processor, by eval-mllm's model and by stock
    transformers; padding is that of LLaVA-1.5: mean colour as whole numbers, the picture in the middle."""
    from transformers import AutoProcessor

    saved = LlavaProcessor.from_pretrained(tiny_llava)
    saved.image_processor = with_geometry(saved.image_processor, geometry)
    shutil.copytree(tiny_llava, tmp_path, dirs_exist_ok=True)
    saved.save_pretrained(tmp_path)
    saved.image_processor.save_pretrained(tmp_path)
    picture = draw(tmp_path / "a.png", size)
    messages = ({"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"})
    chats = Listed([Conversation("x", "s", messages, (picture,))])
    pixels = ChatDataset(chats, saved, LLAMA3, 512)[0]["pixel_values"]
    image = Image.open(picture).convert("RGB")
    for other in (ChatModel(tmp_path, "cpu", "float32").processor, AutoProcessor.from_pretrained(tmp_path)):
        assert torch.equal(other.image_processor(images=[image], return_tensors="pt")["pixel_values"], pixels)
    mean, std = (np.array(values)[:, None, None] for values in ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    side = max(size)
    if geometry == "pad":
        square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in (0.4, 0.5, 0.6)))
        square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
        wanted = np.asarray(square.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255
        # Torchvision's resize rounds otherwise than Pillow's, by a step of the 255 or two.
        assert np.abs(pixels[0].numpy() * std + mean - wanted).max() <= 2.5 / 255
    else:
        assert saved.image_processor.size == {"shortest_edge": IMAGE_SIZE}


def test_a_damaged_picture_is_told_whatever_pillow_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a damaged AVIF a RuntimeError, of others an AssertionError without a word."""
    for error, said in ((RuntimeError("truncated"), "truncated"), (AssertionError(), r"AssertionError\(\)")):
        monkeypatch.setattr(Image, "open", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(ValueError, match=said):
            open_rgb(b"damaged")
