"""The caption decoders: CLIPS' (section 3.4), which never sees its target, and CoCa's, which reads it token by token.

Both run queries over a condition. CLIPS: condition = patch tokens and the web caption's states, queries = learnable
tokens, query t predicts caption token t. CoCa: condition = patch tokens, queries = the caption's own causal states,
query t predicts token t+1. Shapes: B batch, N patches, L text slots, C condition, Q queries, D width, M targets.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.attention import Combination, Padded
from encoders.config import CaptionerConfig
from encoders.data.tokenizers import NO_TARGET
from encoders.losses import caption_loss
from encoders.text import Block, TextOutput

NORM_EPS = 1e-6
ACTIVATION = "gelu_tanh"
GROUPS = 4  # of rows with captions of similar length; a row's queries end with the longest caption of its group


class Decoder(nn.Module):
    """Pre-norm blocks over condition and queries, final norm and head."""

    def __init__(self, config: CaptionerConfig, vocab_size: int):
        super().__init__()
        block = Block if config.fusion == "self" else CrossBlock
        blocks = (block(config.width, config.heads, ACTIVATION, NORM_EPS) for _ in range(config.layers))
        self.fusion = config.fusion
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.head = nn.Linear(config.width, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=config.width**-0.5)

    def forward(self, condition: Tensor, keep: Tensor | None, queries: Tensor, targets: Tensor) -> Tensor:
        """condition (B,C,D), of which `keep` (B,C) is False at padding; queries and targets (B,Q,D) and (B,Q), -100
        where there is no target. Returns the cross-entropy summed over targets."""
        # The residual stream is float32 also under autocast, as in the towers.
        precise = torch.promote_types(condition.dtype, torch.float32)
        condition, queries = condition.to(precise), queries.to(precise)
        hidden, labels = [], []
        for rows, length in groups_of_similar_length(targets):
            kept = None if keep is None else keep[rows]
            states = self._run(condition[rows], kept, queries[rows, :length])  # (b,q,D)
            labelled = targets[rows, :length] != NO_TARGET
            hidden.append(states[labelled])
            labels.append(targets[rows, :length][labelled])
        return caption_loss(self.norm(torch.cat(hidden)), self.head, torch.cat(labels))

    def _run(self, condition: Tensor, keep: Tensor | None, queries: Tensor) -> Tensor:
        length = queries.shape[1]
        if self.fusion == "self":
            layout = Combination(condition.shape[1], length, condition.device, keep)
            sequence = torch.cat([condition, queries], dim=1)  # (b,C+q,D)
            for block in self.blocks:
                sequence = block(sequence, layout)
            return sequence[:, -length:]
        for block in self.blocks:
            queries = block(queries, condition, keep)
        return queries


class CrossBlock(nn.Module):
    """Causal self-attention of the queries, cross-attention to the condition, MLP; each with its norm before it."""

    def __init__(self, width: int, heads: int, activation: str, norm_eps: float):
        super().__init__()
        self.heads = heads
        self.causal = Padded(causal=True)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.condition_norm = nn.LayerNorm(width, eps=norm_eps)
        self.query, self.key_value, self.out = (nn.Linear(width, n * width) for n in (1, 2, 1))
        for weight in (self.query.weight, *self.key_value.weight.chunk(2), self.out.weight):
            nn.init.xavier_uniform_(weight)
        for layer in (self.query, self.key_value, self.out):
            nn.init.zeros_(layer.bias)
        self.block = Block(width, heads, activation, norm_eps)

    def forward(self, x: Tensor, condition: Tensor, keep: Tensor | None) -> Tensor:
        """(b,q,D) and (b,C,D) -> (b,q,D)."""
        query = self.query(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b,q,D) -> (b,h,q,d)
        key, value = self.key_value(self.condition_norm(condition)).unflatten(-1, (2, self.heads, -1)).unbind(2)
        mask = None if keep is None else keep[:, None, None, :]  # (b,1,1,C)
        attended = F.scaled_dot_product_attention(query, key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))  # (b,h,q,d) -> (b,q,D)
        return self.block(x, self.causal)


class ClipsCaptioner(nn.Module):
    """Image and web caption -> the full synthetic caption, from learnable tokens (CLIPS equation 4)."""

    def __init__(self, config: CaptionerConfig, vision_width: int, text_width: int, text_kind: str, vocab_size: int):
        super().__init__()
        self.image_condition = nn.Linear(vision_width, config.width, bias=False)
        self.text_condition = nn.Linear(text_width, config.width, bias=False)
        self.queries = nn.Parameter(torch.randn(config.tokens, config.width))  # N(0, 1), as in the recipe
        self.decoder = Decoder(config, vocab_size)
        self.drop_last = text_kind == "bert"  # the class token in the last slot is no condition

    def forward(self, patch_tokens: Tensor, text: TextOutput, targets: Tensor) -> Tensor:
        """patch_tokens (B,N,Dv) before the final norm; the web caption's states; targets (B,Q), Q <= T, -100: none.
        Returns the cross-entropy summed over targets."""
        slots = text.states.shape[1] - self.drop_last
        image = self.image_condition(patch_tokens)  # (B,N,Dv) -> (B,N,D)
        words = self.text_condition(text.states[:, :slots])  # (B,L,Dt) -> (B,L-1,D)
        condition = torch.cat([image, words], dim=1)  # (B,C,D)
        keep = None
        if text.keep is not None:
            keep = torch.cat([text.keep.new_ones(image.shape[:2]), text.keep[:, :slots]], dim=1)  # (B,C)
        queries = self.queries[: targets.shape[1]].expand(len(image), -1, -1)
        return self.decoder(condition, keep, queries, targets)


class CocaCaptioner(nn.Module):
    """Image -> the caption whose causal states are the queries (CoCa, arXiv 2205.01917)."""

    def __init__(self, config: CaptionerConfig, vision_width: int, text_width: int, vocab_size: int):
        super().__init__()
        self.image_condition = nn.Linear(vision_width, config.width, bias=False)
        self.text_query = nn.Linear(text_width, config.width, bias=False)
        self.decoder = Decoder(config, vocab_size)

    def forward(self, patch_tokens: Tensor, states: Tensor, targets: Tensor) -> Tensor:
        """patch_tokens (B,N,Dv); causal states (B,Q,Dt); targets (B,Q): the token after each, -100 behind the last.
        Returns the cross-entropy summed over targets."""
        return self.decoder(self.image_condition(patch_tokens), None, self.text_query(states), targets)


def groups_of_similar_length(targets: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Rows (b,) of targets (B,Q), in groups, and the length up to which any row of the group has a target, at least 1.

    Queries behind a row's last target carry no loss and nothing earlier sees them, so cutting them is exact.
    """
    places = torch.arange(1, targets.shape[1] + 1, device=targets.device)
    lengths = ((targets != NO_TARGET) * places).amax(1)  # (B,Q) -> (B,)
    by_length = lengths.argsort()
    longest = [max(int(group[-1]), 1) for group in lengths[by_length].cpu().chunk(GROUPS)]
    yield from zip(by_length.chunk(GROUPS), longest, strict=True)
