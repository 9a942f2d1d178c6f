"""What of an artifact goes to the Hub, and whether it may: every check runs here, before anything is sent.

Encoder folders, LLaVA folders and the LoRA adapters inside those; a manifest says which and of which files.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from encoders import manifest
from encoders.errors import ModelError, ParityError, UsageError
from encoders.manifest import MANIFEST, FileEntry, Manifest, Parent
from encoders.publish.private_text import private_matters
from encoders.weights.headers import read_safetensors
from encoders.weights.values import non_finite

CARD, PARITY = "README.md", "parity.json"
ADDED_BY_HAND = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md")
SUFFIXES = (".safetensors", ".json", ".md", ".txt", ".jinja", ".model")
ADAPTER, ADAPTER_CONFIG = "adapter", "adapter_config.json"
HOLDS_A_RUN = ("llava",)
"""Kinds that training wrote: checkpoints and logs lie beside the artifact and stay here."""
CARD_STATES = ("license", "library_name", "pipeline_tag")

Content = Path | bytes


@dataclass(frozen=True)
class Publishable:
    """An artifact that passed every check."""

    kind: str
    contents: dict[str, Content]
    """By path in the repository: a file, or its content."""
    left_out: tuple[str, ...]


def check(folder: Path, instead: Mapping[str, bytes] | None = None) -> Publishable:
    """The publishable form of the artifact in `folder`; `instead` replaces or adds files.

    Raises DataError if it is no finished artifact, UsageError if it is of another kind, ParityError if an encoder's
    certificate is missing or failed, ModelError naming everything else that forbids publishing.
    """
    seal = read_seal(folder)
    contents: dict[str, Content] = {name: folder / name for name in seal.files}
    problems, left_out = _strangers(folder, seal)
    for name in (CARD, *ADDED_BY_HAND):
        if (folder / name).is_file():
            contents[name] = folder / name
    contents |= instead or {}
    if seal.kind == "encoder":
        check_parity(folder / PARITY)
    own = {
        name: seal.files[name] for name, content in contents.items() if name in seal.files and content == folder / name
    }
    problems += [*_changed(folder, own), *_unreadable(contents)]
    if not problems:  # only what can be read is looked into
        problems = [*_card_problems(contents), *_private(contents), *_broken_weights(contents)]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ModelError(f"{folder} was not published, nothing was sent:\n{listed}")
    contents[MANIFEST] = public_manifest(seal, contents)
    return Publishable(seal.kind, contents, left_out)


def read_seal(folder: Path) -> Manifest:
    """The folder's manifest, of what is published together; an adapter's is cut out of that of the LLaVA around it.

    Raises DataError if there is none, UsageError for a kind that is not published.
    """
    if not (folder / MANIFEST).is_file() and (folder / ADAPTER_CONFIG).is_file():
        whole, prefix = manifest.read(folder.resolve().parent, "llava"), f"{folder.resolve().name}/"
        files = {name.removeprefix(prefix): entry for name, entry in whole.files.items() if name.startswith(prefix)}
        return replace(whole, kind=ADAPTER, files=files)
    seal = manifest.read(folder)
    if seal.kind not in ("encoder", "llava", ADAPTER):
        raise UsageError(
            f"{folder} holds a {seal.kind!r} artifact; encoders, LLaVAs and their adapters can be published"
        )
    if seal.kind == "llava":
        files = {name: entry for name, entry in seal.files.items() if not name.startswith(f"{ADAPTER}/")}
        return replace(seal, files=files)
    return seal


def _strangers(folder: Path, seal: Manifest) -> tuple[list[str], tuple[str, ...]]:
    """What forbids publishing about files that the manifest does not name, and which of them are left out."""
    problems, left_out = [], []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_symlink():
            problems.append(f"{name} is a symlink; put the file itself there")
        elif not file.is_file() or name in seal.files or name in (MANIFEST, CARD, *ADDED_BY_HAND):
            continue
        elif seal.kind in HOLDS_A_RUN or name.startswith("."):
            left_out.append(name)
        else:
            problems.append(f"{name} is not part of the artifact ({MANIFEST} does not name it); remove it")
    return problems, tuple(left_out)


def check_parity(file: Path) -> None:
    """Raise ParityError unless the certificate is there and each of its figures is within its own bound."""
    try:
        certificate = json.loads(file.read_text())
        failures = list(_beyond_bounds(certificate))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ParityError(f"{file} is no parity certificate ({error!r}); export the encoder again") from error
    if failures:
        raise ParityError(f"{file} says that the export failed: {'; '.join(failures)}; export the encoder again")


def _beyond_bounds(certificate: Mapping[str, Any]) -> Iterator[str]:
    for dtype in ("float32", "bfloat16"):
        bounds, layers = certificate[dtype]["bound"], certificate[dtype]["layers"]
        if not bounds or not layers:
            yield f"{dtype} has no bounds or no layers"
        for layer, figures in layers.items():
            for measure, bound in bounds.items():
                value = figures[measure]
                if not (value >= bound if measure.startswith("min_") else value <= bound):
                    yield f"{dtype} {layer}: {measure} is {value}, bound {bound}"
    for what, count in certificate["keys"].items():
        if count:
            yield f"{count} {what} keys"


def _changed(folder: Path, files: Mapping[str, FileEntry]) -> Iterator[str]:
    """A card may be edited; every other file must be the one that was made."""
    for name, entry in files.items():
        if not (folder / name).is_file():
            yield f"{name} is missing although {MANIFEST} names it; write the artifact again"
        elif name != CARD and sha256(folder / name) != entry.sha256:
            yield f"{name} is not the file that {MANIFEST} describes; write the artifact again"


def _unreadable(contents: Mapping[str, Content]) -> Iterator[str]:
    for name in contents:
        if not name.endswith(SUFFIXES) and name not in ADDED_BY_HAND:
            yield f"{name} is of a kind that is not published; weights go out as safetensors only"
    if CARD not in contents:
        yield f"there is no {CARD}"


def _card_problems(contents: Mapping[str, Content]) -> Iterator[str]:
    import yaml
    from huggingface_hub import ModelCard

    try:
        stated = ModelCard(read(contents[CARD]).decode()).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        yield f"{CARD}: its metadata is not valid ({' '.join(str(error).split())})"
        return
    for key in CARD_STATES:
        if not stated.get(key):
            yield f"{CARD} states no `{key}`; add it to the block between the two `---` lines"


def _private(contents: Mapping[str, Content]) -> Iterator[str]:
    for name, content in contents.items():
        if name.endswith(".safetensors") and isinstance(content, Path):
            text = json.dumps(read_safetensors(content).metadata, indent=0).encode()
        else:
            text = read(content)
        yield from (f"{name}: {matter}" for matter in private_matters(text))
        if name.endswith(".json") and b'"auto_map"' in text:
            yield f"{name} has an `auto_map`: who loads it would run code from the repository"


def _broken_weights(contents: Mapping[str, Content]) -> Iterator[str]:
    for name, content in contents.items():
        if name.endswith(".safetensors") and isinstance(content, Path):
            for tensor, count in non_finite(read_safetensors(content).tensors).items():
                yield f"{name}: {count:,} values of {tensor} are not finite"


def public_manifest(seal: Manifest, contents: Mapping[str, Content]) -> bytes:
    """The manifest as it is published: of these files, without dates, and with names in the place of paths."""
    files = {name: FileEntry(sha256(content), size(content), 0) for name, content in sorted(contents.items())}
    parents = {role: Parent(Path(parent.path).name, parent.fingerprint) for role, parent in seal.parents.items()}
    public = {**vars(seal), "files": {name: asdict(entry) for name, entry in files.items()}, "created": ""}
    public |= {"parents": {role: asdict(parent) for role, parent in parents.items()}}
    public |= {"config": _without_paths(seal.config), "metrics": _without_paths(seal.metrics)}
    return (json.dumps(public, indent=2, sort_keys=True) + "\n").encode()


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def read(content: Content) -> bytes:
    """A file's bytes, or the content itself."""
    return content if isinstance(content, bytes) else content.read_bytes()


def size(content: Content) -> int:
    """In bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def sha256(content: Content) -> str:
    """In hexadecimal."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
