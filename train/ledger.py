"""What a run saw, over all ranks: samples used, bad ones by reason, whatever else its batches count, and in
bad_samples.jsonl every bad one by step, id, reason, shard and key, with the spare that stood in.

Counts are held in memory and in checkpoints; reports go to the file, so neither grows with the run.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from encoders.errors import DataError
from train.tracking import tell

BAD_SAMPLES = "bad_samples.jsonl"
FEWEST = 10_000
"""A share is judged by at least so many samples, or by the whole of a smaller set."""


class Ledger:
    """Every rank holds one and they count alike; the main one writes the file."""

    def __init__(self, out: Path, max_bad_fraction: float, samples: int, accelerator: Accelerator):
        self.file, self.max_bad_fraction, self.accelerator = out / BAD_SAMPLES, max_bad_fraction, accelerator
        self.fewest = min(FEWEST, samples)
        self.seen = self.bad = 0
        self.by_reason: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        """Sums of the batches' `counts`, up to the last `gather`."""
        self._my_counts: Counter[str] = Counter()  # not gathered yet
        self._mine: list[dict[str, Any]] = []  # not gathered yet
        self._lines: list[str] = []  # gathered, not written yet
        self._bytes = 0

    def note(self, step: int, micro_batches: Sequence[Mapping[str, Any]]) -> int:
        """Keep the reports, and the counts, of this rank's part of a step (from 1); returns the reports' number."""
        for batch in micro_batches:
            self._my_counts.update(batch.get("counts", {}))
        reports = [{"step": step, **report} for batch in micro_batches for report in batch["bad"]]
        self._mine += reports
        return len(reports)

    def count(self, samples: int, bad: int) -> None:
        """Count a step of all ranks. Raises DataError, on every rank, above the allowed share of bad samples."""
        self.seen += samples
        self.bad += bad
        if self.bad > self.max_bad_fraction * max(self.seen, self.fewest):
            self.gather()
            if self.accelerator.is_main_process:
                self.write()
            raise DataError(
                f"{self.bad} of {self.seen} samples are bad, more than data.max_bad_fraction {self.max_bad_fraction} "
                f"allows ({dict(sorted(self.by_reason.items()))}); {self.file} names them; mend the shards"
            )

    def gather(self) -> None:
        """Collect what all ranks noted, in an order that neither ranks nor checkpoints change. Every rank must call
        it."""
        reports = sorted(gather_object(self._mine), key=lambda report: (report["step"], report["id"]))
        self._mine = []
        for counts in gather_object([dict(self._my_counts)]):
            self.counts.update(counts)
        self._my_counts.clear()
        self.by_reason.update(report["reason"] for report in reports)
        if self.accelerator.is_main_process:
            self._lines += [json.dumps(report, sort_keys=True) + "\n" for report in reports]

    def write(self) -> None:
        """Append what was gathered, durably. Raises OSError if it cannot; nothing is lost, the next write has it."""
        if not self._lines:
            return
        try:
            with self.file.open("ab") as stream:
                stream.write("".join(self._lines).encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            self._cut()
            raise
        self._lines = []
        self._bytes = self.file.stat().st_size

    def state(self) -> dict[str, Any]:
        """For a checkpoint, after `gather` and `write`."""
        counted = {"by_reason": dict(self.by_reason), "counts": dict(self.counts)}
        return {"seen": self.seen, "bad": self.bad, **counted, "bytes": self._bytes}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint's state, or begin: what the file holds beyond it will be written again."""
        if state is not None:
            self.seen, self.bad, self._bytes = state["seen"], state["bad"], state["bytes"]
            self.by_reason, self.counts = Counter(state["by_reason"]), Counter(state["counts"])
        if not self.accelerator.is_main_process:
            return
        there = self.file.stat().st_size if self.file.is_file() else 0
        if there < self._bytes:
            tell(f"warning: {self.file} has {there} of {self._bytes} bytes; some reports of bad samples are gone")
            self._bytes = there
        self._cut()

    def _cut(self) -> None:
        if self.file.is_file():
            os.truncate(self.file, self._bytes)
