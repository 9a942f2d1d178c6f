"""chat-mllm, and that what a question becomes at evaluation is what it was in training, for every template."""

import io
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from chat_tokenizers import write_chatml, write_sentencepiece
from conftest import IMAGE_TOKENS, WORDS, tiny_llama
from PIL import Image
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from encoders.errors import DataError, UsageError
from eval import chat
from eval.answering.chat_model import ChatModel
from llava_adapter.chat import CHAT_TEMPLATES, encode, encode_prompt
from llava_adapter.compose import compose
from llava_adapter.save import save_llava


@pytest.fixture(scope="module")
def llavas(tiny_encoder: Path, tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LLaVA per chat template; the one of chatml pads its pictures."""
    place = tmp_path_factory.mktemp("llavas")
    llms = {"llama3": tiny_llm, "chatml": write_chatml(place / "chatml_llm", tiny_llm)}
    llms["vicuna_v1"] = write_sentencepiece(place / "vicuna_llm")
    folders = {}
    for name, llm in llms.items():
        if name != "llama3":
            size = Tokenizer.from_file(str(llm / "tokenizer.json")).get_vocab_size()
            torch.manual_seed(0)
            LlamaForCausalLM(tiny_llama(vocab_size=size)).save_pretrained(llm)
        torch.manual_seed(0)
        model, processor = compose(tiny_encoder, llm, name, torch.float32, "pad" if name == "chatml" else "crop")
        folders[name] = place / name
        save_llava(model, processor, folders[name])
    return folders


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_question_has_the_ids_of_training(name: str, llavas: dict[str, Path]) -> None:
    model, rng = ChatModel(llavas[name], "cpu", "float32"), random.Random(0)
    for _ in range(50):
        question = " ".join(rng.choices([*WORDS, "é😀", "1234", "\n", "  ", "(a)", "?"], k=rng.randint(0, 9)))
        messages = [{"role": "user", "content": f"<image>\n{question}"}]
        ids = model.prompt_ids(model.prompt(question), IMAGE_TOKENS)
        assert ids == encode_prompt(model.tokenizer, CHAT_TEMPLATES[name], messages, IMAGE_TOKENS)
        trained, _ = encode(
            model.tokenizer, CHAT_TEMPLATES[name], [*messages, {"role": "assistant", "content": "a"}], 16
        )
        assert trained[: len(ids)] == ids


def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, *options: object) -> str:
    monkeypatch.setattr(sys, "argv", ["chat-mllm", *map(str, options), "--device", "cpu", "--dtype", "float32"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    monkeypatch.setenv("COLUMNS", "200")
    chat.main()
    return capsys.readouterr().out


def test_answers_are_the_models(
    llavas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each question on its own, about the picture of the moment; two models side by side get the same ones."""
    pictures = [tmp_path / "[red].png", tmp_path / "wide.png"]
    Image.new("RGB", (40, 40), "red").save(pictures[0])
    Image.effect_mandelbrot((90, 30), (-2, -1, 1, 1), 20).convert("RGB").save(pictures[1])
    questions = ["What is it?", "Where is [red]the star?"]
    names = ["llama3", "chatml"]
    models = [ChatModel(llavas[name], "cpu", "float32") for name in names]

    def answers(picture: Path, question: str) -> list[str]:
        image = Image.open(picture).convert("RGB")
        return [model.answer([model.prompt(question)], model.encode([image]), 3)[0] for model in models]

    expected = [*answers(pictures[0], questions[0]), *answers(pictures[1], questions[1])]
    assert expected[0] != expected[2]  # the models are random, but not deaf
    typed = (
        f"{questions[0]}\n/image {pictures[1]}\n/image {tmp_path}/none.png\na <image>\n{questions[1]}\n\nnever asked\n"
    )
    options = [llavas["llama3"], "--image", pictures[0], "--max-new-tokens", 3]
    out = ask(monkeypatch, capsys, typed, *options)
    told = "".join(out.split())
    assert "[red].png:ask" in told
    assert told.index("".join(expected[0].split())) < told.index("".join(expected[2].split()))
    assert "none.png cannot be read" in " ".join(out.split())
    assert "2 image placeholders instead of one" in " ".join(out.split())
    both = "".join(re.sub("[│┃]", "", ask(monkeypatch, capsys, typed, *options, "--vs", llavas["chatml"])).split())
    assert all("".join(answer.split()) in both for answer in expected)


def test_mistakes_are_told_before_a_model_is_loaded(
    llavas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llavas["llama3"]
    with pytest.raises(UsageError, match=r"none\.png does not exist"):
        ask(monkeypatch, capsys, "", model, "--image", tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png cannot be read"):
        ask(monkeypatch, capsys, "", model, "--image", tmp_path / "text.png")
    with pytest.raises(UsageError, match="at least 1"):
        ask(monkeypatch, capsys, "", model, "--image", tmp_path / "text.png", "--max-new-tokens", 0)
    with pytest.raises(UsageError, match="no folder, and no id"):
        ask(monkeypatch, capsys, "", tmp_path / "none", "--image", tmp_path / "text.png")
