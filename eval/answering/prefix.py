"""Greedy decoding that computes once what questions share: the keys and values of everything up to the last picture.

A prompt is a prefix, which ends with its last image token, and a suffix with the question's own words. Both are padded
on the left, so the columns of a batch are: padding, prefix, padding, suffix, answer; masks and positions skip padding.
Shapes: P prefixes, B rows of a batch, N image tokens, Lp and Ls tokens of prefix and suffix, D width of the LLM.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from encoders.errors import ModelError

Ids = Sequence[int]


@dataclass(frozen=True)
class Memory:
    """Prefixes as the LLM remembers them."""

    layers: list[tuple[Tensor, Tensor]]  # per layer keys and values (P, heads, Lp, width of a head)
    mask: Tensor  # (P, Lp) 1 where there is a token


def split_prompt(ids: Ids, image_token: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prefix, up to and including the last image token (empty without one), and suffix, never empty: a chat prompt ends
    with the words that let the assistant speak."""
    end = next((place for place in range(len(ids), 0, -1) if ids[place - 1] == image_token), 0)
    return tuple(ids[:end]), tuple(ids[end:])


def remember(model: Any, prefixes: Sequence[Ids], features: Sequence[Sequence[Tensor]]) -> Memory:
    """Run the LLM over prefixes (none empty), `features` holding for each its pictures' features (N, D) in order.

    Raises ModelError if there is not one feature per image token.
    """
    ids, mask = _left_padded(prefixes, model.device)  # (P, Lp)
    is_image = (ids == model.config.image_token_id) & mask.bool()
    pictures = torch.cat([feature for of_prefix in features for feature in of_prefix])  # (pictures * N, D)
    if len(pictures) != (found := int(is_image.sum())):
        raise ModelError(f"the prompts have {found} image tokens but the vision tower gave {len(pictures)} features")
    words = model.get_input_embeddings()(ids)  # (P, Lp, D)
    words = words.masked_scatter(is_image[..., None], pictures.to(words.dtype))
    cache = DynamicCache()
    whole = bool(mask.all())  # then causal attention needs no mask, which is faster
    model.model.language_model(
        inputs_embeds=words,
        attention_mask=None if whole else mask,
        position_ids=_positions(mask),
        past_key_values=cache,
        use_cache=True,
    )
    layers: Any = cache.layers  # of a Llama all are plain keys and values, which the annotations do not know
    return Memory([(layer.keys, layer.values) for layer in layers], mask)


def greedy(
    model: Any,
    memory: Memory | None,
    prefix_of: Sequence[int],
    suffixes: Sequence[Ids],
    max_new_tokens: int,
    stop_ids: Sequence[int],
) -> list[list[int]]:
    """The most likely tokens after each suffix, up to a stop token (left out) or `max_new_tokens`.

    `prefix_of` is each row's place in `memory`; no memory: the suffixes are whole prompts. Raises FloatingPointError if
    a logit is not finite: the most likely token would be an arbitrary one; ValueError for suffixes of different length
    where the model's sliding window is too short for them: it would count the padding before them.
    """
    if memory is not None and len(set(map(len, suffixes))) > 1:
        longest = memory.mask.shape[1] + max(map(len, suffixes)) + max_new_tokens
        window = model.config.get_text_config().to_dict().get("sliding_window")
        if window is not None and longest > window:
            raise ValueError(f"up to {longest} tokens do not fit the sliding window of {window}; ask one by one")
    ids, mask = _left_padded(suffixes, model.device)  # (B, Ls)
    cache: Cache = DynamicCache()
    if memory is not None:
        rows = torch.tensor(list(prefix_of), device=model.device)
        cache = Cache(layers=[_Roomy(*layer, rows, ids.shape[1] + max_new_tokens) for layer in memory.layers])
        mask = torch.cat([memory.mask[rows], mask], dim=1)  # (B, Lp + Ls)
    positions = _positions(mask)[:, -ids.shape[1] :]  # (B, Ls)
    stops = torch.tensor(list(stop_ids), device=model.device)
    done = torch.zeros(len(ids), dtype=torch.bool, device=model.device)
    finite = torch.ones_like(done)
    flag = _Flag(model.device)
    new: list[Tensor] = []
    while True:
        hidden = model.model.language_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]  # (B, D)
        logits = model.lm_head(hidden).float()  # (B, V)
        best = logits.argmax(dim=-1)  # (B,), of a row with a NaN its place
        finite = finite & logits.gather(1, best[:, None])[:, 0].isfinite()
        ids = best[:, None]  # (B, 1); behind a row's stop token it no longer matters
        new.append(ids)
        done = done | torch.isin(best, stops)
        if len(new) == max_new_tokens or flag.is_up(done.all()):
            break
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
        positions = positions[:, -1:] + 1
    if not bool(finite.all()):
        raise FloatingPointError("the model gives NaN or infinite logits, out of which no answer can be read")
    return [_until(row, set(stop_ids)) for row in torch.cat(new, dim=1).tolist()]


class _Roomy(DynamicLayer):
    """The keys and values of a layer, with room behind the prefix: each token is written there, where a plain one would
    copy all that came before. For `rows` of a memory's `keys` and `values`, and `room` more tokens."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.buffers = [_with_room(tensor, rows, room) for tensor in (keys, values)]
        self._show(keys.shape[2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write what is new (B, heads, new, width of a head) behind the rest; all there is now."""
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        return self._show(end)

    def _show(self, end: int) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[:, :, :end] for buffer in self.buffers)
        self.keys, self.values = keys, values
        return keys, values


def _with_room(tensor: Tensor, rows: Tensor, room: int) -> Tensor:
    _, heads, length, width = tensor.shape
    buffer = tensor.new_empty(len(rows), heads, length + room, width)
    buffer[:, :, :length] = tensor[rows]
    return buffer


class _Flag:
    """Asks a device whether all rows are done. A GPU is asked about the step before, so that it never waits for us: at
    most one step is computed for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.late = device.type == "cuda"
        if self.late:
            self.value = torch.zeros((), dtype=torch.bool, pin_memory=True)
            self.copied = torch.cuda.Event()
            self.asked = False

    def is_up(self, up: Tensor) -> bool:
        if not self.late:
            return bool(up)
        if self.asked:
            self.copied.synchronize()
            if bool(self.value):
                return True
        self.value.copy_(up, non_blocking=True)
        self.copied.record()
        self.asked = True
        return False


def _left_padded(rows: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, longest). What stands in the padding plays no part."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    length = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(longest, device=device) >= longest - length[:, None]
    return ids, mask.long()


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _until(tokens: list[int], stops: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]
