"""Useful FLOPs of a training step in closed form: matrix products, convolutions and attention over real tokens.

Two per multiply-add, backward twice the forward, attention not halved for causality, nothing for what is recomputed.
"""

from collections.abc import Sequence

from encoders.config import EncoderConfig


def blocks(layers: int, width: int, lengths: Sequence[int]) -> float:
    """Forward of pre-norm blocks with an MLP of four times the width, over sequences that attend to themselves."""
    return layers * sum(24 * n * width**2 + 4 * n**2 * width for n in lengths)


def dual_encoder_flops(config: EncoderConfig, images: int, lengths: Sequence[int]) -> float:
    """Forward and backward of the image tower on `images` pictures and the text tower on texts of these lengths."""
    vision, text = config.vision, config.text
    patches = vision.grid**2
    conv = 2 * patches * 3 * vision.patch_size**2 * vision.width
    grouping = config.dreamlip is not None and config.dreamlip.grouping_weight != 0
    projected = patches if grouping else 0
    image = blocks(vision.layers, vision.width, [patches + 1]) + 2 * (1 + projected) * vision.width * config.embed_dim
    texts = blocks(text.layers, text.width, lengths) + 2 * len(lengths) * text.width * config.embed_dim
    return images * (3 * image + 2 * conv) + 3 * texts  # pixels get no gradient


def captioner_flops(config: EncoderConfig, web: Sequence[int], targets: Sequence[int]) -> float:
    """Forward and backward of the CLIPS captioner: per picture, tokens of the web caption and of the target."""
    captioner = config.captioner
    assert captioner is not None
    patches, width = config.vision.grid**2, captioner.width
    words = [n - (config.text.kind == "bert") for n in web]  # the class token is no condition
    condition = 2 * width * (len(web) * patches * config.vision.width + sum(words) * config.text.width)
    sequences = [patches + n + queries for n, queries in zip(words, targets, strict=True)]
    head = 2 * sum(targets) * width * config.text.vocab_size
    return 3 * (condition + blocks(captioner.layers, width, sequences) + head)
