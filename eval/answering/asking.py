"""Asks a model all questions: what the journal knows is not asked again, what is answered goes there at once.

The unit that is written, and the unit that a continued run skips, is a batch; a run that continues forms the same
batches as one that was never interrupted, so it ends with the same answers in any dtype.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple

from encoders.errors import EvaluationIncomplete
from eval.answering.journal import Journal
from eval.answering.reading import Asked, Chunk, Question, Reader, Reading, ahead, chunks
from eval.answering.rounds import Answers, Round
from eval.answering.workers import Lone, Team

GIVE_UP = 50
"""Failed questions before the first answer: then it is not the questions."""
READERS = 4  # threads
Whose = tuple[Chunk, list[tuple[int, list[Asked]]]]
"""What a round's batches are: their number in the chunk and who stands in them."""


@dataclass
class Cost:
    """What the answers took, those of an interrupted run before included."""

    seconds_encode: float = 0.0
    seconds_answer: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    peak_memory_bytes: int = 0
    smallest_batch: int = 0
    reused: int = 0  # answers taken from the journal
    pictures: set[str] = field(default_factory=set)


class Failure(NamedTuple):
    """A question without answer."""

    question: Question
    reason: str


class Asking:
    """All questions of one benchmark to one model. After `run`, by place: `texts` (stripped; none for `failures`) and
    `image_ids` ("" without a picture, joined by "_" if several)."""

    def __init__(self, reader: Reader, team: Team, journal: Journal | None, progress: Callable[[], None]) -> None:
        self.reader, self.team, self.journal, self.progress = reader, team, journal, progress
        self.texts: dict[int, str] = {}
        self.image_ids: dict[int, str] = {}
        self.failures: dict[int, Failure] = {}
        self.cost = Cost()

    def run(self, questions: Sequence[Question]) -> None:
        """Ask. Raises LooksAtMore if the questions' sources are too coarse: call again with finer ones, what is
        answered stays. Raises EvaluationIncomplete if the first questions all fail or a worker dies."""
        with ThreadPoolExecutor(READERS) as threads:
            left = (
                chunk
                for chunk in chunks(
                    [question for question in questions if question.place not in self.image_ids],
                    self.reader.batch_size,
                )
                if not self._is_known(chunk)
            )
            readings = ahead(threads, self.reader.read, left, self.team.processes + 1)
            for (chunk, batches), place, answers in self.team.answers(self._rounds(readings)):
                number, asked = batches[place]
                self._write(chunk, number, asked, answers)

    def check(self, questions: Sequence[Question], number: int) -> tuple[int, list[tuple[Question, str, str]]]:
        """Ask `number` answered questions, evenly spread, again: alone, through transformers' own generate. How many
        there were, and those whose answer differs, with both answers."""
        answered = [question for question in questions if question.place in self.texts]
        size = min(number, len(answered))
        chosen = [answered[place * len(answered) // size] for place in range(size)]
        return len(chosen), [
            (question, self.texts[question.place], alone)
            for question in chosen
            if (alone := self._alone(question)) != self.texts[question.place]
        ]

    def _alone(self, question: Question) -> str:
        ((asked, _),) = self.reader.read(Chunk([question])).rounds
        (row,) = asked.batches[0]
        ids = (asked.prefixes[0].ids if asked.prefixes else ()) + row.suffix
        shown = None if asked.pixels is None else asked.pixels[list(asked.prefixes[0].pictures)]
        return self.reader.chat.text(self.team.alone(Lone(ids, shown, question.max_new_tokens)))

    def _is_known(self, chunk: Chunk) -> bool:
        """Whether the journal answers all of a chunk; then it is taken from there, and no picture is read."""
        found = (self._line(chunk, number) for number in range(len(chunk.questions)))
        lines = [line for line in found if line is not None]
        if sorted(row["question"] for line in lines for row in line["rows"]) != list(range(len(chunk.questions))):
            return False
        for line in lines:
            self._take(chunk, line)
        return True

    def _rounds(self, readings: Iterator[Reading]) -> Iterator[tuple[Whose, Round]]:
        """Rounds for the team, without the batches that the journal knows."""
        for reading in readings:
            for question, image_id, reason in reading.failed:
                self._fail(question, image_id, reason)
            numbers = count()
            for asked, batches in reading.rounds:
                left = []  # place in the round, number in the chunk
                for place, number in zip(range(len(batches)), numbers, strict=False):
                    line = self._line(reading.chunk, number)
                    # Where a picture could not be read before, other questions stood in the batch.
                    if line is not None and _rows_of(line) == _places(reading.chunk, batches[place]):
                        self._take(reading.chunk, line)
                    else:
                        left.append((place, number))
                if left:
                    missing = replace(asked, batches=[asked.batches[place] for place, _ in left])
                    yield (reading.chunk, [(number, batches[place]) for place, number in left]), missing

    def _line(self, chunk: Chunk, number: int) -> dict[str, Any] | None:
        """What the journal knows of a chunk's batch."""
        return self.journal.lines.get(f"{chunk.key}/{number}") if self.journal is not None else None

    def _write(self, chunk: Chunk, number: int, asked: Sequence[Asked], answers: Answers) -> None:
        rows = []
        for place, one, tokens in zip(_places(chunk, asked), asked, answers.rows, strict=True):
            if isinstance(tokens, str):
                self._fail(one.question, one.image_id, tokens)
                continue
            rows.append(
                {
                    "question": place,
                    "answer": self.reader.chat.text(tokens),
                    "image_id": one.image_id,
                    "prompt_tokens": one.prompt_tokens,
                    "new_tokens": len(tokens),
                }
            )
        cost = {name: getattr(answers, name) for name in MEASURED}
        line = {"rows": rows, **cost}
        if self.journal is not None and len(rows) == len(asked):  # a batch with a failure is asked again as a whole
            self.journal.append(f"{chunk.key}/{number}", line)
        self._take(chunk, line, reused=False)

    def _take(self, chunk: Chunk, line: dict[str, Any], reused: bool = True) -> None:
        """Count a line of the journal as answered."""
        cost = self.cost
        for row in line["rows"]:
            place = chunk.questions[row["question"]].place
            self.texts[place], self.image_ids[place] = row["answer"], row["image_id"]
            cost.prompt_tokens += row["prompt_tokens"]
            cost.new_tokens += row["new_tokens"]
            cost.pictures |= set(row["image_id"].split("_")) - {""}
            cost.reused += reused
            self.progress()
        cost.seconds_encode += line["seconds_encode"]
        cost.seconds_answer += line["seconds_answer"]
        cost.peak_memory_bytes = max(cost.peak_memory_bytes, line["peak_bytes"])
        cost.smallest_batch = min(cost.smallest_batch or line["batch_size"], line["batch_size"])

    def _fail(self, question: Question, image_id: str, reason: str) -> None:
        self.image_ids[question.place] = image_id
        self.failures[question.place] = Failure(question, reason)
        self.progress()
        if not self.texts and len(self.failures) >= GIVE_UP:
            raise EvaluationIncomplete(
                f"{question.task}: none of the first {GIVE_UP} questions could be answered; the last one, row "
                f"{question.row} ({question.text!r}, picture {image_id or 'none'}): {reason}"
            )


def _places(chunk: Chunk, asked: Sequence[Asked]) -> list[int]:
    """Where the questions of a batch stand in their chunk."""
    places = {question.place: index for index, question in enumerate(chunk.questions)}
    return [places[one.question.place] for one in asked]


def _rows_of(line: dict[str, Any]) -> list[int]:
    """The same of a line of the journal."""
    return [row["question"] for row in line["rows"]]


MEASURED = ("seconds_encode", "seconds_answer", "batch_size", "peak_bytes")
