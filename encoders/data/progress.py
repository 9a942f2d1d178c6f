"""A progress bar for the console commands of this folder."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any


def bar(label: str) -> Callable[[Sequence[Any]], Iterable[Any]]:
    """Pass things on and show on stderr how many are done and how long the rest takes."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )

    def track(things: Sequence[Any]) -> Iterable[Any]:
        with progress.Progress(*columns, console=Console(stderr=True)) as shown:
            yield from shown.track(things, total=len(things), description=label)

    return track
