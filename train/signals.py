"""Asked to stop: SIGTERM, SIGUSR1 and SIGINT are noted, and acted on by all ranks at the next step boundary.

    python -m train.signals OUT     asks the ranks of the run in OUT that live on this machine to save and leave;
                                    exits with 3 if there are none

Launchers lose or distort signals (docs/cluster.md), so this asks the ranks themselves.
"""

import argparse
import os
import signal
from pathlib import Path
from types import FrameType, TracebackType

from encoders.errors import DataError, run_command

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Context manager that notes the signals, around everything that a run does. A second SIGINT stops at once, as an
    impatient Ctrl-C should."""

    def __init__(self) -> None:
        self.noted: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.noted == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            os.write(2, b"stopping after this step, with a checkpoint; press Ctrl-C again to stop at once\n")
        self.noted = signal.Signals(number)


def leave_to_parent(worker: int) -> None:
    """For data loader workers: a signal to the whole job must not kill them before the last step is done."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a run to write a checkpoint and leave (exit code 75).")
    parser.add_argument("out", type=Path, help="folder of the run")
    out = parser.parse_args().out
    from train import ranks

    asked = [rank for rank in ranks.read(out) if rank.here and rank.alive]
    if not asked:
        raise DataError(f"no rank of {out} runs on this machine (yet)")
    for rank in asked:
        os.kill(rank.pid, signal.SIGUSR1)
    print(f"asked {len(asked)} rank(s) of {out} on this machine to save and leave")


if __name__ == "__main__":
    run_command(main)
