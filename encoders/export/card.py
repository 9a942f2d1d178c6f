"""The model card of an exported encoder: README.md with the Hub's metadata, what the encoder is, how to use it, what
was measured and what it cannot do. Every figure in it comes from the certificate or from the run's manifest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from encoders.publish.publishable import UNNAMED

FILE = "README.md"
UNKNOWN_LICENSE = "unknown"
PAPERS = {
    "clips": """@article{liu2024clips,
  title={CLIPS: An Enhanced CLIP Framework for Learning with Synthetic Captions},
  author={Liu, Yanqing and Li, Xianhang and Wang, Zeyu and Zhao, Bingchen and Xie, Cihang},
  journal={arXiv preprint arXiv:2411.16828},
  year={2024}
}""",
    "dreamlip": """@inproceedings{zheng2024dreamlip,
  title={DreamLIP: Language-Image Pre-training with Long Captions},
  author={Zheng, Kecheng and Zhang, Yifei and Wu, Wei and Lu, Fan and others},
  booktitle={ECCV},
  year={2024}
}""",
    "clipa": """@inproceedings{li2023clipa,
  title={An Inverse Scaling Law for CLIP Training},
  author={Li, Xianhang and Wang, Zeyu and Xie, Cihang},
  booktitle={NeurIPS},
  year={2023}
}""",
    "coca": """@article{yu2022coca,
  title={CoCa: Contrastive Captioners are Image-Text Foundation Models},
  author={Yu, Jiahui and Wang, Zirui and Vasudevan, Vijay and others},
  journal={TMLR},
  year={2022}
}""",
    "clip": """@inproceedings{radford2021clip,
  title={Learning Transferable Visual Models From Natural Language Supervision},
  author={Radford, Alec and Kim, Jong Wook and Hallacy, Chris and others},
  booktitle={ICML},
  year={2021}
}""",
}
RETRIEVAL = {  # key in a run's metrics -> name of the metric
    "i2t_r1": "image-to-text R@1",
    "i2t_r5": "image-to-text R@5",
    "i2t_r10": "image-to-text R@10",
    "t2i_r1": "text-to-image R@1",
    "t2i_r5": "text-to-image R@5",
    "t2i_r10": "text-to-image R@10",
}
POOLS = {
    ("class", False): "the class token after the final norm, which is `pooler_output`",
    (
        "mean",
        False,
    ): "the mean of the patch tokens after the final norm; `pooler_output` is the class token and is **not** it",
    (
        "mean",
        True,
    ): "the final norm of the mean of the patch tokens; `pooler_output` is the class token and is **not** it",
}


def write(
    folder: Path, provenance: Mapping[str, Any], facts: Mapping[str, Any], certificate: Mapping[str, Any]
) -> None:
    """Write README.md: `facts` is encoder.json, `certificate` is parity.json, `provenance` is the source's."""
    data = metadata(provenance, facts, "two_towers" in certificate)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text(provenance, facts, certificate)}")
    (folder / FILE).write_text(card.content)


def metadata(provenance: Mapping[str, Any], facts: Mapping[str, Any], with_text: bool) -> ModelCardData:
    """What the Hub indexes. Results of a run belong to its own resolution: a resized encoder has none."""
    objective = _objective(provenance, facts)
    tags = ["clip", "clip_vision_model", "vision", "vision-encoder", "llava", objective]
    tags += ["open_clip", "zero-shot-image-classification"] if with_text else []
    measured = results(provenance) if facts["resize"] is None else None
    return ModelCardData(
        license=provenance.get("license") or UNKNOWN_LICENSE,
        license_name=provenance.get("license_name"),
        license_link=provenance.get("license_link"),
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        base_model=provenance.get("base_model"),
        tags=sorted(set(tags)),
        model_name=title(provenance, facts) if measured else None,
        eval_results=measured,
    )


def results(provenance: Mapping[str, Any]) -> list[EvalResult] | None:
    """The held-out retrieval of a run as the Hub's model-index; None for a source that was not measured here."""
    measured = provenance.get("metrics", {}).get("retrieval", {})
    return [
        EvalResult(
            task_type="image-text-retrieval",
            task_name="Zero-shot retrieval",
            dataset_type="custom",
            dataset_name=f"held-out pairs of the training world ({measured['queries']} queries)",
            metric_type=key,
            metric_name=name,
            metric_value=round(100 * measured[key], 2),
        )
        for key, name in RETRIEVAL.items()
        if key in measured and "queries" in measured
    ] or None


def title(provenance: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Objective or family, architecture and resolution."""
    vision = facts["vision"]
    size = f"{vision['layers']} x {vision['width']}, patch {vision['patch_size']}"
    return f"{_objective(provenance, facts)} vision encoder ({size}) at {vision['image_size']} px"


def text(provenance: Mapping[str, Any], facts: Mapping[str, Any], certificate: Mapping[str, Any]) -> str:
    """The card below its metadata."""
    sections = [
        f"# {title(provenance, facts)}",
        _what(provenance, facts),
        _usage(facts, "two_towers" in certificate),
        _parity(certificate),
        _measured(provenance, facts),
        _limits(provenance, facts),
    ]
    if paper := PAPERS.get(_objective(provenance, facts)):
        sections.append(f"## Citation\n```bibtex\n{paper}\n```")
    return "\n\n".join(section for section in sections if section) + "\n"


def _objective(provenance: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    objective: str = provenance.get("objective", facts["family"])
    return objective


def _what(provenance: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    vision = facts["vision"]
    commit = f" at `{provenance['commit']}`" if provenance.get("commit") else ""
    loads = "A plain `CLIPVisionModel`: it loads with transformers alone, 4.37 and newer, and is a "
    lines = [
        loads + ("vision tower for LLaVA in bfloat16." if facts["folded"] else "drop-in vision tower for LLaVA."),
        f"- Source: `{provenance['source']}`{commit}, family `{facts['family']}`; sha256 of its weights "
        f"`{provenance['weights_sha256']}`",
        f"- {vision['layers']} layers of width {vision['width']}, {vision['heads']} heads, patch "
        f"{vision['patch_size']}, {vision['image_size']} x {vision['image_size']} px, `{vision['activation']}`, "
        f"layer norm eps {vision['norm_eps']}",
        f"- Pictures: {_preprocessing(facts['preprocess'], vision['image_size'])}",
    ]
    return "\n".join([lines[0], "", *lines[1:], *(f"- {note}" for note in provenance.get("notes", ()))])


def _preprocessing(preprocess: Mapping[str, Any], size: int) -> str:
    way = (
        f"both sides resized to {size}"
        if preprocess["resize"] == "squash"
        else f"short side to {size}, then the centre"
    )
    return f"{way}, {preprocess['interpolation']}, mean {list(preprocess['mean'])}, std {list(preprocess['std'])}"


def _usage(facts: Mapping[str, Any], with_text: bool) -> str:
    vision = facts["vision"]
    pool = POOLS[vision["pool"], vision["norm_after_pool"]]
    projected = (
        "\n`image_projection.safetensors` holds the projection (`visual_projection.weight`, E x D) that makes the "
        "image embedding of it; `encoder.json` states the rule."
        if facts["embed_dim"] is not None
        else ""
    )
    half = (
        " Its `llava/model/builder.py` loads everything in float16, in which this encoder is wrong without an error: "
        "write `torch.bfloat16` there (twice), and in the code that casts pictures to `.half()` or `torch.float16`."
        if facts["folded"]
        else ""
    )
    grid = vision["image_size"] // vision["patch_size"]
    open_clip = """
Both towers, for zero-shot use with open_clip (download the folder first):
```python
import open_clip
model, preprocess = open_clip.create_model_from_pretrained("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
```
"""
    return f"""## Usage
```python
from PIL import Image
from transformers import AutoImageProcessor, CLIPVisionModel

name = "{UNNAMED}"  # or a folder
image = Image.open("picture.jpg")
tower = CLIPVisionModel.from_pretrained(name)
processor = AutoImageProcessor.from_pretrained(name)
output = tower(**processor(image, return_tensors="pt"), output_hidden_states=True)
patches = output.hidden_states[-2][:, 1:]  # (1, {grid * grid}, {vision["width"]}): what LLaVA reads
```
LLaVA-1.5's own code takes the folder as
`--vision_tower {UNNAMED} --mm_vision_select_layer -2 --mm_vision_select_feature patch`; with encoder-swap:
`accelerate launch train/tune_llava.py --stage projector --encoder FOLDER ...`.{half}

The image embedding pools {pool}.{projected}
{open_clip if with_text else ""}"""


def _parity(certificate: Mapping[str, Any]) -> str:
    rows = []
    for name, layer in certificate["float32"]["layers"].items():
        raw = f"{layer['raw_max_relative_error']:.1e}" if "raw_max_relative_error" in layer else "the same"
        other = certificate["bfloat16"]["layers"][name]
        rows.append(
            f"| {name} | {layer['max_abs_error']:.1e} | {layer['max_relative_error']:.1e} | {layer['min_cosine']:.7f} "
            f"| {raw} | {other['rms_error']:.1e} | {other['rounding_ratio']:.2f} |"
        )
    bounds, ratio = certificate["float32"]["bound"], certificate["bfloat16"]["bound"]["rounding_ratio"]
    return f"""## Parity with the source
{certificate["pictures"]} fixed pictures at {certificate["image_size"]} px, against the source's own implementation;
parity.json has all figures. Refused above {bounds["max_relative_error"]} of the largest activation or below a cosine of
{bounds["min_cosine"]} (float32), and above {ratio} times the source's own rounding error (bfloat16).

| layer | max abs error | relative | min cosine | raw, with channel means | bfloat16 RMS error | over the source's own |
|---|---|---|---|---|---|---|
""" + "\n".join(rows)


def _measured(provenance: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    measured = results(provenance)
    if measured is None:
        return ""
    if facts["resize"] is not None:
        return "## Results\nThe run was measured at its own resolution only; at this one it was not."
    rows = "\n".join(f"| {result.metric_name} | {result.metric_value:.1f} |" for result in measured)
    return f"## Results\n{measured[0].dataset_name}, both towers, %:\n\n| measure | value |\n|---|---|\n{rows}"


def _limits(provenance: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    limits = []
    if facts["fold"] is not None:
        limits += [
            "**Folded.** The encoder has no norm before its blocks and `CLIPVisionModel` always has one: its "
            f"embeddings are scaled by {facts['fold']['scale']:.3g} so that the norm's epsilon makes it a "
            "constant. Hidden states lack each token's channel mean, which every norm behind them removes anyway.",
            "**Not for float16.** The folded patch kernel is below its range: outputs are wrong and nothing fails. Use "
            "bfloat16 or float32.",
            "**Not for further training** of `embeddings` and `pre_layrnorm`: keep them frozen, or train the unfolded "
            "source and export again.",
        ]
    if facts["vision"]["pool"] == "mean":
        limits.append("`pooler_output` (the class token) was never trained as an image embedding.")
    if facts["resize"] is not None:
        grids = f"{facts['resize']['from_grid']} to {facts['resize']['to_grid']}"
        limits.append(
            f"The position table was fitted from a grid of {grids} without training ({facts['resize']['mode']}): "
            "expect less than at the original resolution until it is fine-tuned."
        )
    if (provenance.get("license") or UNKNOWN_LICENSE) == UNKNOWN_LICENSE:
        limits.append("The licence of the source is not known here; it decides how these weights may be used.")
    limits.append("The encoder inherits the biases of the pictures and captions it was trained on.")
    return "## Limits\n" + "\n".join(f"- {limit}" for limit in limits)
