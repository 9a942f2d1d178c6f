"""Which files of a dataset repository hold a split: its README's front matter, read as the datasets library reads it.

Works on names alone, so that it answers for a repository on the Hub as well as for a folder.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from encoders.errors import DataError
from eval.benches.benchmarks import Table

README = "README.md"
DATA_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv", ".zip", ".tar", ".jpg", ".png")


def front_matter(text: str) -> dict[str, Any]:
    """The YAML at the head of a README; empty if there is none. Raises DataError if it is no YAML."""
    found = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        entries = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        raise DataError(f"the front matter of its {README} is no YAML ({' '.join(str(error).split())})") from error
    return entries if isinstance(entries, dict) else {}


def data_files(card: Mapping[str, Any], names: Collection[str], table: Table) -> list[str]:
    """Which of a repository's files hold the table, sorted.

    Raises DataError, without the repository's name, if it has no such config or split, or no file of it.
    """
    config = chosen_config(card, table.config)
    patterns = _patterns(config)
    base = str(config.get("data_dir") or "").strip("./")
    inside = [name for name in names if not base or name.startswith(f"{base}/")]
    if patterns is None:  # then the datasets library goes by the names of files and folders
        word = re.compile(rf"(?:^|[/._\-\s0-9]){re.escape(table.split)}(?:[/._\-\s0-9]|$)")
        found = [name for name in inside if name.endswith(DATA_SUFFIXES) and word.search(name)]
        listed = "its files"
    else:
        if table.split not in patterns:
            raise DataError(f"it has no split {table.split!r} in {_named(config)}, but {', '.join(sorted(patterns))}")
        wanted = [re.compile(_regex(pattern)) for pattern in patterns[table.split]]
        found = [name for name in names if any(pattern.fullmatch(name) for pattern in wanted)]
        listed = f"{', '.join(patterns[table.split])} that its {README} lists"
    if not found:
        raise DataError(f"none of {listed} for split {table.split!r} of {_named(config)} is there")
    return sorted(found)


def trimmed(card: Mapping[str, Any], files: Mapping[Table, Sequence[str]], version: str) -> str:
    """A README that lists only these tables, each with its files by name, and what is known of their columns.

    `version` enters the key under which the datasets library caches them.
    """
    configs: dict[str, dict[str, Any]] = {}
    for table, names in files.items():
        name = str(chosen_config(card, table.config).get("config_name", "default"))
        entry = configs.setdefault(name, {"config_name": name, "description": version, "data_files": []})
        entry["data_files"].append({"split": table.split, "path": list(names)})
        if not table.config:
            entry["default"] = True
    kept = {"configs": list(configs.values())}
    if infos := _infos(card, {table.split for table in files}):
        kept["dataset_info"] = infos
    return f"---\n{yaml.safe_dump(kept, sort_keys=False)}---\n"


def chosen_config(card: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The config of this name; for no name the default one. Raises DataError listing what there is."""
    configs = {str(config.get("config_name", "default")): config for config in card.get("configs") or []}
    if not configs and name in ("", "default"):
        return {}
    if name in configs:
        return configs[name]
    if not name:
        defaults = [config for key, config in configs.items() if key == "default" or config.get("default")]
        if len(defaults or configs) == 1:
            return (defaults or list(configs.values()))[0]
    raise DataError(f"it has no config {name or 'default'!r}, but {', '.join(sorted(configs)) or 'none'}")


def _patterns(config: Mapping[str, Any]) -> dict[str, list[str]] | None:
    """The file patterns of each split that a config lists; None if it lists none."""
    listed = config.get("data_files")
    if not listed:
        return None
    patterns: dict[str, list[str]] = {}
    for entry in [listed] if isinstance(listed, str | Mapping) else listed:
        split, paths = (str(entry["split"]), entry["path"]) if isinstance(entry, Mapping) else ("train", entry)
        base = PurePosixPath(str(config.get("data_dir") or "."))
        for path in [paths] if isinstance(paths, str) else paths:
            patterns.setdefault(split, []).append(str(base / path))
    return patterns


def _regex(pattern: str) -> str:
    """A glob of the datasets library as a regular expression: * stays within a folder, ** does not."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    return "".join(parts.get(piece, piece if piece.startswith("[") else re.escape(piece)) for piece in pieces)


def _infos(card: Mapping[str, Any], splits: Collection[str]) -> list[dict[str, Any]]:
    """The columns that a card declares, without the splits that are left out: the datasets library would miss them."""
    infos = card.get("dataset_info") or []
    kept = []
    for info in [infos] if isinstance(infos, Mapping) else infos:
        sizes = [split for split in info.get("splits") or [] if split.get("name") in splits]
        rest = {key: value for key, value in info.items() if key in ("config_name", "features")}
        kept.append({**rest, "splits": sizes} if sizes else rest)
    return kept


def _named(config: Mapping[str, Any]) -> str:
    return f"config {config.get('config_name', 'default')!r}"
