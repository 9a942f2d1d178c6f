"""Samples of `data.dataset` -> batches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llava_adapter.chat import IGNORED


def collate(samples: Sequence[dict[str, Any]], pad_token_id: int, packed: bool = False) -> dict[str, Any]:
    """Batch samples. `pixel_values` (images, 3, H, W) are all samples' images in order; `id` is a list.

    Padded: `input_ids`, `labels` and `attention_mask` (B, L), padded on the right.
    Packed: the same keys as one row (1, T) without padding, conversation after conversation, and what tells them
    apart: `position_ids` (1, T), from 0 in each, and `lengths`, the list of their tokens. A conversation's first token
    is never supervised: it would be predicted from the one before.
    """
    ids, labels = ([sample[name] for sample in samples] for name in ("input_ids", "labels"))
    common = {
        "id": [sample["id"] for sample in samples],
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
    }
    lengths = [len(row) for row in ids]
    if packed:
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        row = torch.cat(ids)[None]  # (1, T)
        return common | {
            "input_ids": row,
            "labels": torch.cat(labels).index_fill(0, starts, IGNORED)[None],
            "attention_mask": torch.ones_like(row),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "lengths": lengths,
        }
    return common | {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        # From the lengths: a pad id inside a conversation must stay visible.
        "attention_mask": (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long(),
    }
