"""Values out of a config file of others, each of the kind it must have or a ModelError that names file and key."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoders.errors import ModelError


@dataclass(frozen=True)
class Fields:
    """A JSON object in `file`. Every reader gives None where the key is missing or null."""

    file: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, file: Path) -> "Fields":
        """Raises ModelError for a file that is no JSON object."""
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{file} cannot be read as JSON ({error})") from error
        if not isinstance(content, dict):
            raise ModelError(f"{file} holds no JSON object")
        return cls(file, content)

    def whole(self, key: str) -> int | None:
        value = self.values.get(key)
        if value is None or (type(value) is int and 0 <= value < 2**31):
            return value
        raise self._odd(key, "a whole number")

    def number(self, key: str) -> float | None:
        value = self.values.get(key)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        raise self._odd(key, "a number")

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self._odd(key, "a word")

    def flag(self, key: str) -> bool | None:
        value = self.values.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self._odd(key, "true or false")

    def numbers(self, key: str) -> tuple[float, ...] | None:
        """Of three channels."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, list) and len(value) == 3 and all(type(each) in (int, float) for each in value):
            return tuple(float(each) for each in value)
        raise self._odd(key, "three numbers")

    def section(self, key: str) -> "Fields | None":
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, dict):
            return Fields(self.file, value)
        raise self._odd(key, "an object")

    def _odd(self, key: str, needed: str) -> ModelError:
        return ModelError(f"{self.file}: {key} is {self.values[key]!r:.80}, needed is {needed}")
