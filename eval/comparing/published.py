"""Published figures (published.yaml): what papers print for the benchmarks we measure, always marked as published."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class Published:
    """A model's figures on one benchmark in its paper's own unit (percent, or points), by our name of the metric."""

    paper: str
    table: str
    model: str
    scores: dict[str, float]
    notes: list[str]


def published_for(bench: str) -> list[Published]:
    """What is published for a benchmark, in the order of the file."""
    return [
        Published(source["paper"], source["table"], row["model"], row["scores"][bench], source["notes"])
        for source in _sources()
        for row in source["rows"]
        if bench in row["scores"]
    ]


@cache
def _sources() -> list[dict[str, Any]]:
    sources: list[dict[str, Any]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return sources
