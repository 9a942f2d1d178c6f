"""Tiny finished encoder runs for the tests of export: random weights, all moved away from their initial values."""

from pathlib import Path
from typing import Any

import torch

from encoders import encoder_run, manifest
from encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from encoders.data.tokenizers import CaptionTokenizer
from encoders.objectives import build

TINY: dict[str, Any] = {"image_size": 48, "patch_size": 8, "width": 32, "layers": 3, "heads": 2, "mlp_width": 64}
CLIPS: dict[str, Any] = {
    "pre_norm": False,
    "pool": "mean",
    "norm_after_pool": True,
    "position_table": "sincos2d",
    "norm_eps": 1e-6,
}
"""Of an image tower that export has to fold."""
BERT_TEXT = TextConfig(vocab_size=60, length=8, width=32, layers=1, heads=2, padding="reference")
CLIP_TEXT = TextConfig(
    kind="clip", vocab_size=600, length=12, width=48, layers=2, heads=2, norm_eps=1e-5, activation="gelu"
)
PREPROCESS = PreprocessConfig(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), interpolation="bicubic")
RETRIEVAL = {"i2t_r1": 0.5, "t2i_r1": 0.25, "chance_r1": 0.01, "queries": 100}


def write_run(
    folder: Path,
    text: TextConfig = BERT_TEXT,
    preprocess: PreprocessConfig = PREPROCESS,
    **vision: Any,
) -> Path:
    """A run of objective clip whose image tower is TINY with `vision` on top."""
    torch.manual_seed(0)
    config = EncoderConfig(
        objective="clip", embed_dim=16, vision=VisionConfig(**TINY | vision), text=text, preprocess=preprocess
    )
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    folder.mkdir(parents=True)
    tokenizer = CaptionTokenizer.train(["a red square"], text.vocab_size, text.kind)
    encoder_run.save(folder, model, tokenizer)
    manifest.seal(folder, "encoder-run", {}, metrics={"retrieval": RETRIEVAL})
    return folder
