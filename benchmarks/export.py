"""export-encoder on a random ViT-L/14 at 336 px: seconds and peak memory of the whole command, certificate included.

    python benchmarks/export.py [--source clips|run]

`clips` is an open_clip folder without a norm before the blocks: the certificate runs open_clip, the export is folded.
`run` is an encoder run of ours. Two pictures, two threads, a fresh process; memory counts everything resident at its
peak, libraries and mapped files too, over the bytes of the exported tower's float32 weights.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from measure import Bar, conclude

from encoders import encoder_run, manifest, objectives
from encoders.config import EncoderConfig, TextConfig, VisionConfig
from encoders.data.tokenizers import CaptionTokenizer
from encoders.export import open_clip as open_clip_export
from encoders.weights import safetensors_file

L14 = VisionConfig(image_size=336, patch_size=14, width=1024, layers=24, heads=16, mlp_width=4096)
CLIPS = replace(L14, pre_norm=False, pool="mean", norm_after_pool=True, position_table="sincos2d", norm_eps=1e-6)
TEXT = TextConfig(vocab_size=60, length=8, width=32, layers=1, heads=1, padding="reference")  # not what is measured


def write_source(kind: str, folder: Path) -> None:
    """A random encoder as an encoder run, or as an open_clip folder."""
    torch.manual_seed(0)
    vision = L14 if kind == "run" else CLIPS
    model = objectives.build(EncoderConfig(embed_dim=768, vision=vision, text=TEXT))
    folder.mkdir()
    if kind == "run":
        encoder_run.save(folder, model, CaptionTokenizer.train(["a red square"], TEXT.vocab_size, TEXT.kind))
        manifest.seal(folder, "encoder-run", {})
        return
    config = open_clip_export.model_config(model.vision, TEXT, model.config.preprocess, 2, own_tokenizer=True)
    manifest.write_json(folder / open_clip_export.CONFIG_FILE, config)
    state = open_clip_export.state_dict(model.vision, model.text, model.logit_scale)
    safetensors_file.write(folder / open_clip_export.WEIGHTS_FILE, state, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=("clips", "run"), default="clips")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_source(options.source, options.write)
        return
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "open_clip_torch")), flush=True)
    with tempfile.TemporaryDirectory() as place:
        source, out = Path(place, "source"), Path(place, "encoder")
        subprocess.run([sys.executable, __file__, "--source", options.source, "--write", str(source)], check=True)
        began = time.monotonic()
        command = [sys.executable, "-m", "encoders.export.command", str(source), str(out)]
        child = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "2"})
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - began
        if status:
            sys.exit("the export failed")
        weights = (out / "model.safetensors").stat().st_size
    peak = usage.ru_maxrss * 1024
    print(
        f"  {usage.ru_utime + usage.ru_stime:.0f} CPU seconds; peak {peak / 2**20:.0f} MiB, "
        f"weights {weights / 2**20:.0f} MiB"
    )
    conclude(
        [
            Bar("seconds on two threads", seconds, "at most", 60),
            Bar("peak memory over the weights", peak / weights, "at most", 3),
        ]
    )


if __name__ == "__main__":
    main()
