"""What an encoder is, as data: frozen dataclasses that check themselves. No torch import: config errors are instant.

One EncoderConfig describes a training model whole: image tower, text tower, captioner, preprocessing, objective.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from encoders.errors import ModelError, UsageError


@dataclass(frozen=True)
class VisionConfig:
    """The image tower: a ViT in CLIP's layout (norm before the blocks, class-token pooling)."""

    image_size: int = 224
    """Side of the square input in pixels; a multiple of patch_size."""
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    norm_eps: float = 1e-5
    position_table: Literal["learned", "sincos2d"] = "learned"
    """`sincos2d` is fixed: never trained, regenerated at a new resolution."""

    def __post_init__(self) -> None:
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

    @property
    def grid(self) -> int:
        """Patches along one side; N = grid * grid."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TextConfig:
    """The text tower of CLIPS: bidirectional, pooled at a class token in the last slot."""

    vocab_size: int = 32000
    """Rows of the embedding table; a tokenizer with larger ids is refused."""
    length: int = 80
    """Tokens per text, class token included."""
    width: int = 512
    layers: int = 12
    heads: int = 8
    tokenizer: str | None = None
    """Folder with a WordPiece tokenizer.json; null trains one of `vocab_size` on the training captions."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UsageError(f"text.width {self.width} is not a multiple of text.heads {self.heads}")
        if self.length < 4:
            raise UsageError(f"text.length {self.length} leaves no room for words beside [bos], [eos] and [CLS]")


@dataclass(frozen=True)
class CaptionerConfig:
    """The CLIPS decoder that predicts the full synthetic caption."""

    tokens: int = 128
    """Learnable tokens T: the longest caption it can predict."""
    width: int = 512
    layers: int = 12
    heads: int = 8
    weight: float = 2.0
    """beta of the CLIPS loss; alpha is 1."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UsageError(f"captioner.width {self.width} is not a multiple of captioner.heads {self.heads}")


@dataclass(frozen=True)
class PreprocessConfig:
    """How pictures become pixels: training and the exported image processor share it."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    crop_area: tuple[float, float] = (0.4, 1.0)
    """Share of the picture's area that a training crop keeps (lowest, highest)."""
    crop_aspect: tuple[float, float] = (0.75, 1.3333333333)

    def __post_init__(self) -> None:
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise UsageError(f"preprocess.crop_area {self.crop_area} must satisfy 0 < lowest <= highest <= 1")
        if not 0 < self.crop_aspect[0] <= self.crop_aspect[1]:
            raise UsageError(f"preprocess.crop_aspect {self.crop_aspect} must satisfy 0 < lowest <= highest")


@dataclass(frozen=True)
class EncoderConfig:
    """A training model: two towers into one joint space, and what the objective adds."""

    objective: Literal["clip", "clips"] = "clip"
    embed_dim: int = 512
    """Width E of the joint image-text space."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    captioner: CaptionerConfig | None = None
    piece_tokens: int | None = None
    """Of clips: null draws one sentence of the long caption; a number is L of the sub-caption cut."""
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)

    def __post_init__(self) -> None:
        if self.objective == "clips" and self.captioner is None:
            raise UsageError("objective clips needs a captioner: section; see train/recipes/clips_demo.yaml")
        if self.objective == "clip" and (self.captioner is not None or self.piece_tokens is not None):
            raise UsageError("objective clip takes no captioner: and no piece_tokens:; remove them or use clips")
        if self.piece_tokens is not None and self.piece_tokens < 1:
            raise UsageError(f"piece_tokens is {self.piece_tokens} but must be at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def read(cls, file: Path) -> "EncoderConfig":
        """Read what `to_dict` wrote. Raises ModelError for a file that is not an encoder config."""
        try:
            raw = json.loads(file.read_text())
            raw["vision"] = VisionConfig(**raw["vision"])
            raw["text"] = TextConfig(**raw["text"])
            raw["captioner"] = CaptionerConfig(**raw["captioner"]) if raw["captioner"] else None
            preprocess: dict[str, Any] = raw["preprocess"]
            lists = {name: tuple(value) for name, value in preprocess.items() if isinstance(value, list)}
            raw["preprocess"] = PreprocessConfig(**{**preprocess, **lists})
            return cls(**raw)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{file} is not the config of an encoder run ({error!r})") from error
