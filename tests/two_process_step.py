"""Run by test_two_processes_equal_one under torchrun: one DDP step against the same step in one process."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from encoders.config import CaptionerConfig, EncoderConfig, TextConfig, VisionConfig
from encoders.objectives import build

CONFIG = EncoderConfig(
    objective="clips",
    embed_dim=16,
    vision=VisionConfig(image_size=16, patch_size=8, width=32, layers=2, heads=2, mlp_width=64),
    text=TextConfig(vocab_size=40, length=8, width=32, layers=1, heads=2),
    captioner=CaptionerConfig(tokens=6, width=32, layers=1, heads=2),
)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = build(CONFIG)
    targets = torch.randint(5, 40, (8, 6))
    for row, length in enumerate((6, 3, 5, 1, 2, 4, 6, 2)):  # ranks hold unequal numbers of targets
        targets[row, length:] = -100
    batch = {
        "images": torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8),
        "web_ids": torch.randint(5, 40, (8, 8)),
        "piece_ids": torch.randint(5, 40, (8, 8)),
        "target_ids": targets,
    }
    whole = model(batch)["loss"]  # before the process group exists: one process, the whole batch
    whole.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    wrapped = DistributedDataParallel(model)
    mine = {name: value[rank * 4 : rank * 4 + 4] for name, value in batch.items()}
    loss = wrapped(mine)["loss"]
    loss.backward()
    mean = loss.detach() / world
    dist.all_reduce(mean)
    torch.testing.assert_close(mean, whole.detach())
    worst = 0.0
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
        worst = max(worst, (parameter.grad - expected[name]).abs().max().item())
    if rank == 0:
        print(f"largest gradient difference {worst:.2e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
