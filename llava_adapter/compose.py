"""Encoder folder + LLM folder -> LlavaForConditionalGeneration and its processor, everything checked.

The projector is fresh (nn.Linear's own initialisation, from torch's global seed). The LLM keeps its vocabulary
size if it has a spare token: that one becomes `<image>`; otherwise the table grows to a multiple of 64.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionModel,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from encoders.errors import ModelError, UsageError
from encoders.pretrained import load_strict
from llava_adapter.chat import IMAGE, TEMPLATES, ChatTemplate
from llava_adapter.data import image_token_count

FEATURE_LAYER = -2
PAD = "<pad>"


def compose(
    encoder: Path, llm: Path, template: str, dtype: torch.dtype
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Build a LLaVA from an exported encoder and a Llama folder; features are hidden_states[-2] without class token.

    Raises ModelError if one of them is not what it must be, UsageError for a template that is not a chat template.
    """
    chat = TEMPLATES.get(template)
    if not isinstance(chat, ChatTemplate):
        known = ", ".join(name for name, known in TEMPLATES.items() if isinstance(known, ChatTemplate))
        raise UsageError(f"template {template!r} is not a chat template; choose one of: {known}")
    tower = load_strict(CLIPVisionModel, encoder, dtype)
    image_processor = _load_image_processor(encoder, tower)
    tokenizer = prepare_tokenizer(llm, chat)
    language = load_strict(LlamaForCausalLM, llm, dtype)
    if len(tokenizer) > language.config.vocab_size:
        language.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    tokenizer.model_max_length = language.config.max_position_embeddings

    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" drops again
        chat_template=chat.jinja,
    )
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=tokenizer.image_token_id,
        image_seq_length=image_token_count(processor),
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=language.config.tie_word_embeddings,
        dtype=dtype,
    )
    model = _assemble(config, tower, language, dtype)
    model.generation_config = _generation_config(tokenizer, chat)
    return model, processor


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


def _load_image_processor(encoder: Path, tower: CLIPVisionModel) -> CLIPImageProcessor:
    """The preprocessing that the encoder was trained with: it travels with the encoder, never a class default."""
    file = encoder / "preprocessor_config.json"
    if not file.is_file():
        raise ModelError(f"{encoder} has no preprocessor_config.json, so its mean, std and size are unknown")
    image_processor = CLIPImageProcessor.from_pretrained(encoder, local_files_only=True)
    size = tower.config.image_size
    crop = image_processor.crop_size
    if not image_processor.do_center_crop or (crop["height"], crop["width"]) != (size, size):
        raise ModelError(
            f"{file}: images are cropped to {crop['height']}x{crop['width']} (do_center_crop "
            f"{image_processor.do_center_crop}) but config.json has image_size {size}; export the encoder again"
        )
    return image_processor


def prepare_tokenizer(llm: Path, template: ChatTemplate) -> PreTrainedTokenizerFast:
    """The LLM's tokenizer with `<image>`, the template, its end token as EOS, a pad token that is no stop token,
    and no BOS of its own (the template writes the one BOS). Raises ModelError if it lacks the template's tokens."""
    file = llm / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{llm} has no tokenizer.json; pass the folder of an LLM together with its tokenizer")
    backend = Tokenizer.from_file(str(file))
    markup = (template.bos_token, template.end)
    lacking = [token for token in markup if backend.token_to_id(token) is None]
    if lacking:
        raise ModelError(f"{file} lacks {', '.join(lacking)}: not the tokenizer of a model for this chat template")
    if backend.token_to_id(IMAGE) is None:
        backend = _rename_spare_token(backend, template.spare_tokens)
    pad = next((token for token in template.pad_tokens if backend.token_to_id(token) is not None), PAD)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (IMAGE, pad)])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=template.bos_token,
        eos_token=template.end,
        pad_token=pad,
        extra_special_tokens={"image_token": IMAGE},
        chat_template=template.jinja,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def _rename_spare_token(backend: Tokenizer, spare_tokens: tuple[str, ...]) -> Tokenizer:
    """Give the first spare token that exists the name `<image>`; its id and the vocabulary size stay."""
    spare = next((token for token in spare_tokens if backend.token_to_id(token) is not None), None)
    if spare is None:
        return backend
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        if token["content"] == spare:
            token["content"] = IMAGE
    vocabulary = content["model"]["vocab"]
    if spare in vocabulary:
        vocabulary[IMAGE] = vocabulary.pop(spare)
    return Tokenizer.from_str(json.dumps(content))


def _generation_config(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> GenerationConfig:
    vocabulary = tokenizer.get_vocab()
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[vocabulary[token] for token in template.stop_tokens if token in vocabulary],
        pad_token_id=tokenizer.pad_token_id,
    )


def describe(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> str:
    """The shape plan of a LLaVA in words: image -> patches -> features -> image tokens -> LLM."""
    vision: Any = model.config.vision_config
    text: Any = model.config.text_config
    side = vision.image_size // vision.patch_size
    parts = {
        "tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "LLM": model.model.language_model,
    }
    sizes = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in parts.items())
    return "\n".join(
        (
            f"image      {vision.image_size} x {vision.image_size} pixels, patch {vision.patch_size}: "
            f"{side} x {side} patches",
            f"features   hidden_states[{model.config.vision_feature_layer}] of {vision.num_hidden_layers} layers, "
            f"class token dropped, width {vision.hidden_size}",
            f"projector  {vision.hidden_size} -> {text.hidden_size}, {model.config.projector_hidden_act}",
            f"LLM        {text.num_hidden_layers} layers of {text.hidden_size}, vocabulary {text.vocab_size:,}; "
            f"an image takes {image_token_count(processor)} tokens (id {model.config.image_token_id})",
            f"parameters {sizes}",
        )
    )
