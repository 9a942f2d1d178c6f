"""Training objectives, one small file each: model + losses, `forward(batch) -> {"loss": ...}`."""

from encoders.config import EncoderConfig
from encoders.objectives.clip import Clip
from encoders.objectives.clips import Clips

OBJECTIVES: dict[str, type[Clip] | type[Clips]] = {"clip": Clip, "clips": Clips}


def build(config: EncoderConfig) -> Clip | Clips:
    """The training model of a config, freshly initialised from torch's global random state."""
    return OBJECTIVES[config.objective](config)
