"""What an encoder makes of a picture, patch by patch: the tokens that a LLaVA reads, their principal components as
colours, and their similarity to a phrase. For `view-encoder` and the report.

Shapes: P pictures, N patches (g x g, row by row), D width, E joint embedding, S side of the input in pixels.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, CLIPVisionConfig, CLIPVisionModel

from encoders.data.tokenizers import CaptionTokenizer, pad_texts
from encoders.data.transforms import MAX_ASPECT
from encoders.dual_encoder import DualEncoder, unit
from encoders.errors import DataError, ModelError, UsageError
from encoders.export import two_towers
from encoders.pretrained import load_strict
from encoders.sources.download import download
from encoders.sources.open_clip_config import OPEN_CLIP_CONFIG
from encoders.sources.source import HUB_ID, evaluation_pixels, open_source
from llava_adapter.data.pictures import open_rgb
from llava_adapter.geometry import read_image_processor
from llava_adapter.save import tower_tensors

FEATURE_LAYER = -2
"""Of LLaVA-1.5, and of every LLaVA that this toolkit composes."""
UNUSUAL = 2.0
"""A token of more than twice the median norm: large ViTs keep a few of them as scratch space, and a fit through them
would show little else."""
FAR = 1.0, 99.0  # percentiles of a component's scores that become the darkest and the brightest


@dataclass(frozen=True)
class Encoder:
    """An encoder that is open to be looked into: float32, on the CPU, in eval mode."""

    name: str
    tower: nn.Module
    """A CLIPVisionModel, or one whose norm before the blocks is an Identity (CLIPS, before export folds it)."""
    layer: int
    """Which of the tower's hidden states is looked at."""
    pixels: Callable[[Image.Image], Tensor]
    """A picture -> normalised pixels (1,3,S,S), as the encoder or its LLaVA takes them."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    model: DualEncoder | None = None
    """Both towers, where there is a text tower."""
    tokenizer: CaptionTokenizer | None = None
    no_text: str = "it is an image tower alone"
    """Why there is no text tower, if there is none."""

    @property
    def config(self) -> Any:
        """The tower's, of transformers."""
        return self.tower.config

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return int(self.config.image_size // self.config.patch_size)

    @torch.inference_mode()
    def tokens(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (1,3,S,S) -> patch tokens (N,D) of the layer, class token dropped."""
        states = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        tokens: Tensor = states[self.layer]
        if isinstance(self.tower.pre_layrnorm, nn.Identity):
            tokens = tokens - states[0].mean(-1, keepdim=True)  # which a fold takes out: so an export looks the same
        return tokens[0, 1:].float()  # (1,1+N,D) -> (N,D)

    @torch.inference_mode()
    def similarity(self, pixels: Tensor, phrase: str) -> Tensor:
        """Cosine of every patch in the joint space and a phrase, (g,g). Raises ModelError if there is no text tower,
        UsageError for a phrase that it would cut off."""
        if self.model is None or self.tokenizer is None:
            raise ModelError(f"{self.name} has no text tower to take a phrase: {self.no_text}")
        text = self.model.config.text
        row = self.tokenizer.encode(phrase, text.length)
        if len(self.tokenizer.encode(phrase, text.length + 1)) > len(row):
            raise UsageError(
                f"the phrase has more tokens than the {text.length} that the text tower of {self.name} takes"
            )
        embedding = self.model.encode_text(pad_texts([row], text), [len(row)])  # (1,E)
        patches = unit(self.model.vision.project_patches(self.model.vision(pixels)[0]))  # (1,N,E)
        return (patches[0] @ embedding[0]).view(self.grid, self.grid)

    def shown(self, pixels: Tensor) -> Image.Image:
        """The input itself: normalised pixels (1,3,S,S) as a picture again."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return to_image((pixels[0] * std + mean).permute(1, 2, 0))  # (3,S,S) -> (S,S,3)


@dataclass(frozen=True)
class Components:
    """The first three principal components of an encoder's patch tokens, over all pictures together."""

    scores: Tensor
    """(P,g,g,3), of variance 1 each."""
    shares: tuple[float, float, float]
    """Of the variance."""
    unusual: int
    """Tokens that were left out of the fit for their norm; they have scores all the same."""

    def images(self) -> list[Image.Image]:
        """One picture of g x g pixels each, red, green and blue for the three components."""
        low, high = np.percentile(self.scores.reshape(-1, 3).numpy(), FAR, axis=0)
        spread = np.where(high > low, high - low, 1.0)
        return [to_image(torch.from_numpy((scores.numpy() - low) / spread)) for scores in self.scores]


def open_encoder(source: str | Path, layer: int | None = None) -> Encoder:
    """Open an encoder run, an exported encoder, a folder of transformers or open_clip, a LLaVA folder or a Hub id.

    layer: index into the tower's hidden states; None is -2, or what a LLaVA's config says. Raises UsageError for a
    source that is nothing of these or has no such layer, ModelError for one that cannot be loaded.
    """
    encoder = _open(source)
    count = encoder.config.num_hidden_layers
    chosen = encoder.layer if layer is None else layer
    if not -count - 1 <= chosen <= count:
        raise UsageError(f"--layer {chosen}: {source} has {count} layers; name one from {-count - 1} to {count}")
    return replace(encoder, name=str(source), layer=chosen)


def _open(source: str | Path) -> Encoder:
    path = Path(source)
    if path.is_file():
        raise UsageError(f"{source} is a file; export it first (export-encoder {source} OUT --model-name NAME)")
    if path.is_dir():
        return _open_folder(path) or _of_source(source)
    if path.is_absolute() or not HUB_ID.fullmatch(str(source)):
        raise UsageError(f"{source} does not exist, and it is no id on the Hub (organisation/name)")
    # What says which kind it is comes first, and alone: a LLaVA would be many gigabytes.
    if kind_of(download(str(source), None, None).folder) == "llava":
        raise UsageError(f"{source} is a LLaVA on the Hub; fetch it (hf download) and name its folder")
    return _of_source(source)


def _open_folder(folder: Path) -> Encoder | None:
    """A LLaVA or an exported encoder; None for what `open_source` knows."""
    kind = kind_of(folder)
    if kind == "llava":
        return _of_llava(folder)
    if (folder / two_towers.CONFIG_FILE).is_file():
        model, tokenizer = two_towers.read(folder)
        return _of_model(model, tokenizer, "")
    if kind == "clip_vision_model" and not (folder / OPEN_CLIP_CONFIG).is_file():
        tower = load_strict(CLIPVisionModel, folder, torch.float32).eval()
        processor = read_image_processor(folder, tower.config.image_size)
        why = "it was exported without one; export it again --with-text"
        return _with_processor(tower, processor, FEATURE_LAYER, why)
    return None


def kind_of(folder: Path) -> str | None:
    """model_type of a folder's config.json, if it has one."""
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text()) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}") from error
    return content.get("model_type") if isinstance(content, dict) else None


def _of_source(source: str | Path) -> Encoder:
    found = open_source(source)
    size = found.tower.config.image_size
    notes = "; ".join(found.provenance["notes"]) or "it is an image tower alone"
    if found.model is not None and found.tokenizer is not None:
        return _of_model(found.model, found.tokenizer, notes)

    def pixels(picture: Image.Image) -> Tensor:
        return evaluation_pixels(found.preprocess, size, to_tensor(picture))

    tower, preprocess = found.tower.model, found.preprocess
    return Encoder("", tower, FEATURE_LAYER, pixels, preprocess.mean, preprocess.std, no_text=notes)


def _of_model(model: DualEncoder, tokenizer: CaptionTokenizer, why: str) -> Encoder:
    preprocess, size = model.config.preprocess, model.config.vision.image_size

    def pixels(picture: Image.Image) -> Tensor:
        return evaluation_pixels(preprocess, size, to_tensor(picture))

    tower = model.eval().vision.model
    return Encoder("", tower, FEATURE_LAYER, pixels, preprocess.mean, preprocess.std, model, tokenizer, why)


def _of_llava(folder: Path) -> Encoder:
    """The tower out of a LLaVA: only its tensors are read, as the LLM would not fit everywhere."""
    config = json.loads((folder / "config.json").read_text())
    vision = config.get("vision_config") or {}
    if vision.get("model_type") != "clip_vision_model":
        raise ModelError(f"{folder / 'config.json'}: its tower is {vision.get('model_type')!r}, not a CLIPVisionModel")
    tower = CLIPVisionModel(CLIPVisionConfig.from_dict(vision))
    try:
        tower.load_state_dict({name: tensor.float() for name, tensor in tower_tensors(folder)})
    except RuntimeError as error:
        raise ModelError(f"{folder}: its config and the vision_tower.* tensors disagree: {error}") from error
    layer = config.get("vision_feature_layer", FEATURE_LAYER)
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} has no image processor that transformers can read: {error}") from error
    why = "a LLaVA keeps none; name the encoder that it was made from"
    return _with_processor(tower.eval(), processor, layer if isinstance(layer, int) else layer[-1], why)


def _with_processor(tower: CLIPVisionModel, processor: Any, layer: int, why: str) -> Encoder:
    side = tower.config.image_size

    def pixels(picture: Image.Image) -> Tensor:
        values: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"].float()
        if values.shape != (1, 3, side, side):
            raise ModelError(f"the image processor gives {tuple(values.shape)}, the tower takes {side} x {side} pixels")
        return values

    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return Encoder("", tower, layer, pixels, mean, std, no_text=why)


def components(tokens: Sequence[Tensor]) -> Components:
    """Fit over pictures of one encoder, each (N,D). The sign of a component is the one that makes its largest loading
    positive, so that the same encoder always has the same colours. Raises ModelError for tokens that are not finite."""
    rows = torch.stack(list(tokens)).double()  # (P,N,D)
    if not rows.isfinite().all():
        raise ModelError("the patch tokens are not all finite; do not use this encoder")
    flat = rows.flatten(0, 1)  # (P*N,D)
    norms = flat.norm(dim=-1)
    usual = norms <= UNUSUAL * norms.median()
    mean = flat[usual].mean(0)
    centred = flat[usual] - mean
    variances, loadings = torch.linalg.eigh(centred.T @ centred / usual.sum())  # ascending; (D), (D,D)
    variances, loadings = variances.flip(0).clamp(min=0)[:3], loadings.flip(1)[:, :3]  # (3), (D,3)
    loadings = loadings * loadings.gather(0, loadings.abs().argmax(0, keepdim=True)).sign()
    total = centred.square().sum() / usual.sum()
    scores = (flat - mean) @ loadings / variances.sqrt().clamp(min=1e-12)  # (P*N,3)
    scores[:, variances <= 1e-12 * total] = 0.0  # fewer than three directions: nothing but rounding
    shares = (variances / total).tolist() if total > 0 else [0.0] * 3
    side = round(rows.shape[1] ** 0.5)
    return Components(scores.view(len(rows), side, side, 3), (shares[0], shares[1], shares[2]), int((~usual).sum()))


def aligned(one: Components, other: Components) -> tuple[Components, float]:
    """`other` rotated to agree with `one` as well as three components can (orthogonal Procrustes), and how well they
    then do, from 0 to 1: at 1 the two show the same picture. Grids may differ; places are compared."""
    side = one.scores.shape[1]
    a = one.scores.reshape(-1, 3)  # (P*g*g,3)
    b = F.interpolate(other.scores.permute(0, 3, 1, 2), size=(side, side), mode="bilinear", align_corners=False)
    b = b.permute(0, 2, 3, 1).reshape(-1, 3)
    left, strengths, right = torch.linalg.svd(b.T @ a)
    norm = a.norm() * b.norm()
    agreement = float(strengths.sum() / norm) if norm > 0 else 0.0
    return replace(other, scores=other.scores @ (left @ right)), agreement


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture -> uint8 (3,h,w)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()  # (h,w,3) -> (3,h,w)


def to_image(values: Tensor) -> Image.Image:
    """(h,w,3) in 0..1, what lies outside of it cut off."""
    return Image.fromarray((values.clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def read_picture(name: str, picture: Path | bytes) -> Image.Image:
    """A picture's pixels in RGB. Raises DataError if it is none, or a strip whose resize would take gigabytes."""
    try:
        found = open_rgb(picture)
    except ValueError as error:
        raise DataError(f"{name} is not a picture that can be read: {error}") from error
    if max(found.size) > MAX_ASPECT * min(found.size):
        raise DataError(f"{name} is {found.width} x {found.height} pixels: sides of more than {MAX_ASPECT} : 1")
    return found
