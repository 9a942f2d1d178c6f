"""Padding-free batches: conversations end to end in one row, each attending to itself alone.

`enable` gives the LLM an attention that transformers takes from its public registry. It must be told where the
conversations end, so a model with it is for training: load it again to generate. Shapes: T tokens of all conversations,
h query heads, k key heads, d head width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, LlavaForConditionalGeneration

from encoders.errors import ModelError

NAME = "encoder_swap_packed"


class Spans:
    """Where the conversations of a packed row lie."""

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.lengths, self.longest = list(lengths), max(lengths)
        ends = torch.tensor([0, *lengths]).cumsum(0)
        self.starts = ends.to(torch.int32).to(device, non_blocking=True)
        """(conversations + 1,) first token of each, and the end of the last."""


def enable(model: LlavaForConditionalGeneration) -> None:
    """From now on the LLM takes packed rows, and only those."""
    model.model.language_model.set_attn_implementation(NAME)


def is_enabled(model: Any) -> bool:
    """Whether a LLaVA's LLM takes packed rows."""
    return bool(model.model.language_model.config._attn_implementation == NAME)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    spans: Spans | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each conversation, in transformers' form: query (1,h,T,d), key and value (1,k,T,d) ->
    (1,T,h,d). Raises ModelError without spans: across conversations it would be silently wrong."""
    if spans is None:
        raise ModelError("this LLM was made ready for packed batches; load the model again for anything else")
    # Autocast computes value in bfloat16, but RoPE hands on query and key in the type of the residual stream.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T,heads,d)
        starts, longest, gqa = spans.starts, spans.longest, key.shape[1] != query.shape[1]
        packed = varlen_attn(
            q, k, v, starts, starts, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=gqa
        )
        assert isinstance(packed, Tensor)  # no auxiliary output was asked for
        return packed[None], None
    parts = zip(*(tensor.split(spans.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    attended = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True) for q, k, v in parts
    ]
    return torch.cat(attended, dim=2).transpose(1, 2), None


AttentionInterface.register(NAME, attend)
