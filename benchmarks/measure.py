"""What the benchmarks share: CPU seconds of one thread, peak extra memory, and bars that are met or missed.

CPU seconds do not count what other programs use of the machine. Variants run in turn, round by round, so that what
changes over a run changes for all of them; ratios are medians of the rounds' own ratios.
"""

import ctypes
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NoReturn

import torch

MIB = 2**20


@dataclass(frozen=True)
class Bar:
    """One figure and what it must reach."""

    what: str
    measured: float
    bound: Literal["at least", "at most"]
    bar: float

    @property
    def met(self) -> bool:
        return self.measured >= self.bar if self.bound == "at least" else self.measured <= self.bar


def announce() -> None:
    """Compute on one thread, and print on what machine and with which versions."""
    torch.set_num_threads(1)
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "open_clip_torch"))
    print(f"{found[1] if found else platform.machine()}, one thread; {packages}", flush=True)


def cpu_seconds(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one round to warm up; printed with their medians."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, variant in variants.items():
            began = time.process_time()
            variant()
            seconds[name].append(time.process_time() - began)
    for name, taken in seconds.items():
        del taken[0]
        print(f"  {name}: {statistics.median(taken):.2f} s ({min(taken):.2f} to {max(taken):.2f})", flush=True)
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def extra_memory(prepare: Callable[[], Callable[[], object]]) -> float:
    """MiB by which what `prepare` returns raises the resident memory at its peak, in a fresh process (Linux).

    `prepare` runs there first, so its inputs do not count; it must be importable from the calling script."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(_peak, prepare).result()


def _peak(prepare: Callable[[], Callable[[], object]]) -> float:
    torch.set_num_threads(1)
    function = prepare()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _status("VmRSS")
    kept = function()
    after = _status("VmHWM")
    del kept
    return (after - before) / 1024


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def check_equal(what: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Raise AssertionError if two results differ by more than `tolerance` of the largest entry."""
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"  {what}: largest difference {difference:.0e} of the largest entry")
    assert difference <= tolerance, f"{what} differs: there is nothing to compare the speed of"


def conclude(bars: list[Bar]) -> NoReturn:
    """Print a line per bar; exit with 1 if one is missed."""
    for bar in bars:
        print(f"{bar.what}: {bar.measured:.2f}, {bar.bound} {bar.bar:g}: {'met' if bar.met else 'MISSED'}")
    sys.exit(not all(bar.met for bar in bars))
