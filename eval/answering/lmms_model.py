"""Our lmms-eval model: questions grouped by picture, each picture read and encoded once, no failure made an answer.

`eval-mllm` builds it; plain lmms-eval finds it by the entry point in lmms_plugin.py:
`python -m lmms_eval --model encoder_swap_llava --model_args pretrained=DIR,dtype=float32 --batch_size 32 ...`.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import ImageFile
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from encoders.errors import EvaluationIncomplete, UsageError
from eval.answering.asking import Asking, Cost, Failure
from eval.answering.chat_model import ChatProcessor
from eval.answering.journal import Journal
from eval.answering.pictures import LooksAtMore, Pictures
from eval.answering.reading import Question, Reader
from eval.answering.workers import Here, Team, team

SHOWN = 5  # failures that a message names


class EncoderSwapLlava(lmms):
    """A LLaVA folder behind lmms-eval's interface, for tasks that decode greedily; any number of pictures a question.

    An answer ends at `max_new_tokens` or at the task's own limit, whichever is smaller. With `place`, a folder, answers
    are kept there under the model's `identity` as they come and found again, and a small JPEG of each picture lies in
    `place`/images. With `keep_failures` a question that cannot be answered has the answer "" and stands in `failures`;
    without, it is an error. `image_ids` maps (task, row) to the picture's id.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 32,
        device: str = "auto",
        dtype: str = "auto",
        max_new_tokens: int = 1024,
        processes: int | None = 1,
        place: Path | None = None,
        identity: str = "",
        keep_failures: bool = False,
    ) -> None:
        super().__init__()
        # lmms-eval deletes every torch module it finds in our attributes after a run; these are none.
        self.batch_size = int(batch_size)
        self.team: Team = team(Path(pretrained), device, dtype, self.batch_size, processes)
        self.chat = self.team.chat if isinstance(self.team, Here) else ChatProcessor(Path(pretrained))
        self.max_new_tokens = max_new_tokens
        self.keep_failures = keep_failures
        thumbnails = place / "images" if place is not None else None
        self.reader = Reader(self.chat, self.team.image_tokens, self.batch_size, thumbnails)
        self.journal = Journal(place / f"{identity[:16]}.jsonl") if place is not None else None
        self.data = ""  # identity of the files that questions come from
        self.asking: Asking | None = None
        self.questions: list[Question] = []
        self.seconds = 0.0  # of the last generate_until
        self.image_ids: dict[tuple[str, int], str] = {}

    @property
    def device(self) -> torch.device:
        """The kind of device that answers."""
        return torch.device(self.team.device)

    @property
    def failures(self) -> list[Failure]:
        """Of the last `generate_until`."""
        return list(self.asking.failures.values()) if self.asking is not None else []

    def costs(self) -> dict[str, float]:
        """What the last `generate_until` took, an interrupted run before it included: seconds, tokens, bytes."""
        cost = self.asking.cost if self.asking is not None else Cost()
        return {
            "seconds_encode": round(cost.seconds_encode, 2),
            "seconds_answer": round(cost.seconds_answer, 2),
            "prompt_tokens": cost.prompt_tokens,
            "new_tokens": cost.new_tokens,
            "peak_memory_bytes": cost.peak_memory_bytes,
            "pictures": len(cost.pictures),
            "smallest_batch": cost.smallest_batch,
            "answers_reused": cost.reused,
        }

    def check(self, count: int) -> tuple[int, list[tuple[Question, str, str]]]:
        """Ask questions of the last `generate_until` again, alone: how many, and those with another answer (question,
        answer, answer alone)."""
        return self.asking.check(self.questions, count) if self.asking is not None else (0, [])

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One answer per request, in their order.

        Raises EvaluationIncomplete naming the questions that cannot be answered, unless `keep_failures` is set; and
        always if nothing at all can be answered or a worker dies.
        """
        began = time.perf_counter()
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval sets it: half a picture would be shown, the rest grey
        shown: dict[tuple[str, str], Pictures] = {}
        with Progress(*COLUMNS) as progress:
            names = ", ".join(dict.fromkeys(request.args[4] for request in requests))
            bar = progress.add_task(f"{names}: answering", total=len(requests))
            self.asking = asking = Asking(self.reader, self.team, self.journal, lambda: progress.advance(bar))
            while True:
                self.questions = [self._question(place, request, shown) for place, request in enumerate(requests)]
                try:
                    asking.run(self.questions)
                    break
                except LooksAtMore as more:
                    more.refine()
        ids = asking.image_ids
        self.image_ids |= {(question.task, question.row): ids[question.place] for question in self.questions}
        self.seconds = time.perf_counter() - began
        if asking.failures and not self.keep_failures:
            raise EvaluationIncomplete(failure_message(names, self.failures, len(requests)))
        return ["" if place in asking.failures else asking.texts[place] for place in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: the tasks this model is for are scored by what it says."""
        raise NotImplementedError("encoder_swap_llava answers generate_until tasks only")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: one question, one answer."""
        raise NotImplementedError("encoder_swap_llava answers single-round tasks only")

    def close(self) -> None:
        """End the workers and let the journal go."""
        self.team.close()
        if self.journal is not None:
            self.journal.close()

    def _question(self, place: int, request: Instance, shown: dict[tuple[str, str], Pictures]) -> Question:
        text, settings, doc_to_visual, row, task, split = request.args
        if settings.get("do_sample", False) or settings.get("num_beams", 1) != 1:
            raise UsageError(f"{task} asks for sampling or beams; encoder_swap_llava decodes greedily only")
        if (task, split) not in shown:
            shown[task, split] = Pictures(task, self.task_dict[task][split], doc_to_visual, self.data)
        pictures = shown[task, split]
        limit = min(self.max_new_tokens, settings.get("max_new_tokens", self.max_new_tokens))
        return Question(place, task, row, text, limit, pictures, pictures.source(row))


COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


def failure_message(name: str, failures: Sequence[Failure], questions: int) -> str:
    """How many questions have no answer, and why the first ones do not."""
    told = "; ".join(
        f"row {failed.question.row} ({failed.question.text!r}): {failed.reason}" for failed in failures[:SHOWN]
    )
    more = f"; and {len(failures) - SHOWN} more" if len(failures) > SHOWN else ""
    return f"{name}: no answer to {len(failures)} of {questions} questions: {told}{more}"
