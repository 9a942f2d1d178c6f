"""`python -m encoders.data.check DATA`: read a data set whole, before a run does: counts, captions, damage.

Prints a summary and writes a report as JSON: every bad sample by reason, shard and key. Exits with 3 if there is one,
or if a shard cannot be had; the report then holds what was read before.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from encoders.data.spec import DataSpec
from encoders.errors import DataError, UsageError, run_command

REPORT = "data_check.json"
CHUNK = 1000


def main() -> None:
    """Parse the options, check, write the report."""
    parser = argparse.ArgumentParser(prog="python -m encoders.data.check", description=__doc__)
    parser.add_argument("data", type=Path, help="a folder of tars, or what --format says")
    parser.add_argument("--format", default="tar", choices=("tar", "parquet", "dataset", "csv"))
    parser.add_argument("--mapping", default="embedded_world", help="ready mapping or YAML file (%(default)s)")
    parser.add_argument("--images", type=Path, help="folder that a table's image paths start from")
    parser.add_argument("--captions", type=Path, help="CSV file of captions, for mappings that join one")
    parser.add_argument("--cache", type=Path, help="folder for indices and for copies of remote shards")
    parser.add_argument("--no-decode", action="store_true", help="check captions and members, but no pixels")
    parser.add_argument("--every", type=int, default=1, help="read each Nth sample only (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read; 0: this one (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(REPORT), help="report to write (%(default)s)")
    options = parser.parse_args()
    if options.every < 1 or options.workers < 0:
        raise UsageError(f"--every {options.every} must be at least 1, --workers {options.workers} at least 0")
    places = {"images": options.images, "captions": options.captions, "cache": options.cache}
    spec = DataSpec(options.data, options.format, options.mapping, **places)
    report = check(spec, decode=not options.no_decode, every=options.every, workers=options.workers)
    from encoders.manifest import write_json

    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, report)
    print(_summary(report))
    if report["stopped"]:
        raise DataError(f"{report['stopped']}; {options.out} tells of the {report['read']} samples read before")
    if report["bad"]:
        raise DataError(
            f"{len(report['bad'])} of {report['read']} samples are bad; {options.out} names them. Mend them, or allow "
            "their share with data.max_bad_fraction"
        )


def check(spec: DataSpec, decode: bool = True, every: int = 1, workers: int = 0) -> dict[str, Any]:
    """The report on a data set: samples and shards, bad samples, sizes of pictures, lengths of captions; `stopped` says
    why, if a shard could not be had."""
    from encoders.data.examine import Findings, examined
    from encoders.data.formats import open_samples
    from encoders.data.progress import bar

    samples = open_samples(spec)
    chunks = [range(i, min(i + CHUNK * every, len(samples)), every) for i in range(0, len(samples), CHUNK * every)]
    found, more = Findings(), iter(examined(samples, chunks, decode, workers))
    for _ in bar("thousands of samples")(chunks):
        found.add(next(more))
        if found.stopped:
            break
    return {
        "data": {name: str(value) for name, value in vars(spec).items() if value is not None},
        "fingerprint": samples.fingerprint(),
        "shards": len(samples.sizes),
        "samples": len(samples),
        "read": found.read,
        "stopped": found.stopped,
        "bad": found.bad,
        "bad_by_reason": dict(sorted(Counter(one["reason"] for one in found.bad).items())),
        "bad_by_shard": dict(sorted(Counter(one["shard"] for one in found.bad).items())),
        "without": dict(found.without),
        "words": {name: _spread(counts) for name, counts in found.words.items()},
        "height": _spread(found.heights),
        "width": _spread(found.widths),
    }


def _spread(counts: Counter[int]) -> dict[str, float]:
    """Number, smallest, mean, 5th, 50th and 95th percentile, largest of values that were counted."""
    if not counts:
        return {}
    values, ends = sorted(counts), np.cumsum([counts[value] for value in sorted(counts)])
    number = int(ends[-1])
    mean = sum(value * count for value, count in counts.items()) / number
    ranks = {f"p{share}": int(np.searchsorted(ends, share / 100 * (number - 1), side="right")) for share in (5, 50, 95)}
    percentiles = {name: values[rank] for name, rank in ranks.items()}
    return {"number": number, "min": values[0], "mean": round(mean, 2), **percentiles, "max": values[-1]}


def _summary(report: dict[str, Any]) -> str:
    lines = [f"{report['samples']:,} samples in {report['shards']:,} shards; {report['read']:,} read"]
    for name, spread in [*report["words"].items(), *((side, report[side]) for side in ("height", "width"))]:
        if spread:
            unit = "pixels" if name in ("height", "width") else "words"
            lines.append(f"  {name}: {spread['mean']} {unit} on average ({spread['min']} to {spread['max']})")
    lines += [f"  {count:,} without {name} captions" for name, count in report["without"].items()]
    lines += [f"  bad: {count:,} x {reason}" for reason, count in report["bad_by_reason"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
