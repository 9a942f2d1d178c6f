"""Finding and opening the pictures of conversations."""

import io
from os.path import splitext
from pathlib import Path

from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")  # OCR-VQA's entries all say .jpg, its files do not


class Finder:
    """Looks paths up below a root; a folder is listed once, however many of its files are asked for."""

    def __init__(self, root: Path):
        self.root = root
        self._listed: dict[Path, dict[str, str]] = {}

    def find(self, path: str) -> Path | None:
        """The file at `path`, or the one that differs from it in nothing but the suffix; None if there is neither."""
        file = self.root / path
        names = self._names(file.parent)
        for name in (file.name, *(file.stem + suffix for suffix in SUFFIXES)):
            if name in names:
                return file.with_name(names[name])
        return None

    def _names(self, folder: Path) -> dict[str, str]:
        """Names by themselves, and by themselves with the suffix in small letters."""
        if folder not in self._listed:
            found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
            small = {stem + suffix.lower(): stem + suffix for stem, suffix in map(splitext, found)}
            self._listed[folder] = small | {name: name for name in found}
        return self._listed[folder]


def open_rgb(picture: Path | bytes | Image.Image) -> Image.Image:
    """A picture's pixels, of an animation the first frame. Raises ValueError if it cannot be read."""
    try:
        if isinstance(picture, Image.Image):
            return picture.convert("RGB")
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's, for a broken file: of every kind, RuntimeError of a damaged AVIF among them
        raise ValueError(str(error) or repr(error)) from error
