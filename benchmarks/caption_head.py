"""The captioner's head and cross-entropy, forward and backward: labelled positions only, in chunks, against plain.

    python benchmarks/caption_head.py [--positions 4096] [--labelled 0.5] [--rounds 5]

Plain is one nn.Linear over all positions and F.cross_entropy with ignored labels. Loss and gradients are compared
first; memory is that of fresh processes.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from measure import Bar, announce, check_equal, conclude, cpu_seconds, extra_memory, median_ratio
from torch import Tensor, nn

from encoders.data.tokenizers import NO_TARGET
from encoders.losses import caption_loss


def chunked(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """What the decoder does: labelled positions (M,D) of (B*Q,D), then the head."""
    labelled = targets != NO_TARGET
    return caption_loss(hidden[labelled], head, targets[labelled])


def plain(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Logits (B*Q,V) of every position."""
    return F.cross_entropy(head(hidden), targets, ignore_index=NO_TARGET, reduction="sum")


LOSSES = {"chunked": chunked, "plain": plain}


def prepare(name: str, positions: int, width: int, vocabulary: int, labelled: float) -> Callable[[], list[Tensor]]:
    """Random states and targets; the function gives the loss and the gradients of states and head."""
    torch.manual_seed(0)
    hidden = torch.randn(positions, width, requires_grad=True)
    head = nn.Linear(width, vocabulary, bias=False)
    targets = torch.randint(vocabulary, (positions,)).masked_fill(torch.rand(positions) >= labelled, NO_TARGET)

    def loss_and_gradients() -> list[Tensor]:
        loss = LOSSES[name](hidden, head, targets) / positions
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, head.weight))]

    return loss_and_gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--labelled", type=float, default=0.5, help="share of positions that have a target")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    announce()

    size = (options.positions, options.width, options.vocabulary, options.labelled)
    prepared = {name: partial(prepare, name, *size) for name in LOSSES}
    functions = {name: make() for name, make in prepared.items()}
    ours, theirs = (function() for function in functions.values())
    for what, mine, reference in zip(("loss", "d states", "d head"), ours, theirs, strict=True):
        check_equal(what, mine, reference)
    del ours, theirs

    memory = {name: extra_memory(make) for name, make in prepared.items()}
    print("  extra memory: " + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in memory.items()))
    seconds = cpu_seconds(functions, options.rounds)
    print(f"  chunked takes {median_ratio(seconds['chunked'], seconds['plain']):.2f} of plain's time")
    share = 100 * memory["chunked"] / memory["plain"]
    conclude([Bar("caption head, chunked against plain, extra memory in %", share, "at most", 20)])


if __name__ == "__main__":
    main()
