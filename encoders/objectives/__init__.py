"""Training objectives, one small file each; encoders/objective.py says what one is."""

from encoders.config import EncoderConfig
from encoders.objective import Objective
from encoders.objectives.clip import Clip
from encoders.objectives.clipa import Clipa
from encoders.objectives.clips import Clips
from encoders.objectives.coca import Coca
from encoders.objectives.dreamlip import Dreamlip

OBJECTIVES: dict[str, type[Objective]] = {
    "clip": Clip,
    "clipa": Clipa,
    "coca": Coca,
    "clips": Clips,
    "dreamlip": Dreamlip,
}


def build(config: EncoderConfig) -> Objective:
    """The training model of a config, freshly initialised from torch's global random state."""
    return OBJECTIVES[config.objective](config)
