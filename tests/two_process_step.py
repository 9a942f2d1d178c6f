"""Run by test_two_processes_equal_one under torchrun: one DDP step against the same step in one process."""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from objective_batches import CONFIGS, part, random_batch
from torch.nn.parallel import DistributedDataParallel

from encoders.objectives import build
from train.cached_step import cached_step

ROWS = 8
NAMES = ("clips", "coca", "dreamlip", "dreamlip batch")


def main() -> None:
    torch.set_num_threads(1)
    expected = {}
    for name in NAMES:  # before the process group exists: one process, the whole batch
        torch.manual_seed(0)
        model = build(CONFIGS[name]).double()
        batch = random_batch(name, ROWS)
        whole = model(batch)["loss"]
        whole.backward()
        expected[name] = (
            whole.detach(),
            {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad},
        )
    accelerator = Accelerator(cpu=True)
    for name in NAMES:
        for cached in (False, True):
            compare(name, cached, *expected[name], accelerator)
    accelerator.end_training()


def compare(
    name: str, cached: bool, whole: torch.Tensor, gradients: dict[str, torch.Tensor], accelerator: Accelerator
) -> None:
    torch.manual_seed(0)
    model = build(CONFIGS[name]).double()
    batch = random_batch(name, ROWS)
    rank, world = dist.get_rank(), dist.get_world_size()
    wrapped = DistributedDataParallel(model)
    mine = part(batch, slice(rank * 4, rank * 4 + 4))
    if cached:
        halves = [part(mine, slice(0, 2)), part(mine, slice(2, 4))]
        loss = cached_step(model, wrapped, halves, accelerator)["loss"]
    else:
        loss = wrapped(mine)["loss"]
        loss.backward()
    mean = loss.detach() / world
    dist.all_reduce(mean)
    torch.testing.assert_close(mean, whole)
    worst = 0.0
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, gradients[key], rtol=0, atol=1e-10, msg=lambda m, key=key: f"{name}, {key}: {m}"
            )
            worst = max(worst, (parameter.grad - gradients[key]).abs().max().item())
    if rank == 0:
        print(f"{name}, cached {cached}: largest gradient difference {worst:.2e}")


if __name__ == "__main__":
    main()
