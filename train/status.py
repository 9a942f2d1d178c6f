"""status.json: launchers return 1 whatever happened, this file holds a run's state and its code."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from encoders import manifest
from encoders.errors import Preempted, SwapError
from train import ranks
from train.config import RunConfig
from train.tracking import tell

STATUS = "status.json"
SECONDS_TO_DIE = 2.0


def write_status(out: Path, state: str, code: int | None, message: str, rank: int) -> None:
    """Of several failures the first stays, as the others follow from it; a finished run stays finished."""
    if state == "failed" and _state(out / STATUS) in ("failed", "finished"):
        return
    try:
        manifest.write_json(out / STATUS, {"state": state, "code": code, "message": message, "rank": rank})
    except OSError as error:  # a full disk: the exit code still tells
        tell(f"warning: {out / STATUS} could not be written ({error}); the run is {state} ({code}): {message}")


def _state(file: Path) -> str | None:
    """The state that a file holds; None if it is not there or damaged."""
    try:
        return str(json.loads(file.read_text())["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def status(run: RunConfig, accelerator: Accelerator) -> Iterator[None]:
    """Keep status.json through a run: running, then finished, preempted (code 75) or failed with what failed."""
    rank = accelerator.process_index

    def write(state: str, code: int | None, message: str = "") -> None:
        # Any rank may be the one that fails, and the launcher then kills the others.
        if accelerator.is_main_process or state == "failed":
            write_status(run.out, state, code, message, rank)

    write("running", None)
    try:
        yield
    except Preempted as stop:
        write("preempted", stop.exit_code, str(stop))
        accelerator.wait_for_everyone()  # a launcher ends the others once the first has left
        raise
    except SwapError as error:
        write("failed", error.exit_code, str(error))
        raise
    except BaseException as error:
        write("failed", 1, f"{error!r}{_whose_fault(run.out, accelerator)}")
        raise
    write("finished", 0)


def _whose_fault(out: Path, accelerator: Accelerator) -> str:
    """A rank that died makes the others fail in whatever they were doing together; the message should name it."""
    if accelerator.num_processes == 1 or not (out / ranks.RANKS).is_file():
        return ""
    time.sleep(SECONDS_TO_DIE)
    gone = [str(rank) for rank in ranks.read(out) if rank.here and not rank.alive]
    return f"; {' and '.join(gone)} is gone" if gone else ""
