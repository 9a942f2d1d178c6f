"""Encoder folder + LLM folder -> LlavaForConditionalGeneration and its processor, everything checked.

`draft` reads configs and tokenizer only and is what the shape plan is printed from; `build` then loads the weights. The
projector is fresh (nn.Linear's own initialisation, from torch's global seed) unless a trained one is named. The LLM
keeps its vocabulary size if it has a spare token: that one becomes `<image>`; otherwise it grows to a multiple of 64.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.image_utils import PILImageResampling

from encoders.errors import ModelError
from encoders.pretrained import load_strict, read_config
from encoders.weights.headers import read_header
from llava_adapter.geometry import Geometry, geometry_of, image_token_count, read_image_processor, with_geometry
from llava_adapter.projector import trained_projector
from llava_adapter.sources import WEIGHTS, model_folder
from llava_adapter.tokenizer import chat_template, generation_config, prepare_tokenizer

FEATURE_LAYER = -2
ADDED = 2  # tokens that a vocabulary may have to take in: `<image>` and a pad token
MULTIPLE = 64


@dataclass(frozen=True)
class Draft:
    """A LLaVA but for its weights, checked."""

    names: tuple[str | Path, str | Path]
    """Of encoder and LLM, as they were asked for."""
    encoder: Path
    llm: Path
    config: LlavaConfig
    processor: LlavaProcessor
    generation: GenerationConfig

    def __str__(self) -> str:
        return describe(self.config, self.processor)


def draft(encoder: str | Path, llm: str | Path, template: str, geometry: Geometry, dtype: torch.dtype) -> Draft:
    """Plan a LLaVA around an exported encoder and a Llama, each a folder or an id on the Hub; loads no weights.

    Features are hidden_states[-2] without class token. Raises ModelError if one of the two is not what it must be,
    UsageError for a template that is not a chat template.
    """
    chat, names = chat_template(template), (encoder, llm)
    encoder, llm = model_folder(encoder, weights=False), model_folder(llm, weights=False)
    vision: Any = _config(CLIPVisionConfig, encoder)
    _check_table(encoder, vision)
    image_processor = with_geometry(read_image_processor(encoder, vision.image_size), geometry)
    text: Any = _config(LlamaConfig, llm)
    tokenizer = prepare_tokenizer(llm, chat)
    text.vocab_size = _vocabulary(len(tokenizer), text.vocab_size, llm)
    tokenizer.model_max_length = text.max_position_embeddings
    vision.dtype = text.dtype = dtype
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" drops again
        chat_template=chat.jinja,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        image_seq_length=image_token_count(processor),
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
        dtype=dtype,
    )
    return Draft(names, encoder, llm, config, processor, generation_config(tokenizer, chat))


def build(plan: Draft, projector: Path | None = None) -> LlavaForConditionalGeneration:
    """Load the weights of a draft, in eval mode, on the CPU. `projector`: a LLaVA folder to take a trained one from.

    Raises ModelError if weights do not fit their config, or if the projector was trained between other models.
    """
    config: Any = plan.config
    for name in plan.names:
        model_folder(name)  # of an id, the weights are fetched now
    tower = load_strict(CLIPVisionModel, plan.encoder, config.dtype)
    trained = trained_projector(projector, plan.encoder, plan.llm, tower) if projector is not None else None
    language = load_strict(LlamaForCausalLM, plan.llm, config.dtype)
    if language.config.vocab_size < config.text_config.vocab_size:
        language.resize_token_embeddings(config.text_config.vocab_size)
    model = _assemble(config, tower, language, config.dtype)
    if trained is not None:
        model.model.multi_modal_projector.load_state_dict(trained)
    model.generation_config = plan.generation
    return model


def compose(
    encoder: str | Path, llm: str | Path, template: str, dtype: torch.dtype, geometry: Geometry = "crop"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """`draft` and `build` in one."""
    plan = draft(encoder, llm, template, geometry, dtype)
    return build(plan), plan.processor


def _assemble(
    config: LlavaConfig, tower: CLIPVisionModel, language: LlamaForCausalLM, dtype: torch.dtype
) -> LlavaForConditionalGeneration:
    """Put the loaded parts into an empty shell, so that no weight is initialised or held twice."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    projector_type = type(model.model.multi_modal_projector)
    model.model.vision_tower = tower
    model.model.language_model = language.model
    model.model.multi_modal_projector = projector_type(config).to(dtype)
    model.lm_head = language.lm_head
    return model.eval()


def _config(config_class: type[PreTrainedConfig], folder: Path) -> PreTrainedConfig:
    read_config(folder, config_class.model_type)
    return config_class.from_pretrained(folder, local_files_only=True)


def _check_table(encoder: Path, vision: Any) -> None:
    """The position table against image_size, from the file's header, where the file is at hand."""
    for file in (encoder / name for name in WEIGHTS if (encoder / name).is_file()):
        for name, tensor in read_header(file).tensors.items():
            wanted = [(vision.image_size // vision.patch_size) ** 2 + 1, vision.hidden_size]
            if name.endswith("position_embedding.weight") and list(tensor.shape) != wanted:
                raise ModelError(
                    f"{encoder}: config.json and weights disagree: {name} is saved as {list(tensor.shape)}, config "
                    f"asks {wanted} (image_size {vision.image_size}, patch_size {vision.patch_size}); export it again"
                )


def _vocabulary(tokens: int, rows: int, llm: Path) -> int:
    """Rows of the embedding table that hold the prepared tokenizer."""
    if tokens > rows + ADDED:
        raise ModelError(
            f"{llm}: tokenizer.json has {tokens} tokens but config.json vocab_size {rows}; they are not of one model"
        )
    return rows if tokens <= rows else -(-tokens // MULTIPLE) * MULTIPLE


def describe(config: LlavaConfig, processor: LlavaProcessor) -> str:
    """The shape plan of a LLaVA in words: image -> patches -> features -> image tokens -> LLM. Needs no weights."""
    vision: Any = config.vision_config
    text: Any = config.text_config
    images, tokenizer = processor.image_processor, processor.tokenizer
    side = vision.image_size // vision.patch_size
    how = {"crop": "short side resized, centre cropped", "pad": "padded to a square with the mean colour, resized"}
    return "\n".join(
        (
            f"image      {vision.image_size} x {vision.image_size} pixels, {how[geometry_of(images)]} "
            f"({PILImageResampling(images.resample).name.lower()}), patch {vision.patch_size}: {side} x {side} patches",
            f"           mean {_numbers(images.image_mean)}, std {_numbers(images.image_std)}",
            f"features   hidden_states[{config.vision_feature_layer}] of {vision.num_hidden_layers} layers, "
            f"class token dropped, width {vision.hidden_size}",
            f"projector  {vision.hidden_size} -> {text.hidden_size}, {config.projector_hidden_act}",
            f"LLM        {text.num_hidden_layers} layers of {text.hidden_size}, vocabulary {text.vocab_size:,}"
            f"{', tied' if text.tie_word_embeddings else ''}; an image takes {image_token_count(processor)} tokens "
            f"(id {config.image_token_id})",
            f"tokens     {_special_tokens(tokenizer)}",
            f"parameters {_sizes(config)}",
        )
    )


def _numbers(values: Any) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> str:
    named = {"image": tokenizer.image_token, "end": tokenizer.eos_token, "pad": tokenizer.pad_token}
    return ", ".join(f"{what} {name} = {tokenizer.convert_tokens_to_ids(name)}" for what, name in named.items())


def _sizes(config: LlavaConfig) -> str:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    parts = {"tower": "vision_tower", "projector": "multi_modal_projector", "LLM": "language_model"}
    shells = {name: model.model.get_submodule(path) for name, path in parts.items()}
    return ", ".join(f"{name} {sum(p.numel() for p in shell.parameters()):,}" for name, shell in shells.items())
