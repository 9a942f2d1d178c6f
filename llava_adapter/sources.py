"""Where a model comes from: a folder on this machine, or an id on the Hub, fetched into huggingface_hub's cache."""

import hashlib
from pathlib import Path

from encoders import manifest
from encoders.errors import UsageError
from encoders.sources.download import download

WEIGHTS = ("model.safetensors.index.json", "model.safetensors")
DECIDING = (".safetensors", ".json", ".jinja", ".model", ".txt")  # weights, configs, tokenizers


def model_folder(name: str | Path, weights: bool = True) -> Path:
    """The folder of an encoder, LLM or LLaVA: `name` itself, or what the Hub has under that id. Without `weights` an id
    gives the folder that the weights will lie in, with configs and tokenizer only.

    Raises UsageError if it is neither, ModelError if the Hub does not give it (a gated model needs `hf auth login`).
    """
    if (folder := Path(name)).is_dir():
        return folder
    if folder.is_absolute() or len(folder.parts) != 2 or folder.parts[0] in (".", ".."):
        raise UsageError(f"{name} is no folder, and no id on the Hub (organisation/name) either")
    return download(str(name), None, (lambda _: WEIGHTS) if weights else None).folder


def fingerprint(folder: Path) -> str:
    """Identity of an encoder or LLM wherever it lies: an artifact's fingerprint, or that of a foreign folder's weights,
    configs and tokenizer, all by content (seconds per 10 GB). Dates and what else lies there play no part."""
    if (folder / manifest.MANIFEST).is_file():
        return manifest.fingerprint(folder)
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in DECIDING:
            digest.update(f"\0{file.name}\0{manifest.fingerprint(file)}".encode())
    return digest.hexdigest()
