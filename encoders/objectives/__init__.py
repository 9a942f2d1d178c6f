"""Training objectives, one small file each; encoders/objective.py says what one is."""

from dataclasses import replace

from encoders.config import ClipsOptions, EncoderConfig, ObjectiveName
from encoders.dual_encoder import DualEncoder
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


def around(towers: DualEncoder, name: ObjectiveName) -> Objective:
    """Published towers as the training model of an objective; what it learns beside them starts afresh. clips goes
    without its captioner: nobody published one."""
    clips = ClipsOptions(beta=0.0) if name == "clips" else None
    model = build(replace(towers.config, objective=name, clips=clips))
    model.vision, model.text, model.logit_scale = towers.vision, towers.text, towers.logit_scale
    return model
