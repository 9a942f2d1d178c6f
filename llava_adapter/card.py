"""The model cards of LLaVA folders and their LoRA adapters: Hub metadata, use, training, scores, limits.

Everything stated comes from the folder's own manifest and configs, from results that were measured on this very model,
and from what the publisher says: its licence and the published models it was made from.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from encoders import manifest
from encoders.errors import DataError
from encoders.manifest import Manifest

STAGES = ("projector", "full", "lora", "qlora", "tower")  # in the order in which they can follow each other
Results = Mapping[str, Mapping[str, Any]]
"""By bench, as in results.json: task, metrics, protocol, questions, dataset."""
LOCAL = "local"  # revision of a data set that nobody fetched: it may hold anything


def llava_card(
    folder: Path, repo: str, seal: Manifest, license: str, base_models: Sequence[str], results: Results
) -> str:
    """README.md of a LLaVA folder that is published as `repo`."""
    config = json.loads((folder / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    side = vision["image_size"] // vision["patch_size"]
    data = _metadata("transformers", license, base_models, "finetune", results, [])
    return f"""---
{data}
---

# LLaVA with a swapped vision encoder

A stock `LlavaForConditionalGeneration`: images of {vision["image_size"]} px become {side} x {side} patch features
(`hidden_states[{config["vision_feature_layer"]}]` of a `CLIPVisionModel` with {vision["num_hidden_layers"]} layers of
{vision["hidden_size"]}, `{vision["hidden_act"]}`), a two-layer projector maps them to a `{text["model_type"]}` language
model with {text["num_hidden_layers"]} layers of {text["hidden_size"]} and a vocabulary of {text["vocab_size"]:,}.

```python
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
image = Image.open("picture.jpg")
model = LlavaForConditionalGeneration.from_pretrained("{repo}", dtype="auto")
processor = AutoProcessor.from_pretrained("{repo}")
chat = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is in the picture?"}}]}}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=image, text=prompt, add_special_tokens=False, return_tensors="pt").to(model.dtype)
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```
The chat template writes every special token itself, hence `add_special_tokens=False`. Transformers 4.57
and 5 both load every weight.

## Training
{_training(seal)}

## Results
{_results(results)}

## Limits
Answers are not checked for truth or harm, and inherit what the language model and the captions got wrong. Pictures are
seen at {vision["image_size"]} px: small print is lost.{_fold_warning(vision)}
"""


def adapter_card(adapter: Path, repo: str, seal: Manifest, license: str, base_model: str, results: Results) -> str:
    """README.md of a LoRA adapter published as `repo`; `base_model` is the published LLaVA it was trained on."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    adapted = [
        part.replace("_", " ") for part in ("vision_tower", "language_model") if part in config["target_modules"]
    ]
    data = _metadata("peft", license, [base_model], "adapter", results, ["lora"])
    return f"""---
{data}
---

# LoRA adapter of a LLaVA

LoRA of rank {config["r"]} (alpha {config["lora_alpha"]}) on the {" and the ".join(adapted)} of
[{base_model}](https://huggingface.co/{base_model}), and in full: {", ".join(config["modules_to_save"] or ["nothing"])}.

```python
from peft import PeftModel
from transformers import LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained("{base_model}", dtype="auto")
model = PeftModel.from_pretrained(model, "{repo}")
```

## Training
{_training(seal)}

## Results
Of the merged model:

{_results(results)}

## Limits
It fits {base_model} only: on other weights it loads and answers badly.
"""


def read_results(folder: Path, model: Manifest) -> Results:
    """The scores in a results folder of eval-mllm.

    Raises DataError if they are another model's, of a part of the questions only, or if questions had no answer.
    """
    seal = manifest.read(folder, "results")
    manifest.verify(folder)
    if seal.parents["model"].fingerprint != model.fingerprint:
        raise DataError(
            f"{folder} holds the scores of another model ({seal.parents['model'].path}); run eval-mllm on it"
        )
    if seal.config["limit"] is not None:
        raise DataError(
            f"{folder} answered only {seal.config['limit']} questions per bench; run eval-mllm without --limit"
        )
    benches: Results = json.loads((folder / "results.json").read_text())["benches"]
    for name, bench in benches.items():
        if bench["failed"]:
            raise DataError(
                f"{folder}: {len(bench['failed'])} questions of {name} had no answer and count as wrong; run eval-mllm "
                "without --allow-errors"
            )
    return benches


def _metadata(
    library: str, license: str, base_models: Sequence[str], relation: str, results: Results, tags: list[str]
) -> str:
    scores = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="custom" if _is_local(bench) else bench["dataset"]["repository"],
            dataset_name=_dataset(name, bench),
            dataset_config=bench["dataset"]["config"] or None,
            dataset_split=bench["dataset"]["split"],
            dataset_revision=None if _is_local(bench) else bench["dataset"]["revision"],
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for name, bench in results.items()
        for metric, value in bench["metrics"].items()
    ]
    return ModelCardData(
        license=license,
        library_name=library,
        pipeline_tag="image-text-to-text",
        base_model=list(base_models) or None,
        base_model_relation=relation if base_models else None,  # of several bases the Hub would take it for a merge
        tags=["llava", "vision-language", "encoder-swap", *tags],
        model_name="LLaVA" if scores else None,
        eval_results=scores or None,
    ).to_yaml()


def _is_local(bench: Mapping[str, Any]) -> bool:
    return bool(bench["dataset"]["revision"] == LOCAL)


def _dataset(name: str, bench: Mapping[str, Any]) -> str:
    """Questions that were not fetched are named as such: their scores stand beside nobody else's."""
    asked = bench["dataset"]["fingerprint"][:12]
    return f"{name}-shaped questions from a local folder ({asked})" if _is_local(bench) else name


def _training(seal: Manifest) -> str:
    """One line per stage in the manifest's config."""
    lines = [
        f"* {name}: {_trained(name, stage)}; {stage['run']['steps']} steps of {stage['run']['batch_size']}, "
        f"{stage['run']['precision']}, seed {stage['run']['seed']}"
        for name in STAGES
        if (stage := seal.config.get(name)) is not None
    ]
    encoder, llm = seal.config["encoder"], seal.config["llm"]["fingerprint"]
    since = ", trained further since" if encoder.get("trained_further") else ""
    return "\n".join(
        [*lines, "", f"Fingerprints: vision encoder `{encoder['fingerprint']}`{since}, language model `{llm}`."]
    )


def _trained(name: str, stage: Mapping[str, Any]) -> str:
    """What a stage trained, each part with its rate."""
    rate = f"{stage['optim']['lr']:g}"
    if name == "projector":
        return f"projector (lr {rate})"
    lora = f"LoRA r {stage['lora_r']} alpha {stage['lora_alpha']}"
    how = {"full": "in full", "lora": lora, "qlora": f"{lora} on weights of {stage.get('bits')} bits"}
    parts = [f"projector (lr {stage['projector_lr']:g})"]
    if name == "tower":
        parts.insert(0, f"vision tower ({how[stage['vision']]}, lr {stage['vision_lr']:g})")
    language = stage["language"] if name == "tower" else name
    return ", ".join(parts + ([f"language model ({how[language]}, lr {rate})"] if language != "frozen" else []))


def _results(results: Results) -> str:
    if not results:
        return "None were published with this model."
    rows = [
        f"| {_dataset(name, bench)} | {metric} | {value:.4f} | {bench['questions']} | {bench['protocol']['scoring']} |"
        for name, bench in results.items()
        for metric, value in bench["metrics"].items()
    ]
    head = ["| questions | metric | value | number | scoring |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows, "\nlmms-eval's own tasks, greedy decoding."])


def _fold_warning(vision: Mapping[str, Any]) -> str:
    if not vision.get("folded"):
        return ""
    return (
        " The vision tower is folded (its norm before the blocks stands for none): use bfloat16 or float32, never "
        "float16, and do not train its embeddings."
    )
