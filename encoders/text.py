"""The text tower of CLIPS and the transformer block it shares with the captioner.

Input: ids laid out by data/tokenizers.py, `[bos] words [eos] [pad ...] [CLS]`. As in the published recipe the tower is
bidirectional, pads are attended and the last position is pooled. Shapes: B batch, L tokens, D width, E joint embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.config import TextConfig

NORM_EPS = 1e-6


class Block(nn.Module):
    """Pre-norm transformer block: multi-head self-attention and a GELU(tanh) MLP of four times the width."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        for layer in (self.qkv, self.out, self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B,L,D) -> (B,L,D). `mask` (L,L) is True where row may attend to column; None lets all attend to all."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B,L,3,h,d) -> 3 x (B,h,L,d)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))  # (B,h,L,d) -> (B,L,D)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class TextTower(nn.Module):
    """Token ids (B,L) -> hidden states (B,L,D) before the final norm, and pooled embedding (B,E)."""

    def __init__(self, config: TextConfig, embed_dim: int):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.empty(config.length, config.width))
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.projection = nn.Linear(config.width, embed_dim, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        nn.init.normal_(self.projection.weight, std=config.width**-0.5)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        states = self.tokens(input_ids) + self.positions  # (B,L) -> (B,L,D)
        for block in self.blocks:
            states = block(states)
        pooled = self.norm(states[:, -1])  # the class token sits in the last slot
        return states, self.projection(pooled)
