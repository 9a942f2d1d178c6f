"""What can be known in seconds, before any model is loaded: are the data, the tools, the memory and the disk there?

A run that would end after hours for want of Java or of a column ends here, with the file and the remedy in one line.
"""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from encoders.errors import ModelError, UsageError
from encoders.weights.headers import read_header, weight_files
from eval.benches.benchmarks import Bench
from eval.benches.data_check import count_questions
from eval.benches.lmms_tasks import INSTALL
from eval.benches.staging import LOCAL, Source, table_files

ROW_BYTES = 4_000  # of a question in the journal and in samples.jsonl
THUMBNAIL_BYTES = 15_000
HEADROOM = 1.2  # weights and what computing with them takes, at the least
DTYPE_BYTES = {"auto": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Note:
    """Something to tell before a run: a fact, or a warning with what it means for the scores."""

    level: Literal["fact", "warning"]
    text: str


def preflight(
    benches: Sequence[Bench],
    sources: Mapping[str, Source],
    model: Path,
    out: Path,
    device: str = "auto",
    dtype: str = "auto",
    processes: int = 1,
) -> list[Note]:
    """Check everything that a run needs; `sources` from `located`, `device` and `dtype` as on the command line.

    Raises a SwapError naming the first thing that is missing and what to do; returns what else is worth saying.
    """
    check_requirements(benches)
    notes, rows = [], {}
    for bench in benches:
        rows[bench.name] = count_questions(bench, sources)
        notes.append(_size(bench, sources, rows[bench.name]))
    weights = weight_bytes(model, dtype)
    notes += _check_memory(model, weights, device, processes)
    notes += _check_disk(benches, sources, rows, out)
    return notes


def check_requirements(benches: Sequence[Bench]) -> None:
    """Raise UsageError if a package or a tool that the benches' scoring needs is not there."""
    if any(importlib.util.find_spec(package) is None for package in ("lmms_eval", "datasets")):
        raise UsageError(INSTALL)
    for bench in benches:
        if "java" in bench.requires:
            _check_java(bench)


def _size(bench: Bench, sources: Mapping[str, Source], rows: int) -> Note:
    revision = sources[bench.tables[0].repository].revision
    origin = "a local copy" if revision == LOCAL else f"commit {revision[:8]}"
    if not bench.questions or rows == bench.questions:
        return Note("fact", f"{bench.name}: {rows:,} questions of {origin}")
    return Note(
        "warning",
        f"{bench.name}: {rows:,} questions of {origin}, but the benchmark has {bench.questions:,}; the scores compare "
        "with runs on the same questions only (fetch-benches gets the full set)",
    )


def weight_bytes(model: Path, dtype: str) -> int:
    """Memory that a model's weights take in a dtype, from the headers of its files.

    Raises ModelError if there are none, or one is missing, cut off or not fetched.
    """
    if dtype not in DTYPE_BYTES:
        raise UsageError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPE_BYTES)}")
    tensors = [tensor for file in weight_files(model) for tensor in read_header(file).tensors.values()]
    floating = sum(tensor.count for tensor in tensors if "F" in tensor.dtype)
    return floating * DTYPE_BYTES[dtype] + sum(tensor.size for tensor in tensors if "F" not in tensor.dtype)


def free_memory() -> int:
    """Bytes of main memory to be had: what the system has, or what a container's limit leaves."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
        free = min(free, int(most) - int(used.read_text()))
    return free


def _check_java(bench: Bench) -> None:
    remedy = f"install a Java runtime (apt install default-jre-headless), or leave {bench.name} out of --bench"
    if (java := shutil.which("java")) is None:
        raise UsageError(f"{bench.name} is scored with Java, and there is no `java` on the PATH; {remedy}")
    tried = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        raise UsageError(f"{bench.name} is scored with Java, but `{java} -version` fails; {remedy}")
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or spec.submodule_search_locations is None:
        raise UsageError(
            f"{bench.name} is scored with pycocoevalcap, which is not installed; pip install pycocoevalcap"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "tokenizer"
    if not os.access(folder, os.W_OK):
        raise UsageError(
            f"{bench.name}: pycocoevalcap writes its captions into {folder}, where you may not write; install it into "
            "an environment of your own"
        )


def _check_memory(model: Path, weights: int, device: str, processes: int) -> list[Note]:
    """Raise ModelError if the weights alone do not fit."""
    gpu = False
    if device != "cpu":
        import torch

        gpu = torch.cuda.is_available()
    if gpu:
        free, where, needed = torch.cuda.mem_get_info()[0], "the GPU", weights
    else:
        free, where, needed = free_memory(), "main memory", weights * processes
    sizes = f"the weights of {model} take {_gigabytes(needed)}, {where} has {_gigabytes(free)} free"
    remedy = "use --dtype bfloat16, a larger machine, or end what else uses the memory"
    if needed > free:
        raise ModelError(f"{sizes}; {remedy}")
    return [Note("warning", f"{sizes}, which may not suffice; {remedy}")] if needed * HEADROOM > free else []


def _check_disk(
    benches: Sequence[Bench], sources: Mapping[str, Source], rows: Mapping[str, int], out: Path
) -> list[Note]:
    """Raise UsageError if the results do not fit where they are to go."""
    there = next(folder for folder in (out, *out.parents) if folder.is_dir())
    needed = sum(
        rows[bench.name] * ROW_BYTES + min(bench.images or rows[bench.name], rows[bench.name]) * THUMBNAIL_BYTES
        for bench in benches
    )
    if (free := shutil.disk_usage(there).free) < needed:
        raise UsageError(
            f"the results take about {_gigabytes(needed)}, but {there} has {_gigabytes(free)} free; name another "
            "folder with --out"
        )
    tables = {table for bench in benches for table in bench.tables}
    copied = sum(file.stat().st_size for table in tables for file in table_files(sources[table.repository], table))
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or os.environ.get("HF_HOME") or Path.home() / ".cache")
    cache = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    if (free := shutil.disk_usage(cache).free) < copied:
        text = (
            f"the datasets library copies {_gigabytes(copied)} of questions and pictures into its cache unless it has "
            f"them, and {cache} has {_gigabytes(free)} free; HF_DATASETS_CACHE names another folder"
        )
        return [Note("warning", text)]
    return []


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
