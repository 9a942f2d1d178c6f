"""What must not leave this machine inside a text or JSON: access tokens, keys, paths that tell who works where.

JSON is looked at as what it decodes to, keys and doubled keys included: an escape hides nothing.
"""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

SECRETS = {
    "a Hugging Face token": r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,}",
    "a Weights & Biases key": r"\bwandb_v1_\w{20,}|(?is:wandb|api_?key|password).{0,30}?\b[0-9a-f]{40}\b",
    "a GitHub token": r"\bgh[opsur]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{40,}",
    "an API key": r"\bsk-[\w-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
GLUED = r"(?<=-[A-Za-z])(?<![\w./-]-[A-Za-z])|(?<=\\[nrt])"  # to an option (-I/...) or an escape (\n/...)
# Not the middle of a relative path or of a web address.
START = rf"(?:(?<=file://)|{GLUED}|(?<![\w./~-]))"
HOMES = rf"{START}\\?/(?:home|Users|root)\\?/[\w.@+-]+|(?:\b|{GLUED})[A-Za-z]:[\\/]+Users[\\/]+[\w.@+-]+"
HOME_MARKS = ("/home", "/Users", "\\Users", "/root")  # without any of them, the slow search is spared
TWO_LEVELS = START + r"/[\w.@+-]+/[\w.@+-]+"
WHOLE_PATH = re.compile(r"/|~|\.\.?[\\/]|[A-Za-z]:[\\/]|\\\\")
INNER_PATH = re.compile(rf"(?:{HOMES}|{TWO_LEVELS})[^\s:,;\"'<>|]*")
EVERYWHERE = ("bin", "boot", "dev", "etc", "lib", "lib64", "proc", "run", "sbin", "sys", "usr")
"""Folders of the system: every machine has them."""


def in_text(text: str) -> Iterator[str]:
    """Say what is found and on which line. A token is named, never shown."""
    for line, what in _found(text):
        yield f"line {line} holds {what}"


def in_json(text: str) -> Iterator[str]:
    """The same by the path of keys that leads there, and any `auto_map`. Raises ValueError for what is no JSON."""
    try:
        content = json.loads(text, object_pairs_hook=tuple)
        leaves, code = list(_leaves(content, "", "")), _asks_for_code(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    for line, what in _found("\n".join(leaf.replace("\n", " ") for _, leaf in leaves)):
        yield f"{_hidden(leaves[line - 1][0])} holds {what}"
    if code:
        yield "has an `auto_map`: who loads it would run code from the repository"


def without_paths(value: Any) -> Any:
    """A JSON value with names in the place of paths, wherever they stand."""
    if isinstance(value, dict):
        return {without_paths(key): without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    if not isinstance(value, str):
        return value
    return _name(value) if WHOLE_PATH.match(value) else INNER_PATH.sub(lambda found: _name(found.group()), value)


def _name(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1].lstrip("~")


def _leaves(value: Any, place: str, key: str) -> Iterator[tuple[str, str]]:
    """(path of keys, `key value`) of everything in a JSON value whose objects came as tuples of (key, value)."""
    if isinstance(value, tuple):
        for name, each in value:
            inner = f"{place}.{name}" if place else name
            if isinstance(each, tuple | list):
                yield inner, name
            yield from _leaves(each, inner, name)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each, place, key)
    else:
        yield place, f"{key} {value}"


def _asks_for_code(value: Any) -> bool:
    """A vocabulary may know the word, with a number beside it."""
    if isinstance(value, tuple):
        return any((name == "auto_map" and not isinstance(each, int)) or _asks_for_code(each) for name, each in value)
    return isinstance(value, list) and any(map(_asks_for_code, value))


def _hidden(place: str) -> str:
    for pattern in SECRETS.values():
        place = re.sub(pattern, "...", place)
    return place


def _found(text: str) -> Iterator[tuple[int, str]]:
    for what, pattern in SECRETS.items():
        for found in re.finditer(pattern, text):
            yield _line(text, found), f"what looks like {what}"
    marked = any(mark in text for mark in HOME_MARKS)
    homes = {found.group(): found for found in re.finditer(HOMES, text)} if marked else {}
    here = {found.group(): found for found in re.finditer(TWO_LEVELS, text) if _is_of_this_machine(found.group())}
    for path, found in (here | homes).items():
        yield _line(text, found), f"a path of a machine: {path}"


def _is_of_this_machine(path: str) -> bool:
    return path.split("/")[1] not in EVERYWHERE and os.path.exists(path)


def _line(text: str, found: re.Match[str]) -> int:
    return text.count("\n", 0, found.start()) + 1
