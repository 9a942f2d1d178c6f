"""Seconds that `inspect-encoder` takes on encoders of 300 M and 1 B parameters, from the shell's prompt to the next.

    python benchmarks/inspect_encoder.py [--rounds 7] [--full]

Wall time of a fresh process: the interpreter's start, all imports, configs and header, printing. The weights are sparse
files of zeros (headers are real, no disk is filled), so `--full` shows the speed of the scan, not that of a disk. The
rival is what one would type instead: transformers' config and safetensors' key list, which need their imports.
"""

import argparse
import json
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path

from measure import Bar, conclude

SHAPES = {"ViT-L/14 at 336": (1024, 24, 336), "ViT-g/14 at 336": (1408, 40, 336)}
RIVAL = """
import sys
from safetensors import safe_open
from transformers import CLIPVisionConfig
print(CLIPVisionConfig.from_pretrained(sys.argv[1]))
with safe_open(sys.argv[1] + "/model.safetensors", "pt") as opened:
    print({name: opened.get_slice(name).get_shape() for name in opened.keys()})
"""


def main() -> None:
    """Time both on both sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--full", action="store_true", help="also time the scan for NaN and Inf")
    arguments = parser.parse_args()
    bars = []
    with tempfile.TemporaryDirectory() as root:
        for title, (width, layers, size) in SHAPES.items():
            folder = Path(root) / f"{width}"
            parameters = write_sparse(folder, width, layers, size)
            command = [sys.executable, "-m", "encoders.inspection.command", str(folder)]
            seconds = wall(f"{title}, {parameters / 1e6:.0f} M: inspect-encoder", command, arguments.rounds)
            wall("  config and keys by transformers and safetensors", [sys.executable, "-c", RIVAL, str(folder)], 3)
            bars.append(Bar(f"{title}: seconds to inspect", seconds, "at most", 1.0))
            if arguments.full:
                wall("  inspect-encoder --full", [*command, "--full"], 3)
    conclude(bars)


def write_sparse(folder: Path, width: int, layers: int, size: int) -> int:
    """A float32 CLIPVisionModel folder whose tensors are holes in a file; returns its number of parameters."""
    block = {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    block |= {f"self_attn.{side}_proj": (width, width) for side in ("q", "k", "v", "out")}
    tensors: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "embeddings.position_embedding.weight": (1 + (size // 14) ** 2, width),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for n in range(layers):
        norms += [f"encoder.layers.{n}.layer_norm{k}" for k in (1, 2)]
        for name, shape in block.items():
            tensors |= {f"encoder.layers.{n}.{name}.weight": shape, f"encoder.layers.{n}.{name}.bias": shape[:1]}
    tensors |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 4 * prod(shape)
        header[f"vision_model.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        stream.truncate(8 + len(raw) + end)
    config = {"model_type": "clip_vision_model", "hidden_size": width, "intermediate_size": 4 * width}
    config |= {"num_hidden_layers": layers, "num_attention_heads": width // 64, "image_size": size, "patch_size": 14}
    (folder / "config.json").write_text(json.dumps(config))
    return end // 4


def wall(what: str, command: list[str], rounds: int) -> float:
    """Median wall seconds of a command after one round to warm the file cache."""
    taken = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        taken.append(time.perf_counter() - began)
    del taken[0]
    print(f"{what}: {statistics.median(taken):.2f} s ({min(taken):.2f} to {max(taken):.2f})", flush=True)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
