"""The task of pre-training and of resolution fine-tuning: an objective on image-text pairs, scored by retrieval."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from encoders import encoder_run, objectives
from encoders.config import ObjectiveName
from encoders.data.formats import open_samples
from encoders.data.order import Shards
from encoders.data.pairs import TrainingPairs, collate, evaluation_set
from encoders.data.samples import BadSample, Samples
from encoders.data.tokenizers import FILE as TOKENIZER_FILE
from encoders.data.tokenizers import CaptionTokenizer
from encoders.errors import ModelError, UsageError
from encoders.objective import Objective
from encoders.sources.source import open_source
from eval.zero_shot.scorer import open_sets
from eval.zero_shot.scores import chance_r1, recalls, retrieval_ranks
from train.cached_step import cached_step
from train.config import PairData, PretrainConfig, ResolutionConfig
from train.loop import Artifact, Batch
from train.optim import decay_groups

TOKENIZER_SAMPLES = 20_000
EVALUATION_BATCH = 250
RANKS_FILE = "retrieval.jsonl"
FAMILY_OBJECTIVES: dict[str, ObjectiveName] = {"clips": "clips", "dreamlip": "dreamlip"}  # of published weights


def pretrain(config: PretrainConfig, accelerator: Accelerator) -> "PairTask":
    """A fresh model of `config.model`. Raises ModelError if the tokenizer's ids exceed the embedding table."""
    with accelerator.main_process_first():  # the first to open the set indexes it
        samples = open_samples(config.data.train)
    tokenizer = _tokenizer(config, samples, accelerator)
    if tokenizer.size > config.model.text.vocab_size:
        raise ModelError(
            f"the tokenizer has {tokenizer.size} ids but model.text.vocab_size is {config.model.text.vocab_size}; "
            "raise vocab_size or use a smaller tokenizer"
        )
    model = objectives.build(config.model)
    return PairTask("pretrain", asdict(config), config.data, samples, model, tokenizer, {"data": config.data.folder})


def finetune_resolution(config: ResolutionConfig) -> "PairTask":
    """The model of a finished run, or of published weights, with its position table, config and preprocessing at the
    new size.

    Raises ModelError if the source lacks a text tower or a tokenizer that fit here.
    """
    source = open_source(config.init, config.model_name, config.revision)
    if source.model is None or source.tokenizer is None:
        raise ModelError(
            f"{config.init} cannot be trained further, as it takes both towers and a tokenizer: "
            + "; ".join(source.provenance["notes"])
        )
    if isinstance(source.model, Objective):
        if config.objective is not None:
            raise UsageError(f"{config.init} goes on with its own objective; leave out `objective`")
        model = source.model
    else:
        name = config.objective or FAMILY_OBJECTIVES.get(source.family, "clip")
        model = objectives.around(source.model, name)
        print(f"{config.init}: published weights of family {source.family}, trained on with objective {name}")
    before = model.config.vision.image_size
    model.resize(config.image_size)
    print(f"position table: {before} px -> {config.image_size} px ({model.config.vision.grid} patches a side)")
    parents = {"data": config.data.folder, "init": next(iter(source.parents.values()))}
    samples = open_samples(config.data.train)
    return PairTask("resolution", asdict(config), config.data, samples, model.train(), source.tokenizer, parents)


class PairTask:
    """See train.loop.Task."""

    def __init__(
        self,
        name: str,
        config: dict[str, Any],
        data: PairData,
        samples: Samples,
        model: Objective,
        tokenizer: CaptionTokenizer,
        parents: dict[str, Path],
    ):
        self.name, self.config, self.data, self.parents = name, config, data, parents
        self.module: nn.Module = model
        self.entries: tuple[str, ...] = ("encode",)  # cached_step's first pass
        self.data_fingerprint = samples.fingerprint()
        self.base: dict[str, str] = {}  # a checkpoint holds every weight
        self.shards: Shards = samples
        self.model, self.tokenizer, self.samples = model, tokenizer, samples
        self.dataset: Dataset[dict[str, Any]] = TrainingPairs(
            samples, model.config, tokenizer, model.texts, config["run"]["seed"]
        )
        self.max_bad_fraction = data.max_bad_fraction
        # Opened now so that a missing folder is told before hours of training.
        self.held_out = {"val": open_samples(data.val), "test": open_samples(data.test)}
        self.zero_shot = open_sets(data.zero_shot)

    def collate(self, examples: list[dict[str, Any]]) -> Batch:
        return collate(examples, self.model.config)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return decay_groups(self.module, self.config["optim"]["weight_decay"])

    def step(self, module: nn.Module, micro_batches: list[Batch], accelerator: Accelerator) -> dict[str, Tensor]:
        """Several micro-batches make one contrastive batch, exactly, by cached embeddings."""
        if len(micro_batches) > 1:
            return cached_step(self.model, module, micro_batches, accelerator)
        output = module(micro_batches[0])
        accelerator.backward(output["loss"])
        return {name: value.detach() for name, value in output.items()}

    def adopt(self, module: nn.Module) -> None:
        assert isinstance(module, Objective)
        self.module = self.model = module

    def check_step(self, micro_batches: list[Batch], accelerator: Accelerator) -> str:
        return ""

    def evaluate(self, accelerator: Accelerator) -> dict[str, float]:
        i2t, t2i, _, _ = self._ranks("val", accelerator)
        return {f"val_{name}": value for name, value in recalls(i2t, t2i).items()} | self._zero_shot(accelerator)

    def finish(self, out: Path, accelerator: Accelerator) -> Artifact:
        encoder_run.save(out, self.model, self.tokenizer)  # first: nothing after it may cost the weights
        i2t, t2i, keys, captions = self._ranks("test", accelerator)
        rows = zip(keys, i2t.tolist(), t2i.tolist(), strict=True)
        lines = (json.dumps({"key": key, "i2t_rank": i, "t2i_rank": t}) for key, i, t in rows)
        (out / RANKS_FILE).write_text("\n".join(lines) + "\n")
        retrieval = {**recalls(i2t, t2i), "chance_r1": chance_r1(captions), "queries": len(keys)}
        print(
            f"retrieval on {len(keys)} test pairs: R@1 {retrieval['i2t_r1']:.1%} image->text, "
            f"{retrieval['t2i_r1']:.1%} text->image (chance {retrieval['chance_r1']:.2%})"
        )
        metrics = {"retrieval": retrieval, **({"zero_shot": self._zero_shot(accelerator)} if self.zero_shot else {})}
        return Artifact("encoder-run", self.parents, metrics)

    def _zero_shot(self, accelerator: Accelerator) -> dict[str, float]:
        figures: dict[str, float] = {}
        for one in self.zero_shot:
            with accelerator.autocast():
                scores = one.score(self.model, self.tokenizer, accelerator.device, EVALUATION_BATCH)
            figures |= {f"{one.spec.task}_{one.name}_{name}": value for name, value in scores.items()}
        return figures

    @torch.no_grad()
    def _ranks(self, split: str, accelerator: Accelerator) -> tuple[Tensor, Tensor, list[str], list[str]]:
        """Ranks of a held-out set (the query is the short caption for every objective), its keys and captions."""
        pairs = evaluation_set(self.held_out[split], self.model.config, self.tokenizer)
        self.model.eval()
        with accelerator.autocast():
            batches = [slice(i, i + EVALUATION_BATCH) for i in range(0, len(pairs["images"]), EVALUATION_BATCH)]
            images = [self.model.encode_image(pairs["images"][rows].to(accelerator.device)) for rows in batches]
            texts = [
                self.model.encode_text(pairs["short_ids"][rows].to(accelerator.device), pairs["short_lengths"][rows])
                for rows in batches
            ]
        self.model.train()
        return (
            *retrieval_ranks(torch.cat(images), torch.cat(texts), pairs["captions"]),
            pairs["keys"],
            pairs["captions"],
        )


def _tokenizer(config: PretrainConfig, samples: Samples, accelerator: Accelerator) -> CaptionTokenizer:
    if config.model.text.tokenizer is not None:
        return CaptionTokenizer.read(Path(config.model.text.tokenizer), config.model.text.kind)
    kept = config.run.resume and (config.run.out / TOKENIZER_FILE).is_file()
    if accelerator.is_main_process and not kept:
        text = config.model.text
        CaptionTokenizer.train(_captions(samples), text.vocab_size, text.kind).save(config.run.out)
    accelerator.wait_for_everyone()
    return CaptionTokenizer.read(config.run.out, config.model.text.kind)


def _captions(samples: Samples) -> Iterator[str]:
    for index in range(0, len(samples), max(len(samples) // TOKENIZER_SAMPLES, 1)):
        try:
            sample = samples[index]
        except BadSample:
            continue  # counted and named when training draws it
        yield from (sample.web, *sample.short.values(), *sample.long.values())
