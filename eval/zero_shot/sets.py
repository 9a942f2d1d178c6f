"""Readers of evaluation sets: what lies on disk or on the hub -> examples whose pictures are read when they are scored.

Everything but the pixels is checked here, before a model is loaded: an evaluation is never partial, so whatever is
missing or malformed raises DataError.
"""

import glob
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from encoders import manifest
from encoders.data.samples import BadSample
from encoders.data.shards import TarSamples
from encoders.errors import DataError, UsageError
from eval.zero_shot.labels import Labels, check_names, read_json, read_labels, read_layout
from eval.zero_shot.prompts import imagenet_names
from eval.zero_shot.scores import IGNORED
from eval.zero_shot.spec import ZeroShotSpec

CLASSES_FILE = "classes.json"
MASK_SUFFIX = "mask.png"
WORDNET_ID = re.compile(r"n\d{8}")
SPLIT = re.compile(r"(train|val|valid|validation|dev|test)(?![a-zA-Z])|\w+-\d{5}-of-\d{5}")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Example(Generic[Answer]):
    """A picture, still encoded and unread, and what is true of it. `name` finds it again."""

    name: str
    image: Callable[[], bytes]
    answer: Answer


@dataclass(frozen=True)
class RetrievalData:
    """Pictures with their captions. `shared`: texts that read alike are hits for each other's pictures."""

    examples: list[Example[list[str]]]
    shared: bool


@dataclass(frozen=True)
class ClassificationData:
    """Pictures of one class each: its place in `classes`."""

    examples: list[Example[int]]
    classes: list[str]


@dataclass(frozen=True)
class SegmentationData:
    """Pictures with a label map each, read with the picture: (h,w) int64, a place in `classes` or IGNORED."""

    examples: list[Example[Callable[[], Labels]]]
    classes: list[str]


SetData = RetrievalData | ClassificationData | SegmentationData


def read_set(spec: ZeroShotSpec) -> SetData:
    """Read what a spec names. Raises DataError if it is missing, malformed or empty."""
    readers: dict[tuple[str, str], Callable[[ZeroShotSpec], SetData]] = {
        ("retrieval", "karpathy"): _karpathy,
        ("retrieval", "shards"): _shards,
        ("retrieval", "scenes"): _scene_captions,
        ("retrieval", "dataset"): _dataset,
        ("classification", "folder"): _class_folders,
        ("classification", "scenes"): _scene_classes,
        ("segmentation", "folder"): _label_folder,
        ("segmentation", "scenes"): _scene_masks,
    }
    data = readers[spec.task, spec.kind](spec)
    if not data.examples:
        raise DataError(
            f"{spec.path}: no picture for {spec.task} in it (split {spec.split!r}); name another set or split"
        )
    return data


def _karpathy(spec: ZeroShotSpec) -> RetrievalData:
    """Karpathy's splits of COCO and Flickr30k: images[] of {filepath?, filename, split, sentences[].raw}."""
    file = Path(spec.path)
    root = Path(spec.images) if spec.images is not None else file.parent
    examples = []
    for place, entry in enumerate(_entries(file)):
        try:
            if entry["split"] != spec.split:
                continue
            image = root / entry.get("filepath", "") / entry["filename"]
            captions = [sentence["raw"] for sentence in entry["sentences"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file}: images[{place}] is not in Karpathy's form ({error!r}); it needs split, filename and "
                "sentences[].raw"
            ) from error
        if not image.is_file():
            raise DataError(f"{image} is missing, which {file} names; images=FOLDER says where the pictures lie")
        examples.append(Example(str(image), image.read_bytes, _captions(captions, f"{file}: {entry['filename']}")))
    return RetrievalData(examples, shared=False)


def _entries(file: Path) -> list[Any]:
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(f"{file} has no list `images`; give one of Karpathy's files, such as dataset_coco.json")
    return content["images"]


def _shards(spec: ZeroShotSpec) -> RetrievalData:
    return _tar_captions(Path(spec.path))


def _scene_captions(spec: ZeroShotSpec) -> RetrievalData:
    return _tar_captions(_scene_shards(spec))


def _tar_captions(folder: Path) -> RetrievalData:
    """All short captions of every sample, or its web caption if it has none; generated captions repeat, so equal ones
    are shared."""
    samples, examples = TarSamples(folder), []
    for index in range(len(samples)):
        try:
            sample = samples[index]
            captions = list(sample.short.values()) or [sample.web]
        except BadSample as error:
            raise DataError(f"{folder}: {error}; an evaluation set must be whole") from error
        examples.append(
            Example(f"{samples.shard(index)}: {samples.key(index)}", partial(_image, samples, index), captions)
        )
    return RetrievalData(examples, shared=True)


def _dataset(spec: ZeroShotSpec) -> RetrievalData:
    """A Hugging Face data set with a column of pictures and one of captions, each a list or one text."""
    data = _load_dataset(spec)
    for column in (spec.image_column, spec.caption_column):
        if column not in data.column_names:
            raise DataError(
                f"{spec.path} has no column {column!r}; it has {', '.join(data.column_names)}: name yours with "
                "image_column=... and caption_column=..."
            )
    import datasets

    if isinstance(data.features[spec.image_column], datasets.Image):
        data = data.cast_column(spec.image_column, datasets.Image(decode=False))
    examples = []
    for row, value in enumerate(data[spec.caption_column]):
        name = f"{spec.path}: row {row}"
        captions = _captions([value] if isinstance(value, str) else value, name)
        examples.append(Example(name, partial(_cell, data, row, spec.image_column), captions))
    return RetrievalData(examples, shared=False)


def _load_dataset(spec: ZeroShotSpec) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UsageError("dataset: sets need the extra: pip install 'encoder-swap[eval]'") from error
    where = Path(spec.path)
    files = _of_split(where, spec.split) if where.is_dir() else sorted(glob.glob(spec.path))
    try:
        if (where / "dataset_dict.json").is_file():
            return datasets.load_from_disk(spec.path)[spec.split]
        if (where / "dataset_info.json").is_file():
            return datasets.load_from_disk(spec.path)
        if files:
            return datasets.Dataset.from_parquet(files)
        if not where.exists() and HUB_ID.fullmatch(spec.path):
            return datasets.load_dataset(spec.path, revision=spec.revision, split=spec.split)
    except Exception as error:  # the library raises of every kind
        raise DataError(
            f"{spec.path} cannot be loaded as a data set ({type(error).__name__}: {error}); check path and split. A "
            "hub data set that is a script loads with revision=refs/convert/parquet"
        ) from error
    state = "holds neither a data set of save_to_disk nor parquet files" if where.is_dir() else "does not exist"
    raise DataError(f"{spec.path} {state}; name a folder of either, a pattern of parquet files, or a hub id")


def _of_split(folder: Path, split: str) -> list[str]:
    """A folder's parquet files; where a name begins with a split, as in test-00000-of-00001.parquet, those of ours.
    Raises DataError if there are others only."""
    files = sorted(folder.glob("*.parquet"))
    ours = [file for file in files if re.match(rf"{re.escape(split)}(?![a-zA-Z])", file.name)]
    if not ours and (other := next((file for file in files if SPLIT.match(file.name)), None)):
        raise DataError(f"{folder} holds {other.name}, but nothing of split {split!r}; choose one with split=...")
    return [str(file) for file in ours or files]


def _cell(data: Any, row: int, column: str) -> bytes:
    """A picture's bytes: an undecoded Image cell, or plain binary."""
    match data[row][column]:
        case bytes(image) | {"bytes": bytes(image)}:
            return image
        case {"path": str(file)}:
            return Path(file).read_bytes()
        case other:
            raise DataError(f"row {row}: column {column!r} holds {other!r:.80}, not a picture")


def _captions(captions: Any, where: str) -> list[str]:
    whole = isinstance(captions, Sequence) and all(isinstance(text, str) and text.strip() for text in captions)
    if not whole or not captions:
        raise DataError(f"{where}: captions are {captions!r:.120}; every picture needs one or more texts, none empty")
    return list(captions)


def _class_folders(spec: ZeroShotSpec) -> ClassificationData:
    """One folder per class, as in ImageNet. Names: classes.json (folder -> name), `imagenet`, or the folder's own."""
    root = _folder(spec.path)
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    names = _class_names(root, folders, spec.classes)
    examples = []
    for label, folder in enumerate(names):
        files = sorted(path for path in (root / folder).glob("*") if path.is_file() and path.name[0] != ".")
        if not files:
            raise DataError(f"{root / folder} holds no picture of class {names[folder]!r}; an evaluation set is whole")
        examples += [Example(str(file), file.read_bytes, label) for file in files]
    return ClassificationData(examples, list(names.values()))


def _class_names(root: Path, folders: list[str], builtin: str | None) -> dict[str, str]:
    """Folder -> class name, in the order of the classes."""
    file = root / CLASSES_FILE
    if builtin == "imagenet":
        imagenet = imagenet_names()
        if len(folders) != len(imagenet):
            raise DataError(f"{root} has {len(folders)} class folders, but ImageNet-1k has {len(imagenet)} classes")
        return dict(zip(folders, imagenet, strict=True))
    if file.is_file():
        names = read_json(file)
        if not isinstance(names, dict) or not all(isinstance(name, str) and name for name in names.values()):
            raise DataError(f"{file} must map each class folder to its name in words")
        unnamed = sorted(set(folders) - set(names))
        if unnamed:
            raise DataError(f"{file} names no class for the folders {unnamed[:5]}; add them or move them away")
        return names
    if any(WORDNET_ID.fullmatch(folder) for folder in folders):
        raise DataError(
            f"{root}: folders such as {folders[0]} are WordNet ids, not names; pass classes=imagenet for ImageNet-1k "
            f"or write {CLASSES_FILE} that maps folder to name"
        )
    return {folder: folder.replace("_", " ") for folder in folders}


def _scene_classes(spec: ZeroShotSpec) -> ClassificationData:
    """Scenes that show one class of object only, once or more. Classes without such a scene stay candidates."""
    classes = _scene_names(spec)
    examples = []
    samples = TarSamples(_scene_shards(spec))
    for index, name, objects in _scene_objects(samples):
        if len(set(objects)) == 1:
            examples.append(Example(name, partial(_image, samples, index), _label(objects[0], classes, name)))
    return ClassificationData(examples, classes)


def _label_folder(spec: ZeroShotSpec) -> SegmentationData:
    """VOC, Pascal Context, ADE20K and the like, as segmentation.json in the folder describes them."""
    layout = read_layout(_folder(spec.path))
    examples: list[Example[Callable[[], Labels]]] = []
    for image, label in layout.pairs:
        labels = partial(read_labels, label.read_bytes, layout.table, str(label))
        examples.append(Example(str(image), image.read_bytes, labels))
    return SegmentationData(examples, layout.classes)


def _scene_masks(spec: ZeroShotSpec) -> SegmentationData:
    """Scenes with masks: 0 is background and ignored, i + 1 is object i, whose name the json has."""
    classes = _scene_names(spec)
    examples: list[Example[Callable[[], Labels]]] = []
    samples = TarSamples(_scene_shards(spec))
    for index, name, objects in _scene_objects(samples):
        if not samples.has(index, MASK_SUFFIX):
            raise DataError(f"{name} has no {MASK_SUFFIX}; write the scenes again with --masks")
        mask = partial(samples.read, index, MASK_SUFFIX)
        table = {0: IGNORED} | {i + 1: _label(thing, classes, name) for i, thing in enumerate(objects)}
        examples.append(Example(name, partial(_image, samples, index), partial(read_labels, mask, table, name)))
    return SegmentationData(examples, classes)


def _scene_objects(samples: TarSamples) -> Iterator[tuple[int, str, list[str]]]:
    """(number, name, names of the objects) of every scene of a split."""
    for index in range(len(samples)):
        name = f"{samples.shard(index)}: {samples.key(index)}"
        try:
            content = json.loads(samples.read(index, "json"))
            objects = [thing["name"] for thing in content["scene"]["objects"]]
        except BadSample as error:
            raise DataError(f"{error}; an evaluation set must be whole") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{name}.json has no scene.objects ({error!r}); write the scenes again") from error
        yield index, name, objects


def _scene_shards(spec: ZeroShotSpec) -> Path:
    manifest.read(Path(spec.path), "scenes")
    return Path(spec.path) / "shards" / spec.split


def _scene_names(spec: ZeroShotSpec) -> list[str]:
    manifest.read(Path(spec.path), "scenes")
    return check_names(read_json(Path(spec.path) / CLASSES_FILE), Path(spec.path) / CLASSES_FILE)


def _label(name: str, classes: list[str], where: str) -> int:
    if name not in classes:
        raise DataError(f"{where} shows {name!r}, which {CLASSES_FILE} does not list; write the scenes again")
    return classes.index(name)


def _image(samples: TarSamples, index: int) -> bytes:
    return samples[index].image


def _folder(path: str) -> Path:
    if not Path(path).is_dir():
        raise DataError(f"{path} is not a folder; name the folder that holds the evaluation set")
    return Path(path)
