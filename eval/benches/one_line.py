"""Captions on one line: a filter that lmms-eval's NoCaps task is given through its config.

The PTB tokenizer takes one caption a line and returns one a line. A carriage return or any other line break inside a
caption would move every caption after it to the wrong picture, without an error; pycocoevalcap replaces only \\n.
"""

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.filter import Filter

from eval.benches.data_check import LINE_BREAK


class OneLine(Filter):
    """Puts a space for every run of line breaks."""

    def apply(self, resps: Sequence[Sequence[str]], docs: Any) -> list[list[str]]:
        """The answers of each question, each on one line."""
        return [[LINE_BREAK.sub(" ", answer) for answer in answers] for answers in resps]
