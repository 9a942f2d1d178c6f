"""What a set of conversations holds, and what of it a LLaVA would learn: counts, lengths, damage, and a view of single
conversations with the supervised parts marked."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.text import Text
from torch.utils.data import DataLoader, Dataset

from encoders.data.progress import bar
from encoders.errors import DataError
from llava_adapter.chat import IGNORED
from llava_adapter.data.conversations import counts
from llava_adapter.data.dataset import ChatDataset
from llava_adapter.data.pictures import open_rgb
from llava_adapter.data.readers import Chats

CHUNK = 256
LEARNED, MARKUP = "bold green", "dim"


@dataclass
class Report:
    """Sums over the conversations that were read."""

    read: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    """By number of pictures."""
    turns: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    lost_turns: Counter[str] = field(default_factory=Counter)
    """Turns that do not fit, by source."""
    shortened: int = 0
    cut: int = 0
    """Conversations whose first answer loses its end."""
    bad: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        """Take in what `_Examined` found of one conversation."""
        self.read += 1
        if "bad" in row:
            self.bad.append({"number": row["number"], "reason": row["bad"]})
            return
        self.sources[row["source"]] += 1
        self.images[row["images"]] += 1
        self.turns.append(row["turns"])
        if "tokens" in row:
            self.tokens.append(row["tokens"])
            self.supervised.append(row["supervised"])
            self.shortened += row["lost"] > 0
            self.lost_turns[row["source"]] += row["lost"]
            self.cut += row["cut"] > 0

    def summary(self, max_length: int | None) -> str:
        """For people."""
        lines = [
            f"{self.read:,} read, {len(self.bad):,} bad",
            f"sources     {counts(self.sources)}",
            f"images      {', '.join(f'{n}: {number:,}' for n, number in sorted(self.images.items()))}",
            f"turns       {_spread(self.turns)}",
        ]
        if self.tokens:
            share = sum(self.supervised) / sum(self.tokens)
            lines += [
                f"tokens      {_spread(self.tokens)}",
                f"supervised  {_spread(self.supervised)}; {share:.1%} of all",
                f"too long    {self.shortened:,} conversations lose {self.lost_turns.total():,} turns at {max_length} "
                f"tokens ({counts(+self.lost_turns) or 'none'}); {self.cut:,} lose the end of their only answer",
            ]
        return "\n".join(lines + [f"bad         {one['number']}: {one['reason']}" for one in self.bad[:10]])


def examine(chats: Chats, dataset: ChatDataset | None, open_images: bool, every: int, workers: int) -> Report:
    """Go through a set, each `every`th conversation. Without a dataset nothing is tokenised."""
    report = Report()
    numbers = range(0, len(chats), every)
    loader = DataLoader(
        _Examined(chats, dataset, open_images, numbers), CHUNK, num_workers=workers, collate_fn=_as_it_is
    )
    more: Iterator[list[dict[str, Any]]] = iter(loader)
    for _ in bar(f"batches of {CHUNK} conversations")(range(len(loader))):
        for row in next(more):
            report.add(row)
    return report


class _Examined(Dataset[dict[str, Any]]):
    """What is to be known of each conversation."""

    def __init__(self, chats: Chats, dataset: ChatDataset | None, open_images: bool, numbers: range):
        self.chats, self.dataset, self.open_images, self.numbers = chats, dataset, open_images, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> dict[str, Any]:
        number = self.numbers[place]
        try:
            return {"number": number, **self._look(number)}
        except (DataError, ValueError) as error:
            return {"number": number, "bad": str(error)}

    def _look(self, number: int) -> dict[str, Any]:
        chat = self.chats[number]
        asked = sum(message["role"] == "user" for message in chat.messages)
        found = {"source": chat.source, "images": len(chat.pictures), "turns": asked}
        if self.open_images:
            for picture in chat.pictures:
                try:
                    open_rgb(picture)
                except ValueError as error:
                    raise DataError(f"conversation {chat.id!r}: cannot read image {picture!r:.200}: {error}") from error
        if self.dataset is None:
            return found
        tokens = self.dataset.tokens(chat)
        learned = sum(label != IGNORED for label in tokens.labels)
        told = {"tokens": len(tokens.input_ids), "supervised": learned}
        return found | told | {"lost": tokens.lost_turns, "cut": tokens.cut_tokens}


def _as_it_is(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows


def view(dataset: ChatDataset, number: int) -> Text:
    """A conversation as the model gets it: supervised parts in green and between [[ and ]], image tokens as a count."""
    tokenizer = dataset.processor.tokenizer
    try:
        chat = dataset.chats[number]
        tokens = dataset.tokens(chat)
    except DataError as error:
        return Text(f"{number}: {error}", style="red")
    text = Text(f"{number}: {chat.id} ({chat.source}), {len(tokens.input_ids)} tokens\n", style="bold")
    image, end = tokenizer.image_token_id, 0
    ids, learned = tokens.input_ids, [label != IGNORED for label in tokens.labels]
    while end < len(ids):
        start = end
        kind = (learned[start], ids[start] == image)
        while end < len(ids) and (learned[end], ids[end] == image) == kind:
            end += 1
        if kind[1]:
            images = (end - start) // dataset.image_tokens
            text.append(f"[{images} image x {dataset.image_tokens} tokens]", style="cyan")
        else:
            words = tokenizer.decode(ids[start:end])
            text.append(f"[[{words}]]" if kind[0] else words, style=LEARNED if kind[0] else MARKUP)
    if tokens.lost_turns or tokens.cut_tokens:
        text.append(f"\n({tokens.lost_turns} turns and {tokens.cut_tokens} tokens do not fit)", style="red")
    return text


def _spread(values: list[int]) -> str:
    if not values:
        return "none"
    low, middle, high, most = np.percentile(values, (5, 50, 95, 100)).astype(int).tolist()
    return f"5 % {low:,}, median {middle:,}, 95 % {high:,}, longest {most:,}, mean {np.mean(values):,.1f}"
