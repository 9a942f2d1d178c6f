"""eval-encoder: readers of evaluation sets and their scores, by an encoder that sees nothing but colour, whose figures
can be told in advance; then the command on a real, random one."""

import io
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from encoders import encoder_run, manifest, objectives
from encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from encoders.data.scenes.__main__ import write_scenes
from encoders.data.scenes.world import ScenesConfig
from encoders.data.shards import TarSamples
from encoders.data.tokenizers import CaptionTokenizer
from encoders.errors import DataError, ModelError, UsageError
from eval.encoder import main
from eval.zero_shot.scorer import open_sets, picture, windows
from eval.zero_shot.scores import IGNORED
from eval.zero_shot.sets import read_set
from eval.zero_shot.spec import ZeroShotSpec, parse_spec

COLOURS = {
    "red": (255, 0, 0),
    "lime green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "pink": (255, 0, 255),
}
SIDE, PATCH = 32, 8


class ColourTokenizer:
    """A text's first colour is its one word."""

    def encode(self, text: str, length: int) -> list[int]:
        words = [place for place, name in enumerate(COLOURS) if name in text]
        return [10, words[0] if words else 9, 11]


class ColourEncoder(nn.Module):
    """Embeds the mean colour of a picture, a patch, or the colour that a text names."""

    def __init__(self) -> None:
        super().__init__()
        self.config = EncoderConfig(
            vision=VisionConfig(image_size=SIDE, patch_size=PATCH),
            text=TextConfig(kind="clip", length=4),
            preprocess=PreprocessConfig(interpolation="bilinear"),
        )
        self.table = torch.tensor([*COLOURS.values(), *[(0, 0, 0)] * 6]).float()

    def encode_image(self, images: Tensor) -> Tensor:
        assert not self.training
        return F.normalize(images.float().mean(dim=(2, 3)) - 127.5, dim=-1)

    def encode_patches(self, images: Tensor) -> Tensor:
        means = F.avg_pool2d(images.float(), PATCH).flatten(2).transpose(1, 2)
        return F.normalize(means - 127.5, dim=-1)

    def encode_text(self, input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        assert list(lengths) == [3] * len(input_ids)
        return F.normalize(self.table[input_ids[:, 1]] - 127.5, dim=-1)


def score(spec: ZeroShotSpec, model: nn.Module | None = None, batch_size: int = 4) -> dict[str, float]:
    [one] = open_sets([spec])
    return one.score(model or ColourEncoder(), ColourTokenizer(), torch.device("cpu"), batch_size)  # type: ignore[arg-type]


def encoded(colour: str, size: tuple[int, int] = (40, 40), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour]).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def karpathy(tmp_path: Path) -> Path:
    """Six pictures with three captions each; one caption of the red picture says blue. One more is for training."""
    (tmp_path / "val2014").mkdir()
    images: list[dict[str, Any]] = []
    for place, name in enumerate([*COLOURS, "red"]):
        (tmp_path / "val2014" / f"{place}.png").write_bytes(encoded(name, (40, 40 + place)))
        captions = [f"{text} {place}" for text in (f"a {name} wall", f"{name}!", "blue" if place == 0 else name)]
        split = "test" if place < 6 else "train"
        sentences = [{"raw": caption} for caption in captions]
        images.append({"filepath": "val2014", "filename": f"{place}.png", "split": split, "sentences": sentences})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    return tmp_path / "dataset_coco.json"


def test_karpathy_retrieval_counts_any_own_caption(karpathy: Path) -> None:
    found = score(ZeroShotSpec("retrieval", "karpathy", str(karpathy)))
    # image->text: red finds its two red captions first; blue ties with the stray caption, and ties go against it.
    assert found["i2t_r1"] == pytest.approx(5 / 6)
    assert found["i2t_r5"] == 1
    assert found["t2i_r1"] == pytest.approx(17 / 18)  # only the stray caption finds the wrong picture
    assert found["chance_r1"] == pytest.approx(1 / 6)
    [one] = open_sets([ZeroShotSpec("retrieval", "karpathy", str(karpathy), limit=4)])
    assert one.name == "dataset_coco"
    assert one.sizes == {"pictures": 4, "captions": 12}
    assert one.protocol == "hits are the picture's own captions"  # as published, whatever others say


def test_karpathy_that_is_not_whole_is_refused(karpathy: Path) -> None:
    spec = ZeroShotSpec("retrieval", "karpathy", str(karpathy))
    content = json.loads(karpathy.read_text())
    picture_file = karpathy.parent / "val2014" / "3.png"
    whole = picture_file.read_bytes()
    picture_file.write_bytes(whole[:60])
    with pytest.raises(DataError, match=re.escape(str(picture_file)) + ".*does not decode"):
        score(spec)
    picture_file.unlink()
    with pytest.raises(DataError, match=r"3\.png is missing.*images=FOLDER"):
        read_set(spec)
    picture_file.write_bytes(whole)
    for broken, words in (
        ({"sentences": []}, "3.png: captions are"),
        ({"sentences": [{"raw": " "}]}, "none empty"),
        ({"sentences": [{"text": "a"}]}, r"images\[3\] is not in Karpathy's form"),
    ):
        entries = [*content["images"][:3], content["images"][3] | broken, *content["images"][4:]]
        karpathy.write_text(json.dumps({"images": entries}))
        with pytest.raises(DataError, match=words):
            read_set(spec)
    with pytest.raises(DataError, match="no picture for retrieval.*'val'"):
        karpathy.write_text(json.dumps(content))
        read_set(ZeroShotSpec("retrieval", "karpathy", str(karpathy), split="val"))
    with pytest.raises(DataError, match="cannot be read as json"):
        read_set(ZeroShotSpec("retrieval", "karpathy", str(karpathy.parent / "none.json")))


def test_hub_data_sets_are_asked_for_by_id(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: str, **options: str) -> datasets.Dataset:
        asked.append((path, options))
        if path != "owner/flickr":
            raise ConnectionError("no such data set")
        return columns(list(COLOURS))

    monkeypatch.setattr(datasets, "load_dataset", load)
    spec = parse_spec("retrieval", "dataset:owner/flickr,revision=refs/convert/parquet,split=val")
    assert spec.label == "flickr"
    assert len(read_set(spec).examples) == 6
    assert asked == [("owner/flickr", {"revision": "refs/convert/parquet", "split": "val"})]
    with pytest.raises(DataError, match="owner/none cannot be loaded.*no such data set.*revision=refs/convert/parquet"):
        read_set(ZeroShotSpec("retrieval", "dataset", "owner/none"))


def columns(names: Sequence[str]) -> datasets.Dataset:
    """A data set as people publish them: pictures and lists of captions."""
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    rows = {"image": [{"bytes": encoded(n), "path": None} for n in names], "caption": [[f"a {n} a", n] for n in names]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_datasets_on_disk_score_alike(tmp_path: Path) -> None:
    data, names = columns(list(COLOURS)), list(COLOURS)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"val": data.select([0]), "test": data}).save_to_disk(tmp_path / "splits")
    (tmp_path / "parquet").mkdir()
    data.to_parquet(tmp_path / "parquet" / "test-0.parquet")
    plain = datasets.Dataset.from_dict({"picture": [encoded(n) for n in names], "text": names})
    plain.to_parquet(tmp_path / "plain.parquet")
    specs = [
        ZeroShotSpec("retrieval", "dataset", str(tmp_path / "saved")),
        ZeroShotSpec("retrieval", "dataset", str(tmp_path / "splits")),
        ZeroShotSpec("retrieval", "dataset", str(tmp_path / "parquet")),
        parse_spec("retrieval", f"dataset:{tmp_path}/plain.parquet,image_column=picture,caption_column=text"),
    ]
    for spec in specs:
        found = score(spec)
        assert found["i2t_r1"] == found["t2i_r1"] == 1
        assert found["chance_r1"] == pytest.approx(1 / 6)
    with pytest.raises(DataError, match="no column 'picture'; it has image, caption"):
        read_set(ZeroShotSpec("retrieval", "dataset", str(tmp_path / "saved"), image_column="picture"))
    with pytest.raises(DataError, match="cannot be loaded.*train"):
        read_set(ZeroShotSpec("retrieval", "dataset", str(tmp_path / "splits"), split="train"))
    with pytest.raises(DataError, match="does not exist"):
        read_set(ZeroShotSpec("retrieval", "dataset", str(tmp_path / "none")))
    datasets.Dataset.from_dict({"image": ["red.png"] * 2, "caption": ["red", "blue"]}).save_to_disk(tmp_path / "names")
    with pytest.raises(DataError, match="row 0: column 'image' holds 'red.png', not a picture"):
        score(ZeroShotSpec("retrieval", "dataset", str(tmp_path / "names")))
    # Written anew in place, other rows are other rows, whatever the library has cached.
    columns(names[:2]).to_parquet(tmp_path / "parquet" / "test-0.parquet")
    assert len(read_set(specs[2]).examples) == 2
    # The folder of a repository's splits: only the one that is named, which by default is test.
    columns(names).to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    assert len(read_set(specs[2]).examples) == 2
    assert len(read_set(replace(specs[2], split="train")).examples) == 6
    with pytest.raises(DataError, match=r"holds test-0\.parquet, but nothing of split 'val'; choose one with split="):
        read_set(replace(specs[2], split="val"))


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """Two pictures of every colour, three of pink; one of the red ones is blue."""
    for name in COLOURS:
        folder = tmp_path / "photos" / name.replace(" ", "_")
        folder.mkdir(parents=True)
        for number in range(3 if name == "pink" else 2):
            (folder / f"{number}.JPEG").write_bytes(
                encoded("blue" if (name, number) == ("red", 0) else name, kind="JPEG")
            )
    return tmp_path / "photos"


def test_class_folders(class_folders: Path) -> None:
    spec = ZeroShotSpec("classification", "folder", str(class_folders))
    found = score(spec)
    assert found["top1"] == pytest.approx(12 / 13)
    assert found["class_mean"] == pytest.approx(5.5 / 6)
    assert found["chance_top1"] == pytest.approx(1 / 6)
    assert found["chance_top5"] == pytest.approx(5 / 6)
    assert read_set(spec).classes == ["blue", "cyan", "lime green", "pink", "red", "yellow"]  # type: ignore[union-attr]
    [spread] = open_sets([ZeroShotSpec("classification", "folder", str(class_folders), limit=6)])
    assert [example.answer for example in spread.data.examples] == [0, 1, 2, 3, 3, 4]  # no class but the last left out
    (class_folders / "pink" / "1.JPEG").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"pink/1\.JPEG: the picture does not decode"):
        score(spec)


def test_class_names_from_a_file_or_refused(class_folders: Path) -> None:
    spec = ZeroShotSpec("classification", "folder", str(class_folders), templates="imagenet7")
    (class_folders / "red").rename(class_folders / "n01440764")
    with pytest.raises(DataError, match="WordNet ids, not names; pass classes=imagenet"):
        read_set(spec)
    with pytest.raises(DataError, match="6 class folders, but ImageNet-1k has 1000"):
        read_set(ZeroShotSpec("classification", "folder", str(class_folders), classes="imagenet"))
    names = {folder.name: folder.name.replace("_", " ") for folder in sorted(class_folders.iterdir(), reverse=True)}
    (class_folders / "classes.json").write_text(json.dumps(names | {"n01440764": "red"}))
    assert score(spec)["top1"] == pytest.approx(12 / 13)
    (class_folders / "classes.json").write_text(json.dumps({"n01440764": "red"}))
    with pytest.raises(DataError, match="names no class for the folders.*blue"):
        read_set(spec)
    (class_folders / "classes.json").write_text(json.dumps(names | {"n01440764": "red", "teal": "teal"}))
    with pytest.raises(DataError, match="holds no picture of class 'teal'"):
        read_set(spec)


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """VOC's layout: palette maps whose 1.. are the classes, 0 and 255 not counted. A wide and a tall picture."""
    root, names = tmp_path / "voc", list(COLOURS)
    (root / "JPEGImages").mkdir(parents=True)
    (root / "SegmentationClass").mkdir()
    for name, shape in (("wide", (64, 128)), ("tall", (160, 64))):
        values = np.zeros(shape, np.uint8)
        values[:32, :32], values[32:64, :32], values[:32, 32:64], values[-32:, -32:] = 1, 2, 3, 4
        pixels = np.full((*shape, 3), 128, np.uint8)
        for value in (1, 2, 3, 4):
            pixels[values == value] = COLOURS[names[value - 1]]
        values[:2, :2] = 255
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.png")
        label = Image.fromarray(values).convert("P")
        label.putpalette([(7 * place) % 256 for place in range(768)])
        label.putdata(list(values.flatten()))
        label.save(root / "SegmentationClass" / f"{name}.png")
    (root / "JPEGImages" / "unlabelled.jpg").write_bytes(encoded("red", kind="JPEG"))
    (root / "val.txt").write_text("wide\ntall\n")
    (root / "classes.txt").write_text("\n".join(names))
    describe(root)
    return root


def describe(root: Path, **changes: Any) -> None:
    layout = {"images": "JPEGImages", "labels": "SegmentationClass", "list": "val.txt", "classes": "classes.txt"}
    layout |= {"first_label": 1, "ignore": [0, 255], **changes}  # type: ignore[dict-item]
    (root / "segmentation.json").write_text(json.dumps(layout))


def test_segmentation_covers_pictures_that_are_not_square(voc: Path) -> None:
    spec = ZeroShotSpec("segmentation", "folder", str(voc))
    data = read_set(spec)
    truth = data.examples[0].answer()  # type: ignore[operator, union-attr]
    assert truth[0, 0] == truth[63, 64] == IGNORED
    assert (truth[5, 5], truth[40, 5], truth[5, 40], truth[60, 125]) == (0, 1, 2, 3)
    found = score(spec, batch_size=1)
    assert found == score(spec, batch_size=8)
    assert found["pixel_accuracy"] > 0.99  # patches are of one colour, so bilinear borders lie where the colours change
    assert found["miou"] > 0.98
    assert 0 < found["chance_miou"] < 0.2
    describe(voc, classes=["yellow", "blue", "lime green", "red", "cyan", "pink"])
    assert score(spec)["miou"] < 0.01


def test_windows_cover_a_picture_evenly() -> None:
    image = torch.arange(100, dtype=torch.uint8).expand(3, 40, 100)
    crops, places = windows(image, 40, PreprocessConfig())
    assert places == [(0, 0), (0, 30), (0, 60)]
    assert [int(crop[0, 0, 0]) for crop in crops] == [0, 30, 60]
    assert windows(image.transpose(1, 2), 20, PreprocessConfig())[1] == [(0, 0), (30, 0), (60, 0)]
    assert windows(image[:, :, :40], 20, PreprocessConfig())[1] == [(0, 0)]


def test_broken_segmentation_folders_are_refused(voc: Path) -> None:
    spec = ZeroShotSpec("segmentation", "folder", str(voc))
    describe(voc, ignore=[0])
    with pytest.raises(DataError, match=r"wide\.png: the label map has the values \[255\], beyond the 6 classes"):
        score(spec)
    describe(voc, classes=["red", "lime green"])
    with pytest.raises(DataError, match=r"values \[3, 4\], beyond the 2 classes"):
        score(spec)
    describe(voc, ignore=[0, 1, 2, 3, 4, 255])
    with pytest.raises(DataError, match="no pixel belongs to a class"):
        score(spec)
    describe(voc, colours=3)
    with pytest.raises(DataError, match="must have the keys images, labels, classes, first_label, ignore"):
        read_set(spec)
    describe(voc)
    label = voc / "SegmentationClass" / "wide.png"
    for content, words in (
        (encoded("red", (128, 64)), "one class number a pixel, no colours"),
        (b"no map", "the label map does not decode"),
        (label.read_bytes()[:80], "the label map does not decode"),
        ((voc / "SegmentationClass" / "tall.png").read_bytes(), "differ in size .128x64 and 64x160."),
    ):
        label.write_bytes(content)
        with pytest.raises(DataError, match=f"wide.*{words}"):
            score(spec)
    label.unlink()
    with pytest.raises(DataError, match=r"wide\.png is missing"):
        read_set(spec)
    (voc / "JPEGImages" / "wide.png").unlink()
    with pytest.raises(DataError, match="has no picture for wide"):
        read_set(spec)
    (voc / "segmentation.json").unlink()
    with pytest.raises(DataError, match=r"segmentation\.json is missing; it describes the set.*first_label: value of"):
        read_set(spec)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small embedded world with masks."""
    out = tmp_path_factory.mktemp("zero_shot") / "scenes"
    config = ScenesConfig(classes=20, image_size=48, train=30, val=5, test=24, shard_size=10, chats=0, bench_images=0)
    write_scenes(out, ScenesConfig(**{**vars(config), "masks": True}))
    return out


def test_scenes_give_all_three_tasks(scenes: Path) -> None:
    names = json.loads((scenes / "classes.json").read_text())
    samples = TarSamples(scenes / "shards" / "test")
    texts = [json.loads(samples.read(index, "json")) for index in range(len(samples))]
    shown = [[thing["name"] for thing in text["scene"]["objects"]] for text in texts]

    retrieval = read_set(ZeroShotSpec("retrieval", "scenes", str(scenes)))
    assert [example.answer for example in retrieval.examples] == [[text["short"]] for text in texts]
    assert retrieval.shared  # type: ignore[union-attr]
    assert picture(retrieval.examples[23]).shape == (3, 48, 48)
    assert retrieval.examples[23].image() == samples[23].image

    classification = read_set(ZeroShotSpec("classification", "scenes", str(scenes)))
    assert [names[example.answer] for example in classification.examples] == [
        objects[0] for objects in shown if len(set(objects)) == 1
    ]
    assert 0 < len(classification.examples) < 24

    segmentation = read_set(ZeroShotSpec("segmentation", "scenes", str(scenes)))
    assert len(segmentation.examples) == 24
    for example, text, objects in zip(segmentation.examples, texts, shown, strict=True):
        labels = example.answer()  # type: ignore[operator]
        assert set(np.unique(labels)) - {IGNORED} == {names.index(name) for name in objects}
        for thing in text["scene"]["objects"]:
            x0, y0, x1, y1 = thing["box"]
            assert (labels[y0:y1, x0:x1] == names.index(thing["name"])).mean() > 0.2


def test_scenes_without_masks_or_with_unknown_objects_are_refused(scenes: Path, tmp_path: Path) -> None:
    world = tmp_path / "world"
    shutil.copytree(scenes, world)
    (world / "classes.json").write_text(json.dumps(["rat"]))
    for task in ("classification", "segmentation"):
        with pytest.raises(DataError, match=r"shows .* which classes\.json does not list"):
            read_set(ZeroShotSpec(task, "scenes", str(world)))  # type: ignore[arg-type]
    write_scenes(tmp_path / "bare", ScenesConfig(classes=20, train=0, val=0, test=3, chats=0, bench_images=0))
    with pytest.raises(DataError, match=r"has no mask\.png; write the scenes again with --masks"):
        read_set(ZeroShotSpec("segmentation", "scenes", str(tmp_path / "bare")))
    with pytest.raises(DataError, match="does not exist"):
        read_set(ZeroShotSpec("retrieval", "scenes", str(tmp_path / "none")))


def test_scoring_leaves_a_training_model_in_training_and_refuses_a_broken_one(karpathy: Path, voc: Path) -> None:
    model = ColourEncoder().train()
    score(ZeroShotSpec("retrieval", "karpathy", str(karpathy)), model)
    assert model.training
    model.table.fill_(torch.nan)
    for spec in (
        ZeroShotSpec("retrieval", "karpathy", str(karpathy)),
        ZeroShotSpec("segmentation", "folder", str(voc)),
    ):
        with pytest.raises(ModelError, match="not finite"):
            score(spec, model)
    assert model.training


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a random CLIP."""
    folder = tmp_path_factory.mktemp("zero_shot") / "run"
    folder.mkdir()
    samples = TarSamples(scenes / "shards" / "train")
    captions = [caption for place in range(len(samples)) for caption in samples[place].long.values()]
    tokenizer = CaptionTokenizer.train(captions, 400, "bert")
    vision = VisionConfig(image_size=48, patch_size=16, width=32, layers=2, heads=2, mlp_width=64)
    text = TextConfig(kind="bert", vocab_size=400, length=24, width=32, layers=2, heads=2)
    torch.manual_seed(0)
    config = EncoderConfig(objective="clip", embed_dim=16, vision=vision, text=text)
    encoder_run.save(folder, objectives.build(config), tokenizer)
    manifest.seal(folder, "encoder-run", config.to_dict(), files=encoder_run.FILES)
    return folder


def test_the_command_scores_a_run(run: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    sets = [f"--{task}=scenes:{scenes}" for task in ("retrieval", "classification", "segmentation")]
    main([str(run), *sets, f"--retrieval=shards:{scenes}/shards/val,limit=3", "--device=cpu", f"--out={out}"])
    results = json.loads(out.read_text())
    found = {(entry["set"]["task"], entry["name"]): entry for entry in results["sets"]}
    assert set(found) == {(t, "scenes") for t in ("retrieval", "classification", "segmentation")} | {
        ("retrieval", "val")
    }
    assert found["retrieval", "scenes"]["sizes"] == {"pictures": 24, "captions": 24}
    assert found["retrieval", "val"]["sizes"]["pictures"] == 3
    assert found["retrieval", "val"]["protocol"] == "hits are all captions that read like one of the picture's own"
    assert found["classification", "scenes"]["protocol"] == "prompts plain, averaged per class"
    assert found["segmentation", "scenes"]["sizes"] == {"pictures": 24, "classes": 20}
    assert all(0 <= value <= 1 for entry in results["sets"] for value in entry["metrics"].values())
    assert results["run"]["fingerprint"] == manifest.fingerprint(run)
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("image->text R@1", "mean class accuracy", "mean IoU", str(out)))

    model, tokenizer = encoder_run.load(run)
    [one] = open_sets([ZeroShotSpec("classification", "scenes", str(scenes))])
    again = one.score(model, tokenizer, torch.device("cpu"), 5)
    assert again == pytest.approx(found["classification", "scenes"]["metrics"])


def test_templates_and_limit_stand_in_where_a_set_says_nothing(run: Path, class_folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    sets = [f"folder:{class_folders}", f"folder:{class_folders},name=own,templates=plain,limit=5"]
    main([str(run), *(f"--classification={one}" for one in sets), "--templates=imagenet7", "--limit=7", f"--out={out}"])
    settings = [entry["set"] for entry in json.loads(out.read_text())["sets"]]
    assert [(one["templates"], one["limit"]) for one in settings] == [("imagenet7", 7), ("plain", 5)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no evaluation set named"),
        (["--retrieval=coco"], "is not KIND:PATH; kinds for retrieval: karpathy, shards, scenes, dataset"),
        (["--retrieval=folder:x"], "retrieval knows no sets of kind 'folder'"),
        (["--retrieval=shards:x,templates=plain"], "takes no option 'templates'"),
        (["--retrieval=shards:x,size=3"], "options: .*caption_column"),
        (["--retrieval=shards:x,limit=few"], "not a whole number"),
        (["--retrieval=shards:x", "--limit=0"], "limit must be at least 1"),
        (["--classification=folder:x,templates=best"], "'best' are unknown; choose one of plain, imagenet"),
        (["--classification=folder:x,classes=coco"], "`imagenet` is the only built-in list"),
        (["--retrieval=shards:x", "--batch-size=0"], "--batch-size must be at least 1"),
        (["--retrieval=shards:x", "--out=/nowhere/at/all.json"], "its folder does not exist"),
    ],
)
def test_impossible_command_lines_are_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        main(["run", *arguments])


def test_two_sets_of_one_name_and_a_folder_that_is_no_run_are_refused(scenes: Path, tmp_path: Path) -> None:
    spec = ZeroShotSpec("retrieval", "scenes", str(scenes))
    with pytest.raises(UsageError, match="2 retrieval sets are called 'scenes'"):
        open_sets([spec, spec])
    with pytest.raises(DataError, match="manifest"):
        main([str(tmp_path), f"--retrieval=scenes:{scenes}"])
