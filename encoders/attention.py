"""Three layouts of a batch of sequences and attention within each: padded, packed, and the captioner's combination.

A layout is made once per batch and handed to every block. Shapes: B batch, L slots, T tokens of a packed batch,
C condition positions, Q queries, h heads, d head width.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


class Layout(Protocol):
    """Attention over one batch: query, key and value as (...,3,h,d) -> (...,h,d) with the same leading shape."""

    def __call__(self, qkv: Tensor) -> Tensor: ...


class Padded:
    """Rows of equal length, (B,L): every slot is computed, and attended unless `causal` forbids it."""

    def __init__(self, causal: bool = False):
        self.causal = causal

    def __call__(self, qkv: Tensor) -> Tensor:
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B,L,3,h,d) -> 3 x (B,h,L,d)
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal).transpose(1, 2)


class Packed:
    """Real tokens only, (T,): one row after another, shortest row first.

    On CUDA in half precision attention is one variable-length kernel; elsewhere rows of equal length attend together,
    as a rectangle without padding. Both compute what a padded batch does at its real tokens."""

    def __init__(
        self, lengths: Sequence[int], slots: int, device: torch.device, *, causal: bool, last_in_last_slot: bool
    ):
        counts = torch.tensor(lengths)
        order = counts.argsort(stable=True)
        sorted_counts = counts[order]
        self.causal, self.longest = causal, int(sorted_counts[-1])
        lengths_of_rows, rows = sorted_counts.unique_consecutive(return_counts=True)
        self.groups = [(int(n), int(length)) for n, length in zip(rows, lengths_of_rows, strict=True)]
        ends = sorted_counts.cumsum(0)
        place = torch.arange(int(ends[-1])) - (ends - sorted_counts).repeat_interleave(sorted_counts)  # (T,) in its row
        row = order.repeat_interleave(sorted_counts)
        if last_in_last_slot:
            place = torch.where(place == counts[row] - 1, slots - 1, place)
        self.place = place.to(device, non_blocking=True)
        """(T,) slot of each token in its row."""
        self.index = (row * slots + place).to(device, non_blocking=True)
        """(T,) where each token lies in a flattened (B*L) batch."""
        self.last = (ends - 1)[order.argsort()].to(device, non_blocking=True)
        """(B,) where each row's last token lies in the packed batch."""
        self.starts = F.pad(ends, (1, 0)).to(torch.int32).to(device, non_blocking=True)

    def __call__(self, qkv: Tensor) -> Tensor:
        if qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16):
            query, key, value = qkv.unbind(1)  # (T,3,h,d) -> 3 x (T,h,d)
            window = (-1, 0) if self.causal else (-1, -1)
            packed = varlen_attn(
                query, key, value, self.starts, self.starts, self.longest, self.longest, window_size=window
            )
            assert isinstance(packed, Tensor)  # no auxiliary output was asked for
            return packed
        parts = []
        for (rows, length), tokens in zip(
            self.groups, qkv.split([n * length for n, length in self.groups]), strict=True
        ):
            query, key, value = tokens.view(rows, length, *tokens.shape[1:]).permute(2, 0, 3, 1, 4)
            part = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)  # (rows,h,length,d)
            parts.append(part.transpose(1, 2).flatten(0, 1))
        return torch.cat(parts)  # (T,h,d)


class Combination:
    """Condition and queries in one sequence, (B,C+Q), under the combination mask of CLIPS section 3.4: condition
    positions see all of the condition, query i sees all of the condition and queries <= i.

    keep (B,C) is False where a condition position is padding that nothing may attend to; None keeps all.
    """

    def __init__(self, condition: int, queries: int, device: torch.device, keep: Tensor | None = None):
        self.condition = condition
        mask = combination_mask(condition, queries, device)[condition:]  # (Q,C+Q)
        self.condition_mask = None if keep is None else keep[:, None, None, :]  # (B,1,1,C)
        if keep is not None:
            kept = F.pad(keep, (0, queries), value=True)  # (B,C+Q)
            mask = mask & kept[:, None, None, :]  # (B,1,Q,C+Q)
        self.query_mask = mask

    def __call__(self, qkv: Tensor) -> Tensor:
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B,C+Q,3,h,d) -> 3 x (B,h,C+Q,d)
        # In two calls, as no condition position sees a query: the larger one then needs no mask at all.
        c = self.condition
        first = F.scaled_dot_product_attention(
            query[:, :, :c], key[:, :, :c], value[:, :, :c], attn_mask=self.condition_mask
        )
        second = F.scaled_dot_product_attention(query[:, :, c:], key, value, attn_mask=self.query_mask)
        return torch.cat([first, second], dim=2).transpose(1, 2)


def combination_mask(condition: int, queries: int, device: torch.device | None = None) -> Tensor:
    """M of CLIPS section 3.4, (C+Q,C+Q), True = may attend."""
    position = torch.arange(condition + queries, device=device)
    column = position[None, :]
    return (column < condition) | ((position[:, None] >= condition) & (column <= position[:, None]))
