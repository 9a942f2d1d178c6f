"""A transformers folder that describes pictures, in batches. Greedy; B batch, L prompt tokens, T new tokens."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from encoders.data.recaption_backends import Answer, Answers, Question
from encoders.data.transforms import decode
from encoders.errors import ModelError, UsageError


class FolderModel:
    """Any image-text-to-text folder of transformers with a chat template; `device` and `dtype` may be "auto".

    Raises UsageError for a device that cannot be had, ModelError for a folder that cannot be asked.
    """

    def __init__(self, folder: Path, device: str, dtype: str, batch_size: int) -> None:
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json: not a model folder")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda was asked for but torch sees no GPU; use --device cpu")
        if dtype == "auto":
            dtype = "bfloat16" if device == "cuda" else "float32"
        self.batch_size = batch_size
        self.processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True
        )
        model, info = loaded
        if lacking := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
            raise ModelError(
                f"{folder}: weights lack or contradict {len(lacking)} of config.json's ({lacking[0]}, ...)"
            )
        if self.processor.chat_template is None or model.config.is_encoder_decoder:
            raise ModelError(f"{folder} needs a chat template and a decoder-only language model to be asked in a chat")
        self.model: Any = model.to(device).eval()
        # Greedy whatever the folder's generation_config.json says; the rest of it (stop tokens) holds.
        self.model.generation_config.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None)
        stop = self.model.generation_config.eos_token_id
        if stop is None:
            raise ModelError(f"{folder} names no eos_token_id in generation_config.json, so no caption would ever end")
        self.stop = torch.tensor([stop] if isinstance(stop, int) else stop, device=device)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # so that every answer starts right behind its prompt
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.generation_config.pad_token_id = self.tokenizer.pad_token_id

    def answers(self, questions: Iterable[Question]) -> Answers:
        """In batches of one prompt each, whose captions are about equally long."""
        waiting: dict[str, list[Question]] = {}
        for question in questions:
            batch = waiting.setdefault(question.kind, [])
            batch.append(question)
            if len(batch) == self.batch_size:
                yield from self._batch(waiting.pop(question.kind))
        for batch in waiting.values():
            yield from self._batch(batch)

    @torch.inference_mode()
    def _batch(self, batch: list[Question]) -> Iterator[tuple[Question, Answer]]:
        texts = [self._prompt(question.prompt) for question in batch]
        bos = self.tokenizer.bos_token
        inputs = self.processor(
            text=texts,
            images=[[Image.fromarray(decode(question.image).permute(1, 2, 0).numpy())] for question in batch],
            padding=True,
            add_special_tokens=bos is None or not texts[0].startswith(bos),  # never two BOS
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        out = self.model.generate(**inputs, max_new_tokens=batch[0].max_tokens)  # (B, L + T)
        new = out[:, inputs["input_ids"].shape[1] :]  # (B, T)
        ended = torch.isin(new, self.stop).any(dim=1).tolist()
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        yield from zip(batch, map(Answer, texts, ended), strict=True)

    def _prompt(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return text
