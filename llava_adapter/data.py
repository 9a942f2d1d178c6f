"""LLaVA json -> training samples and batches.

Reads the format of LLaVA's instruction files: a list of {"id", "image", "conversations": [{"from", "value"}, ...]},
text-only entries without "image". One image per conversation at most.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from encoders.errors import DataError
from llava_adapter.chat import IGNORED, IMAGE, CaptionTemplate, ChatTemplate, Message, encode

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def read_chats(json_path: Path, image_root: Path) -> list[dict[str, Any]]:
    """Read and check a LLaVA json: [{"id": str, "image": Path | None, "messages": [{"role", "content"}, ...]}, ...].

    Raises DataError naming the entry: unknown roles or order, `<image>` marks that do not match "image", no such file.
    """
    try:
        entries = json.loads(json_path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{json_path} does not exist; pass a json file in LLaVA's conversation format") from error
    except ValueError as error:
        raise DataError(f"{json_path} is not valid JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{json_path} does not hold a non-empty list of conversations")
    return [_read_chat(entry, f"{json_path}, entry {number}", image_root) for number, entry in enumerate(entries)]


def _read_chat(entry: Any, where: str, image_root: Path) -> dict[str, Any]:
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        raise DataError(f'{where}: not an object with a list of "conversations"')
    where = f"{where} (id {entry.get('id')!r})"
    messages = []
    for turn in entry["conversations"]:
        if not isinstance(turn, dict) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
            raise DataError(
                f'{where}: a turn needs "from" (one of {", ".join(ROLES)}) and a text "value", not {turn!r}'
            )
        messages.append({"role": ROLES[turn["from"]], "content": turn["value"]})
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise DataError(f"{where}: turns must be human, gpt, human, gpt, ...; found {', '.join(roles) or 'none'}")

    asked = sum(message["content"].count(IMAGE) for message in messages if message["role"] == "user")
    marks = sum(message["content"].count(IMAGE) for message in messages)
    given = 0 if entry.get("image") is None else 1
    if not asked == marks == given:
        raise DataError(
            f'{where}: {marks} {IMAGE} marks ({asked} in human turns) but {given} "image"; '
            "a conversation shows its one image once, in a human turn"
        )
    image = image_root / entry["image"] if given else None
    if image is not None and not image.is_file():
        raise DataError(f"{where}: image {image} does not exist; check the image root")
    return {"id": str(entry.get("id", where)), "image": image, "messages": messages}


def image_token_count(processor: LlavaProcessor) -> int:
    """Number of image tokens of one image: patches after the crop, with the class token kept or dropped."""
    crop = processor.image_processor.crop_size
    patches = (crop["height"] // processor.patch_size) * (crop["width"] // processor.patch_size)
    dropped = 1 if processor.vision_feature_select_strategy == "default" else 0
    return patches + processor.num_additional_image_tokens - dropped


class ChatDataset(Dataset[dict[str, Any]]):
    """Samples {"id", "input_ids" (L), "labels" (L), "pixel_values" (images, 3, H, W)} of `read_chats`' entries.

    A conversation longer than `max_length` tokens loses whole turns from its end, then the end of its last answer.
    `pixel_values` holds 1 image, or 0 for a text-only entry. Raises DataError naming the entry.
    """

    def __init__(
        self,
        chats: Sequence[dict[str, Any]],
        processor: LlavaProcessor,
        template: ChatTemplate | CaptionTemplate,
        max_length: int,
    ) -> None:
        self.chats = chats
        self.processor = processor
        self.template = template
        self.max_length = max_length
        self.image_tokens = image_token_count(processor)

    def __len__(self) -> int:
        return len(self.chats)

    def __getitem__(self, index: int) -> dict[str, Any]:
        chat = self.chats[index]
        try:
            input_ids, labels = self._encode(chat["messages"])
        except DataError as error:
            raise DataError(f"conversation {chat['id']!r}: {error}") from error
        return {
            "id": chat["id"],
            "input_ids": torch.tensor(input_ids),
            "labels": torch.tensor(labels),
            "pixel_values": self._pixels(chat),
        }

    def _encode(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Ids and labels of as many leading turns as fit."""
        messages = list(messages)
        while True:
            input_ids, labels = encode(self.processor.tokenizer, self.template, messages, self.image_tokens)
            if len(input_ids) <= self.max_length or len(messages) <= 3:
                break
            messages = messages[:-2]
        if len(input_ids) <= self.max_length:
            return input_ids, labels
        cut = labels[: self.max_length]
        if all(label == IGNORED for label in cut):
            raise DataError(
                f"max_length {self.max_length} leaves no token of the first answer ({len(input_ids)} tokens with the "
                f"image's {self.image_tokens}); raise max_length"
            )
        return input_ids[: self.max_length], cut

    def _pixels(self, chat: dict[str, Any]) -> Tensor:
        if chat["image"] is None:
            crop = self.processor.image_processor.crop_size
            return torch.zeros(0, 3, crop["height"], crop["width"])
        try:
            with Image.open(chat["image"]) as image:
                rgb = image.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"conversation {chat['id']!r}: cannot read image {chat['image']}: {error}") from error
        return self.processor.image_processor(rgb, return_tensors="pt")["pixel_values"]  # (1, 3, H, W)


def collate(samples: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Batch samples: right-padded ids, labels and attention_mask (B, L), and pixel_values (images, 3, H, W)."""
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "id": [sample["id"] for sample in samples],
        "input_ids": pad([sample["input_ids"] for sample in samples], batch_first=True, padding_value=pad_token_id),
        "labels": pad([sample["labels"] for sample in samples], batch_first=True, padding_value=IGNORED),
        # From the lengths: a pad id inside a conversation must stay visible.
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
    }
