"""Run by test_eval_journal: eval-mllm with a trap in it that ends it by SIGKILL.

python killed_eval.py lines:2 | torn:2 | scoring | sealing ARGUMENTS OF EVAL-MLLM
"""

import json
import os
import signal
import sys

import torch

from eval import run
from eval.answering.journal import Journal


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_lines(count: int, torn: bool) -> None:
    """Kill when `count` lines are written; `torn`: in the middle of the next one."""
    append, written = Journal.append, []

    def deadly(self: Journal, key: str, value: object) -> None:
        if len(written) == count:
            if torn:
                self._stream.write(b"0123456789abcdef [" + json.dumps(key).encode())
                self._stream.flush()
            die()
        append(self, key, value)
        written.append(key)

    Journal.append = deadly  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    trap, _, count = sys.argv[1].partition(":")
    if trap in ("lines", "torn"):
        after_lines(int(count), trap == "torn")
    elif trap == "scoring":  # between the last answer and the finished folder
        run._write_rows = die  # type: ignore[assignment]
    else:
        run.manifest.seal = die  # type: ignore[assignment]
    run.main(sys.argv[2:])
