"""The arms of the ablations: DreamLIP's ladder, CLIPS' cuts, and CLIPS against its baselines.

Towers, pictures seen, learning rate and seeds are equal in all arms. What an arm changes may change its texts per
picture too: raw has one, whole captions two, sub-captions five.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from encoders.config import (
    CaptionerConfig,
    ClipsOptions,
    DreamlipOptions,
    EncoderConfig,
    MixOptions,
    PreprocessConfig,
    TextConfig,
    VisionConfig,
)
from encoders.data.scenes.world import ScenesConfig

NO_CAPTIONER = ClipsOptions(beta=0.0)
LADDER = {  # DreamLIP's ablation, each step on top of the one before
    "dreamlip_raw": DreamlipOptions(k=0, grouping_weight=0.0),
    "dreamlip_long_whole": DreamlipOptions(k=1, short=False, long="whole", grouping_weight=0.0),
    "dreamlip_sub_captions": DreamlipOptions(k=4, short=False, grouping_weight=0.0),
    "dreamlip_short": DreamlipOptions(k=4, grouping_weight=0.0),
    "dreamlip_grouping": DreamlipOptions(k=4),
}
CUT_LENGTHS = (8, 16, 32, 77)  # 77 keeps nearly all of a long caption
CUT_LENGTH = 16
CUTS = {f"cut_sub_caption_{n}": replace(NO_CAPTIONER, cut="sub_caption", cut_tokens=n) for n in CUT_LENGTHS} | {
    f"cut_{cut}_{CUT_LENGTH}": replace(NO_CAPTIONER, cut=cut, cut_tokens=CUT_LENGTH)
    for cut in ("truncation", "random_mask", "block_mask")
}
FRAMEWORKS: dict[str, dict[str, Any]] = {
    "clipa": {"objective": "clipa", "mix": MixOptions()},
    "coca": {"objective": "coca", "mix": MixOptions()},
    "clips": {"objective": "clips", "clips": ClipsOptions(cut="sub_caption", cut_tokens=CUT_LENGTH)},
}
VERSION = 2  # raise it when a change of encoders/ changes what an arm learns: kept results are then trained again
ARMS = (*LADDER, *CUTS, *FRAMEWORKS)


@dataclass(frozen=True)
class Profile:
    """Size of everything that the arms share."""

    name: str
    scenes: ScenesConfig
    vision: VisionConfig
    text: TextConfig
    captioner: CaptionerConfig
    embed_dim: int
    steps: int
    batch_size: int
    lr: float
    warmup: int
    workers: int

    def config(self, arm: str) -> EncoderConfig:
        """The model of an arm. DreamLIP's have its causal text tower; so have all others, that families compare."""
        shared = EncoderConfig(
            embed_dim=self.embed_dim,
            vision=self.vision,
            text=self.text,
            preprocess=PreprocessConfig(crop_area=(1.0, 1.0)),
        )
        if arm in LADDER:
            return replace(shared, objective="dreamlip", dreamlip=LADDER[arm])
        if arm in CUTS:
            return replace(shared, objective="clips", clips=CUTS[arm])
        captioner = self.captioner if arm in ("coca", "clips") else None
        return replace(shared, captioner=captioner, **FRAMEWORKS[arm])

    def identity(self, arm: str, seed: int) -> dict[str, Any]:
        """What a kept result is of. `settings` is a hash of all that could change it."""
        settings = {**asdict(self), "workers": None, "model": self.config(arm).to_dict(), "version": VERSION}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        return {"arm": arm, "seed": seed, "profile": self.name, "settings": digest[:16]}


def kept_results(profile: str) -> list[dict[str, Any]]:
    """The kept results that the present arms and profile would give again."""
    file = results_file(profile)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [r for r in rows if PROFILES[profile].identity(r["arm"], r["seed"]).items() <= r.items()]


def results_file(profile: str) -> Path:
    """One JSON line per (arm, seed), kept in the repository so that the table grows over runs."""
    return Path(__file__).parent / f"ablation_{profile}.jsonl"


PROFILES = {
    "cpu": Profile(
        name="cpu",
        scenes=ScenesConfig(
            train=16000,
            val=1000,
            test=2000,
            chats=0,
            bench_images=0,
            masks=True,
            classes=20,
            image_size=32,
            max_objects=2,
        ),
        vision=VisionConfig(
            image_size=32, patch_size=8, width=128, layers=3, heads=2, mlp_width=512, position_table="sincos2d"
        ),
        text=TextConfig(
            kind="clip", vocab_size=1000, length=77, width=128, layers=2, heads=2, activation="gelu", norm_eps=1e-5
        ),
        captioner=CaptionerConfig(tokens=64, width=64, layers=1, heads=2),
        embed_dim=128,
        steps=600,
        batch_size=64,
        lr=1e-3,
        warmup=30,
        workers=0,
    ),
    "gpu": Profile(
        name="gpu",
        scenes=ScenesConfig(
            train=100_000, val=1000, test=2000, chats=0, bench_images=0, masks=True, classes=200, image_size=112
        ),
        vision=VisionConfig(image_size=112, patch_size=16, width=384, layers=12, heads=6, mlp_width=1536),
        text=TextConfig(
            kind="clip", vocab_size=4000, length=77, width=384, layers=6, heads=6, activation="gelu", norm_eps=1e-5
        ),
        captioner=CaptionerConfig(tokens=96, width=384, layers=4, heads=6),
        embed_dim=384,
        steps=400,
        batch_size=1024,
        lr=1e-3,
        warmup=60,
        workers=12,
    ),
}
