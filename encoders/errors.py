"""The errors a user can cause, each with the exit code of the command that meets it.

A message says what happened, where (file, key, shard, sample) and what to do next. `run_command` is the one
place that turns them into an exit code; everything else lets them pass.
"""

import logging
import sys
from collections.abc import Callable


class SwapError(Exception):
    """Base of the errors that are reported without a traceback."""

    exit_code = 1


class UsageError(SwapError):
    """A command line or a config that asks for something impossible."""

    exit_code = 2


class DataError(SwapError):
    """Training or benchmark data that is missing, damaged or not what it claims to be."""

    exit_code = 3


class ModelError(SwapError):
    """A checkpoint, encoder or LLM folder that cannot be used."""

    exit_code = 4


class EvaluationIncomplete(SwapError):
    """A benchmark run in which at least one question has no answer."""

    exit_code = 5


class ParityError(SwapError):
    """An exported model that does not compute what its source computes."""

    exit_code = 6


class Preempted(SwapError):
    """A run that was asked to stop, wrote a checkpoint and left; `--resume` continues it."""

    exit_code = 75


def run_command(main: Callable[[], None]) -> None:
    """Run a console command; a SwapError ends it with its message on stderr and its exit code."""
    # PEFT imports bitsandbytes wherever it is installed, which then warns of a compiled CPU kernel that is not needed.
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
    try:
        main()
    except SwapError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
