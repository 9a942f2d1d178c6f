"""What of an artifact goes to the Hub, and whether it may: every check runs here, before anything is sent.

Encoder folders, LLaVA folders and the LoRA adapters inside those; a manifest says which and of which files.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from encoders import manifest
from encoders.errors import ModelError, ParityError, UsageError
from encoders.manifest import MANIFEST, FileEntry, Manifest, Parent
from encoders.publish.private_text import in_json, in_text, without_paths
from encoders.weights.headers import read_safetensors
from encoders.weights.values import non_finite

CARD, PARITY = "README.md", "parity.json"
ADDED_BY_HAND = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md")
SUFFIXES = (".safetensors", ".json", ".md", ".txt", ".jinja", ".model")
ADAPTER, ADAPTER_CONFIG = "adapter", "adapter_config.json"
HOLDS_A_RUN = ("llava",)
"""Kinds that training wrote: checkpoints and logs lie beside the artifact and stay here."""
CARD_STATES = ("license", "library_name", "pipeline_tag")
UNNAMED = "ORG/NAME"
"""In the card of an encoder, the repository that it will be published as."""
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")

Content = Path | bytes


@dataclass(frozen=True)
class Publishable:
    """An artifact that passed every check."""

    kind: str
    contents: dict[str, Content]
    """By path in the repository: a file, or its content."""
    entries: dict[str, FileEntry]
    """Hash and size of each."""
    left_out: tuple[str, ...]


def check(folder: Path, repo: str, instead: Mapping[str, bytes] | None = None) -> Publishable:
    """The publishable form, as `repo`, of the artifact in `folder`; `instead` replaces or adds files.

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
        if (folder / CARD).is_file():
            contents[CARD] = (folder / CARD).read_bytes().replace(UNNAMED.encode(), repo.encode())
    missing = [name for name, content in contents.items() if isinstance(content, Path) and not content.is_file()]
    problems += [f"{name} is missing although {MANIFEST} names it; write the artifact again" for name in missing]
    entries = {name: _entry(content) for name, content in sorted(contents.items()) if name not in missing}
    problems += [*_changed(contents, entries, seal), *_unreadable(contents)]
    if not problems:  # only what can be read is looked into
        contents[MANIFEST] = public_manifest(seal, entries)
        entries[MANIFEST] = _entry(contents[MANIFEST])
        problems = [*_card_problems(contents), *_private(contents), *_broken_weights(contents)]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ModelError(f"{folder} was not published, nothing was sent:\n{listed}")
    return Publishable(seal.kind, contents, entries, left_out)


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
            f"{folder} holds an artifact of kind {seal.kind!r}; encoders, LLaVAs and their adapters can be published"
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
        ours = name in (*seal.files, MANIFEST, CARD, *ADDED_BY_HAND)
        if file.is_symlink() and (ours or any(inner.startswith(f"{name}/") for inner in seal.files)):
            problems.append(f"{name} is a symlink; put the file itself there")
        elif ours or not (file.is_file() or file.is_symlink()):
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


def _changed(contents: Mapping[str, Content], entries: Mapping[str, FileEntry], seal: Manifest) -> Iterator[str]:
    """A card may be edited; every other file of the folder must be the one that was made."""
    for name, entry in entries.items():
        own = isinstance(contents[name], Path) and name in seal.files and name != CARD
        if own and entry.sha256 != seal.files[name].sha256:
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
    for id in _listed(stated.get("license")):
        if not LICENSE_ID.fullmatch(id):
            yield f"{CARD}: license {id!r} is none of the Hub's names (apache-2.0, mit, llama3, other, ...)"
    for key in ("base_model", "datasets"):
        yield from (f"{CARD}: {key} {id!r} is no id on the Hub" for id in _listed(stated.get(key)) if not _is_id(id))


def _listed(value: Any) -> list[str]:
    return [] if value is None else [str(each) for each in (value if isinstance(value, list) else [value])]


def _is_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _private(contents: Mapping[str, Content]) -> Iterator[str]:
    for name, content in contents.items():
        if name.endswith(".safetensors") and isinstance(content, Path):
            matters = in_json(json.dumps(read_safetensors(content).metadata))
        elif name.endswith(".json"):
            matters = in_json(read(content).decode(errors="replace"))
        else:
            matters = in_text(read(content).decode(errors="replace"))
        try:
            yield from (f"{name}: {matter}" for matter in matters)
        except ValueError as error:
            yield f"{name} is not JSON ({error})"


def _broken_weights(contents: Mapping[str, Content]) -> Iterator[str]:
    for name, content in contents.items():
        if name.endswith(".safetensors") and isinstance(content, Path):
            for tensor, count in non_finite(read_safetensors(content).tensors).items():
                yield f"{name}: {count:,} values of {tensor} are not finite"


def public_manifest(seal: Manifest, entries: Mapping[str, FileEntry]) -> bytes:
    """The manifest as it is published: of these files, without dates, and with names in the place of paths."""
    parents = {
        role: Parent(Path(without_paths(parent.path)).name, parent.fingerprint) for role, parent in seal.parents.items()
    }
    public = {**vars(seal), "files": {name: asdict(entry) for name, entry in entries.items()}, "created": ""}
    public |= {"parents": {role: asdict(parent) for role, parent in parents.items()}}
    public |= {"config": without_paths(seal.config), "metrics": without_paths(seal.metrics)}
    return (json.dumps(public, indent=2, sort_keys=True) + "\n").encode()


def read(content: Content) -> bytes:
    """A file's bytes, or the content itself."""
    return content if isinstance(content, bytes) else content.read_bytes()


def _entry(content: Content) -> FileEntry:
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    return FileEntry(sha256(content), size, 0)


def sha256(content: Content) -> str:
    """In hexadecimal."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
