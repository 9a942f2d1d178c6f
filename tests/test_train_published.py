"""Published towers are trained on at a higher resolution."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from pair_shards import write_shards
from source_folders import BERT, CAPTIONS, CLIPS, MEAN_POOL, SQUASH, TOKENS, config_of, write_open_clip, write_tokenizer

from encoders import encoder_run
from encoders.errors import ModelError
from encoders.sources.source import open_source
from encoders.vision import resize_table
from train import loop, pair_task, signals, start
from train.config import OptimConfig, PairData, ResolutionConfig, RunConfig


@pytest.mark.parametrize(("kind", "objective"), [("clips", "clips"), ("clip", "clip"), ("clip", "dreamlip")])
def test_published_towers_are_trained_on_at_a_higher_resolution(kind: str, objective: str, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path / "published"
    given: dict[str, Any] = CLIPS if kind == "clips" else {}
    write_open_clip(folder, config_of(given), SQUASH)
    tokenizer = write_tokenizer(folder, "bert" if kind == "clips" else "clip")
    write_shards(tmp_path / "train", 16)
    write_shards(tmp_path / "held_out", 4, shards=1)
    before = open_source(str(folder))
    config = ResolutionConfig(
        init=str(folder),
        objective="dreamlip" if objective == "dreamlip" else None,
        image_size=48,
        data=PairData(tmp_path / "train", tmp_path / "held_out", tmp_path / "held_out"),
        run=RunConfig(out=tmp_path / "run", steps=1, batch_size=8, workers=0, threads=1, precision="no"),
        optim=OptimConfig(lr=1e-6, weight_decay=0.0),
    )
    start.prepare_folder(config.run)
    accelerator = start.build_accelerator(config.run)
    loop.train(pair_task.finetune_resolution(config), config.run, config.optim, signals.StopRequest(), accelerator)
    after, read = encoder_run.load(tmp_path / "run")
    assert (after.config.objective, after.config.vision.image_size) == (objective, 48)
    assert after.config.preprocess == before.preprocess
    assert after.config.text.padding == ("reference" if kind == "clips" else "packed")
    assert read.encode(CAPTIONS[1], TOKENS) == tokenizer.encode(CAPTIONS[1], TOKENS)
    old, new = before.model.state_dict(), after.state_dict()
    table = "vision.model.embeddings.position_embedding.weight"
    old[table] = resize_table(old[table], 6)
    assert new.keys() - old.keys() == ({"grouping_scale"} if objective == "dreamlip" else set())
    for name, tensor in old.items():
        torch.testing.assert_close(new[name], tensor, rtol=0, atol=2e-6)  # one step of 1e-6
    assert any(not new[name].equal(tensor) for name, tensor in old.items())


def test_towers_that_cannot_be_trained_on_are_refused_with_what_is_missing(tmp_path: Path) -> None:
    write_open_clip(tmp_path / "clipa", config_of({"vision_cfg": MEAN_POOL, "text_cfg": BERT}))
    with pytest.raises(ModelError, match="takes both towers and a tokenizer: the text tower is left out"):
        pair_task.finetune_resolution(ResolutionConfig(init=str(tmp_path / "clipa")))
    write_open_clip(tmp_path / "clips", config_of(CLIPS))
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        pair_task.finetune_resolution(ResolutionConfig(init=str(tmp_path / "clips")))
