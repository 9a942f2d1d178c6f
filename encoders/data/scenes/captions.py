"""Three captions of a scene: noisy web alt text, one short true sentence, and a long text of 6-10 true sentences.

Every sentence of the long caption stands on its own and is true of some part of the picture; wording and order are
drawn with the generator that is passed in.
"""

import random
from collections.abc import Sequence

from encoders.data.scenes.world import Scene, SceneObject

WEB_TRUE_SHARE = 0.45  # web captions that name one object of the picture
WEB_WRONG_SHARE = 0.15  # web captions that name something else; the rest is junk
LONG_SENTENCES = (6, 10)
ABSENCE_SHARE = 0.1  # long captions that name an object, and that name a text, which is not there

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
IRREGULAR = {
    "mouse": "mice",
    "ox": "oxen",
    "goose": "geese",
    "foot": "feet",
    "tooth": "teeth",
    "man": "men",
    "woman": "women",
    "child": "children",
    "person": "people",
    "wolf": "wolves",
    "leaf": "leaves",
    "knife": "knives",
    "elf": "elves",
    "scarf": "scarves",
    "fish": "fish",
    "blowfish": "blowfish",
    "sheep": "sheep",
    "deer": "deer",
    "bison": "bison",
    "moose": "moose",
    "shrimp": "shrimp",
    "squid": "squid",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "mango": "mangoes",
    "volcano": "volcanoes",
    "mosquito": "mosquitoes",
}
PLACE_PHRASES = {
    "top left": "in the top left corner",
    "top": "at the top",
    "top right": "in the top right corner",
    "left": "on the left",
    "center": "in the center",
    "right": "on the right",
    "bottom left": "in the bottom left corner",
    "bottom": "at the bottom",
    "bottom right": "in the bottom right corner",
}
INVERSE = {"left of": "right of", "above": "below"}
RELATION_PHRASES = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "above",
    "below": "below",
}
WEB_NAMED = (
    "{name}",
    "{name} clipart",
    "{name} png free download",
    "cute {name} sticker #{tag} #art",
    "{name} | free shipping",
    "IMG_{number} {name}",
    "new {name} only ${price}",
    "my {name} :)",
    "{name} stock image {number}",
    "vector {name} on {background}",
)
WEB_JUNK = (
    "IMG_{number}.jpg",
    "DSC0{number}",
    "free shipping on all orders",
    "${price} buy now",
    "#art #cute #design",
    "click to enlarge",
    "untitled-{number}",
    "best price {price} limited offer",
    "image result {number}",
    "photo by user{number}",
    "thumbnail",
    "download wallpaper hd",
)


def article(noun: str) -> str:
    """`apple` -> `an apple`."""
    sounds_open = noun[0] in "aeiou" and not noun.startswith(("uni", "use", "ut", "euro", "one", "ufo"))
    return f"an {noun}" if sounds_open or noun.startswith(("hour", "x-ray", "8", "sos")) else f"a {noun}"


def plural(noun: str) -> str:
    """`dog` -> `dogs`, `ear of corn` -> `ears of corn`: the head noun takes the ending."""
    head, of, rest = noun.partition(" of ")
    before, space, word = head.rpartition(" ")
    if word in IRREGULAR:
        word = IRREGULAR[word]
    elif word.endswith(("s", "x", "z", "ch", "sh")):
        word += "es"
    elif word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        word = word[:-1] + "ies"
    else:
        word += "s"
    return f"{before}{space}{word}{of}{rest}"


def counted(count: int, noun: str) -> str:
    """`two apples`, `one apple`."""
    return f"{NUMBERS[count]} {noun if count == 1 else plural(noun)}"


def short(scene: Scene) -> str:
    """One sentence with every class, its count (its size if there is only one), and the background."""
    parts = []
    for name, count in scene.counts.items():
        size = next(thing.size for thing in scene.objects if thing.name == name)
        parts.append(article(f"{size} {name}") if count == 1 else counted(count, name))
    return _sentence(f"{_join(parts)} on {article(scene.background)} background")


def web(scene: Scene, rng: random.Random, names: Sequence[str]) -> str:
    """Alt text as the web has it: one true object, a wrong one, or none at all."""
    draw = rng.random()
    if draw < WEB_TRUE_SHARE:
        pattern, name = rng.choice(WEB_NAMED), rng.choice(scene.objects).name
    elif draw < WEB_TRUE_SHARE + WEB_WRONG_SHARE:
        pattern, name = rng.choice(WEB_NAMED), absent(scene, rng, names)
    else:
        pattern, name = rng.choice(WEB_JUNK), ""
    price, number = f"{rng.randint(1, 99)}.{rng.randint(0, 99):02d}", rng.randint(1000, 9999)
    tag = name.replace(" ", "")
    return pattern.format(name=name, tag=tag, price=price, number=number, background=scene.background)


def absent(scene: Scene, rng: random.Random, names: Sequence[str]) -> str:
    """A class that the scene does not show."""
    while (name := rng.choice(names)) in scene.counts:
        pass
    return name


def long(scene: Scene, rng: random.Random, names: Sequence[str]) -> str:
    """6-10 sentences: background, printed word and every object first of all, then sizes, relations and counts.

    What is absent is said rarely: a sentence that is true of most pictures tells an encoder nothing about this one.
    """
    most = rng.randint(*LONG_SENTENCES)
    needed = [_background(scene, rng), _gist(scene, rng), *(_where(scene, thing, rng) for thing in scene.objects)]
    if scene.word is not None:
        needed.append(_word(scene, rng))
    more = [_total(scene, rng), *_sizes(scene, rng), *_relations(scene, rng), *_counts(scene, rng)]
    rng.shuffle(more)
    more[:0] = _absences(scene, rng, names)
    sentences = needed + more[: max(0, most - 1 - len(needed))]
    rng.shuffle(sentences)
    return " ".join([short(scene), *(_sentence(text) for text in sentences)])


def _where(scene: Scene, thing: SceneObject, rng: random.Random) -> str:
    where = PLACE_PHRASES[thing.place]
    if scene.counts[thing.name] > 1:
        one = article(f"{thing.size} {thing.name}")
        return rng.choice((f"There is {one} {where}", f"{where} there is {one}", f"One {thing.name} is {where}"))
    return rng.choice(
        (
            f"There is {article(thing.name)} {where}",
            f"{where} of the picture there is {article(f'{thing.size} {thing.name}')}",
            f"The {thing.name} is {where}",
            f"{article(f'{thing.size} {thing.name}')} can be seen {where}",
        )
    )


def _background(scene: Scene, rng: random.Random) -> str:
    color = scene.background
    return rng.choice(
        (
            f"The background is {color}",
            f"The background is plain {color}",
            f"Everything is set on {article(color)} background",
            f"The whole picture has {article(color)} background",
        )
    )


def _word(scene: Scene, rng: random.Random) -> str:
    assert scene.word is not None
    quoted, where = f'"{scene.word.upper()}"', f"at the {scene.word_place}"
    return rng.choice(
        (f"The word {quoted} is printed {where}", f"{where} one can read {quoted}", f"The text says {quoted}")
    )


def _gist(scene: Scene, rng: random.Random) -> str:
    things = _join([article(name) if count == 1 else counted(count, name) for name, count in scene.counts.items()])
    return rng.choice((f"This is a picture of {things}", f"One can see {things}"))


def _absences(scene: Scene, rng: random.Random, names: Sequence[str]) -> list[str]:
    texts = []
    if rng.random() < ABSENCE_SHARE:
        noun = absent(scene, rng, names)
        texts.append(rng.choice((f"There is no {noun} in the picture", f"The picture does not show {article(noun)}")))
    if scene.word is None and rng.random() < ABSENCE_SHARE:
        texts.append(rng.choice(("No word is printed in the picture", "The picture has no text")))
    return texts


def _total(scene: Scene, rng: random.Random) -> str:
    total = len(scene.objects)
    if total == 1:
        name = scene.objects[0].name
        return rng.choice((f"The {name} is the only object", "There is one object in the picture"))
    return rng.choice((f"There are {NUMBERS[total]} objects in the picture", f"{NUMBERS[total]} objects are shown"))


def _counts(scene: Scene, rng: random.Random) -> list[str]:
    texts = []
    for name, count in scene.counts.items():
        if count > 1:
            some = counted(count, name)
            texts.append(rng.choice((f"There are {some}", f"The picture shows {some}", f"{some} can be seen")))
    return texts


def _sizes(scene: Scene, rng: random.Random) -> list[str]:
    return [
        rng.choice((f"The {thing.name} is {thing.size}", f"The picture shows {article(f'{thing.size} {thing.name}')}"))
        for thing in scene.unique
    ]


def _relations(scene: Scene, rng: random.Random) -> list[str]:
    texts = []
    for relation in scene.relations:
        subject, other, kind = scene.objects[relation.subject], scene.objects[relation.object], relation.kind
        if rng.random() < 0.5:
            subject, other, kind = other, subject, INVERSE[kind]
        if subject in scene.unique and other in scene.unique:
            texts.append(f"The {subject.name} is {RELATION_PHRASES[kind]} the {other.name}")
    return texts


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
