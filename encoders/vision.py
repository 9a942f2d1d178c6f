"""The image tower: transformers' own CLIPVisionModel plus the projection into the joint space.

What is trained here is the very module that is exported (design idea 2). Shapes: B batch, N patches, D width,
E joint embedding.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from encoders.config import VisionConfig

ResizeMode = Literal["open_clip", "hf"]
"""How a learned position table is interpolated, both bicubic: with antialias as open_clip does when it loads a table,
or without as transformers' `interpolate_pos_encoding` does at each call. They differ at any grid: torch's antialiased
filter is another cubic (a = -0.5, not -0.75)."""

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}  # ours -> transformers'


def hf_config(config: VisionConfig, embed_dim: int) -> CLIPVisionConfig:
    """The transformers config of this tower, with every value that matters spelled out."""
    return CLIPVisionConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        projection_dim=embed_dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_act=ACTIVATIONS[config.activation],
        layer_norm_eps=config.norm_eps,
    )


class VisionTower(nn.Module):
    """CLIPVisionModel, pooling and bias-free projection: (B,3,H,W) -> patch tokens and pooled embedding."""

    def __init__(self, config: VisionConfig, embed_dim: int):
        super().__init__()
        self.config = config
        self.model = CLIPVisionModel(hf_config(config, embed_dim))
        if not config.pre_norm:
            self.model.add_module("pre_layrnorm", nn.Identity())  # CLIPS towers have none; export folds its absence
        self.projection = nn.Linear(config.width, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=config.width**-0.5)
        self._initialise_attention()
        if config.position_table == "sincos2d":
            self._set_table(sincos2d_table(config.grid, config.width))

    def _initialise_attention(self) -> None:
        """OpenAI's CLIP; transformers has the two standard deviations the other way round, which learns more slowly."""
        width = self.config.width
        stds = dict.fromkeys(("q_proj", "k_proj", "v_proj"), width**-0.5)
        stds["out_proj"] = width**-0.5 * (2 * self.config.layers) ** -0.5
        for name, module in self.model.encoder.named_modules():
            if isinstance(module, nn.Linear) and (std := stds.get(name.rpartition(".")[2])):
                nn.init.normal_(module.weight, std=std)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pixels (B,3,H,W) -> patch tokens before the final norm (B,N,D) and pooled embedding (B,E)."""
        output = self.model(pixel_values=pixel_values)
        patch_tokens = output.last_hidden_state[:, 1:]  # (B,1+N,D) -> (B,N,D)
        return patch_tokens, self.projection(self._pool(output.pooler_output, patch_tokens))

    def project_patches(self, patch_tokens: Tensor) -> Tensor:
        """Patch tokens before the final norm (B,N,D) -> in the joint space (B,N,E)."""
        return self.projection(self.model.post_layernorm(patch_tokens))

    def embed(self, last_hidden_state: Tensor) -> Tensor:
        """All tokens after the last block (B,1+N,D) -> pooled embedding (B,E), as `forward` gives it."""
        class_token = self.model.post_layernorm(last_hidden_state[:, 0])
        return self.projection(self._pool(class_token, last_hidden_state[:, 1:]))

    def _pool(self, class_token: Tensor, patch_tokens: Tensor) -> Tensor:
        norm = self.model.post_layernorm
        if self.config.pool == "class":
            return class_token  # (B,D), normed by CLIPVisionModel
        return (
            norm(patch_tokens.mean(1)) if self.config.norm_after_pool else norm(patch_tokens).mean(1)
        )  # (B,N,D) -> (B,D)

    def resize(self, image_size: int, mode: ResizeMode = "open_clip") -> None:
        """Fit the position table to a new resolution: learned tables are interpolated on their 2-d grid with the class
        position untouched, fixed sin-cos tables are regenerated. Does nothing if the size is the same.

        Raises UsageError if `image_size` is not a multiple of the patch size.
        """
        resized = replace(self.config, image_size=image_size)
        if resized.grid != self.config.grid:
            if resized.position_table == "sincos2d":
                table = sincos2d_table(resized.grid, resized.width)
            else:
                table = resize_table(self.position_table.detach(), resized.grid, mode)
            self._set_table(table)
        embeddings = self.model.embeddings
        embeddings.image_size = self.model.config.image_size = image_size
        self.config = resized

    @property
    def position_table(self) -> Tensor:
        """(1+N,D), class position first."""
        return self.model.embeddings.position_embedding.weight

    def _set_table(self, table: Tensor) -> None:
        positions, width = table.shape
        embeddings = self.model.embeddings
        embeddings.num_patches, embeddings.num_positions = positions - 1, positions
        embeddings.position_embedding = nn.Embedding(positions, width, _weight=table.to(self.position_table))
        embeddings.register_buffer("position_ids", torch.arange(positions).expand(1, -1), persistent=False)
        embeddings.position_embedding.weight.requires_grad_(self.config.position_table == "learned")


def resize_table(table: Tensor, grid: int, mode: ResizeMode = "open_clip") -> Tensor:
    """Interpolate a position table (1+n*n,D) to (1+grid*grid,D) as `mode` says; the class position (first row) is
    copied."""
    old = math.isqrt(table.shape[0] - 1)
    if old * old != table.shape[0] - 1:
        raise ValueError(f"position table with {table.shape[0]} rows is not a class position and a square grid")
    if old == grid:
        return table.clone()
    patches = table[1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (n*n,D) -> (1,D,n,n)
    patches = F.interpolate(
        patches, size=(grid, grid), mode="bicubic", antialias=mode == "open_clip", align_corners=False
    )
    patches = patches.flatten(2).squeeze(0).T  # (1,D,grid,grid) -> (grid*grid,D)
    return torch.cat([table[:1], patches.to(table.dtype)])


def sincos2d_table(grid: int, width: int) -> Tensor:
    """The fixed 2-d table (1+grid*grid,D) of the CLIPS towers: columns [sin x, cos x, sin y, cos y], class row zero."""
    quarter = width // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / max(quarter - 1, 1))
    y, x = torch.meshgrid(*[torch.arange(grid, dtype=torch.float64)] * 2, indexing="ij")
    x, y = x.flatten()[:, None] * omega, y.flatten()[:, None] * omega  # (grid*grid,D/4)
    patches = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), patches]).float()
