"""A round: some pictures and all batches of questions about them, answered by one model on one device.

Pictures are encoded and prefixes remembered once per round. Too little memory halves the batch, down to one question;
a question that fails even alone is reported with its reason, and the others are answered.
"""

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.answering.chat_model import ChatModel
from eval.answering.prefix import Memory, greedy, remember


@dataclass(frozen=True)
class Prefix:
    """The part of a prompt that questions share, and its pictures among the round's, in order."""

    ids: tuple[int, ...]
    pictures: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """The question's own part of a prompt; `prefix` is its place in the round."""

    suffix: tuple[int, ...]
    prefix: int


@dataclass(frozen=True)
class Round:
    """What one model is given at a time; goes through a pipe. Without pictures there are no prefixes."""

    pixels: NDArray[np.float32] | None  # (pictures, 3, H, W)
    prefixes: list[Prefix]
    batches: list[list[Row]]
    max_new_tokens: int


@dataclass(frozen=True)
class Answers:
    """To one batch: per row its tokens, or in words why there are none."""

    rows: list[list[int] | str]
    seconds_encode: float  # pictures and prefixes
    seconds_answer: float
    batch_size: int  # what fitted
    peak_bytes: int  # of the device so far


@dataclass
class Answerer:
    """Answers rounds with one model; remembers how many rows fitted."""

    chat: ChatModel
    batch_size: int
    seconds: dict[str, float] = field(default_factory=lambda: {"encode": 0.0, "answer": 0.0})
    memory: Memory | None = None  # of a round's prefixes

    def answers(self, asked: Round) -> Iterator[Answers]:
        """The answers batch by batch, in order."""
        self.memory = None
        if 0 < len(asked.prefixes) <= self.batch_size:
            # Of one picture perhaps, or of all together: each batch finds out for its own.
            with suppress(Exception):
                self.memory = self._remember(asked, range(len(asked.prefixes)))
        for batch in asked.batches:
            rows = self._batch(asked, batch)
            taken = self.seconds
            self.seconds = {"encode": 0.0, "answer": 0.0}
            yield Answers(rows, taken["encode"], taken["answer"], self.batch_size, peak_bytes(self.chat.device))

    def _batch(self, asked: Round, batch: Sequence[Row]) -> list[list[int] | str]:
        """Answers of a batch, in pieces of what fits; in pieces of one once something else went wrong."""
        done: list[list[int] | str] = []
        alone = False
        while len(done) < len(batch):
            size = 1 if alone else self.batch_size
            piece = batch[len(done) : len(done) + size]
            try:
                done += self._piece(asked, piece, shared=not alone)
                continue
            except Exception as error:
                full, reason = out_of_memory(error), f"{type(error).__name__}: {error}"
            # Not inside `except`: there the error still holds what filled the memory.
            if full:
                self.memory = None
                _free(self.chat.device)
                self.batch_size = max(1, len(piece) // 2)
            else:
                alone = True
            if len(piece) == 1:
                done.append(f"{reason} (asked on its own)")
        return done

    def _piece(self, asked: Round, piece: Sequence[Row], shared: bool) -> list[list[int]]:
        places = [row.prefix for row in piece]
        memory = self.memory if shared else None
        if memory is None and asked.prefixes:
            used = sorted(set(places))
            memory, places = self._remember(asked, used), [used.index(place) for place in places]
        with torch.inference_mode(), self._timed("answer"):
            suffixes = [row.suffix for row in piece]
            new = greedy(self.chat.model, memory, places, suffixes, asked.max_new_tokens, self.chat.stop_ids)
        if len(new) != len(piece):
            raise RuntimeError(f"{len(new)} answers to {len(piece)} questions")
        return new

    def _remember(self, asked: Round, places: Sequence[int]) -> Memory:
        assert asked.pixels is not None, "a round with prefixes has pictures"
        prefixes = [asked.prefixes[place] for place in places]
        pictures = sorted({picture for prefix in prefixes for picture in prefix.pictures})
        with torch.inference_mode(), self._timed("encode"):
            encoded = self.chat.features(torch.from_numpy(asked.pixels[pictures]))
            features: dict[int, Tensor] = dict(zip(pictures, encoded, strict=True))
            shown = [[features[picture] for picture in prefix.pictures] for prefix in prefixes]
            return remember(self.chat.model, [prefix.ids for prefix in prefixes], shown)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.chat.device.type == "cuda":
            torch.cuda.synchronize(self.chat.device)
        self.seconds[what] += time.perf_counter() - began


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the CPU's allocator had nothing left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: of the GPU's allocator, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
