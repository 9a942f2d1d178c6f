"""eval-mllm's way of asking against stock one-by-one generate, as lmms-eval's llava_hf calls it, on the same questions.

    python benchmarks/eval_speed.py [--size small|8b|tiny] [--shapes pope gqa] [--device cuda] [--batch-size 32]

The rival decodes the question's picture, calls the processor and `generate(pixel_values=...)`, batch 1. small: 18
questions a picture on a CPU (CPU seconds), answers must be equal. 8b: LLaMA-3-8B's and CLIP L/14-336's sizes in
bfloat16 with random weights, for a GPU; all questions by us, a slice by the rival. Random weights never stop: all
answers have 3 tokens. Also how long `eval-mllm --help` takes.
"""

import argparse
import io
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from measure import Bar, announce, conclude
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from eval.answering.asking import Asking
from eval.answering.chat_model import ChatModel
from eval.answering.reading import Question, Reader
from eval.answering.rounds import Answerer
from eval.answering.workers import Here
from llava_adapter.chat import IMAGE, TEMPLATES

SUFFIX = "\nAnswer the question using a single word or phrase."
NEW_TOKENS = 3


@dataclass(frozen=True)
class Size:
    """A LLaVA, and what share of the shapes' pictures it is asked about."""

    vision: dict[str, int]
    text: dict[str, int]
    dtype: torch.dtype
    share: float
    rival: int
    """Questions that the rival is asked, evenly spread."""
    bar: float


SIZES = {
    "tiny": Size(
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"image_size": 56, "patch_size": 14},
        {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2},
        torch.float32,
        0.006,
        300,
        0.0,
    ),
    "small": Size(
        {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
        | {"image_size": 336, "patch_size": 14},
        {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}
        | {"num_key_value_heads": 2},
        torch.float32,
        0.004,
        12,
        6.0,
    ),
    "8b": Size(
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"image_size": 336, "patch_size": 14},
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8},
        torch.bfloat16,
        1.0,
        300,
        10.0,
    ),
}
SHAPES = {"pope": (9000, 500), "gqa": (12578, 398)}  # questions, pictures
WORDS = ("is", "there", "a", "red", "dog", "left", "of", "the", "small", "table", "what", "colour", "who", "under")


class RandomModel(ChatModel):
    """A LLaVA that no folder holds."""

    def __init__(self, size: Size, device: str) -> None:
        self.device, self.dtype, self.in_words = torch.device(device), size.dtype, False
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        template: Any = TEMPLATES["llama3"]
        said = f"{template.system} Is there in the image? {SUFFIX}".split()
        # A word is a token, as nearly always in LLaMA-3's vocabulary; letters for what is left.
        words = dict.fromkeys(form for word in (*WORDS, *said) for form in (f" {word}", word))
        backend.add_tokens([*words, *sorted(pre_tokenizers.ByteLevel.alphabet())])
        backend.add_special_tokens(
            [template.bos_token, "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", IMAGE]
        )
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=template.bos_token,
            eos_token="<|eot_id|>",
            extra_special_tokens={"image_token": IMAGE},
        )
        side = size.vision["image_size"]
        self.processor: Any = LlavaProcessor(
            image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
            tokenizer=self.tokenizer,
            patch_size=size.vision["patch_size"],
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template.jinja,
        )
        vocabulary = 128_320 if size.share == 1 else len(self.tokenizer)
        self.config = LlavaConfig(
            vision_config=CLIPVisionConfig(**size.vision),
            text_config=LlamaConfig(
                vocab_size=vocabulary,
                initializer_range=0.05,
                rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
                **size.text,
            ),
            image_token_index=self.tokenizer.image_token_id,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
            dtype=size.dtype,
        )
        self.stop_ids = [vocabulary - 1]  # hardly ever said
        before = torch.get_default_dtype()
        torch.set_default_dtype(size.dtype)
        try:
            torch.manual_seed(0)
            with torch.device(device):
                self.model = LlavaForConditionalGeneration(self.config).eval()
        finally:
            torch.set_default_dtype(before)
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self.stop_ids, pad_token_id=self.stop_ids[0]
        )
        self.image_tokens = (side // size.vision["patch_size"]) ** 2


class InMemory(Here):
    """The team of one model that is already there."""

    def __init__(self, chat: ChatModel, batch_size: int) -> None:
        self.chat, self.image_tokens, self.device, self.dtype = chat, chat.image_tokens, chat.device.type, ""
        self.answerer = Answerer(chat, batch_size)


class Pictures:
    """Stands in for eval.answering.pictures.Pictures: noise as JPEG files, decoded when read."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self.files = []
        for _ in range(count):
            small = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
            file = io.BytesIO()
            small.resize((640, 480)).save(file, "JPEG")
            self.files.append(file.getvalue())

    def read(self, row: int) -> list[Image.Image]:
        return [Image.open(io.BytesIO(self.files[row])).convert("RGB")]


def questions_of(shape: str, share: float) -> list[Question]:
    """Of a shape's pictures a share, each with as many questions as there are on average."""
    questions, pictures = SHAPES[shape]
    count = max(2, round(pictures * share))
    shown: Any = Pictures(count)
    rng = np.random.default_rng(1)
    asked = []
    for place in range(round(questions * count / pictures)):
        words = 6 if shape == "pope" else int(rng.integers(4, 18))
        text = " ".join(["Is there", *rng.choice(WORDS, words), "in the image?"]) + SUFFIX
        asked.append(Question(place, shape, place % count, text, NEW_TOKENS, shown, str(place % count)))
    return asked


def stock(chat: ChatModel, asked: Sequence[Question]) -> list[str]:
    """The calls of lmms-eval's llava_hf, question by question; its template lets the pictures come first too."""
    answers = []
    for question in asked:
        text = chat.processor.apply_chat_template(
            [{"role": "user", "content": f"{IMAGE}\n{question.text}"}], tokenize=False, add_generation_prompt=True
        )
        inputs = chat.processor(
            images=question.pictures.read(question.row), text=text, return_tensors="pt", add_special_tokens=False
        ).to(chat.device, chat.dtype)
        with torch.inference_mode():
            new = chat.model.generate(**inputs, max_new_tokens=NEW_TOKENS, use_cache=True)
        new = new[:, inputs["input_ids"].shape[-1] :]
        answers.append(chat.tokenizer.batch_decode(new, skip_special_tokens=True)[0].strip())
    return answers


def compare(chat: ChatModel, shape: str, size: Size, batch_size: int) -> Bar:
    """Seconds of both, and how often they say the same. In float32 they must."""
    asked = questions_of(shape, size.share)
    some = asked[:: max(1, len(asked) // size.rival)][: size.rival]
    clock = time.process_time if chat.device.type == "cpu" else time.perf_counter
    stock(chat, some[:2])  # warm up
    began = clock()
    theirs = stock(chat, some)
    their_seconds = (clock() - began) / len(some)
    asking = Asking(Reader(chat, chat.image_tokens, batch_size, None), InMemory(chat, batch_size), None, lambda: None)
    began = clock()
    asking.run(asked)
    seconds = clock() - began
    same = sum(asking.texts[question.place] == answer for question, answer in zip(some, theirs, strict=True))
    cost = asking.cost
    gigabytes = cost.peak_memory_bytes / 2**30
    print(
        f"{shape}: {len(asked)} questions, {len(cost.pictures)} pictures in {seconds:.1f} s (pictures, prefixes "
        f"{cost.seconds_encode:.1f}, answers {cost.seconds_answer:.1f}; peak {gigabytes:.0f} GiB); "
        f"one by one {their_seconds * 1000:.0f} ms a question, of {len(some)}; {same} of {len(some)} answers equal; "
        f"{cost.prompt_tokens / len(asked):.0f} tokens a prompt",
        flush=True,
    )
    assert not asking.failures, next(iter(asking.failures.values()))
    assert same == len(some) or size.dtype != torch.float32, "in float32 the answers must be equal"
    return Bar(f"{shape}: times as fast a question", their_seconds * len(asked) / seconds, "at least", size.bar)


def help_seconds() -> float:
    """CPU seconds of `eval-mllm --help` in a fresh process, the median of five."""
    taken = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "eval.run", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["pope"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    announce()
    if args.device.startswith("cuda"):
        print(torch.cuda.get_device_name(args.device))
    size = SIZES[args.size]
    chat = RandomModel(size, args.device)
    bars = [compare(chat, shape, size, args.batch_size) for shape in args.shapes]
    conclude([*bars, Bar("eval-mllm --help, seconds", help_seconds(), "at most", 0.5)])


if __name__ == "__main__":
    main()
