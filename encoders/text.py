"""The text towers and the transformer block they share with the captioner.

Two kinds: bert (CLIPS: bidirectional, class token in the last slot, pooled there) and clip (CLIP, DreamLIP: causal,
pooled at the end token). Shapes: B batch, L slots, T real tokens of the batch, D width, E joint embedding.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.attention import Layout, Packed, Padded
from encoders.config import TextConfig


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


class Block(nn.Module):
    """Pre-norm transformer block: self-attention as the layout has it, and an MLP of four times the width."""

    def __init__(self, width: int, heads: int, activation: str, norm_eps: float):
        super().__init__()
        self.heads = heads
        self.activation = ACTIVATIONS[activation]
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        for weight in (*self.qkv.weight.chunk(3), self.out.weight, self.fc1.weight, self.fc2.weight):
            nn.init.xavier_uniform_(weight)
        for layer in (self.qkv, self.out, self.fc1, self.fc2):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """(...,D) -> (...,D): (B,L,D) or (T,D), whatever `layout` is for."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (...,3D) -> (...,3,h,d)
        x = x + self.out(layout(qkv).flatten(-2))  # (...,h,d) -> (...,D)
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class TextOutput(NamedTuple):
    """What a text tower gives. `states` are before the final norm."""

    pooled: Tensor
    """(B,E)"""
    states: Tensor
    """(B,L,D); in packed mode zero at padding."""
    keep: Tensor | None
    """(B,L) False at padding that nothing may attend to; None if all slots count."""


class TextTower(nn.Module):
    """Token ids (B,L) of data/tokenizers.pad_texts and their numbers of real tokens -> pooled embeddings and states."""

    def __init__(self, config: TextConfig, embed_dim: int):
        super().__init__()
        self.config = config
        width = config.width
        self.tokens = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Parameter(torch.empty(config.length, width))
        blocks = (Block(width, config.heads, config.activation, config.norm_eps) for _ in range(config.layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.projection = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        nn.init.normal_(self.projection.weight, std=width**-0.5)
        if config.kind == "clip":
            self._initialise_like_clip()

    def forward(self, input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """(B,L) and B numbers of real tokens -> pooled (B,E)."""
        states, layout = self._run(input_ids, lengths)
        return self._pool(states, lengths, layout)

    def with_states(self, input_ids: Tensor, lengths: Sequence[int]) -> TextOutput:
        """The same with the states that a captioner reads."""
        states, layout = self._run(input_ids, lengths)
        pooled = self._pool(states, lengths, layout)
        if not isinstance(layout, Packed):
            return TextOutput(pooled, states, None)
        slots = input_ids.numel()
        unpacked = states.new_zeros(slots, states.shape[-1]).index_copy(0, layout.index, states)  # (T,D) -> (B*L,D)
        keep = torch.zeros(slots, dtype=torch.bool, device=states.device).index_fill(0, layout.index, True)
        return TextOutput(pooled, unpacked.view(*input_ids.shape, -1), keep.view(input_ids.shape))

    def _initialise_like_clip(self) -> None:
        width, layers = self.config.width, self.config.layers
        into_residual = width**-0.5 * (2 * layers) ** -0.5
        stds = {"qkv": width**-0.5, "out": into_residual, "fc1": (2 * width) ** -0.5, "fc2": into_residual}
        for name, parameter in self.blocks.named_parameters():
            layer, _, kind = name.rpartition(".")
            if kind == "weight" and (std := stds.get(layer.rpartition(".")[2])):
                nn.init.normal_(parameter, std=std)

    def _run(self, input_ids: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Packed | Padded]:
        causal, slots = self.config.kind == "clip", input_ids.shape[1]
        layout: Packed | Padded
        if self.config.padding == "packed":
            layout = Packed(lengths, slots, input_ids.device, causal=causal, last_in_last_slot=not causal)
            states = self.tokens(input_ids.flatten()[layout.index]) + self.positions[layout.place]  # (T,D)
        else:
            layout = Padded(causal)
            states = self.tokens(input_ids) + self.positions  # (B,L,D)
        for block in self.blocks:
            states = block(states, layout)
        return states, layout

    def _pool(self, states: Tensor, lengths: Sequence[int], layout: Packed | Padded) -> Tensor:
        if isinstance(layout, Packed):
            last = states[layout.last]  # (T,D) -> (B,D)
        elif layout.causal:
            last = states[torch.arange(len(states)), torch.tensor(lengths, device=states.device) - 1]
        else:
            last = states[:, -1]
        return self.projection(self.norm(last))
