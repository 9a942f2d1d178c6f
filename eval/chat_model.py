"""A LLaVA that answers questions about pictures: greedy, batched, every picture encoded once by its caller.

Works with any folder that stock LlavaForConditionalGeneration loads. Prompts come from the folder's own chat template.
Shapes: B batch, N image tokens, L prompt tokens, T new tokens, D width of the LLM.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

from encoders.errors import ModelError, UsageError
from llava_adapter.save import load_llava

DTYPES = {"auto": torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16}


class ChatModel:
    """A LLaVA folder loaded for answering on one device ("auto", "cpu", "cuda") in one dtype ("auto" is bfloat16).

    Raises UsageError for a device or dtype that cannot be had, ModelError for a folder that cannot be asked.
    """

    def __init__(self, folder: Path, device: str = "auto", dtype: str = "auto") -> None:
        if dtype not in DTYPES:
            raise UsageError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
        self.device = _device(device)
        self.dtype = DTYPES[dtype]
        model, processor = load_llava(folder, self.dtype, self.device)
        self.model: Any = model  # transformers' own annotations do not let a LLaVA generate
        self.processor: Any = processor
        self.tokenizer = processor.tokenizer
        if self.processor.chat_template is None:
            raise ModelError(f"{folder} has no chat template; save the one it was trained with beside its processor")
        stop = self.model.generation_config.eos_token_id
        if stop is None:
            raise ModelError(f"{folder} names no eos_token_id in generation_config.json, so no answer would ever end")
        self.stop_ids: list[int] = [stop] if isinstance(stop, int) else list(stop)
        pad = self.tokenizer.pad_token_id
        self.pad_id: int = self.stop_ids[0] if pad is None else pad
        # Nothing else of the folder's settings, such as sampling or a repetition penalty, may steer greedy decoding.
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self.stop_ids, pad_token_id=self.pad_id
        )

    def prompt(self, question: str) -> str:
        """The text of a conversation that shows one picture and asks one question; holds one image placeholder."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        text: str = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if (images := text.count(self.processor.image_token)) != 1:
            raise ModelError(
                f"the prompt holds {images} image placeholders instead of one: the question spells out "
                f"{self.processor.image_token!r} or the chat template ignores images: {text!r}"
            )
        return text

    def prompt_ids(self, prompt: str, image_tokens: int) -> list[int]:
        """Token ids (L,) of a prompt, the placeholder repeated per image token; never two BOS."""
        bos = self.tokenizer.bos_token
        has_bos = bos is not None and prompt.startswith(bos)
        expanded = prompt.replace(self.processor.image_token, self.processor.image_token * image_tokens)
        ids: list[int] = self.tokenizer(expanded, add_special_tokens=not has_bos)["input_ids"]
        if (found := ids.count(self.model.config.image_token_id)) != image_tokens:
            raise ModelError(
                f"the tokenizer made {found} image tokens where the vision tower gives {image_tokens} features: "
                f"{self.processor.image_token!r} is not the model's image token {self.model.config.image_token_id}"
            )
        return ids

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Project each picture into the LLM: per picture (N, D), in one call of the vision tower."""
        pixels = self.processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]  # (B,3,H,W)
        pixels = pixels.to(self.device, self.dtype)
        features: Sequence[Tensor] = self.model.get_image_features(pixels, return_dict=True).pooler_output
        return list(features)

    @torch.inference_mode()
    def answer(self, prompts: Sequence[str], features: Sequence[Tensor], max_new_tokens: int) -> list[str]:
        """Greedy answers (stripped) to prompts, each about the picture whose features (N, D) stand at its place."""
        rows = [self.prompt_ids(prompt, len(image)) for prompt, image in zip(prompts, features, strict=True)]
        longest = max(map(len, rows))
        # Padded on the left, so that every answer starts right behind its prompt.
        ids = torch.tensor([[self.pad_id] * (longest - len(row)) + row for row in rows], device=self.device)  # (B, L)
        padding = torch.tensor([longest - len(row) for row in rows], device=self.device)
        mask = (torch.arange(longest, device=self.device) >= padding[:, None]).long()  # (B, L)
        words = self.model.get_input_embeddings()(ids)  # (B, L, D)
        is_image = (ids == self.model.config.image_token_id)[..., None]
        inputs = words.masked_scatter(is_image, torch.cat(list(features)).to(words.dtype))
        new = self.model.generate(inputs_embeds=inputs, attention_mask=mask, max_new_tokens=max_new_tokens)  # (B, T)
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} was asked for but torch sees no GPU; use --device cpu")
    return device
