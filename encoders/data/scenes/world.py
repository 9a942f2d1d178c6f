"""The world: what is in scene number `index` of a stream. Pure sampling; nothing here draws or writes.

A scene is a function of (seed, stream, index) and of nothing else, so streams are disjoint by seed and a scene has the
same content at every resolution. Positions and sizes are fractions of the image's side.
"""

import random
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from zlib import crc32

from encoders.data.scenes.emoji_classes import load_classes
from encoders.errors import UsageError

BACKGROUNDS = {
    "red": (244, 150, 146),
    "orange": (252, 200, 145),
    "yellow": (252, 238, 160),
    "green": (170, 220, 160),
    "blue": (160, 198, 244),
    "purple": (205, 176, 234),
    "pink": (252, 208, 228),
    "brown": (205, 172, 145),
    "gray": (200, 200, 200),
    "white": (250, 250, 250),
}
# No colours and nothing that is drawn: a printed word never stands for an object.
PRINTABLE = """
sale open stop exit menu free news club film race cash rail post zone help hello away lost easy fast slow good best live
play jump wait here soon home city north south east west jazz rock spring summer winter today hope idea
"""
WORDS = PRINTABLE.split()
PLACES = {  # name -> (column, row) of a 3 x 3 grid
    "top left": (0, 0),
    "top": (1, 0),
    "top right": (2, 0),
    "left": (0, 1),
    "center": (1, 1),
    "right": (2, 1),
    "bottom left": (0, 2),
    "bottom": (1, 2),
    "bottom right": (2, 2),
}
CENTRES = (0.2, 0.5, 0.8)  # of the grid's columns and rows
SIDES = {"small": (0.26, 0.29), "large": (0.40, 0.45)}  # two steps each, so that drawings are rasterised only once
JITTER = 0.06
MARGIN = 0.01  # left free at the image's edge
CLEARLY_APART = 0.2  # least distance of two centres to call one left of, or above, the other
WORD_ROWS = {"top": (0.02, 0.20), "bottom": (0.80, 0.98)}  # the band that a printed word may fill

WORD_SHARE = 0.3  # scenes with a printed word
REPEAT_SHARE = 0.35  # scenes of two or more objects in which the first class occurs several times
HELD_OUT_SHARE = 0.5  # test scenes of two or more objects that show a pair never seen in training
HELD_OUT_PERCENT = 8  # of all pairs of classes

TRAINING_STREAMS = ("train", "val", "chats")
TEST_STREAMS = ("test", "POPE", "MME", "GQA", "textvqa")
LEAST_CLASSES = 12  # twice the most objects: as many classes are missing from a scene as are in it
MOST_DRAWS = 100  # with very few classes a scene may end up with fewer objects


@dataclass(frozen=True)
class ScenesConfig:
    """What to generate; every count may be 0. Raises UsageError for what cannot be drawn."""

    seed: int = 0
    classes: int = 40
    image_size: int = 64
    train: int = 16000
    val: int = 500
    test: int = 500
    shard_size: int = 2000
    chats: int = 2000
    questions_per_chat: int = 5
    bench_images: int = 50
    masks: bool = False
    max_objects: int = 3

    def __post_init__(self) -> None:
        least = {"classes": LEAST_CLASSES, "image_size": 32, "shard_size": 1, "max_objects": 1, "questions_per_chat": 1}
        for name in ("train", "val", "test", "chats", "bench_images", *least):
            value, bound = vars(self)[name], least.get(name, 0)
            if value < bound:
                raise UsageError(f"{name}: {value} is too small; it must be at least {bound}")
        if self.max_objects > 6:
            raise UsageError(f"max_objects: {self.max_objects} is too large; a scene has room for at most 6")


@dataclass(frozen=True)
class SceneObject:
    """One object: where its square of side `side` has its centre (x, y), as fractions of the image's side."""

    name: str
    size: str
    place: str
    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Relation:
    """objects[subject] is clearly `kind` ("left of" or "above") objects[object]."""

    subject: int
    kind: str
    object: int


@dataclass(frozen=True)
class Scene:
    """The content of one picture. `word` is printed (in capitals) in the row `word_place`, or both are None."""

    key: str
    background: str
    objects: tuple[SceneObject, ...]
    word: str | None
    word_place: str | None

    @cached_property
    def counts(self) -> dict[str, int]:
        """How often each class occurs, in the order of the objects."""
        counts: dict[str, int] = {}
        for thing in self.objects:
            counts[thing.name] = counts.get(thing.name, 0) + 1
        return counts

    @cached_property
    def unique(self) -> tuple[SceneObject, ...]:
        """The objects that "the dog" names without doubt: the only ones of their class."""
        return tuple(thing for thing in self.objects if self.counts[thing.name] == 1)

    @cached_property
    def relations(self) -> tuple[Relation, ...]:
        """For every pair of objects that are clearly apart, how they lie along the axis that parts them most."""
        found = []
        for (i, a), (j, b) in combinations(enumerate(self.objects), 2):
            dx, dy = b.x - a.x, b.y - a.y
            if max(abs(dx), abs(dy)) < CLEARLY_APART:
                continue
            kind, forward = ("left of", dx > 0) if abs(dx) >= abs(dy) else ("above", dy > 0)
            found.append(Relation(i, kind, j) if forward else Relation(j, kind, i))
        return tuple(found)


class World:
    """All scenes of one seed. Classes and the pairs held out for testing do not depend on the seed."""

    def __init__(self, config: ScenesConfig) -> None:
        self.config = config
        self.classes = load_classes(config.classes)
        self.names = [one.name for one in self.classes]
        self._partners: dict[str, list[str]] = {}

    def rng(self, stream: str, index: int, purpose: str) -> random.Random:
        """The random numbers of one scene for one purpose (its content, its captions, its questions)."""
        return random.Random(f"{self.config.seed}/{stream}/{index}/{purpose}")

    def scene(self, stream: str, index: int) -> Scene:
        """Scene number `index` of a stream; only TEST_STREAMS show pairs of classes that are held out."""
        rng = self.rng(stream, index, "scene")
        names = self._draw_names(rng, stream in TEST_STREAMS)
        word = rng.choice(WORDS) if rng.random() < WORD_SHARE else None
        word_place = rng.choice(sorted(WORD_ROWS)) if word is not None else None
        objects = _place(rng, names, word_place)
        return Scene(f"{stream}-{index:07d}", rng.choice(list(BACKGROUNDS)), objects, word, word_place)

    def _draw_names(self, rng: random.Random, testing: bool) -> list[str]:
        total = rng.randint(1, self.config.max_objects)
        repeats = rng.randint(2, total) if total > 1 and rng.random() < REPEAT_SHARE else 1
        chosen = [rng.choice(self.names)]
        if testing and repeats < total and rng.random() < HELD_OUT_SHARE and self._held_out_partners(chosen[0]):
            chosen.append(rng.choice(self._held_out_partners(chosen[0])))
        for _ in range(MOST_DRAWS):
            if len(chosen) + repeats - 1 == total:
                break
            name = rng.choice(self.names)
            if name not in chosen and (testing or not any(is_held_out(name, other) for other in chosen)):
                chosen.append(name)
        names = chosen[:1] * repeats + chosen[1:]
        rng.shuffle(names)
        return names

    def _held_out_partners(self, name: str) -> list[str]:
        if name not in self._partners:
            self._partners[name] = [other for other in self.names if is_held_out(name, other)]
        return self._partners[name]


def is_held_out(a: str, b: str) -> bool:
    """Whether training scenes never show classes `a` and `b` together."""
    return a != b and crc32("|".join(sorted((a, b))).encode()) % 100 < HELD_OUT_PERCENT


def _place(rng: random.Random, names: list[str], word_place: str | None) -> tuple[SceneObject, ...]:
    """Give every object a cell of the grid, a size and a position such that no two squares overlap."""
    free = [place for place, (_, row) in PLACES.items() if row != {"top": 0, "bottom": 2, None: None}[word_place]]
    for attempt in range(60):
        jitter = JITTER * (1 - attempt / 60)
        sizes = [rng.choice(("small", "large")) if attempt < 40 else "small" for _ in names]
        cells = rng.sample(free, len(names))
        objects = [_put(rng, *drawn, jitter) for drawn in zip(names, sizes, cells, strict=True)]
        if not any(_overlap(a, b) for a, b in combinations(objects, 2)):
            return tuple(objects)
    return tuple(_put(rng, name, "small", cell, 0.0) for name, cell in zip(names, cells, strict=True))


def _put(rng: random.Random, name: str, size: str, place: str, jitter: float) -> SceneObject:
    side = rng.choice(SIDES[size])
    low, high = side / 2 + MARGIN, 1 - side / 2 - MARGIN
    centres = (min(max(CENTRES[cell], low), high) for cell in PLACES[place])
    x, y = (rng.uniform(max(centre - jitter, low), min(centre + jitter, high)) for centre in centres)
    return SceneObject(name, size, place, x, y, side)


def _overlap(a: SceneObject, b: SceneObject) -> bool:
    reach = (a.side + b.side) / 2
    return abs(a.x - b.x) < reach and abs(a.y - b.y) < reach
