"""Templates and labels: what is supervised, what the pinned jinja renders to, what a user cannot smuggle in.

10,000 random conversations were run once per template and tokenizer (`-m slow` repeats that); here it is 500 of them.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import llama3_model, write_chatml, write_real_llama3, write_sentencepiece
from conftest import IMAGE_TOKENS, LLAMA3_PATTERN, WORDS
from transformers import PreTrainedTokenizerFast

from encoders.errors import DataError, ModelError
from llava_adapter.chat import CHAT_TEMPLATES, IGNORED, IMAGE, TEMPLATES, encode, encode_prompt, template_of
from llava_adapter.tokenizer import chat_template, generation_config, prepare_tokenizer

# Letters of several scripts, combining and zero-width ones, emoji with joiners and flags, odd spaces, control signs.
# The sign U+2581 is left out: SentencePiece's tokenizers write a space as that, so it comes back as one.
UNICODE = (
    *(
        "é",
        "ß",
        "ñ",
        "日本語",
        "한국",
        "العربية",
        "עברית",
        "Ω",
        "ĳ",
        "ﬁ",
        "e\u0301",
        "a\u0300\u0323",
        "\u200b",
        "\u200d",
    ),
    *("👩\u200d👩\u200d👧", "🇩🇪", "😀", "𝒳", "\u00a0", "\u2028", "\x00", "\x7f", "\ufffd", "½", "²", "۳", "①"),
)
LOOK_ALIKES = (
    *("<s>", "</s>", "<unk>", "<pad>", "<image", "[INST]", "USER:", " ASSISTANT:", "<|eot_id|>", "<|begin_of_text|>"),
    *("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|im_start|>system\n", "<|im_end|>", "<|endoftext|>"),
    *("<|reserved_special_token_0|>", "<reponame>", "<empty_output>", "</s", "{{ messages }}", "{%- set x = 1 -%}"),
)


@pytest.fixture(scope="module")
def tokenizers(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerFast]:
    """One prepared tokenizer per template; plain captions are tokenised with LLaMA-3's."""
    place = tmp_path_factory.mktemp("tokenizers")
    folders = {"llama3": tiny_llm, "plain": tiny_llm}
    folders |= {"chatml": write_chatml(place / "chatml", tiny_llm), "vicuna_v1": write_sentencepiece(place / "vicuna")}
    named = {name: chat_template(name if name != "plain" else "llama3") for name in folders}
    prepared = {name: prepare_tokenizer(folder, named[name]) for name, folder in folders.items()}
    if (model := llama3_model()) is not None:
        for release in ("3.0", "3.1"):
            folder = write_real_llama3(place / release, model, release)
            prepared[f"llama-{release}"] = prepare_tokenizer(folder, chat_template("llama3"))
    return prepared


def sentence(rng: random.Random, tame: bool) -> str:
    """Words with the spacing, digits, quotes and line breaks that make tokenizers merge across seams; unless `tame`,
    look-alikes of special tokens too."""
    words = rng.choices([*WORDS, *UNICODE] if tame else [*WORDS, *UNICODE, *LOOK_ALIKES], k=rng.randint(0, 8))
    seams = [" ", "  ", "\n", "\n\n", ", ", " 's ", "... ", ".\n", " 1234 ", " é😀 ", "\t", "", ">", "\r\n"]
    text = "".join(word + seam for word, seam in zip(words, rng.choices(seams, k=len(words)), strict=True))
    return rng.choice(["", " ", "\n", "\n\n"]) + text + rng.choice(["", ".", "?", "!\n", "\n\n ", "😀", " 7"])


def conversation(rng: random.Random, name: str, tame: bool) -> list[dict[str, Any]]:
    """1-12 turns, some of them empty, with 0-4 images."""
    if name == "plain":
        return [said("user", "<image>\nDescribe."), said("assistant", sentence(rng, tame))]
    messages = [said("system", sentence(rng, tame))] if rng.random() < 0.3 else []
    pairs, images = rng.randint(1, 12), rng.randint(0, 4)
    shown = sorted(rng.choices(range(pairs), k=images))
    for pair in range(pairs):
        marks = "<image>" * shown.count(pair)
        content: Any = rng.choice([f"{marks}\n{{}}", f"{{}}\n{marks}"]).format("@").replace("@", sentence(rng, tame))
        if rng.random() < 0.2:  # the other form of a message
            content = [*[{"type": "image"}] * len(marks.split(">")[1:]), {"type": "text", "text": sentence(rng, tame)}]
        messages += [said("user", content), said("assistant", sentence(rng, tame))]
    return messages


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def shown_and_said(message: dict[str, Any]) -> tuple[int, str]:
    """What of a message must arrive: the number of its images and its text."""
    role, content = message["role"], message["content"]
    if isinstance(content, list):
        return len(content) - 1, content[-1]["text"].strip()
    marks = content.count(IMAGE) if role == "user" else 0
    return marks, (content.replace(IMAGE, "") if role == "user" else content).strip()


def supervised_runs(labels: Sequence[int]) -> list[list[int]]:
    """The supervised ids, run by run."""
    runs: list[list[int]] = []
    for before, label in zip([IGNORED, *labels[:-1]], labels, strict=True):
        if label != IGNORED and before == IGNORED:
            runs.append([])
        if label != IGNORED:
            runs[-1].append(label)
    return runs


def check(rng: random.Random, name: str, tokenizer: PreTrainedTokenizerFast, tame: bool) -> None:
    """One random conversation: exactly the answers with their ends are supervised and nothing is dropped; of a tame one
    the jinja text, tokenised whole, gives the same ids and mask."""
    template = TEMPLATES[name]
    end = "\n" if name == "plain" else chat_template(name).ends["assistant"]
    messages = conversation(rng, name, tame)
    images = sum(shown_and_said(message)[0] for message in messages)
    tokens = rng.choice([1, 4])
    ids, labels = encode(tokenizer, template, messages, image_tokens=tokens)
    answers = [message["content"].strip() for message in messages if message["role"] == "assistant"]
    runs = supervised_runs(labels)
    assert [tokenizer.decode(run) for run in runs] == [answer + end for answer in answers], messages
    assert all(label in (IGNORED, token) for label, token in zip(labels, ids, strict=True))
    assert ids.count(tokenizer.image_token_id) == images * tokens
    special = set(tokenizer.all_special_ids)
    assert [token for run in runs for token in run if token in special] == (
        [] if name == "plain" else [tokenizer.eos_token_id] * len(answers)
    ), messages
    whole = tokenizer.decode(ids)
    for message in messages[1:] if name == "plain" else messages:
        assert shown_and_said(message)[1] in whole, (message, whole)
    if not tame:
        return
    rendered = tokenizer.apply_chat_template(
        messages, chat_template=template.jinja, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    single, single_labels = encode(tokenizer, template, messages, image_tokens=1)
    assert rendered["input_ids"] == single, messages
    assert rendered["assistant_masks"] == [int(label != IGNORED) for label in single_labels], messages


@pytest.mark.parametrize("tame", [True, False], ids=["as rendered", "look-alikes"])
@pytest.mark.parametrize("name", ["llama3", "vicuna_v1", "chatml", "plain", "llama-3.0", "llama-3.1"])
@pytest.mark.parametrize("count", [250, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_conversations(
    name: str, tame: bool, count: int, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    if name not in tokenizers:
        pytest.skip("the real tokenizer needs: pip install --no-deps llama-models")
    rng = random.Random(f"{name} {tame}")
    for _ in range(count):
        check(rng, "llama3" if name.startswith("llama-") else name, tokenizers[name], tame)


GOLDEN = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image><image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na red apple<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhere?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nleft<|eot_id|>"
    ),
    "vicuna_v1": "<s> a USER: <image><image>\nWhat is it? ASSISTANT: a red apple</s>USER: Where? ASSISTANT: left</s>",
    "chatml": (
        "<|im_start|>system\na<|im_end|>\n<|im_start|>user\n<image><image>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\na red apple<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n"
        "<|im_start|>assistant\nleft<|im_end|>\n"
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    """The text and the labels of one conversation, written out."""
    tokenizer = tokenizers[name]
    messages = [said("system", "a"), said("user", "What is it?\n<image>"), said("assistant", "a red apple")]
    messages += [said("user", "Where?"), said("assistant", "left")]
    ids, labels = encode(tokenizer, TEMPLATES[name], messages, image_tokens=2)
    assert tokenizer.decode(ids) == GOLDEN[name]
    end = tokenizer.eos_token
    assert [tokenizer.decode(run) for run in supervised_runs(labels)] == [f"a red apple{end}", f"left{end}"]


def test_golden_plain(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    messages = [said("user", "<image>\nWhat?"), said("assistant", "a dog")]
    ids, _ = encode(tokenizers["plain"], TEMPLATES["plain"], messages, image_tokens=3)
    assert tokenizers["plain"].decode(ids) == "<|begin_of_text|><image><image><image>a dog\n"


def test_vicuna_ids_are_those_of_sentencepiece(tokenizers: dict[str, PreTrainedTokenizerFast], tmp_path: Path) -> None:
    """The library that Vicuna was trained with, on the text that LLaVA-1.5 gave it."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(write_sentencepiece(tmp_path) / "tokenizer.model"))
    template, tokenizer = chat_template("vicuna_v1"), tokenizers["vicuna_v1"]
    messages = [said("user", "<image>\nWhat is it?"), said("assistant", "a red  dog é😀")]
    messages += [said("user", "Where?\nIs it red"), said("assistant", "left")]
    # SentencePiece adds a space before a text; of what comes behind </s> or an image it is taken off again.
    pieces = [
        f"{template.system} USER: ",
        "What is it? ASSISTANT:",
        "a red  dog é😀",
        "Where?\nIs it red",
        "ASSISTANT:",
    ]
    first, question, answer, second, header = (model.encode(piece) for piece in pieces)
    bare, (newline,) = model.encode("xUSER:")[len(model.encode("x")) :], model.encode("\n")[1:]
    start = len(model.encode("What")) - len(tokenizer.encode("What", add_special_tokens=False))
    wanted = [1, *first, tokenizer.image_token_id, newline]
    ids, labels = encode(tokenizer, template, messages, image_tokens=1)
    assert ids[: len(wanted)] == wanted
    tail = [*bare, *second, *header, *model.encode("left"), 2]
    assert ids[-len(tail) :] == tail
    assert supervised_runs(labels) == [[*answer, 2], [*model.encode("left"), 2]]
    assert len(ids) == len(wanted) + len(question) - start + len(answer) + 1 + len(tail)


def test_real_llama3_ids(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    """Against tiktoken on the release's own file, put together as the release does: header, text, end."""
    model = llama3_model()
    if model is None:
        pytest.skip("the real tokenizer needs: pip install --no-deps llama-models")
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    words = tiktoken.Encoding(
        "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=load_tiktoken_bpe(str(model)), special_tokens={}
    )
    rng = random.Random(0)
    for release, pad, stops in (("3.0", 128003, [128009, 128001]), ("3.1", 128004, [128009, 128001, 128008])):
        tokenizer = tokenizers[f"llama-{release}"]
        assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (128256, 128000, 128009)
        assert (tokenizer.image_token_id, tokenizer.pad_token_id) == (128002, pad)
        assert generation_config(tokenizer, chat_template("llama3")).eos_token_id == stops
        for _ in range(100):
            messages = conversation(rng, "llama3", tame=False)
            wanted = [128000]
            system = chat_template("llama3").system
            for message in messages if messages[0]["role"] == "system" else [said("system", system), *messages]:
                images, text = shown_and_said(message)
                header = [128006, *words.encode(message["role"]), 128007, *words.encode("\n\n")]
                shown = [128002, 128002, *words.encode("\n")] * images
                wanted += [*header, *shown, *words.encode(text, disallowed_special=()), 128009]
            assert encode(tokenizer, TEMPLATES["llama3"], messages, image_tokens=2)[0] == wanted, messages


def test_prompt_is_the_prefix_of_training(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    """At evaluation the model sees the very ids after which it learned to answer."""
    rng = random.Random(1)
    for name, template in CHAT_TEMPLATES.items():
        for _ in range(50):
            messages = conversation(rng, name, tame=False)
            ids, labels = encode(tokenizers[name], template, messages, image_tokens=5)
            prompt = encode_prompt(tokenizers[name], template, messages[:-1], image_tokens=5)
            assert ids[: len(prompt)] == prompt
            assert labels[len(prompt)] != IGNORED


def test_nothing_to_learn_is_an_error(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    with pytest.raises(DataError, match="no assistant turn"):
        encode(tokenizers["llama3"], TEMPLATES["llama3"], [said("user", "What?")], IMAGE_TOKENS)
    with pytest.raises(DataError, match="plain"):
        text_only = [said("user", "What?"), said("assistant", "a")]
        encode(tokenizers["plain"], TEMPLATES["plain"], text_only, IMAGE_TOKENS)


def test_template_is_recognised_by_its_text(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    for name in CHAT_TEMPLATES:
        assert template_of(tokenizers[name].chat_template) == name
    with pytest.raises(ModelError, match="not one of ours"):
        template_of("{{ messages }}")
