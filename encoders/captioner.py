"""The CLIPS decoder: predicts the full synthetic caption from the image and the web caption (CLIPS section 3.4).

Its sequence is [patch tokens] + [text states of the web caption] + [T learnable tokens]; learnable token t predicts the
t-th caption token. Targets are never fed in. Shapes: B batch, N patches, L text tokens, C = N+L-1 condition, D width.
"""

import torch
from torch import Tensor, nn

from encoders.config import CaptionerConfig
from encoders.text import NORM_EPS, Block


class Captioner(nn.Module):
    """Self-attention over condition and learnable tokens under the combination mask."""

    def __init__(self, config: CaptionerConfig, vision_width: int, text_width: int, vocab_size: int):
        super().__init__()
        self.image_condition = nn.Linear(vision_width, config.width, bias=False)
        self.text_condition = nn.Linear(text_width, config.width, bias=False)
        self.queries = nn.Parameter(torch.randn(config.tokens, config.width))  # N(0, 1), as in the recipe
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.head = nn.Linear(config.width, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=config.width**-0.5)

    def forward(self, patch_tokens: Tensor, text_states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the positions that have a target, and those targets.

        patch_tokens (B,N,Dv) before the final norm; text_states (B,L,Dt) before the final norm, class position last (it
        is left out); targets (B,T) token ids, -100 where there is none. Returns (M,V) logits and (M,) targets.
        """
        targets = targets[:, : _last_target(targets)]  # later queries see no loss and nothing earlier sees them
        length = targets.shape[1]
        image = self.image_condition(patch_tokens)  # (B,N,Dv) -> (B,N,D)
        text = self.text_condition(text_states[:, :-1])  # (B,L,Dt) -> (B,L-1,D)
        queries = self.queries[:length].to(image.dtype).expand(len(image), -1, -1)
        sequence = torch.cat([image, text, queries], dim=1)  # (B,C+T,D)
        mask = combination_mask(sequence.shape[1] - length, length, sequence.device)
        for block in self.blocks:
            sequence = block(sequence, mask)
        labelled = targets != -100
        hidden = self.norm(sequence[:, -length:][labelled])  # (B,C+T,D) -> (M,D)
        return self.head(hidden), targets[labelled]


def combination_mask(condition: int, learnable: int, device: torch.device | None = None) -> Tensor:
    """M of CLIPS section 3.4, (C+T,C+T), True = may attend: condition sees all condition, learnable token i sees all
    condition and learnable tokens <= i."""
    position = torch.arange(condition + learnable, device=device)
    column = position[None, :]
    return (column < condition) | ((position[:, None] >= condition) & (column <= position[:, None]))


def _last_target(targets: Tensor) -> int:
    """Length up to the last labelled position of any row; at least 1."""
    labelled = (targets != -100).any(dim=0).nonzero()
    return int(labelled[-1]) + 1 if len(labelled) else 1
