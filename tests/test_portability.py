"""Exported folders on an older transformers, installed aside: the same keys, the same features, the same words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_encoders_export import run as run  # the fixture: a finished encoder run
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from encoders.export import export, fixed_images

pytestmark = pytest.mark.slow
# transformers 4.57.6 needs these two older than transformers 5 allows; everything else is shared.
SIDE_INSTALL = ["transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1"]
SCRIPT = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, LlavaForConditionalGeneration
assert transformers.__version__ == "4.57.6", transformers.__version__
encoder, llava, inputs, outputs = sys.argv[1:]
given = load_file(inputs)
tower, tower_info = CLIPVisionModel.from_pretrained(encoder, output_loading_info=True)
model, model_info = LlavaForConditionalGeneration.from_pretrained(llava, output_loading_info=True)
with torch.no_grad():
    seen = tower.eval()(given["pixels"], output_hidden_states=True)
    ids, chat_pixels = given["ids"], given["chat_pixels"]
    logits = model.eval()(input_ids=ids, pixel_values=chat_pixels).logits
    said = model.generate(input_ids=ids, pixel_values=chat_pixels, max_new_tokens=8, do_sample=False)
save_file({"penultimate": seen.hidden_states[-2].contiguous(), "last": seen.last_hidden_state.contiguous(),
           "pooled": seen.pooler_output.contiguous(), "logits": logits.contiguous(),
           "said": said.contiguous()}, outputs)
print(json.dumps({k: [str(x) for x in v] for info in (tower_info, model_info) for k, v in info.items()}))
print(json.dumps([len(v) for info in (tower_info, model_info) for v in info.values()]))
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("older")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *SIDE_INSTALL]
    subprocess.run(pip, check=True, timeout=600)
    return folder


def test_transformers_4_reads_the_same_encoder_and_llava(
    older: Path, run: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    encoder = tmp_path / "encoder"
    export(run, encoder)
    tower = CLIPVisionModel.from_pretrained(encoder).eval()
    llava = LlavaForConditionalGeneration.from_pretrained(tiny_llava).eval()
    torch.manual_seed(0)
    pixels = fixed_images(48).float() / 255
    image_tokens = [llava.config.image_token_id] * 16
    ids = torch.tensor([[1, 5, *image_tokens, 7, 8, 9]])
    chat_pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        seen = tower(pixels, output_hidden_states=True)
        logits = llava(input_ids=ids, pixel_values=chat_pixels).logits
        said = llava.generate(input_ids=ids, pixel_values=chat_pixels, max_new_tokens=8, do_sample=False)
    expected = {"penultimate": seen.hidden_states[-2], "last": seen.last_hidden_state, "pooled": seen.pooler_output}
    expected |= {"logits": logits, "said": said}

    save_file({"pixels": pixels, "ids": ids, "chat_pixels": chat_pixels}, tmp_path / "in.safetensors")
    files = [str(encoder), str(tiny_llava), str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]
    environment = {**os.environ, "PYTHONPATH": str(older)}
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, *files], env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert set(json.loads(finished.stdout.splitlines()[-1])) == {0}, finished.stdout  # nothing missing or unexpected
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
