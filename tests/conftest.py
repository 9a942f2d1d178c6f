"""Tiny stand-ins shared by the tests: an exported encoder folder, a LLaMA-3-like LLM folder, and their LLaVA.

All are random, float32 and made once per session. They have the layout of the real artifacts; tests must not write
into them (copy first).
"""

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "0"  # read on import; the tests that need a Hub bring one of their own

import pytest
import torch
from huggingface_hub.utils import disable_progress_bars
from PIL import ImageFile
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE = 32
PATCH_SIZE = 8
IMAGE_TOKENS = 16
WORDS = (  # noqa: SIM905 - a list of sixty strings reads worse
    "a the red green blue apple banana dog cat house car tree star is are on under left right of big small two three "
    "what where which how many colour there in picture image yes no and with answer question using single word phrase "
    "Answer What Where Which How Is Are The A Yes No describe Describe user assistant system"
).split()
# The pre-tokenizer's pattern of LLaMA-3: what merges with a neighbouring newline depends on it.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
]


def write_encoder(folder: Path, image_size: int = IMAGE_SIZE, seed: int = 0) -> Path:
    """Write a random CLIPVisionModel folder the way export-encoder does: `vision_model.*` keys and a processor."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        architectures=["CLIPVisionModel"],
    )
    tower = CLIPVisionModel(config)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    state = {f"vision_model.{name}": tensor.contiguous() for name, tensor in tower.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.25, 0.3],
    ).save_pretrained(folder)
    return folder


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred words with LLaMA-3's special tokens and its BOS-adding post-processor."""
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    corpus = [" ".join(WORDS), ".\n", "\n\n", "?\n"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[], initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    backend.add_special_tokens(LLAMA3_SPECIAL_TOKENS)
    bos = LLAMA3_SPECIAL_TOKENS[0]
    add_bos = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), add_bos])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="<|end_of_text|>")


def tiny_llama(**changes: Any) -> LlamaConfig:
    """Two layers with grouped-query attention and LLaMA-3's RoPE."""
    settings = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "initializer_range": 0.2,
    }
    return LlamaConfig(**settings | changes)


def write_llm(folder: Path, seed: int = 0, tie_word_embeddings: bool = False) -> Path:
    """Write a random Llama of two layers with a LLaMA-3-like tokenizer."""
    torch.manual_seed(seed)
    tokenizer = llama3_tokenizer()
    config = tiny_llama(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=tie_word_embeddings,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPVisionModel folder: 32 pixels, patch 8, so 16 patches."""
    return write_encoder(tmp_path_factory.mktemp("tiny") / "encoder")


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LlamaForCausalLM folder with tokenizer."""
    return write_llm(tmp_path_factory.mktemp("tiny") / "llm")


@pytest.fixture(scope="session")
def tiny_llava(tiny_encoder: Path, tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two composed with the `llama3` template and saved in the portable layout (float32, no manifest)."""
    from llava_adapter.compose import compose
    from llava_adapter.save import save_llava

    torch.manual_seed(0)
    model, processor = compose(tiny_encoder, tiny_llm, "llama3", torch.float32)
    folder = tmp_path_factory.mktemp("tiny") / "llava"
    save_llava(model, processor, folder)
    return folder


@pytest.fixture(autouse=True)
def _torn_pictures_are_torn(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval tells Pillow, for the whole process, to show what there is of a torn picture in grey."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture(scope="session", autouse=True)
def _no_progress_bars() -> None:
    """wandb, which lmms-eval brings, locks the console while it writes; a bar of huggingface_hub that is collected just
    then waits for that lock for ever."""
    disable_progress_bars()
