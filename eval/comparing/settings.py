"""Which settings differ between the arms of a comparison: none should but the encoder's and, within arms, the seed."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from encoders.errors import DataError

Role = Literal["encoder", "seed", "idle", "other"]
ABSENT = "(not set)"
# What follows from the encoder by its nature: what it is, how its pictures are prepared, how many tokens it gives.
ENCODER = re.compile(
    r"(model\.)?encoder(\.|$)|(.*\.)?"
    r"(processor|image_processor|preprocess|vision_config|vision_feature_select_strategy"
    r"|image_tokens|image_seq_length|num_additional_image_tokens)(\.|$)"
)
# The LLaVA's choice: the layer, and whether pictures are cropped or padded.
NOT_ENCODER = re.compile(r"encoder\.vision_feature_layer$|(.*\.)?do_(pad|center_crop)$")
SEED = re.compile(r"(.*\.)?seed$")
# Settings of a training run that have no part in what it learns.
IDLE = re.compile(
    r".*\brun\.(out|resume|workers|threads|log_every|eval_every|save_every|keep|tracker|hang_limit)$"
    r"|model\..*\b(data\.chats\.path|held_out)$"  # conversations are known by their content
)


@dataclass(frozen=True)
class Setting:
    """A setting that is not equal in all runs: a value per arm, or, where an arm's seeds differ, a list of them."""

    key: str
    values: list[Any]
    role: Role


def compare_settings(arms: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[list[Setting], dict[str, Any]]:
    """The settings that differ between or within arms, under dotted names, and those that all share."""
    flat = [[dict(_flatten(run)) for run in arm] for arm in arms]
    differing, shared = [], {}
    for key in sorted({key for arm in flat for run in arm for key in run}):
        values = [[run.get(key, ABSENT) for run in arm] for arm in flat]
        role = role_of(key)
        if role == "seed":
            values = [sorted(of_arm, key=json.dumps) for of_arm in values]
            alike = _same_seeds(values)
        else:
            alike = all(value == values[0][0] for of_arm in values for value in of_arm)
        shown = [of_arm[0] if all(value == of_arm[0] for value in of_arm) else of_arm for of_arm in values]
        if alike:
            shared[key] = shown[0]
        else:
            differing.append(Setting(key, shown, _role_of_difference(key, role, values)))
    return differing, shared


def role_of(key: str) -> Role:
    """What a setting is about, by its dotted name."""
    if ENCODER.match(key) and not NOT_ENCODER.match(key):
        return "encoder"
    if SEED.fullmatch(key):
        return "seed"
    return "idle" if IDLE.fullmatch(key) else "other"


def check_settings(differing: Sequence[Setting], names: Sequence[str]) -> None:
    """Raise DataError listing the settings besides the encoder that differ."""
    others = [setting for setting in differing if setting.role == "other"]
    if others:
        lines = [
            f"  {setting.key}: "
            + ", ".join(f"{name} {json.dumps(value)}" for name, value in zip(names, setting.values, strict=True))
            for setting in others
        ]
        raise DataError(
            "these settings differ besides the encoder, so a difference in the scores may come from them:\n"
            + "\n".join(lines)
            + "\ntrain and evaluate all arms alike, or pass --allow-differences: the report then says so at its top"
        )


def check_seeds(arm: Sequence[Mapping[str, Any]], name: str) -> None:
    """Raise DataError if two runs of an arm were trained alike, seed and all.

    What the rounding of a GPU makes them differ by is less than the luck of training.
    """
    trained = [
        {key: value for key, value in _flatten(run) if role_of(key) != "idle"} for run in arm if run.get("model")
    ]
    if any(one == other for one, other in combinations(trained, 2)):
        raise DataError(
            f"two runs of {name!r} have the same seed and encoder, so they do not show the luck of training; name one "
            "of them, or train with another run.seed"
        )


def _same_seeds(values: Sequence[Sequence[Any]]) -> bool:
    """Whether the arms were trained with the same seeds, or one with some of another's, in whatever order."""
    most = max(values, key=len)
    return all(value in most for of_arm in values for value in of_arm)


def _role_of_difference(key: str, role: Role, values: Sequence[Sequence[Any]]) -> Role:
    """Seeds may not differ between arms; within an arm no more of the encoder than its weights: its own seeds."""
    within = any(value != of_arm[0] for of_arm in values for value in of_arm)
    if role == "seed" or (role == "encoder" and within and not key.endswith((".fingerprint", ".path", ".seed"))):
        return "other"
    return role


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
