"""Which evaluation set, as data and as command-line text. No torch import: usage errors are instant.

On the command line a set is KIND:PATH, with options after commas: `karpathy:/data/dataset_coco.json,images=/data/coco`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from encoders.errors import UsageError
from eval.zero_shot.prompts import TEMPLATE_SETS

Task = Literal["retrieval", "classification", "segmentation"]

# task -> kind -> the options it takes beside name and limit
KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "retrieval": {
        "karpathy": ("split", "images"),
        "shards": (),
        "scenes": ("split",),
        "dataset": ("split", "revision", "image_column", "caption_column"),
    },
    "classification": {"folder": ("classes", "templates"), "scenes": ("split", "templates")},
    "segmentation": {"folder": ("templates",), "scenes": ("split", "templates")},
}


@dataclass(frozen=True)
class ZeroShotSpec:
    """One evaluation set. Raises UsageError for a kind that the task has not, or an option that the kind has not."""

    task: Task
    kind: Literal["karpathy", "shards", "scenes", "dataset", "folder"]
    path: str
    """karpathy: the json of Karpathy's splits. shards: a folder of tars. scenes: an embedded world. dataset: a folder
    of `save_to_disk` or of parquet files, or a hub id. folder: one folder per class, or one with segmentation.json."""
    name: str | None = None
    """In results; null takes the last part of the path."""
    split: str = "test"
    images: str | None = None
    """Folder of the pictures that a karpathy json names; null takes the json's own."""
    revision: str | None = None
    """Of a hub id; refs/convert/parquet serves data sets that consist of a script."""
    image_column: str = "image"
    caption_column: str = "caption"
    classes: str | None = None
    """`imagenet`: sorted class folders are the classes of ImageNet-1k. Null: see the folder's classes.json, or take the
    folders' own names."""
    templates: str | None = None
    """Prompts around a class name: plain (the default), imagenet (80), imagenet7."""
    limit: int | None = None
    """Pictures, spread evenly over the set; null takes all."""

    def __post_init__(self) -> None:
        kinds = KINDS.get(self.task)
        if kinds is None:
            raise UsageError(f"zero-shot task {self.task!r} is unknown; choose one of {', '.join(KINDS)}")
        if self.kind not in kinds:
            raise UsageError(f"{self.task} knows no sets of kind {self.kind!r}; choose one of {', '.join(kinds)}")
        allowed = ("task", "kind", "path", "name", "limit", *kinds[self.kind])
        for option in dataclasses.fields(self):
            if option.name not in allowed and vars(self)[option.name] != option.default:
                raise UsageError(
                    f"a {self.kind} set for {self.task} takes no option {option.name!r}; it takes "
                    f"{', '.join(('name', 'limit', *kinds[self.kind]))}"
                )
        if self.templates is not None and self.templates not in TEMPLATE_SETS:
            raise UsageError(f"templates {self.templates!r} are unknown; choose one of {', '.join(TEMPLATE_SETS)}")
        if self.classes not in (None, "imagenet"):
            raise UsageError(f"classes {self.classes!r} are unknown; `imagenet` is the only built-in list")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit must be at least 1, not {self.limit}")

    @property
    def label(self) -> str:
        """The set's name in results."""
        return self.name if self.name is not None else self.path.rstrip("/").rpartition("/")[2].removesuffix(".json")

    def takes(self, option: str) -> bool:
        """Whether sets of this kind have the option."""
        return option in KINDS[self.task][self.kind]


def parse_spec(task: Task, text: str) -> ZeroShotSpec:
    """Read KIND:PATH[,OPTION=VALUE...]. Raises UsageError saying what is wrong with it."""
    where, *options = text.split(",")
    kind, colon, path = where.partition(":")
    if not colon or not path:
        raise UsageError(f"{text!r} is not KIND:PATH; kinds for {task}: {', '.join(KINDS[task])}")
    values: dict[str, str | int] = {}
    known = {option.name for option in dataclasses.fields(ZeroShotSpec)} - {"task", "kind", "path"}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or name not in known:
            raise UsageError(f"{option!r} in {text!r} is not OPTION=VALUE; options: {', '.join(sorted(known))}")
        values[name] = value
    if "limit" in values:
        try:
            values["limit"] = int(values["limit"])
        except ValueError as error:
            raise UsageError(f"limit in {text!r} is not a whole number") from error
    return ZeroShotSpec(task, kind, path, **values)  # type: ignore[arg-type]
