"""Conversations -> training samples: ids and labels that fit, and the pictures' pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from encoders.errors import DataError
from llava_adapter.chat import IGNORED, CaptionTemplate, ChatTemplate, Message, encode, split_images
from llava_adapter.data.conversations import Conversation
from llava_adapter.data.pictures import open_rgb
from llava_adapter.data.readers import Chats
from llava_adapter.geometry import image_token_count

SPARES = 50


class Tokens(NamedTuple):
    """A conversation's ids and labels (L), and what did not fit."""

    input_ids: list[int]
    labels: list[int]
    images: int
    """Shown in the turns that are left."""
    lost_turns: int
    """Question-answer pairs taken off the end."""
    cut_tokens: int
    """Taken off the end of the first answer, where it alone is too long."""


class ChatDataset(Dataset[dict[str, Any]]):
    """Samples {"id", "input_ids" (L), "labels" (L), "pixel_values" (images, 3, H, W), "lost_turns", "cut_tokens"}.

    A conversation longer than `max_length` tokens loses whole turns from its end; a first answer that is too long by
    itself loses its end, and with it its end token. Image tokens are never lost. `pixel_values` holds 0 images for a
    text-only conversation. Raises DataError naming a conversation of which no answer would be learned, or whose picture
    cannot be read.
    """

    def __init__(
        self, chats: Chats, processor: LlavaProcessor, template: ChatTemplate | CaptionTemplate, max_length: int
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
        tokens = self.tokens(chat)
        return {
            "id": chat.id,
            "input_ids": torch.tensor(tokens.input_ids),
            "labels": torch.tensor(tokens.labels),
            "pixel_values": self.pixels(chat, tokens.images),
            "lost_turns": tokens.lost_turns,
            "cut_tokens": tokens.cut_tokens,
        }

    def tokens(self, chat: Conversation) -> Tokens:
        """Ids and labels of as many leading turns as fit."""
        try:
            return self._fitting(chat.messages)
        except DataError as error:
            raise DataError(f"conversation {chat.id!r}: {error}") from error

    def _fitting(self, messages: Sequence[Message]) -> Tokens:
        lost = 0
        ids, labels = self._encode(messages)
        while len(ids) > self.max_length and len(messages) > 3:  # a system turn and one pair stay
            messages = messages[:-2]
            lost += 1
            ids, labels = self._encode(messages)
        images = sum(split_images(message)[0] for message in messages)
        cut = max(len(ids) - self.max_length, 0)
        if not cut:
            return Tokens(ids, labels, images, lost, 0)
        if all(label == IGNORED for label in labels[: self.max_length]):
            raise DataError(
                f"max_length {self.max_length} leaves no token of the first answer ({len(ids)} tokens, each image "
                f"takes {self.image_tokens}); raise max_length"
            )
        return Tokens(ids[: self.max_length], labels[: self.max_length], images, lost, cut)

    def _encode(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        return encode(self.processor.tokenizer, self.template, messages, self.image_tokens)

    def pixels(self, chat: Conversation, images: int) -> Tensor:
        """The first so many pictures as the tower sees them (images, 3, H, W)."""
        if not images:
            crop = self.processor.image_processor.crop_size
            return torch.zeros(0, 3, crop["height"], crop["width"])
        pictures = []
        for picture in chat.pictures[:images]:
            try:
                pictures.append(open_rgb(picture))
            except ValueError as error:
                what = f"image {picture}" if isinstance(picture, Path) else "an embedded image"
                raise DataError(f"conversation {chat.id!r}: cannot read {what}: {error}") from error
        return self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]  # (images, 3, H, W)


class TrainingChats(Dataset[dict[str, Any]]):
    """(epoch, conversation) -> ChatDataset's sample with "sample_id" and "bad".

    A conversation that cannot be used is reported in "bad" and its slot takes a spare, a function of seed, epoch and
    number; the run stops when data.max_bad_fraction is exceeded, by default at the first.
    """

    def __init__(self, samples: ChatDataset, seed: int):
        self.samples, self.seed = samples, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        """Raises DataError if the conversation and all of its spares are bad."""
        epoch, wanted = item
        try:
            return {**self.samples[wanted], "sample_id": wanted, "bad": []}
        except DataError as error:
            reason = str(error)
        for spare in np.random.default_rng([self.seed, epoch, wanted]).integers(len(self), size=SPARES).tolist():
            try:
                sample = self.samples[spare]
            except DataError:
                continue  # counted where it comes itself, once an epoch
            report = {"id": wanted, "reason": "unusable conversation", "detail": reason, "epoch": epoch, "spare": spare}
            return {**sample, "sample_id": spare, "bad": [report]}
        raise DataError(f"conversation {wanted} and its {SPARES} spares are all bad: {reason}; check the data")
