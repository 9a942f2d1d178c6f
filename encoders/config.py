"""What an encoder is, as data: frozen dataclasses that check themselves. No torch import: config errors are instant.

One EncoderConfig describes a training model whole: image tower, text tower, captioner, preprocessing, objective.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from encoders.errors import ModelError, UsageError

Preset = Literal["ti16", "s16", "b16", "b32", "l16", "l14", "h14"]
ObjectiveName = Literal["clip", "clipa", "coca", "clips", "dreamlip"]


@dataclass(frozen=True)
class VisionConfig:
    """The image tower: a ViT in CLIP's layout. The defaults are CLIP's; the CLIPS papers' tower has no norm before the
    blocks, the mean of its patches as pool and a sincos2d table."""

    image_size: int = 224
    """Side of the square input in pixels; a multiple of patch_size."""
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    norm_eps: float = 1e-5
    pre_norm: bool = True
    """LayerNorm between the embeddings and the blocks."""
    pool: Literal["class", "mean"] = "class"
    """What becomes the image embedding: the class token, or the mean of the patch tokens."""
    norm_after_pool: bool = False
    """Of pool mean: the final norm on the mean (CLIPS) or on every patch token before it. A class token knows no
    difference."""
    position_table: Literal["learned", "sincos2d"] = "learned"
    """`sincos2d` is fixed: never trained, regenerated at a new resolution."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "width", "layers", "heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise UsageError(f"vision.{name} is {getattr(self, name)} but must be at least 1")
        if self.image_size < self.patch_size:
            raise UsageError(f"vision.image_size {self.image_size} has no room for a patch of {self.patch_size}")
        if not self.norm_eps > 0:
            raise UsageError(f"vision.norm_eps {self.norm_eps} must be above 0")
        if self.image_size % self.patch_size:
            below = self.image_size // self.patch_size * self.patch_size
            raise UsageError(
                f"vision.image_size {self.image_size} is not a multiple of vision.patch_size {self.patch_size}; "
                f"the nearest sizes are {below} and {below + self.patch_size}"
            )
        if self.width % self.heads:
            raise UsageError(f"vision.width {self.width} is not a multiple of vision.heads {self.heads}")
        if self.position_table == "sincos2d" and self.width % 4:
            raise UsageError(f"vision.width {self.width} must be a multiple of 4 for a sincos2d position table")
        if self.norm_after_pool and self.pool == "class":
            raise UsageError(
                "vision.norm_after_pool belongs to pool: mean; a class token is pooled and normed either way"
            )

    @property
    def grid(self) -> int:
        """Patches along one side; N = grid * grid."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TextConfig:
    """The text tower. The defaults are those of CLIPS; CLIP's and DreamLIP's are kind clip, length 77, vocabulary
    49408, gelu, eps 1e-5."""

    kind: Literal["bert", "clip"] = "bert"
    """bert: WordPiece, bidirectional, pooled at a class token in the last slot. clip: BPE, causal, pooled at the end
    token."""
    padding: Literal["reference", "packed"] = "packed"
    """packed computes real tokens only and lets nothing attend to padding. reference computes all slots; in a bert
    tower padding is then attended, as in the published weights, which only work so. A causal tower
    embeds alike in both, but a captioner attends to its padding in reference."""
    vocab_size: int = 32000
    """Rows of the embedding table; a tokenizer with larger ids is refused."""
    length: int = 80
    """Most tokens per text, special ones included."""
    width: int = 512
    layers: int = 12
    heads: int = 8
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu_tanh"
    norm_eps: float = 1e-6
    tokenizer: str | None = None
    """Folder with a tokenizer.json; null trains a small one of `vocab_size` on the training captions."""

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads) < 1:
            raise UsageError("text.width, text.layers and text.heads must be at least 1")
        if self.width % self.heads:
            raise UsageError(f"text.width {self.width} is not a multiple of text.heads {self.heads}")
        if self.length < 4:
            raise UsageError(f"text.length {self.length} leaves no room for words beside the special tokens")


@dataclass(frozen=True)
class CaptionerConfig:
    """The decoder that predicts a caption from the picture (clips: and from the web caption)."""

    fusion: Literal["self", "cross"] = "self"
    """self: one sequence under the combination mask (the better one in the CLIPS paper); cross: the queries attend to
    themselves causally and to the condition by cross-attention."""
    tokens: int = 128
    """Of clips: learnable tokens T, the longest caption it can predict."""
    width: int = 512
    layers: int = 12
    heads: int = 8

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads) < 1:
            raise UsageError("captioner.width, captioner.layers and captioner.heads must be at least 1")
        if self.width % self.heads:
            raise UsageError(f"captioner.width {self.width} is not a multiple of captioner.heads {self.heads}")
        if self.tokens < 2:
            raise UsageError(f"captioner.tokens {self.tokens} leaves no room for a word and the end token")


@dataclass(frozen=True)
class ClipOptions:
    """Which caption CLIP learns from."""

    caption: Literal["web", "short", "long"] = "web"


@dataclass(frozen=True)
class MixOptions:
    """Of clipa and coca: each sample's one text is the long synthetic caption or the web caption, drawn anew each
    time."""

    synthetic_share: float = 0.2
    """The CLIPS paper's baselines train on 80 % web and 20 % synthetic captions."""
    caption_weight: float = 2.0
    """Of coca: weight of the captioning loss beside the contrastive one."""

    def __post_init__(self) -> None:
        if not 0 <= self.synthetic_share <= 1:
            raise UsageError(f"mix.synthetic_share {self.synthetic_share} must lie between 0 and 1")


@dataclass(frozen=True)
class ClipsOptions:
    """Loss of CLIPS: alpha * contrast + beta * captioning."""

    cut: Literal["sentence", "sub_caption", "truncation", "random_mask", "block_mask"] = "sentence"
    """How the short piece is cut from the long caption; `sentence`, one drawn at random, is the main recipe."""
    cut_tokens: int | None = None
    """L of the other four cuts (section 3.2)."""
    texts: Literal["both", "web", "synthetic"] = "both"
    """Which texts the picture is contrasted with: the web caption, the short piece, or both (their mean)."""
    alpha: float = 1.0
    beta: float = 2.0
    """0 trains without a captioner."""

    def __post_init__(self) -> None:
        if (self.cut == "sentence") != (self.cut_tokens is None):
            raise UsageError(
                f"clips.cut {self.cut} and clips.cut_tokens {self.cut_tokens} do not fit: `sentence` takes no length, "
                "the other cuts need one"
            )
        if self.cut_tokens is not None and self.cut_tokens < 1:
            raise UsageError(f"clips.cut_tokens is {self.cut_tokens} but must be at least 1")


@dataclass(frozen=True)
class DreamlipOptions:
    """Multi-positive contrast with sub-captions, and the grouping loss between sub-captions and patches."""

    k: int = 8
    """Texts drawn from the pool per picture and step (K); drawn with replacement only if the pool holds fewer, and
    copies of a text are then each other's negatives in the grouping loss. 0: only the raw caption."""
    raw: Literal["always", "pool", "never"] = "always"
    """always: the raw caption is one more text beside the K (published code); pool: one of those drawn from (paper)."""
    short: bool = True
    """Short captions feed the pool, split into sentences as long ones are."""
    long: Literal["split", "whole", "never"] = "split"
    """How long captions feed the pool: as sub-captions, uncut, or not at all."""
    merge: int = 1
    """Consecutive sub-captions joined into one."""
    captioners: tuple[str, ...] | None = None
    """Whose captions feed the pool; null takes all."""
    grouping_weight: float = 1.0
    """0 leaves the grouping loss out."""
    grouping_norm: Literal["minmax", "softmax"] = "minmax"
    sigma: float = 0.0
    """Normalised similarities below this count as 0; a negative value means 1/N."""
    grouping_negatives: Literal["image", "batch"] = "image"
    """Against which grouped vectors a sub-caption is contrasted: those of its own picture, or of the global batch."""
    own_temperature: bool = True
    """The grouping loss learns a temperature of its own."""

    def __post_init__(self) -> None:
        if self.k < 0 or self.merge < 1:
            raise UsageError(f"dreamlip.k {self.k} must not be negative and dreamlip.merge {self.merge} not below 1")
        feeds_pool = self.raw == "pool" or self.short or self.long != "never"
        if self.k and not feeds_pool:
            raise UsageError("dreamlip.k texts are to be drawn but no caption feeds the pool; set raw, short or long")
        if self.k == 1 and self.grouping_weight and self.grouping_negatives == "image":
            raise UsageError(
                "dreamlip.k 1 leaves the grouping loss nothing to tell apart within a picture; raise k, or set "
                "grouping_weight: 0 or grouping_negatives: batch"
            )
        if not self.k and (self.raw != "always" or self.grouping_weight):
            raise UsageError("dreamlip.k 0 leaves only the raw caption: it needs raw: always and grouping_weight: 0")


@dataclass(frozen=True)
class JitterConfig:
    """Colour jitter of training crops; the CLIPS recipe's values."""

    probability: float = 0.8
    brightness: float = 0.32
    contrast: float = 0.32
    saturation: float = 0.32
    hue: float = 0.08
    grey_probability: float = 0.2

    def __post_init__(self) -> None:
        for name in ("probability", "grey_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"preprocess.jitter.{name} {getattr(self, name)} must lie between 0 and 1")
        if not 0 <= self.hue <= 0.5:
            raise UsageError(f"preprocess.jitter.hue {self.hue} must lie between 0 and 0.5")


@dataclass(frozen=True)
class PreprocessConfig:
    """How pictures become pixels: training and the exported image processor share it."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    resize: Literal["crop", "squash"] = "crop"
    """In evaluation: the short side to image_size and the centre cut out, or both sides to image_size. Training
    crops either way."""
    crop_area: tuple[float, float] = (0.4, 1.0)
    """Share of the picture's area that a training crop keeps (lowest, highest)."""
    crop_aspect: tuple[float, float] = (0.75, 1.3333333333)
    jitter: JitterConfig | None = None

    def __post_init__(self) -> None:
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise UsageError(f"preprocess.crop_area {self.crop_area} must satisfy 0 < lowest <= highest <= 1")
        if not 0 < self.crop_aspect[0] <= self.crop_aspect[1]:
            raise UsageError(f"preprocess.crop_aspect {self.crop_aspect} must satisfy 0 < lowest <= highest")


OPTIONS = {"clip": "clip", "clipa": "mix", "coca": "mix", "clips": "clips", "dreamlip": "dreamlip"}


@dataclass(frozen=True)
class EncoderConfig:
    """A training model: two towers into one joint space, and what the objective adds."""

    preset: Preset | None = None
    """In a recipe: sizes of vision, text and captioner to start from; what the recipe itself states wins."""
    objective: ObjectiveName = "clip"
    embed_dim: int = 512
    """Width E of the joint image-text space."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    captioner: CaptionerConfig | None = None
    """Of coca and clips."""
    clip: ClipOptions | None = None
    """A missing section of the objective's own means its defaults."""
    mix: MixOptions | None = None
    """Of clipa and coca."""
    clips: ClipsOptions | None = None
    dreamlip: DreamlipOptions | None = None
    clamp_logit_scale: bool = True
    """Hold the temperature at 1/100 or above, as the CLIP family does."""
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)

    def __post_init__(self) -> None:
        own = OPTIONS[self.objective]
        for section in set(OPTIONS.values()):
            if section != own and getattr(self, section) is not None:
                raise UsageError(f"objective {self.objective} takes no `{section}:` section; its own is `{own}:`")
        clips = self.clips or ClipsOptions()
        captions = self.objective == "coca" or (self.objective == "clips" and clips.beta != 0)
        if captions and self.captioner is None:
            raise UsageError(
                f"objective {self.objective} needs a captioner: section; see train/recipes/clips_demo.yaml"
            )
        if not captions and self.captioner is not None:
            raise UsageError(f"objective {self.objective} trains no captioner here; remove the captioner: section")
        if self.objective == "coca" and self.text.kind != "clip":
            raise UsageError("objective coca predicts the next token, so it needs a causal text tower: text.kind: clip")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def read(cls, file: Path) -> "EncoderConfig":
        """Read what `to_dict` wrote. Raises ModelError for a file that is not an encoder config."""
        try:
            return _from_dict(cls, json.loads(file.read_text()))
        except Exception as error:  # a damaged file may hold anything, and fails in as many ways
            raise ModelError(f"{file} is not the config of an encoder run ({error!r})") from error


def _from_dict(config_class: Any, raw: Mapping[str, Any]) -> Any:
    """A dataclass of this file from plain JSON types; nested sections are told by their annotation."""
    known = {entry.name: entry.type for entry in fields(config_class)}
    content: dict[str, Any] = {}
    for name, value in raw.items():
        section = next((t for t in (known[name], *get_args(known[name])) if is_dataclass(t)), None)
        if section is not None and value is not None:
            value = _from_dict(section, value)
        content[name] = tuple(value) if isinstance(value, list) else value
    return config_class(**content)


def preset(name: str) -> dict[str, Any]:
    """Sizes of a preset as nested config keys: embed_dim, vision, text, captioner.

    Image towers as ViT names them; text towers and captioners are the CLIPS paper's table, which for S to H is also the
    CLIP family's text size. ti16's text tower and captioner are ours: no paper has them.
    """
    size, patch = name[:-2], int(name[-2:])
    vision = {"ti": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16)}[size]
    text = {"ti": (192, 12, 3), "s": (384, 12, 6), "b": (512, 12, 8), "l": (768, 12, 12), "h": (1024, 24, 16)}[size]
    decoder = {"ti": (192, 4, 3)}.get(size, text)
    keys = ("width", "layers", "heads")
    return {
        "embed_dim": text[0],
        "vision": {"patch_size": patch, **dict(zip(keys, vision, strict=True)), "mlp_width": 4 * vision[0]},
        "text": dict(zip(keys, text, strict=True)),
        "captioner": dict(zip(keys, decoder, strict=True)),
    }
