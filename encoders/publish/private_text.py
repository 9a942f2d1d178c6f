"""What must not leave this machine inside a text: access tokens, keys, and paths that tell who works where."""

import os
import re
from collections.abc import Iterator

SECRETS = {
    "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}",
    "a Weights & Biases key": rb"\bwandb_v1_\w{20,}|(?is:wandb|api_?key|password).{0,30}?\b[0-9a-f]{40}\b",
    "a GitHub token": rb"\bgh[opsur]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{40,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
# Not the middle of a relative path or of a web address.
START = rb"(?:(?<=file://)|(?<![\w./:~-]))"
HOMES = START + rb"(?:/home/|/Users/|/root/)[\w.@+-]+|\b[A-Za-z]:[\\/]+Users[\\/]+[\w.@+-]+"
TWO_LEVELS = START + rb"/[\w.@+-]+/[\w.@+-]+"
EVERYWHERE = ("bin", "boot", "dev", "etc", "lib", "lib64", "proc", "run", "sbin", "sys", "usr")
"""Folders of the system: every machine has them."""


def private_matters(text: bytes) -> Iterator[str]:
    """Say what is found and on which line. A token is named, never shown."""
    for what, pattern in SECRETS.items():
        for found in re.finditer(pattern, text):
            yield f"line {_line(text, found)} holds what looks like {what}"
    homes = {found.group(): found for found in re.finditer(HOMES, text)}
    here = {found.group(): found for found in re.finditer(TWO_LEVELS, text) if _is_of_this_machine(found.group())}
    for path, found in (here | homes).items():
        yield f"line {_line(text, found)} holds a path of a machine: {path.decode(errors='replace')}"


def _is_of_this_machine(path: bytes) -> bool:
    name = path.decode(errors="replace")
    return name.split("/")[1] not in EVERYWHERE and os.path.exists(name)


def _line(text: bytes, found: re.Match[bytes]) -> int:
    return text.count(b"\n", 0, found.start()) + 1
