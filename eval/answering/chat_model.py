"""A LLaVA that answers questions about pictures: what its processor makes of them, and the model itself.

Works with any folder that stock LlavaForConditionalGeneration loads. Prompts come from the folder's own chat template.
Shapes: B batch, N image tokens, L prompt tokens, D width of the LLM.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, LlavaConfig

from encoders.errors import ModelError, UsageError
from eval.answering.prefix import greedy, remember, split_prompt
from llava_adapter.save import load_llava, load_processor

DTYPES = {"auto": torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16}
PROBE = "QUESTION"


class ChatProcessor:
    """The part of a LLaVA folder that needs no weights: prompts, pixels, and the tokens that end an answer.

    `stop_ids` are those of generation_config.json, the tokenizer's EOS, and the special token that the chat template
    puts behind an answer: a folder that forgot to name it would never stop. Raises ModelError for a folder that cannot
    be asked.
    """

    def __init__(self, folder: Path) -> None:
        with _readable(f"{folder}: its config or processor"):
            self.config: Any = LlavaConfig.from_pretrained(folder, local_files_only=True)
            self.processor: Any = load_processor(folder)
        self.tokenizer = self.processor.tokenizer
        template = self.processor.chat_template or self.tokenizer.chat_template
        if template is None:
            raise ModelError(f"{folder} has no chat template; save the one it was trained with beside its processor")
        self.processor.chat_template = template
        self.in_words = False  # whether the template takes pictures as placeholders in the text only
        try:
            self.prompt(PROBE)
        except (ModelError, TemplateError, TypeError):
            self.in_words = True
            try:
                self.prompt(PROBE)
            except (TemplateError, TypeError) as error:
                raise ModelError(f"{folder}: its chat template cannot be used: {error}") from error
        self.stop_ids = sorted(self._stop_ids(folder))
        if not self.stop_ids:
            raise ModelError(
                f"{folder} names no eos_token_id in generation_config.json, its tokenizer has no EOS and its chat "
                "template ends no answer with a special token, so no answer would ever end"
            )

    def prompt(self, question: str, pictures: int = 1, marks: bool = False) -> str:
        """The text of a conversation that shows pictures and asks one question; holds a placeholder per picture.

        The pictures come first, or with `marks` where the question itself writes the placeholder. Raises ModelError if
        the result does not hold one placeholder per picture.
        """
        pieces = question.split(self.processor.image_token) if marks else ["", question]
        shown = [{"type": "image"}] * (1 if marks else pictures)
        content = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
        for piece in pieces[1:]:
            content += [*shown, {"type": "text", "text": piece}]
        text = self._render([{"role": "user", "content": content}])
        if (images := text.count(self.processor.image_token)) != pictures:
            raise ModelError(
                f"the prompt holds {images} image placeholders instead of {'one' if pictures == 1 else pictures}: the "
                f"question spells out {self.processor.image_token!r} or the chat template ignores images: {text!r}"
            )
        return text

    def prompt_ids(self, prompt: str, image_tokens: int) -> list[int]:
        """Token ids (L,) of a prompt, each placeholder repeated per image token; never two BOS."""
        bos = self.tokenizer.bos_token
        has_bos = bos is not None and prompt.startswith(bos)
        wanted = prompt.count(self.processor.image_token) * image_tokens
        expanded = prompt.replace(self.processor.image_token, self.processor.image_token * image_tokens)
        ids: list[int] = self.tokenizer(expanded, add_special_tokens=not has_bos)["input_ids"]
        if (found := ids.count(self.config.image_token_id)) != wanted:
            raise ModelError(
                f"the tokenizer made {found} image tokens where the vision tower gives {wanted} features: "
                f"{self.processor.image_token!r} is not the model's image token {self.config.image_token_id}"
            )
        return ids

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures as the tower takes them (B, 3, H, W), float32."""
        pixels: Tensor = self.processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels

    def text(self, tokens: Sequence[int]) -> str:
        """What an answer says, stripped."""
        said: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return said.strip()

    def _render(self, messages: list[dict[str, Any]], asking: bool = True) -> str:
        if self.in_words:
            words = {"image": f"{self.processor.image_token}\n"}
            messages = [
                message | {"content": "".join(words.get(part["type"]) or part["text"] for part in message["content"])}
                for message in messages
            ]
        text: str = self.processor.apply_chat_template(messages, add_generation_prompt=asking, tokenize=False)
        return text

    def _stop_ids(self, folder: Path) -> set[int]:
        stops = {self.tokenizer.eos_token_id, self._turn_end()}
        if (folder / "generation_config.json").is_file():
            with _readable(str(folder / "generation_config.json")):
                named = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
            stops |= {named} if named is None or isinstance(named, int) else set(named)
        return stops - {None}

    def _turn_end(self) -> int | None:
        """The special token right behind an answer in the chat template, if there is one."""
        asked = {"role": "user", "content": [{"type": "text", "text": PROBE}]}
        answer = "ANSWER"
        told = self._render([asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}], asking=False)
        behind = self.tokenizer.encode(told.rpartition(answer)[2].lstrip(), add_special_tokens=False)
        added = self.tokenizer.added_tokens_decoder
        return behind[0] if behind and behind[0] in added and added[behind[0]].special else None


class ChatModel(ChatProcessor):
    """A LLaVA folder loaded for answering on one device ("auto", "cpu", "cuda", "cuda:1") in one dtype ("auto" is
    bfloat16); `image_tokens` is the number N that its tower makes of a picture.

    Raises UsageError for a device or dtype that cannot be had, ModelError for a folder that cannot be asked.
    """

    def __init__(self, folder: Path, device: str = "auto", dtype: str = "auto") -> None:
        self.device = device_of(device)
        self.dtype = dtype_of(dtype)
        super().__init__(folder)
        model, _ = load_llava(folder, self.dtype, self.device)
        self.model: Any = model  # transformers' own annotations do not let a LLaVA generate
        # Nothing else of the folder's settings, such as sampling or a repetition penalty, may steer greedy decoding.
        pad = self.tokenizer.pad_token_id
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self.stop_ids, pad_token_id=self.stop_ids[0] if pad is None else pad
        )
        self.image_tokens = self._probe(folder)

    @torch.inference_mode()
    def _probe(self, folder: Path) -> int:
        """Ask once about a grey picture: the number of its image tokens. What is wrong with a folder shows here."""
        try:
            features = self.encode([Image.new("RGB", (64, 64), "grey")])
            split = split_prompt(self.prompt_ids(self.prompt(PROBE), len(features[0])), self.config.image_token_id)
            greedy(self.model, remember(self.model, [split[0]], [features]), [0], [split[1]], 1, self.stop_ids)
        except (ValueError, IndexError, RuntimeError, FloatingPointError) as error:
            raise ModelError(f"{folder} cannot be asked about a picture: {type(error).__name__}: {error}") from error
        return len(features[0])

    def encode(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Project each picture into the LLM: per picture (N, D), in one call of the vision tower."""
        return self.features(self.pixels(images))

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> list[Tensor]:
        """The same for pixels (B, 3, H, W)."""
        pixels = pixels.to(self.device, self.dtype)
        features: Sequence[Tensor] = self.model.get_image_features(pixels, return_dict=True).pooler_output
        return list(features)

    @torch.inference_mode()
    def answer(self, prompts: Sequence[str], features: Sequence[Tensor], max_new_tokens: int) -> list[str]:
        """Greedy answers (stripped) to prompts, each about the one picture whose features (N, D) stand at its place."""
        asked = zip(prompts, features, strict=True)
        split = [
            split_prompt(self.prompt_ids(prompt, len(image)), self.config.image_token_id) for prompt, image in asked
        ]
        memory = remember(self.model, [prefix for prefix, _ in split], [[image] for image in features])
        suffixes = [suffix for _, suffix in split]
        new = greedy(self.model, memory, range(len(split)), suffixes, max_new_tokens, self.stop_ids)
        return [self.text(tokens) for tokens in new]

    @torch.inference_mode()
    def alone(self, ids: Sequence[int], pixels: Tensor | None, max_new_tokens: int) -> list[int]:
        """The answer of transformers' own `generate` to one prompt with its pictures' pixels: nothing shared, nothing
        padded. What our way of answering is checked against."""
        shown = {} if pixels is None else {"pixel_values": pixels.to(self.device, self.dtype)}
        prompt = torch.tensor([list(ids)], device=self.device)  # (1, L)
        new = self.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, **shown
        )
        tokens: list[int] = new[0, len(ids) :].tolist()
        return tokens[:-1] if tokens and tokens[-1] in self.stop_ids else tokens


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """What transformers raises for missing or damaged files, as a ModelError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{what} cannot be read: {error}; save the folder again") from error


def device_of(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU where there is one. Raises UsageError if torch sees none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} was asked for but torch sees no GPU; use --device cpu")
    return device


def hardware(name: str) -> str:
    """What a device of this name is: answers of another in the same dtype may differ. Raises UsageError as above."""
    device = device_of(name)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name. Raises UsageError for an unknown one."""
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name]
