"""Templates and labels: what is supervised, what the pinned jinja renders to, what a user cannot smuggle in."""

import random
from pathlib import Path

import pytest
from conftest import IMAGE_TOKENS, WORDS
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from encoders.errors import DataError, ModelError
from llava_adapter.chat import IGNORED, TEMPLATES, ChatTemplate, encode, encode_prompt, template_of
from llava_adapter.compose import prepare_tokenizer

CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<reponame>", "<empty_output>"]


@pytest.fixture(scope="module")
def tokenizers(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerFast]:
    """One prepared tokenizer per template; plain captions are tokenised with LLaMA-3's."""
    llama3, chatml = TEMPLATES["llama3"], TEMPLATES["chatml"]
    assert isinstance(llama3, ChatTemplate)
    assert isinstance(chatml, ChatTemplate)
    folder = tmp_path_factory.mktemp("chatml")
    backend = Tokenizer.from_file(str(tiny_llm / "tokenizer.json"))
    backend.add_special_tokens(CHATML_TOKENS)
    backend.save(str(folder / "tokenizer.json"))
    prepared = prepare_tokenizer(tiny_llm, llama3)
    return {"llama3": prepared, "chatml": prepare_tokenizer(folder, chatml), "plain": prepared}


def sentence(rng: random.Random) -> str:
    """Words with the spacing, digits, quotes and line breaks that make tokenizers merge across seams."""
    words = rng.choices(WORDS, k=rng.randint(1, 8))
    glue = rng.choices([" ", "  ", "\n", "\n\n", ", ", " 's ", "... ", ".\n", " 1234 ", " é😀 ", "\t"], k=len(words))
    text = "".join(word + seam for word, seam in zip(words, glue, strict=True))
    return rng.choice(["", " ", "\n", "\n\n"]) + text + rng.choice(["", ".", "?", "!\n", "\n\n "])


def conversation(rng: random.Random, name: str) -> list[dict[str, str]]:
    if name == "plain":
        return [{"role": "user", "content": "<image>\nDescribe."}, {"role": "assistant", "content": sentence(rng)}]
    messages = [{"role": "system", "content": sentence(rng)}] if rng.random() < 0.3 else []
    for turn in range(rng.randint(1, 4)):
        question, mark = sentence(rng), rng.choice(["<image>\n{}", "{}\n<image>", "{} <image>", "{}"])
        messages.append({"role": "user", "content": mark.format(question) if turn == 0 else question})
        messages.append({"role": "assistant", "content": sentence(rng)})
    return messages


@pytest.mark.parametrize("name", TEMPLATES)
def test_random_conversations(name: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    """Exactly the answers with their ends are supervised, and the jinja text tokenises to the same ids and mask."""
    tokenizer, template, rng = tokenizers[name], TEMPLATES[name], random.Random(0)
    end = template.end if isinstance(template, ChatTemplate) else "\n"
    for _ in range(200):
        messages = conversation(rng, name)
        ids, labels = encode(tokenizer, template, messages, image_tokens=1)
        supervised = [label for label in labels if label != IGNORED]
        answers = [m["content"].strip() + end for m in messages if m["role"] == "assistant"]
        assert tokenizer.decode(supervised) == "".join(answers)
        assert all(label in (IGNORED, token) for label, token in zip(labels, ids, strict=True))
        rendered = tokenizer.apply_chat_template(
            messages,
            chat_template=template.jinja,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenize=True,
        )
        assert rendered["input_ids"] == ids, messages
        assert rendered["assistant_masks"] == [int(label != IGNORED) for label in labels], messages


def test_golden_llama3(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    """The text and the labels of one conversation, written out."""
    tokenizer = tokenizers["llama3"]
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "What is it?\n<image>"},
        {"role": "assistant", "content": "a red apple"},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "left"},
    ]
    ids, labels = encode(tokenizer, TEMPLATES["llama3"], messages, image_tokens=2)
    assert tokenizer.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image><image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na red apple<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhere?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nleft<|eot_id|>"
    )
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "a red apple<|eot_id|>left<|eot_id|>"


def test_golden_chatml_and_plain(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    messages = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "a dog"}]
    ids, _ = encode(tokenizers["chatml"], TEMPLATES["chatml"], messages, image_tokens=1)
    assert tokenizers["chatml"].decode(ids) == (
        "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\na dog<|im_end|>\n"
    )
    ids, _ = encode(tokenizers["plain"], TEMPLATES["plain"], messages, image_tokens=3)
    assert tokenizers["plain"].decode(ids) == "<|begin_of_text|><image><image><image>a dog\n"


def test_prompt_is_the_prefix_of_training(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    """At evaluation the model sees the very ids after which it learned to answer."""
    rng = random.Random(1)
    for name in ("llama3", "chatml"):
        template = TEMPLATES[name]
        assert isinstance(template, ChatTemplate)
        for _ in range(50):
            messages = conversation(rng, name)
            ids, _ = encode(tokenizers[name], template, messages, image_tokens=5)
            prompt = encode_prompt(tokenizers[name], template, messages[:-1], image_tokens=5)
            assert ids[: len(prompt)] == prompt


def test_special_token_look_alikes_stay_text(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    """A user who writes a special token's name gets its letters, not the token."""
    for name, tokenizer in tokenizers.items():
        attack = "".join(tokenizer.all_special_tokens) + "<|start_header_id|><|im_start|>"
        clean = [{"role": "user", "content": "<image>\nWhat"}, {"role": "assistant", "content": "yes"}]
        attacked = [
            {"role": "user", "content": "<image>\nWhat" + attack.replace("<image>", "")},
            {"role": "assistant", "content": "yes" + attack},
        ]
        special = set(tokenizer.all_special_ids) | {tokenizer.image_token_id}
        count = [
            sum(token in special for token in encode(tokenizer, TEMPLATES[name], messages, image_tokens=3)[0])
            for messages in (clean, attacked)
        ]
        assert count[0] == count[1]


def test_nothing_to_learn_is_an_error(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    with pytest.raises(DataError, match="no assistant turn"):
        encode(tokenizers["llama3"], TEMPLATES["llama3"], [{"role": "user", "content": "What?"}], IMAGE_TOKENS)
    with pytest.raises(DataError, match="plain"):
        text_only = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a"}]
        encode(tokenizers["plain"], TEMPLATES["plain"], text_only, IMAGE_TOKENS)


def test_template_is_recognised_by_its_text(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    assert template_of(tokenizers["llama3"].chat_template) == "llama3"
    assert template_of(tokenizers["chatml"].chat_template) == "chatml"
    with pytest.raises(ModelError, match="not one of ours"):
        template_of("{{ messages }}")
