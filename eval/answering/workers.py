"""Who answers rounds: one model in this process, or one process per GPU, each with a model of its own.

The parent alone talks to lmms-eval, reads pictures and writes down answers. A worker that dies ends the run with an
error that names it; what it had answered is with the parent already.
"""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch

from encoders.errors import EvaluationIncomplete, SwapError, UsageError
from eval.answering.chat_model import ChatModel, device_of, dtype_of
from eval.answering.rounds import Answerer, Answers, Round

PATIENCE = 600  # seconds
Key = Any  # whatever the caller knows a round by


@dataclass(frozen=True)
class Lone:
    """A question for `alone`: one prompt and the pixels of its pictures."""

    ids: tuple[int, ...]
    pixels: Any  # (pictures, 3, H, W) float32 array, or None
    max_new_tokens: int


class Team(Protocol):
    """Answers rounds."""

    image_tokens: int  # that the tower makes of a picture
    device: str
    dtype: str
    processes: int

    def answers(self, rounds: Iterator[tuple[Key, Round]]) -> Iterator[tuple[Key, int, Answers]]:
        """The answers to each round's batches with the batch's number, in any order."""

    def alone(self, asked: Lone) -> list[int]:
        """The tokens that transformers' own generate gives."""

    def close(self) -> None:
        """Let the models go."""


class Here:
    """One model in this process."""

    processes = 1

    def __init__(self, folder: Path, device: str, dtype: str, batch_size: int) -> None:
        self.chat = ChatModel(folder, device, dtype)
        self.image_tokens = self.chat.image_tokens
        self.device, self.dtype = self.chat.device.type, str(self.chat.dtype).removeprefix("torch.")
        self.answerer = Answerer(self.chat, batch_size)

    def answers(self, rounds: Iterator[tuple[Key, Round]]) -> Iterator[tuple[Key, int, Answers]]:
        for key, asked in rounds:
            for number, answers in enumerate(self.answerer.answers(asked)):
                yield key, number, answers

    def alone(self, asked: Lone) -> list[int]:
        return _alone(self.chat, asked)

    def close(self) -> None:
        pass


class Workers:
    """`processes` models, each in a process of its own, on the GPUs in turn."""

    def __init__(self, folder: Path, device: str, dtype: str, batch_size: int, processes: int) -> None:
        kind = device_of(device).type
        self.device, self.dtype = kind, str(dtype_of(dtype)).removeprefix("torch.")
        self.processes = processes
        gpus = torch.cuda.device_count() if kind == "cuda" else 0
        if kind == "cuda" and processes > gpus:
            raise UsageError(f"--processes {processes}, but torch sees {gpus} GPUs; a GPU takes one process")
        context = multiprocessing.get_context("spawn")
        self.workers: dict[Connection, Any] = {}
        self.names: dict[Connection, str] = {}
        for number in range(processes):
            ours, theirs = context.Pipe()
            place = f"cuda:{number}" if kind == "cuda" else kind
            worker = context.Process(
                target=_work, args=(theirs, folder, place, dtype, batch_size, processes), daemon=True
            )
            worker.start()
            theirs.close()  # else its end would not show here
            self.workers[ours], self.names[ours] = worker, f"worker {number} (process {worker.pid}, {place})"
        try:
            (self.image_tokens,) = {self._receive(connection) for connection in self.workers}
        except BaseException:
            self.close()
            raise

    def answers(self, rounds: Iterator[tuple[Key, Round]]) -> Iterator[tuple[Key, int, Answers]]:
        busy: dict[Connection, tuple[Key, int, int]] = {}  # round, batches answered, batches
        idle = list(self.workers)
        more, broken = True, None
        while more or busy:
            while more and idle:
                try:
                    following = next(rounds, None)
                except Exception as error:  # raised once what is under way has been answered
                    following, broken = None, error
                if more := following is not None:
                    key, asked = following
                    self._send(connection := idle.pop(), asked)
                    busy[connection] = (key, 0, len(asked.batches))
            for connection in self._ready(list(busy)):
                answers = self._receive(connection)
                key, number, batches = busy[connection]
                if number + 1 == batches:
                    del busy[connection]
                    idle.append(connection)
                else:
                    busy[connection] = (key, number + 1, batches)
                yield key, number, answers
        if broken is not None:
            raise broken

    def alone(self, asked: Lone) -> list[int]:
        first = next(iter(self.workers))
        self._send(first, asked)
        tokens: list[int] = self._receive(first)
        return tokens

    def close(self) -> None:
        for connection in self.workers:
            connection.close()  # a worker that waits for a question leaves by itself
        for worker in self.workers.values():
            worker.join(5)
            worker.kill()  # of no use any more, and a stopped one would never hear a plain end
            worker.join()

    def _ready(self, busy: list[Connection]) -> list[Any]:
        """Those of the busy workers that have answered. Who is silent for long is named, and goes on: a batch of a
        large model on a CPU takes its time, and only a person can tell."""
        minutes = 0
        while busy and not (ready := wait(busy, PATIENCE)):
            minutes += PATIENCE // 60
            names = ", ".join(self.names[connection] for connection in busy)
            print(
                f"warning: {names} has given no answer for {minutes} minutes; if it does not compute, end it: the same "
                "command goes on from the answers so far",
                file=sys.stderr,
            )
        return ready if busy else []

    def _send(self, connection: Connection, message: object) -> None:
        try:
            connection.send(message)
        except OSError as error:
            raise self._died(connection) from error

    def _receive(self, connection: Connection) -> Any:
        try:
            message = connection.recv()
        except (EOFError, OSError) as error:
            raise self._died(connection) from error
        if isinstance(message, SwapError):
            raise message
        return message

    def _died(self, connection: Connection) -> EvaluationIncomplete:
        worker = self.workers[connection]
        worker.join(10)
        return EvaluationIncomplete(
            f"{self.names[connection]} died (exit code {worker.exitcode}; -9: ended from outside, perhaps for its "
            "memory); run the same command again, which goes on from the answers so far"
        )


def team(folder: Path, device: str, dtype: str, batch_size: int, processes: int | None) -> Team:
    """Load the model as often as asked: None is once per GPU, and once on a CPU."""
    if processes is None:
        processes = max(1, torch.cuda.device_count()) if device_of(device).type == "cuda" else 1
    if processes == 1:
        return Here(folder, device, dtype, batch_size)
    return Workers(folder, device, dtype, batch_size, processes)


def _work(connection: Connection, folder: Path, device: str, dtype: str, batch_size: int, processes: int) -> None:
    """Answer what comes through the pipe until it closes."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    try:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        chat = ChatModel(folder, device, dtype)
    except SwapError as error:
        connection.send(error)
        return
    answerer = Answerer(chat, batch_size)
    connection.send(chat.image_tokens)
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        if isinstance(asked, Lone):
            connection.send(_alone(chat, asked))
        else:
            for answers in answerer.answers(asked):
                connection.send(answers)


def _alone(chat: ChatModel, asked: Lone) -> list[int]:
    pixels = None if asked.pixels is None else torch.from_numpy(asked.pixels)
    return chat.alone(asked.ids, pixels, asked.max_new_tokens)
