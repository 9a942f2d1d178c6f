"""Exported folders on older transformers, installed aside: the same keys, the same features, the same words.

The oldest, which LLaVA's own code pins, is in the fast tests where a package index can be reached; the rest is slow.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from encoder_runs import CLIPS, write_run
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, CLIPVisionModel, LlavaForConditionalGeneration

from encoders.export.command import export
from encoders.export.parity import fixed_images

# Two libraries must be older than transformers 5 allows; everything else is shared.
TOKENIZERS = {"4.37.2": "0.15.2", "4.46.3": "0.20.3", "4.57.6": "0.22.1"}
VERSIONS = [
    "4.37.2",
    pytest.param("4.46.3", marks=pytest.mark.slow),
    pytest.param("4.57.6", marks=pytest.mark.slow),
]
ENCODER_SCRIPT = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionModel
given = load_file(sys.argv[1])
counts = []
for folder in sys.argv[2:]:
    tower, info = CLIPVisionModel.from_pretrained(folder, output_loading_info=True)
    counts += [len(found) for found in info.values()]
    pictures = list(given["pictures"].numpy())
    pixels = CLIPImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        seen = tower.eval()(given["pixels"], output_hidden_states=True)
    outputs = {"penultimate": seen.hidden_states[-2], "last": seen.last_hidden_state, "pooled": seen.pooler_output}
    outputs["pixels"] = pixels
    save_file({name: value.contiguous() for name, value in outputs.items()}, folder + "/seen.safetensors")
print(json.dumps([transformers.__version__, sum(counts)]))
"""
LLAVA_SCRIPT = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration
inputs, llava, outputs = sys.argv[1:]
given = load_file(inputs)
model, info = LlavaForConditionalGeneration.from_pretrained(llava, output_loading_info=True)
with torch.no_grad():
    logits = model.eval()(input_ids=given["ids"], pixel_values=given["pixels"]).logits
    said = model.generate(input_ids=given["ids"], pixel_values=given["pixels"], max_new_tokens=8, do_sample=False)
save_file({"logits": logits.contiguous(), "said": said.contiguous()}, outputs)
print(json.dumps(sum(len(found) for found in info.values())))
"""


@pytest.fixture(scope="module")
def side_installs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Version -> a folder with that transformers, installed once."""
    place = tmp_path_factory.mktemp("transformers")
    return cache(lambda version: install(version, place / version))


def install(version: str, folder: Path) -> Path:
    """Skips the test where pip finds no index to install from."""
    wanted = [f"transformers=={version}", f"tokenizers=={TOKENIZERS[version]}", "huggingface_hub==0.36.0"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries", "1", "--timeout", "10"]
    found = subprocess.run([*pip, "--target", str(folder), *wanted], capture_output=True, text=True, timeout=600)
    if found.returncode:
        pytest.skip(f"pip could not install transformers {version} aside: {found.stderr[-300:]}")
    return folder


def run_aside(install: Path, script: str, *arguments: Path) -> object:
    """What the script prints last, as JSON."""
    environment = {**os.environ, "PYTHONPATH": str(install)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize("version", VERSIONS)
def test_older_transformers_read_the_same_encoders(
    version: str, side_installs: Callable[[str], Path], tmp_path: Path
) -> None:
    folders = {"plain": tmp_path / "plain", "folded": tmp_path / "folded"}
    for (name, folder), vision in zip(folders.items(), ({}, CLIPS), strict=True):
        export(write_run(tmp_path / f"{name}_run", **vision), folder)
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    pictures = fixed_images(90, 2)[:, :, :, :70].permute(0, 2, 3, 1).contiguous()  # (2,90,70,3)
    save_file({"pixels": pixels, "pictures": pictures}, tmp_path / "in.safetensors")
    older = side_installs(version)
    assert run_aside(older, ENCODER_SCRIPT, tmp_path / "in.safetensors", *folders.values()) == [version, 0]
    for name, folder in folders.items():
        found = load_file(folder / "seen.safetensors")
        with torch.no_grad():
            seen = CLIPVisionModel.from_pretrained(folder).eval()(pixels, output_hidden_states=True)
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        expected = {
            "penultimate": seen.hidden_states[-2],
            "last": seen.last_hidden_state,
            "pooled": seen.pooler_output,
            "pixels": processor(list(pictures.numpy()), return_tensors="pt")["pixel_values"],
        }
        assert found.keys() == expected.keys()
        for what, tensor in expected.items():
            bound = 1e-5 * tensor.abs().max().item()
            torch.testing.assert_close(
                found[what], tensor, rtol=0, atol=bound, msg=lambda m, n=f"{name} {what}": f"{n}: {m}"
            )


@pytest.mark.slow
def test_transformers_4_reads_the_same_llava(
    side_installs: Callable[[str], Path], tiny_llava: Path, tmp_path: Path
) -> None:
    llava = LlavaForConditionalGeneration.from_pretrained(tiny_llava).eval()
    ids = torch.tensor([[1, 5, *[llava.config.image_token_id] * 16, 7, 8, 9]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = llava(input_ids=ids, pixel_values=pixels).logits
        said = llava.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=8, do_sample=False)
    save_file({"ids": ids, "pixels": pixels}, tmp_path / "in.safetensors")
    files = (tmp_path / "in.safetensors", tiny_llava, tmp_path / "out.safetensors")
    assert run_aside(side_installs("4.57.6"), LLAVA_SCRIPT, *files) == 0  # nothing missing or unexpected
    found = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(found["logits"], logits, rtol=1e-5, atol=1e-5)
    assert found["said"].equal(said)
