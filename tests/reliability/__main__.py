"""The long half of the reliability tests; writes its figures to docs/reliability.md.

python tests/reliability [--kills 40] [--seed 0] [--out docs/reliability.md]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "reliability")]

from kills import Trial, trials  # noqa: E402 - needs the path above

TESTS = {
    "encoders_transforms": "100,000 mutated pictures: no crash, nothing over 2 s, at most 0.5 GiB more",
    "encoders_index": "2,000 mutated tars; cuts, splits, doubles, what follows an end marker",
    "encoders_formats": "injected damage, 10 kinds x formats, 0, 1, 10 and 50 %: reported is what was injected",
    "train_ledger": "what is reported, across resumes and full disks",
    "train_checkpoint": "a full disk at every 1/16 of it, 200 flipped bits, 100 cuts: the last good one loads",
    "train_signals": "SIGTERM, SIGUSR1, SIGINT; one and two ranks; the SLURM script with both launchers",
    "train_ranks": "a dead rank, a silent machine, a stuck rank; 300 set-ups in one process and 6 as real launches",
    "train_sharded": "fully_shard on two processes: DTensors, resume, checkpoints between FSDP2, DDP and one process",
    "train_profiles": "all six profiles parsed; what would be downgraded is refused",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reliability.md")
    parser.add_argument("--no-suites", action="store_true", help="kills only")
    options = parser.parse_args()
    began = time.monotonic()
    done: list[Trial] = []
    with tempfile.TemporaryDirectory() as work:
        for trial in trials(Path(work), options.kills, options.seed):
            done.append(trial)
            print(len(done), trial, flush=True)
    suites = {} if options.no_suites else {name: _suite(name) for name in TESTS}
    options.out.write_text(_page(options.kills, options.seed, done, suites, time.monotonic() - began))
    print(f"wrote {options.out}")
    aimed = sum(trial.in_save for trial in done) >= 0.4 * options.kills  # too few kills hit a save, else
    sys.exit(not (all(trial.identical for trial in done) and aimed and all(passed for passed, _ in suites.values())))


def _suite(name: str) -> tuple[bool, str]:
    """Whether a test file's long run passed, and its last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", f"tests/test_{name}.py"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(finished.stdout[-2000:], flush=True)
    return finished.returncode == 0, finished.stdout.strip().splitlines()[-1].strip("= ")


def _page(kills: int, seed: int, done: list[Trial], suites: dict[str, tuple[bool, str]], seconds: float) -> str:
    good, inside = sum(trial.identical for trial in done), sum(trial.in_save for trial in done)
    tried = Counter((trial.case.stage, trial.case.ranks, trial.case.workers, trial.identical) for trial in done)
    rows = [
        f"| {stage} | {ranks} | {workers} | {tried[stage, ranks, workers, True]} of "
        f"{tried[stage, ranks, workers, True] + tried[stage, ranks, workers, False]} |"
        for stage, ranks, workers in sorted({key[:3] for key in tried})
    ]
    tests = [f"| `tests/test_{name}.py` | {what} | {suites[name][1]} |" for name, what in TESTS.items() if suites]
    return "\n".join(
        [
            "# What a run survives",
            "",
            f"Written on {date.today()} by `python tests/reliability --kills {kills} --seed {seed}` in "
            f"{seconds / 60:.0f} minutes, with torch {version('torch')} and accelerate {version('accelerate')}.",
            "",
            f"**{good} of {len(done)}** runs that were killed (SIGKILL to all of their processes, at a random moment)",
            "went on with plain `--resume` to the weights, the optimizer state, the sample ledger and the losses of",
            f"the run that nothing interrupted, by sha256. {inside} of the kills left half a checkpoint behind.",
            "",
            "| stage | ranks | workers | identical |",
            "|---|---|---|---|",
            *rows,
            "",
            "| tests, the long half included | what | result |",
            "|---|---|---|",
            *tests,
            "",
            "Not run: anything on a GPU, Accelerate's own FSDP2 launch, more than one machine, a real SLURM cluster.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
