"""THE conversation contract: who said what about which pictures, whatever file it was read from.

`parse` takes an entry of LLaVA's json ("conversations" of from, value; "image"), of ShareGPT's ("image" or "images";
other role names), of the chat format ("messages" of role, content) and a row of question-answer pairs ("texts").
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from encoders.errors import DataError
from llava_adapter.chat import IMAGE, Message, split_images

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant"), "assistant"),
    "system": "system",
}
LONE_MARK = re.compile(rf"^\s*{IMAGE}\s*$", re.MULTILINE)
TEXT_ONLY = "(text only)"
NUMBERED = "(numbered folders)"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Alternating user and assistant turns, after at most one system turn, and the pictures in order of their marks."""

    id: str
    source: str
    """Where it comes from, for counts: its own "source", else the first folder of its first picture."""
    messages: tuple[Message, ...]
    pictures: tuple[Any, ...]
    """`parse` leaves paths as the entry has them; a reader makes them Paths. Bytes of a file, or opened by datasets."""


@dataclass
class Findings:
    """What reading a set met. Counters are by source, `mended` by what was done."""

    kept: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    """Left out: a picture is not there."""
    resuffixed: Counter[str] = field(default_factory=Counter)
    """Kept: a picture was found under another suffix than the entry says."""
    mended: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        if not self.kept:
            return "conversations of a table: read, and checked, as they are drawn"
        told = [f"{self.kept.total():,} conversations: {counts(self.kept)}"]
        if self.missing:
            told.append(f"left out, a picture is missing: {self.missing.total():,} ({counts(self.missing)})")
        if self.resuffixed:
            told.append(f"found under another suffix: {self.resuffixed.total():,} ({counts(self.resuffixed)})")
        told += [f"{what}: {number:,}" for what, number in sorted(self.mended.items())]
        return "\n".join(told)


def counts(found: Mapping[str, int]) -> str:
    """'coco 364,100, gqa 72,140', the largest first."""
    return ", ".join(f"{name} {number:,}" for name, number in sorted(found.items(), key=lambda one: (-one[1], one[0])))


def parse(entry: Any, where: str, mended: Counter[str]) -> Conversation:
    """Check an entry. Raises DataError naming it: unknown roles or order, marks that do not match the pictures.

    An answer before the first question and a question after the last answer teach nothing: they are taken off and
    counted in `mended`.
    """
    if not isinstance(entry, Mapping):
        raise DataError(f"{where}: not an object")
    where = f"{where} (id {entry.get('id')!r})" if "id" in entry else where
    pictures = _pictures(entry, where)
    messages = _messages(entry, where)
    if not pictures:
        messages = [_literal(message, where) for message in messages]
    messages = _in_order(messages, where, mended)
    if entry.get("texts") and pictures:  # such rows hold no marks: the pictures come first
        messages[0] = {"role": "user", "content": IMAGE * len(pictures) + "\n" + messages[0]["content"]}
    shown = sum(split_images(message)[0] for message in messages)
    if shown != len(pictures):
        raise DataError(
            f"{where}: {shown} {IMAGE} marks in human turns but {len(pictures)} images; each image has its mark"
        )
    source = entry.get("source") or _source(pictures)
    return Conversation(str(entry.get("id", where)), str(source), tuple(messages), pictures)


def _messages(entry: Mapping[str, Any], where: str) -> list[Message]:
    if entry.get("conversations"):
        return [_message(turn, "from", "value", where) for turn in _list(entry, "conversations", where)]
    if entry.get("messages"):
        return [_message(turn, "role", "content", where) for turn in _list(entry, "messages", where)]
    if entry.get("texts"):
        pairs = _list(entry, "texts", where)
        said = [{"role": role, "content": pair.get(role)} for pair in pairs for role in ("user", "assistant")]
        return [_message(turn, "role", "content", where) for turn in said]
    raise DataError(f'{where}: no turns under "conversations", "messages" or "texts"')


def _list(entry: Mapping[str, Any], name: str, where: str) -> Sequence[Mapping[str, Any]]:
    turns = entry[name]
    if not isinstance(turns, Sequence) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f'{where}: "{name}" is not a list of turns')
    return turns


def _message(turn: Mapping[str, Any], role_key: str, text_key: str, where: str) -> Message:
    role, content = turn.get(role_key), _content(turn.get(text_key))
    if not isinstance(role, str) or role not in ROLES or content is None:
        raise DataError(
            f'{where}: a turn needs "{role_key}" (one of {", ".join(ROLES)}) and a text "{text_key}", not {turn!r:.200}'
        )
    try:
        (content if isinstance(content, str) else "".join(part.get("text", "") for part in content)).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: a turn holds half a character, which no tokenizer reads ({error})") from error
    message = {"role": ROLES[role], "content": content}
    if message["role"] != "user" and not isinstance(content, str) and split_images(message)[0]:
        raise DataError(f"{where}: only a human turn can show an image; found one in a turn of {role!r}")
    return message


def _content(said: Any) -> str | list[dict[str, str]] | None:
    """A text, or parts without anything that is none of ours; None for what is neither."""
    if isinstance(said, str):
        return said
    if not isinstance(said, Sequence) or not all(isinstance(part, Mapping) for part in said):
        return None
    parts = []
    for part in said:
        match part:
            case {"type": "image"}:
                parts.append({"type": "image"})
            case {"type": "text", "text": str(text)}:
                parts.append({"type": "text", "text": text})
            case _:
                return None
    return parts


def _in_order(messages: list[Message], where: str, mended: Counter[str]) -> list[Message]:
    told, said = (messages[:1], messages[1:]) if messages and messages[0]["role"] == "system" else ([], messages)
    if said and said[0]["role"] == "assistant":
        said = said[1:]
        mended["began with an answer to nothing, which was taken off"] += 1
    if said and said[-1]["role"] == "user":
        said = said[:-1]
        mended["ended with a question without answer, which was taken off"] += 1
    roles = [message["role"] for message in said]
    if not said or roles != ["user", "assistant"] * (len(said) // 2):
        found = ", ".join(message["role"] for message in messages) or "none"
        raise DataError(f"{where}: turns must be human, gpt, human, gpt, ...; found {found}")
    return told + said


def _literal(message: Message, where: str) -> Message:
    """Without a picture, `<image>` is what somebody wrote about, in the midst of words; on a line of its own it is the
    mark of a picture that was lost."""
    content = message["content"]
    if message["role"] != "user" or not isinstance(content, str) or IMAGE not in content:
        return message
    if LONE_MARK.search(content):
        raise DataError(f'{where}: 1 {IMAGE} marks in human turns but no "image"; give the entry its picture')
    return {"role": message["role"], "content": [{"type": "text", "text": content}]}


def _pictures(entry: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    """As cells of tables hold them: bytes, a path, the datasets library's pair of both, or a picture it has opened."""
    found = entry.get("images") or entry.get("image")
    if not found:
        return ()
    cells: Sequence[Any] = found if isinstance(found, list | tuple) else [found]
    return tuple(_picture(cell, where) for cell in cells)


def _picture(cell: Any, where: str) -> str | bytes | Image:
    match cell:
        case str() | bytes() | Image():
            return cell
        case {"bytes": bytes(content)}:
            return content
        case {"path": str(path)}:
            return path
    raise DataError(f"{where}: an image is a path or the bytes of a file, not {cell!r:.80}")


def _source(pictures: Sequence[Any]) -> str:
    if not pictures:
        return TEXT_ONLY
    path = pictures[0]
    if not isinstance(path, str) or "/" not in path:
        return "images"
    top = path.lstrip("/").split("/")[0]
    return NUMBERED if top.isdecimal() else top
