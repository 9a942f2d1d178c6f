"""Write scenes in the formats of real data: webdataset tars, LLaVA json, benchmark folders of parquet files.

Equal worlds give equal bytes: archive headers carry no dates or owners and json keys are sorted.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

from encoders.data.scenes import captions, questions
from encoders.data.scenes.benches import BENCHES, Tables, bench_scenes
from encoders.data.scenes.render import Picture, Renderer
from encoders.data.scenes.world import Scene, World
from encoders.manifest import write_json

JPEG = {"format": "JPEG", "quality": 90, "subsampling": 0}
PNG = {"format": "PNG", "compress_level": 6}
IMAGE = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})  # of the datasets library
BENCH_OWNER = "lmms-lab-encoder"  # first half of the data set names in lmms-eval's task files

Track = Callable[[Sequence[int], str], Iterable[int]]  # passes numbers on and shows progress under a label


def write_shards(folder: Path, world: World, renderer: Renderer, stream: str, count: int, track: Track) -> None:
    """Write the first `count` scenes of a stream as `00000.tar` ...: KEY.jpg, KEY.json and, if masks, KEY.mask.png."""
    folder.mkdir(parents=True)
    with ExitStack() as open_shard:
        for index in track(range(count), stream):
            if index % world.config.shard_size == 0:
                open_shard.close()
                file = folder / f"{index // world.config.shard_size:05d}.tar"
                tar = open_shard.enter_context(tarfile.open(file, "w", format=tarfile.USTAR_FORMAT))
            scene = world.scene(stream, index)
            picture = renderer.draw(scene)
            _add(tar, f"{scene.key}.jpg", encode(picture.image, JPEG))
            _add(tar, f"{scene.key}.json", _to_bytes(sample_record(world, stream, index, scene, picture)))
            if picture.mask is not None:
                _add(tar, f"{scene.key}.mask.png", encode(picture.mask, PNG))


def sample_record(world: World, stream: str, index: int, scene: Scene, picture: Picture) -> dict[str, Any]:
    """The json of a sample: three captions and the ground truth."""
    rng = world.rng(stream, index, "captions")
    objects = [
        {"name": thing.name, "size": thing.size, "place": thing.place, "box": list(box)}
        for thing, box in zip(scene.objects, picture.boxes, strict=True)
    ]
    return {
        "key": scene.key,
        "web": captions.web(scene, rng, world.names),
        "short": captions.short(scene),
        "long": captions.long(scene, rng, world.names),
        "scene": {
            "background": scene.background,
            "text": scene.word.upper() if scene.word is not None else None,
            "text_place": scene.word_place,
            "text_box": list(picture.word_box) if picture.word_box is not None else None,
            "objects": objects,
            "relations": [[relation.subject, relation.kind, relation.object] for relation in scene.relations],
        },
    }


def write_chats(folder: Path, world: World, renderer: Renderer, track: Track) -> None:
    """Write images/, chats_caption.json and chats.json; both files speak about the same images."""
    (folder / "images").mkdir()
    caption_chats, question_chats = [], []
    for index in track(range(world.config.chats), "chats"):
        scene, rng = world.scene("chats", index), world.rng("chats", index, "questions")
        image = f"images/{scene.key}.jpg"
        (folder / image).write_bytes(encode(renderer.draw(scene).image, JPEG))
        caption_chats.append(questions.caption_chat(scene, image, rng))
        question_chats.append(questions.question_chat(scene, image, rng, world.names, world.config.questions_per_chat))
    write_json(folder / "chats_caption.json", caption_chats)
    write_json(folder / "chats.json", question_chats)


def write_benches(folder: Path, world: World, renderer: Renderer, track: Track) -> dict[str, int]:
    """Write one data set folder per benchmark below `folder`; returns the number of questions of each."""
    asked = {}
    for bench, make_tables in BENCHES.items():
        scenes = bench_scenes(world, bench, world.config.bench_images)
        tables = make_tables(scenes, world.rng(bench, 0, "questions"), world.names)
        pictures = [encode(renderer.draw(scenes[number]).image, JPEG) for number in track(range(len(scenes)), bench)]
        write_dataset(folder / BENCH_OWNER / bench, tables, pictures)
        asked[bench] = len(next(iter(tables.values())))
    return asked


def write_dataset(folder: Path, tables: Tables, pictures: list[bytes]) -> None:
    """Write the tables as parquet files with the pictures inside, and the README.md that names configs and splits."""
    (folder / "data").mkdir(parents=True)
    configs: dict[str, list[str]] = {}
    for (config, split), rows in tables.items():
        name = f"data/{config}-{split}.parquet"
        columns = {column: _column(column, [row[column] for row in rows], pictures) for column in rows[0]}
        features = {column: _feature(column, rows[0][column]) for column in columns}
        table = pyarrow.table(columns).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
        pyarrow.parquet.write_table(table, folder / name)
        configs.setdefault(config, []).append(f"  - split: {split}\n    path: {name}\n")
    listed = "".join(f"- config_name: {config}\n  data_files:\n{''.join(files)}" for config, files in configs.items())
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")


def encode(image: Image.Image, options: dict[str, Any]) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def _column(name: str, values: list[Any], pictures: list[bytes]) -> pyarrow.Array:
    if name == "image":
        return pyarrow.array([{"bytes": pictures[number], "path": None} for number in values], IMAGE)
    return pyarrow.array(values)


def _feature(column: str, value: Any) -> dict[str, Any]:
    """How the datasets library describes a column."""
    if column == "image":
        return {"_type": "Image"}
    if isinstance(value, list):
        return {"_type": "List", "feature": _feature("", value[0])}
    return {"_type": "Value", "dtype": {str: "string", int: "int64", bool: "bool"}[type(value)]}


def _to_bytes(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True).encode()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # its date, owner and mode are fixed
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
