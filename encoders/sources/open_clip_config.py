"""open_clip's model config (`model_cfg` and `preprocess_cfg`) -> ours, or a refusal that says why.

The defaults are those of open_clip's CLIPVisionCfg, CLIPTextCfg and PreprocessCfg. No torch and no open_clip import.
"""

from collections.abc import Mapping
from typing import Any, Literal

from encoders.config import JitterConfig, PreprocessConfig, TextConfig, VisionConfig
from encoders.errors import ModelError, UsageError

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

Raw = Mapping[str, Any]
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CUSTOM_BLOCK = dict.fromkeys(
    ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"),
    "CLIPVisionModel's attention and MLP have no such step",
)
REFUSED = {
    "attentional_pool": "its image embedding is made by an attention pool (CoCa), which CLIPVisionModel does not have",
    **CUSTOM_BLOCK,
}
WITHOUT_EFFECT = {  # in evaluation, or without timm
    *("patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "output_tokens", "block_type", "ls_init_value"),
    *("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
    "pos_embed_type",  # says how the table began; the weights hold it
}
READ = {
    *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "timm_model_name"),
    *("no_ln_pre", "final_ln_after_pool", "pool_type", "act_kwargs", "norm_kwargs"),
}
FOREIGN_TOWERS = {  # part of timm_model_name -> what it is
    "siglip": "SigLIP has no class token and pools by attention. Use its SiglipVisionModel folder on the Hub as it is",
    "eva": "EVA-CLIP has SwiGLU and rotary positions. Use timm, or a tower of CLIP's own architecture",
}
A_PLAIN_TOWER = "Use a tower of CLIP's own architecture, such as laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K"
TOKENIZER_BESIDE = "."
"""As hf_tokenizer_name: the tokenizer that lies beside the config, which open_clip reads of a `local-dir:`."""
CLIPS_LENGTH = 80  # tokens; CLIPA, otherwise configured alike, has 32 or fewer


def vision_config(model_cfg: Raw, where: str) -> VisionConfig:
    """`model_cfg["vision_cfg"]` as ours; whether the position table is a fixed one, the weights will tell.

    Raises ModelError for a tower that CLIPVisionModel cannot be: SigLIP, ResNets, timm's, attention pools, ...
    """
    raw = _section(model_cfg.get("vision_cfg", {}), "vision_cfg", where)
    _refuse_foreign(raw, where)
    width, layers, patch = raw.get("width", 768), raw.get("layers", 12), raw.get("patch_size", 16)
    size, pool = raw.get("image_size", 224), raw.get("pool_type", "tok")
    if not (isinstance(size, int) and isinstance(patch, int)):
        raise ModelError(f"{where}: image_size {size} and patch_size {patch} must be single numbers: square input only")
    if pool not in ("tok", "avg"):
        raise ModelError(f"{where}: pool_type {pool!r} gives no image embedding; `tok` and `avg` do")
    try:
        return VisionConfig(
            image_size=size,
            patch_size=patch,
            width=width,
            layers=layers,
            heads=width // raw.get("head_width", 64),
            mlp_width=int(width * raw.get("mlp_ratio", 4.0)),
            activation=_activation(model_cfg, raw, where),
            norm_eps=_eps(raw, where),
            pre_norm=not raw.get("no_ln_pre", False),
            pool="mean" if pool == "avg" else "class",
            norm_after_pool=pool == "avg" and raw.get("final_ln_after_pool", False),
        )
    except (UsageError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ModelError(f"{where}: {error}") from error


def text_plan(model_cfg: Raw, where: str) -> TextConfig | str:
    """`model_cfg["text_cfg"]` as ours, or why it cannot be: such a text tower is left out, not refused.

    Raises ModelError for a config that cannot be read.
    """
    raw = _section(model_cfg.get("text_cfg", {}), "text_cfg", where)
    causal = not raw.get("no_causal_mask", False) and not raw.get("tokenizer_kwargs")
    vocabulary, pool = raw.get("hf_tokenizer_name") or None, raw.get("pool_type", "argmax")
    beside = vocabulary == TOKENIZER_BESIDE and pool == "eos"  # at the id of text_end(), as export-encoder writes it
    clip = causal and (beside or (vocabulary is None and pool == "argmax"))
    bert = is_clips(model_cfg)
    own = [
        (raw.get("hf_model_name"), f"it is {raw.get('hf_model_name')} of transformers"),
        (raw.get("embed_cls"), "it appends a learned class token (CoCa)"),
        (raw.get("proj_bias") or raw.get("proj_type", "linear") != "linear", "its projection is not a plain matrix"),
        (raw.get("mlp_ratio", 4.0) != 4.0, "its MLP is not four times as wide"),
        (raw.get("ls_init_value") is not None, "it scales its layers"),
        (any(raw.get(key) for key in CUSTOM_BLOCK), "its attention has further steps"),
        (model_cfg.get("init_logit_bias") is not None, "it was trained with a sigmoid loss and its bias"),
        (model_cfg.get("multimodal_cfg"), "it belongs to a captioner"),
        (not (clip or bert), "it lays out or tokenizes its texts in a way of its own (CLIPA, multilingual models)"),
    ]
    for found, why in own:
        if found:
            return why
    try:
        return TextConfig(
            kind="bert" if bert else "clip",
            padding="reference" if bert else "packed",  # the published weights attend to their padding
            vocab_size=raw.get("vocab_size", 49408),
            length=raw.get("context_length", 77),
            width=raw.get("width", 512),
            layers=raw.get("layers", 12),
            heads=raw.get("heads", 8),
            activation=_activation(model_cfg, raw, where),
            norm_eps=_eps(raw, where),
        )
    except (UsageError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{where}: {error}") from error


def text_end(model_cfg: Raw) -> int | None:
    """The id at which a text is pooled, where the config names one."""
    raw = _table(model_cfg.get("text_cfg"))
    return raw.get("eos_id", 2) if raw.get("pool_type") == "eos" else None


def tokenizer_repo(model_cfg: Raw) -> str | None:
    """Where on the Hub the tokenizer lies, where the config says so."""
    name = _table(model_cfg.get("text_cfg")).get("hf_tokenizer_name")
    return name if isinstance(name, str) and name not in ("", TOKENIZER_BESIDE) else None


def silence(model_cfg: Raw) -> str | None:
    """Of a CLIPS model whose config leaves out what its weights were trained with: how it is read. None of others."""
    if family(model_cfg) != "clips":
        return None
    vision, text = _table(model_cfg["vision_cfg"]), _table(model_cfg["text_cfg"])
    missing = [
        f"{name} norm_kwargs" for name, raw in (("vision", vision), ("text", text)) if not raw.get("norm_kwargs")
    ]
    missing += ["text act_kwargs"] if not text.get("act_kwargs") else []
    if not missing:
        return None
    return (
        f"its config states no {', no '.join(missing)}, so it is read as open_clip reads it, with eps 1e-5 and exact "
        'GELU there; CLIPS was trained with {"eps": 1e-06}, and in its text tower with {"approximate": "tanh"}: write '
        "them into open_clip_config.json if these are its weights"
    )


def is_clips(model_cfg: Raw) -> bool:
    """Whether texts are laid out as CLIPS does: bidirectional WordPiece, pooled at a class token in the last slot."""
    raw = _table(model_cfg.get("text_cfg"))
    bidirectional = raw.get("no_causal_mask", False) and raw.get("pool_type") == "last"
    return bidirectional and (
        raw.get("tokenizer_mode") == "clips"
        or (raw.get("context_length") == CLIPS_LENGTH and "bert" in str(raw.get("hf_tokenizer_name")))
    )


def family(model_cfg: Raw) -> Literal["clips", "clipa", "open_clip"]:
    """CLIPS and CLIPA share their image tower; their texts tell them apart."""
    raw = _table(model_cfg.get("vision_cfg"))
    if not (raw.get("no_ln_pre", False) and raw.get("pool_type") == "avg" and raw.get("final_ln_after_pool", False)):
        return "open_clip"
    return "clips" if is_clips(model_cfg) else "clipa"


def preprocess_config(preprocess_cfg: Raw, family: str, where: str) -> PreprocessConfig:
    """Mean, std, interpolation and squash or crop as the source states them, and its family's training crops.

    Raises ModelError for a config that cannot be read or asks for what CLIPImageProcessor does not do.
    """
    preprocess_cfg = _section(preprocess_cfg, "preprocess_cfg", where)
    mode, interpolation = preprocess_cfg.get("resize_mode", "shortest"), preprocess_cfg.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash"):
        raise ModelError(f"{where}: resize_mode {mode!r} pads its pictures, which CLIPImageProcessor does not")
    mean, std = preprocess_cfg.get("mean", OPENAI_MEAN), preprocess_cfg.get("std", OPENAI_STD)
    if not (three_numbers(mean) and three_numbers(std)):
        raise ModelError(f"{where}: mean {mean} and std {std} must have three numbers each")
    clips = family in ("clips", "clipa")
    return PreprocessConfig(
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        interpolation="bilinear" if interpolation == "bilinear" else "bicubic",  # open_clip evaluates `random` so too
        resize="squash" if mode == "squash" else "crop",
        crop_area=(0.4, 1.0) if clips else (0.9, 1.0),
        jitter=JitterConfig() if clips else None,
    )


def three_numbers(value: Any) -> bool:
    """Whether a mean or standard deviation of a foreign config is one of three channels."""
    return isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(v, int | float) for v in value)


def _table(value: Any) -> Raw:
    """A section of a foreign config; empty if it is none, which `_section` refuses where it matters."""
    return value if isinstance(value, Mapping) else {}


def _section(value: Any, name: str, where: str) -> Raw:
    if not isinstance(value, Mapping):
        raise ModelError(f"{where}: {name} is {value!r}, needed is an object of keys and values")
    return value


def _refuse_foreign(raw: Raw, where: str) -> None:
    if name := raw.get("timm_model_name"):
        what = next((text for part, text in FOREIGN_TOWERS.items() if part in str(name)), A_PLAIN_TOWER)
        raise ModelError(f"{where}: its image tower is timm's {name}, which is not read here. {what}")
    if isinstance(raw.get("layers", 12), list | tuple):
        raise ModelError(f"{where}: its image tower is a ResNet, which a CLIPVisionModel cannot be. {A_PLAIN_TOWER}")
    for key, why in REFUSED.items():
        if raw.get(key):
            raise ModelError(f"{where}: vision_cfg.{key} is {raw[key]!r}: {why}. {A_PLAIN_TOWER}")
    if unknown := sorted(raw.keys() - READ - WITHOUT_EFFECT - REFUSED.keys()):
        raise ModelError(
            f"{where}: vision_cfg has {', '.join(unknown)}, which open_clip 3.3 does not know either; what the tower "
            "computes cannot be told"
        )


def _activation(model_cfg: Raw, tower: Raw, where: str) -> Literal["gelu", "gelu_tanh", "quick_gelu"]:
    kwargs = _section(tower.get("act_kwargs") or {}, "act_kwargs", where)
    quick = model_cfg.get("quick_gelu", False)
    if kwargs and (quick or set(kwargs) != {"approximate"} or kwargs["approximate"] not in ("none", "tanh")):
        raise ModelError(f"{where}: act_kwargs {kwargs} with quick_gelu {quick} is no activation of open_clip's")
    if quick:
        return "quick_gelu"
    return "gelu_tanh" if kwargs.get("approximate") == "tanh" else "gelu"


def _eps(tower: Raw, where: str) -> float:
    kwargs = _section(tower.get("norm_kwargs") or {}, "norm_kwargs", where)
    if not kwargs.keys() <= {"eps"}:
        raise ModelError(f"{where}: norm_kwargs {kwargs} may hold `eps` and nothing else")
    eps = kwargs.get("eps", 1e-5)
    if not isinstance(eps, int | float):
        raise ModelError(f"{where}: norm_kwargs.eps is {eps!r}, needed is a number")
    return float(eps)
