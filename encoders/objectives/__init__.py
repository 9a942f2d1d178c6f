"""Training objectives, one small file each: model + losses, `forward(batch) -> {"loss": ...}`."""

from encoders.config import EncoderConfig
from encoders.objectives.clip import Clip
from encoders.objectives.clips import Clips

Objective = Clip | Clips
OBJECTIVES: dict[str, type[Clip] | type[Clips]] = {"clip": Clip, "clips": Clips}


def build(config: EncoderConfig) -> Objective:
    """The training model of a config, freshly initialised from torch's global random state."""
    return OBJECTIVES[config.objective](config)
