"""Text tower, forward and backward: packed against padded to 77, the same weights and texts, equal outputs first.

    python benchmarks/text_packing.py [--texts 32] [--mean 18] [--rounds 5] [--bf16]

The rival is our own padded tower; open_clip's is timed beside it.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from measure import Bar, announce, check_equal, conclude, cpu_seconds, median_ratio
from rival import clip_config, open_clip_twin, random_lengths, random_texts
from torch import Tensor

from encoders.dual_encoder import DualEncoder
from encoders.text import TextTower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=32, help="captions in a batch")
    parser.add_argument("--mean", type=float, default=18, help="tokens per caption, about")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast instead of in float32")
    options = parser.parse_args()
    announce()
    torch.manual_seed(0)

    model = DualEncoder(clip_config("b16", 224, "packed"))
    packed, twin = model.text, open_clip_twin(model)
    padded = TextTower(replace(packed.config, padding="reference"), model.config.embed_dim)
    padded.load_state_dict(packed.state_dict())
    lengths = random_lengths(options.texts, options.mean, packed.config.length)
    ids = random_texts(lengths, packed.config)
    print(f"width {packed.config.width}, {len(lengths)} texts, mean {sum(lengths) / len(lengths):.1f} tokens of 77")

    towers: dict[str, Callable[[], Tensor]] = {
        "packed": lambda: packed(ids, lengths),
        "padded to 77": lambda: padded(ids, lengths),
        "open_clip": lambda: twin.encode_text(ids),
    }
    with torch.no_grad():
        outputs = {name: tower() for name, tower in towers.items()}
    for name in ("padded to 77", "open_clip"):
        check_equal(f"packed against {name}", outputs["packed"], outputs[name])

    pull = torch.randn_like(outputs["packed"])

    def forward_and_backward(tower: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
                output = tower()
            (output.float() * pull).sum().backward()
            for module in (packed, padded, twin):
                module.zero_grad()

        return run

    seconds = cpu_seconds({name: forward_and_backward(tower) for name, tower in towers.items()}, options.rounds)
    over_open_clip = median_ratio(seconds["open_clip"], seconds["packed"])
    print(f"  packed over open_clip: {over_open_clip:.2f} times as fast")
    faster = median_ratio(seconds["padded to 77"], seconds["packed"])
    conclude([Bar("text tower, packed over padded to 77, times as fast", faster, "at least", 3)])


if __name__ == "__main__":
    main()
