"""CLIPA as the CLIPS paper trains it: CLIP whose one text per picture is mostly the web caption, sometimes the
synthetic."""

import numpy as np

from encoders.config import EncoderConfig, MixOptions
from encoders.data.captions import any_of
from encoders.data.pairs import Texts
from encoders.data.samples import Sample
from encoders.data.tokenizers import CaptionTokenizer
from encoders.objectives.clip import Clip


class Clipa(Clip):
    """Reads what Clip reads."""

    @staticmethod
    def texts(sample: Sample, tokenizer: CaptionTokenizer, config: EncoderConfig, rng: np.random.Generator) -> Texts:
        synthetic = rng.random() < (config.mix or MixOptions()).synthetic_share
        caption = any_of(sample, "long", rng) if synthetic else sample.web
        return {"text_ids": tokenizer.encode(caption, config.text.length)}
