"""What `encoders.data.check` finds in samples: counted chunk by chunk, in as many processes as asked for."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch.utils.data import DataLoader, Dataset

from encoders.data.pairs import decode_sample
from encoders.data.samples import BadSample, Sample, Samples
from encoders.errors import DataError


@dataclass
class Findings:
    """What was found in some samples."""

    read: int = 0
    bad: list[dict[str, str]] = field(default_factory=list)
    words: dict[str, Counter[int]] = field(default_factory=dict)
    """Kind of caption -> number of captions of each length."""
    without: Counter[str] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    widths: Counter[int] = field(default_factory=Counter)
    stopped: str = ""
    """Why the next sample could not be had."""

    def add(self, more: "Findings") -> None:
        """Add what was found in the samples that follow."""
        self.read += more.read
        self.bad += more.bad
        for name, lengths in more.words.items():
            self.words.setdefault(name, Counter()).update(lengths)
        self.without.update(more.without)
        self.heights.update(more.heights)
        self.widths.update(more.widths)
        self.stopped = more.stopped

    def add_captions(self, sample: Sample) -> None:
        kinds = [("short", sample.short), ("long", sample.long)]
        named = ((f"{kind} ({captioner})", text) for kind, texts in kinds for captioner, text in texts.items())
        for name, caption in chain([("web", sample.web)], named):
            self.words.setdefault(name, Counter())[len(caption.split())] += 1
        self.without.update(kind for kind, texts in kinds if not texts)


class Examiner(Dataset[Findings]):
    """Numbers of samples -> what is found in them, up to the first that cannot be had."""

    def __init__(self, samples: Samples, decode: bool):
        self.samples, self.decode = samples, decode

    def __getitem__(self, chunk: Iterable[int]) -> Findings:
        found = Findings()
        for index in chunk:
            try:
                sample = self.samples[index]
                if self.decode:
                    _, height, width = decode_sample(sample).shape
                    found.heights[height] += 1
                    found.widths[width] += 1
                found.add_captions(sample)
            except BadSample as bad:
                found.bad.append({"reason": bad.reason, "shard": bad.shard, "key": bad.key, "detail": bad.detail})
            except DataError as error:
                found.stopped = str(error)
                break
            found.read += 1
        return found


def examined(samples: Samples, chunks: Sequence[Iterable[int]], decode: bool, workers: int) -> Iterable[Findings]:
    """The findings of each chunk, in order."""
    return DataLoader(
        Examiner(samples, decode), sampler=chunks, batch_size=None, num_workers=workers, collate_fn=_as_it_is
    )


def _as_it_is(found: Any) -> Any:
    return found
