"""InfoNCE, forward and backward: streamed in tiles against open_clip.ClipLoss, which holds the whole logit matrices.

    python benchmarks/contrastive_loss.py [--rows 8192] [--embed-dim 512] [--rounds 5]

One process, so no gather. Loss and gradients are compared first; memory is that of fresh processes.
"""

import argparse
from collections.abc import Callable
from functools import partial

import open_clip
import torch
from measure import Bar, announce, check_equal, conclude, cpu_seconds, extra_memory, median_ratio
from torch import Tensor

from encoders.dual_encoder import unit
from encoders.losses import info_nce

LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "streamed": info_nce,
    "open_clip.ClipLoss": open_clip.ClipLoss(),
}


def prepare(name: str, rows: int, embed_dim: int) -> Callable[[], list[Tensor]]:
    """Random features whose pairs resemble each other; the function gives the loss and the gradients of its inputs."""
    torch.manual_seed(0)
    image = unit(torch.randn(rows, embed_dim))
    text = unit(image + 0.1 * torch.randn(rows, embed_dim))
    inputs = [x.requires_grad_() for x in (image, text, torch.tensor(14.3))]

    def loss_and_gradients() -> list[Tensor]:
        loss = LOSSES[name](*inputs)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    return loss_and_gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="pairs in the global batch, N")
    parser.add_argument("--embed-dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    announce()

    prepared = {name: partial(prepare, name, options.rows, options.embed_dim) for name in LOSSES}
    functions = {name: make() for name, make in prepared.items()}
    streamed, dense = (function() for function in functions.values())
    for what, ours, theirs in zip(("loss", "d image", "d text", "d scale"), streamed, dense, strict=True):
        check_equal(what, ours, theirs)
    del streamed, dense

    memory = {name: extra_memory(make) for name, make in prepared.items()}
    print("  extra memory: " + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in memory.items()))
    seconds = cpu_seconds(functions, options.rounds)
    share = 100 * memory["streamed"] / memory["open_clip.ClipLoss"]
    times = median_ratio(seconds["streamed"], seconds["open_clip.ClipLoss"])
    size = f"InfoNCE N={options.rows}, streamed against dense"
    conclude(
        [
            Bar(f"{size}, extra memory in %", share, "at most", 15),
            Bar(f"{size}, times the time", times, "at most", 1.1),
        ]
    )


if __name__ == "__main__":
    main()
