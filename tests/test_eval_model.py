"""Shared prefixes, batches and rounds give the answers of transformers' own one-by-one generate; what fails is told."""

import json
import os
import re
import shutil
import signal
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_tokenizers import write_sentencepiece
from conftest import IMAGE_TOKENS, tiny_llama
from PIL import Image
from tokenizers import Tokenizer, processors
from transformers import LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from encoders.errors import DataError, EvaluationIncomplete, ModelError
from eval.answering import rounds, workers
from eval.answering.asking import Asking
from eval.answering.chat_model import ChatModel, ChatProcessor
from eval.answering.journal import Journal
from eval.answering.pictures import picture_id
from eval.answering.prefix import greedy, remember, split_prompt
from eval.answering.reading import Question, Reader, chunks
from eval.answering.workers import Here, Workers
from llava_adapter.compose import compose
from llava_adapter.save import save_llava

QUESTIONS = ("Is it?", "What colour is the big house? Answer with a word", "Where are the two trees?", "")


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8))


class Shown:
    """Stands in for eval.answering.pictures.Pictures: row -> pictures; counts how often they are read."""

    def __init__(self, pictures: dict[int, list[Image.Image]]) -> None:
        self.pictures, self.reads = pictures, 0

    def read(self, row: int) -> list[Image.Image]:
        self.reads += 1
        if row not in self.pictures:
            raise DataError(f"the picture of row {row} cannot be read")
        return self.pictures[row]


def ask(shown: Any, sources: Sequence[int], words: Sequence[str] = QUESTIONS) -> list[Question]:
    """A question per source, all of one source about the same pictures."""
    return [
        Question(place, "task", source, f"{words[place % len(words)]} {place}", 6, shown, f"{source:032}")
        for place, source in enumerate(sources)
    ]


def answered(here: Here, questions: Sequence[Question], batch_size: int) -> Asking:
    here.answerer.batch_size = batch_size
    asking = Asking(Reader(here.chat, here.image_tokens, batch_size, None), here, None, lambda: None)
    asking.run(questions)
    return asking


@pytest.fixture(scope="module")
def here(tiny_llava: Path) -> Here:
    return Here(tiny_llava, "cpu", "float32", 32)


def stock(model: ChatModel, question: str, pictures: Sequence[Image.Image], limit: int) -> str:
    """One question through the folder's processor, pixel_values and generate, as llava_hf asks it."""
    content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": question}]
    text = model.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = model.processor(text=text, images=list(pictures) or None, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        new = model.model.generate(**inputs, max_new_tokens=limit)[0, inputs["input_ids"].shape[1] :]
    return str(model.tokenizer.decode(new, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("batch_size", [1, 4, 7, 32])
def test_answers_are_those_of_the_stock_loop(here: Here, batch_size: int) -> None:
    """No picture, one, two and three; pictures come back later; 18 questions on one of them."""
    shown = Shown({0: [], 1: [noise(1)], 2: [noise(2), noise(3)], 3: [noise(1), noise(4), noise(5)], 4: [noise(6)]})
    questions = ask(shown, [1, 2, 4, 0, 3, 1, 4, 2] + [1] * 16 + [0, 0])
    asking = answered(here, questions, batch_size)
    assert not asking.failures
    for question in questions:
        expected = stock(here.chat, question.text, shown.pictures[question.row], 6)
        assert asking.texts[question.place] == expected, question
    assert len(set(asking.texts.values())) > 5
    assert asking.image_ids[3] == ""
    assert len(asking.image_ids[4].split("_")) == 3
    assert asking.cost.pictures == set("_".join(asking.image_ids.values()).split("_")) - {""}
    assert asking.check(questions, 99) == (len(questions), [])


def test_a_picture_is_read_and_encoded_once_and_its_prefix_run_once(here: Here) -> None:
    shown = Shown({1: [noise(1)], 2: [noise(2)]})
    encoded: list[int] = []
    widths: list[tuple[int, int]] = []
    model = here.chat.model.model
    hooks = [
        model.vision_tower.register_forward_hook(lambda tower, args, output: encoded.append(len(output[0]))),
        model.language_model.register_forward_hook(
            lambda llm, args, output: widths.append(tuple(output.last_hidden_state.shape[:2]))
        ),
    ]
    asking = answered(here, ask(shown, [1, 2] * 18), 12)
    for hook in hooks:
        hook.remove()
    assert shown.reads == sum(encoded) == 2
    # A prefix holds the system turn and all image tokens; every other forward of the LLM is shorter.
    assert [rows for rows, width in widths if width > 2 * IMAGE_TOKENS] == [2]
    assert len(asking.texts) == 36


def test_the_memory_of_a_prefix_is_padded_and_shared_exactly(here: Here) -> None:
    """Prefixes of different length in one batch, behind each suffixes of different length, in float64."""
    chat = here.chat
    pictures = [noise(1), noise(2)]
    features = chat.encode(pictures)
    prompts = [chat.prompt(f"one <image> and {'two ' * number}", 1, marks=True) for number in range(3)]
    prompts[2] = prompts[2].replace("user", "user user user", 1)  # a longer prefix
    split = [split_prompt(chat.prompt_ids(prompt, IMAGE_TOKENS), chat.config.image_token_id) for prompt in prompts]
    assert len({len(prefix) for prefix, _ in split}) == 2
    with torch.inference_mode():
        memory = remember(chat.model, [prefix for prefix, _ in split], [[features[0]], [features[1]], [features[0]]])
        together = greedy(chat.model, memory, [2, 0, 1, 0], [split[i][1] for i in (2, 0, 1, 1)], 8, chat.stop_ids)
        for row, (place, words) in enumerate([(2, 2), (0, 0), (1, 1), (0, 1)]):
            ids = split[place][0] + split[words][1]
            assert together[row] == chat.alone(ids, chat.pixels([pictures[place % 2]]), 8)


def test_chunks_hold_whole_pictures_of_one_limit() -> None:
    questions = ask(None, [5, 1, 5, 2, 3, 1, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4])
    questions[3] = Question(3, "task", 2, "", 99, questions[3].pictures, "2")
    made = [[question.place for question in chunk.questions] for chunk in chunks(questions, 2)]
    assert made == [[0, 2, 1, 5], [4], list(range(6, 16)), [3]]
    keys = [chunk.key for chunk in chunks(questions, 2)]
    assert len(set(keys)) == 4
    questions[1] = Question(1, "task", 1, "another", 6, None, f"{1:032}")  # type: ignore[arg-type]
    assert [chunk.key == key for chunk, key in zip(chunks(questions, 2), keys, strict=True)] == [
        False,
        True,
        True,
        True,
    ]


def break_greedy(
    monkeypatch: pytest.MonkeyPatch, breaks: Callable[[Sequence[Sequence[int]]], Exception | None]
) -> None:
    def broken(model: Any, memory: Any, places: Any, suffixes: Any, *more: Any) -> list[list[int]]:
        if (error := breaks(suffixes)) is not None:
            raise error
        return greedy(model, memory, places, suffixes, *more)

    monkeypatch.setattr(rounds, "greedy", broken)


CUDA_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
CPU_FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("error", [CUDA_FULL, CPU_FULL, MemoryError()])
def test_too_little_memory_halves_the_batch(here: Here, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    questions = ask(Shown({1: [noise(1)], 2: [noise(2)]}), [1, 2] * 9)
    expected = answered(here, questions, 8).texts
    break_greedy(monkeypatch, lambda suffixes: error if len(suffixes) > 2 else None)
    asking = answered(here, questions, 8)
    assert asking.texts == expected
    assert asking.cost.smallest_batch == 2


def test_too_little_memory_for_one_question_names_it(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = ask(Shown({1: [noise(1)]}), [1] * 8, words=("a", "a", "a", "a very much longer question"))
    longest = max(map(len, all_suffixes(here, questions)))
    break_greedy(monkeypatch, lambda suffixes: CUDA_FULL if max(map(len, suffixes)) == longest else None)
    asking = answered(here, questions, 4)
    assert sorted(asking.failures) == [3, 7]
    assert "out of memory" in asking.failures[3].reason
    assert sorted(asking.texts) == [0, 1, 2, 4, 5, 6]


def all_suffixes(here: Here, questions: Sequence[Question]) -> list[tuple[int, ...]]:
    ids = [here.chat.prompt_ids(here.chat.prompt(question.text), IMAGE_TOKENS) for question in questions]
    return [split_prompt(row, here.chat.config.image_token_id)[1] for row in ids]


def test_a_failing_question_leaves_the_others_their_answers(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = ask(Shown({1: [noise(1)], 2: [noise(2)]}), [1, 2, 1, 2, 3, 3], words=("a", "dog <image> cat <image>"))
    questions[2] = Question(2, "task", 1, "break", 6, questions[0].pictures, questions[0].source)
    bad = all_suffixes(here, [questions[2]])[0]
    break_greedy(monkeypatch, lambda suffixes: RuntimeError("device assert") if bad in suffixes else None)
    asking = answered(here, questions, 8)
    assert {place: failure.reason for place, failure in asking.failures.items() if place in (2, 4)} == {
        2: "RuntimeError: device assert (asked on its own)",
        4: "the picture of row 3 cannot be read",
    }
    assert "3 image placeholders instead of one" in asking.failures[1].reason
    assert sorted(asking.texts) == [0]


def test_a_model_that_answers_nothing_is_given_up(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    break_greedy(monkeypatch, lambda suffixes: calls.append(len(suffixes)) or ValueError("broken"))  # type: ignore[func-returns-value]
    with pytest.raises(EvaluationIncomplete, match=r"none of the first 50 questions.*row 1.*broken"):
        answered(here, ask(Shown({1: [noise(1)]}), [1] * 500), 8)
    assert sum(calls) < 200


def test_two_workers_give_the_same_answers_or_are_named(
    here: Here, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = ask(Shown({row: [noise(row)] for row in range(9)}), [row % 9 for row in range(45)])
    expected = answered(here, questions, 2).texts
    team = Workers(tiny_llava, "cpu", "float32", 2, 2)
    silent, killed = team.workers.values()

    def asking() -> Asking:
        return Asking(Reader(here.chat, team.image_tokens, 2, None), team, None, lambda: None)

    try:
        (first := asking()).run(questions)
        assert first.texts == expected
        assert first.check(questions, 3) == (3, [])

        # One is stopped: nobody waits in silence.
        os.kill(silent.pid, signal.SIGSTOP)
        waits: list[float] = []

        def wait(connections: Any, seconds: float) -> list[Any]:
            waits.append(seconds)
            if len(waits) == 3:
                raise KeyboardInterrupt
            return []

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(workers, "wait", wait)
            asking().run(questions)
        told = capsys.readouterr().err
        assert re.findall(rf"worker 0 \(process {silent.pid}, cpu\).* for (\d+) minutes", told) == ["10", "20"]

        # One is killed while there is work: named, and nothing hangs.
        killed.kill()
        with pytest.raises(EvaluationIncomplete, match=r"worker 1 \(process \d+, cpu\) died \(exit code -9"):
            asking().run(questions)
    finally:
        team.close()
    assert not silent.is_alive()


TEXTS = "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
LLAVA_HF_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    f"{{% if message['role'] != 'assistant' %}}{TEXTS}{{{{ content['text'] + ' '}}}}{{% endfor %}}{{% else %}}{TEXTS}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def llava_hf(tiny_encoder: Path, tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as llava-hf lays it out: chat_template.json, no EOS in generation_config.json, old processor files."""
    place = tmp_path_factory.mktemp("llava_hf")
    llm = write_sentencepiece(place / "llm")
    size = Tokenizer.from_file(str(llm / "tokenizer.json")).get_vocab_size()
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama(vocab_size=size)).save_pretrained(llm)
    torch.manual_seed(0)
    model, processor = compose(tiny_encoder, llm, "vicuna_v1", torch.float32)
    folder = place / "llava"
    save_llava(model, processor, folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": LLAVA_HF_TEMPLATE}))
    (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True, "pad_token_id": 0}))
    wanted = ("patch_size", "image_token", "vision_feature_select_strategy", "num_additional_image_tokens")
    settings = json.loads((folder / "processor_config.json").read_text())
    kept = {key: settings[key] for key in wanted if key in settings} | {"processor_class": "LlavaProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(kept))
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    config["image_seq_length"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_in_llava_hfs_layout_is_asked_as_stock_asks_it(llava_hf: Path) -> None:
    here = Here(llava_hf, "cpu", "float32", 4)
    assert here.chat.prompt("What is it?") == "USER: <image>\nWhat is it? ASSISTANT:"
    assert here.chat.stop_ids == [here.chat.tokenizer.eos_token_id]
    ids = here.chat.prompt_ids(here.chat.prompt("What is it?"), here.image_tokens)
    assert ids.count(here.chat.tokenizer.bos_token_id) == 1
    shown = Shown({1: [noise(1)], 2: [noise(2)]})
    questions = ask(shown, [1, 2] * 4)
    asking = answered(here, questions, 4)
    for question in questions:
        (picture,) = shown.pictures[question.row]
        text = here.chat.prompt(question.text)
        inputs = here.chat.processor(text=text, images=picture, return_tensors="pt")
        with torch.inference_mode():
            new = here.chat.model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        assert asking.texts[question.place] == here.chat.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_the_end_of_a_turn_stops_even_where_the_folder_forgot_to_say_so(tiny_llava: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llava, tmp_path / "llava")
    (folder / "generation_config.json").unlink()
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens["eos_token"] = "<|end_of_text|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    chat = ChatProcessor(folder)
    ids = chat.tokenizer.convert_tokens_to_ids
    assert set(chat.stop_ids) == {ids("<|end_of_text|>"), ids("<|eot_id|>")}


def test_a_template_for_plain_text_only_is_given_placeholders(tiny_llava: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llava, tmp_path / "llava")
    words = (
        "{{ bos_token }}{% for message in messages %}"
        "{{ message['role'] + ' ' + message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(words)
    chat = ChatProcessor(folder)
    assert chat.prompt("Is it?") == "<|begin_of_text|>user <image>\nIs it?<|eot_id|>assistant "
    assert chat.prompt("Is it?", pictures=0) == "<|begin_of_text|>user Is it?<|eot_id|>assistant "


@pytest.mark.parametrize(
    ("template", "message"),
    [("no picture here", "0 image placeholders"), ("{{ raise_exception('never') }}", "cannot be used: never")],
)
def test_a_template_that_shows_no_picture_is_refused(
    tiny_llava: Path, tmp_path: Path, template: str, message: str
) -> None:
    folder = shutil.copytree(tiny_llava, tmp_path / "llava")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=message):
        ChatProcessor(folder)


def test_a_sliding_window_is_not_filled_with_padding(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts longer than the window: padding between prefix and words would push out what the model should see."""
    folder = shutil.copytree(tiny_llava, tmp_path / "llava")
    config = LlavaConfig.from_pretrained(tiny_llava)
    llama = config.text_config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config.text_config = MistralConfig(
        **{name: getattr(llama, name) for name in names},
        num_key_value_heads=2,
        initializer_range=0.2,
        sliding_window=12,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    here = Here(folder, "cpu", "float32", 4)
    questions = ask(Shown({1: [noise(1)]}), [1] * 4)
    asking = answered(here, questions, 4)
    assert not asking.failures
    assert asking.check(questions, 4) == (4, [])


def test_memory_of_a_round_is_let_go_when_the_batch_is_halved(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the retry has no more room than the attempt that failed."""
    held: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def full_at_first(model: Any, memory: Any, *more: Any) -> list[list[int]]:
        alive.append(bool(held) and held[0]() is not None)
        held.append(weakref.ref(memory))
        if len(held) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return greedy(model, memory, *more)

    monkeypatch.setattr(rounds, "greedy", full_at_first)
    questions = ask(Shown({1: [noise(1)]}), [1] * 4)
    asking = answered(here, questions, 4)
    assert not asking.failures
    assert not any(alive)


def test_a_picture_that_can_be_read_after_all_is_asked_about_when_a_run_goes_on(here: Here, tmp_path: Path) -> None:
    """Its questions change who stands in which batch: no line of the journal may be taken for another batch's."""
    pictures = {row: [noise(row)] for row in range(3)}
    shown = Shown({row: pictures[row] for row in (1, 2)})
    questions = ask(shown, [0, 1, 2, 0, 1, 2])
    expected = answered(here, ask(Shown(pictures), [0, 1, 2, 0, 1, 2]), 2).texts

    def go() -> Asking:
        journal = Journal(tmp_path / "journal.jsonl")
        asking = Asking(Reader(here.chat, here.image_tokens, 2, None), here, journal, lambda: None)
        asking.run(questions)
        journal.close()
        return asking

    here.answerer.batch_size = 2
    assert sorted(go().failures) == [0, 3]
    shown.pictures = pictures
    for _ in range(2):
        asking = go()
        assert asking.texts == expected
        assert not asking.failures
    assert (asking.cost.reused, asking.cost.pictures) == (6, {picture_id(shown[0]) for shown in pictures.values()})
