"""Questions about scenes with short answers, and the LLaVA chats made of them.

Wording follows POPE, MME, GQA and TextVQA; answers are what their scorers accept: lower-case words and digits. Chats
end every question as lmms-eval ends it for these benchmarks.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from encoders.data.scenes import captions
from encoders.data.scenes.world import BACKGROUNDS, WORDS, Scene

PROMPT_END = "\nAnswer the question using a single word or phrase."
WORD_QUESTIONS = ("What word is printed in the image?", "What does the text in the image say?")
CHAT_PATTERN = ("presence", "open", "yes or no", "open", "presence")  # repeated for longer chats
SIDE_PHRASES = {
    "left of": "on the left side of",
    "right of": "on the right side of",
    "above": "above",
    "below": "below",
}


@dataclass(frozen=True)
class Question:
    """A question and its short answer."""

    text: str
    answer: str


YesNo = tuple[Question, Question]  # two questions of one kind: the answer is yes to the first and no to the second


def caption_chat(scene: Scene, image: str, rng: random.Random) -> dict[str, Any]:
    """One caption request in the shape of LLaVA's 558K alignment set."""
    request = rng.choice(("Describe the image briefly.\n<image>", "<image>\nDescribe the image briefly."))
    turns = [{"from": "human", "value": request}, {"from": "gpt", "value": captions.short(scene)}]
    return {"id": scene.key, "image": image, "conversations": turns}


def question_chat(scene: Scene, image: str, rng: random.Random, names: Sequence[str], count: int) -> dict[str, Any]:
    """Up to `count` different questions in the shape of LLaVA's 665K instruction set."""
    turns = []
    for number, question in enumerate(chat_questions(scene, rng, names, count)):
        opening = "<image>\n" if number == 0 else ""
        turns.append({"from": "human", "value": f"{opening}{question.text}{PROMPT_END}"})
        turns.append({"from": "gpt", "value": question.answer})
    return {"id": scene.key, "image": image, "conversations": turns}


def chat_questions(scene: Scene, rng: random.Random, names: Sequence[str], count: int) -> list[Question]:
    """Different questions of the kinds in CHAT_PATTERN in random order; yes and no are equally likely."""
    open_ended = open_questions(scene, rng)
    rng.shuffle(open_ended)
    if scene.word is not None:  # asked whenever it can be: few scenes have one
        open_ended.insert(0, Question(rng.choice(WORD_QUESTIONS), scene.word))
    pairs = list(yes_no_questions(scene, rng, names).values())
    rng.shuffle(pairs)
    # Every class that is there has one partner that is not, so that a yes is dropped as seldom as a no.
    there = rng.sample(list(scene.counts), len(scene.counts))
    missing = rng.sample([name for name in names if name not in scene.counts], len(there))
    either = [(presence(name, "yes"), presence(other, "no")) for name, other in zip(there, missing, strict=True)]
    piles = {
        "presence": [rng.choice(pair) for pair in either],
        "open": open_ended,
        "yes or no": [rng.choice(pair) for pair in pairs],
    }
    questions: list[Question] = []
    for turn in range(len(CHAT_PATTERN) * count):
        pile = piles[CHAT_PATTERN[turn % len(CHAT_PATTERN)]]
        if pile and len(questions) < count:
            questions.append(pile.pop(0))
    rng.shuffle(questions)
    return questions


def presence(name: str, answer: str) -> Question:
    """POPE's question about one class."""
    return Question(f"Is there {captions.article(name)} in the image?", answer)


def yes_no_questions(scene: Scene, rng: random.Random, names: Sequence[str]) -> dict[str, YesNo]:
    """MME category -> its two questions about this scene; position and OCR only where they can be asked."""
    there, missing = rng.choice(list(scene.counts)), captions.absent(scene, rng, names)
    counted = rng.choice(list(scene.counts))
    other_color = rng.choice([color for color in BACKGROUNDS if color != scene.background])
    pairs = {
        "existence": _pair("Is there {} in this image?", captions.article(there), captions.article(missing)),
        "count": _count_pair(scene.counts[counted], counted, rng),
        "color": _pair("Is the background of this image {}?", scene.background, other_color),
    }
    if positions := _position_pairs(scene):
        pairs["position"] = rng.choice(positions)
    if scene.word is not None:
        other_word = rng.choice([word for word in WORDS if word != scene.word])
        pairs["OCR"] = _pair('Is the word in this image "{}"?', scene.word, other_word)
    return pairs


def open_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """GQA-like questions: background, counts, and for objects that are alone in their class size, side and relation."""
    name = rng.choice(scene.objects).name
    questions = [
        Question("What color is the background?", scene.background),
        Question("How many objects are there in the image?", str(len(scene.objects))),
        Question(f"How many {captions.plural(name)} are there in the image?", str(scene.counts[name])),
    ]
    thing = rng.choice(scene.objects)
    questions.append(Question(f"What is {captions.PLACE_PHRASES[thing.place]} of the image?", thing.name))
    if scene.unique:
        thing = rng.choice(scene.unique)
        questions.append(Question(f"Is the {thing.name} small or large?", thing.size))
    sided = [(thing, side) for thing in scene.unique for side in ("left", "right") if side in thing.place.split()]
    if sided:
        thing, side = rng.choice(sided)
        questions.append(Question(f"On which side of the image is the {thing.name}?", side))
    related = _related(scene)
    if related:
        first, kind, second, inverse = rng.choice(related)
        options = sorted((kind, inverse), key=("left of", "right of", "above", "below").index)
        phrase = " or ".join(captions.RELATION_PHRASES[option] for option in options)
        questions.append(Question(f"Is the {first} {phrase} the {second}?", kind.removesuffix(" of")))
    return questions


def _pair(pattern: str, true: str, false: str) -> YesNo:
    return Question(pattern.format(true), "yes"), Question(pattern.format(false), "no")


def _count_pair(count: int, name: str, rng: random.Random) -> YesNo:
    wrong = rng.choice([other for other in (count - 1, count + 1) if 1 <= other <= 6])
    texts = [
        f"{'Is' if number == 1 else 'Are'} there a total of {captions.counted(number, name)} in this image?"
        for number in (count, wrong)
    ]
    return Question(texts[0], "yes"), Question(texts[1], "no")


def _position_pairs(scene: Scene) -> list[YesNo]:
    return [
        _pair(f"Is the {first} {{}} the {second}?", SIDE_PHRASES[kind], SIDE_PHRASES[inverse])
        for first, kind, second, inverse in _related(scene)
    ]


def _related(scene: Scene) -> list[tuple[str, str, str, str]]:
    """(first, kind, second, the opposite kind) in both directions, for objects that are alone in their class."""
    found = []
    for relation in scene.relations:
        first, second = scene.objects[relation.subject], scene.objects[relation.object]
        if first in scene.unique and second in scene.unique:
            kind, inverse = relation.kind, captions.INVERSE[relation.kind]
            found += [(first.name, kind, second.name, inverse), (second.name, inverse, first.name, kind)]
    return found
