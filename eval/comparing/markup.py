"""Text made safe for the report's page, and its plain tables.

Whatever comes from a question, an answer, a setting, a path or a name goes through `text`: it is escaped, and what
would steer the page rather than be read (controls, direction overrides, lone surrogates) is replaced.
"""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

LONGEST_TEXT = 400
STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufdd0-\ufdef\ufffe\uffff"
    "\ud800-\udfff]"
)


def text(value: Any, longest: int = LONGEST_TEXT) -> str:
    """A value as escaped text of bounded length; what is no string is shown as JSON."""
    words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(words) > longest:
        words = words[:longest] + " …"
    return escape(STEERING.sub("\ufffd", words))


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "plain") -> str:
    """A table of cells that are markup already."""
    columns = "".join(f'<th scope="col">{column}</th>' for column in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    table = f'<table class="{kind}"><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def definitions(content: Mapping[str, Any]) -> str:
    """Names and values, one below the other."""
    items = (f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in content.items())
    return f"<dl>{''.join(items)}</dl>"
