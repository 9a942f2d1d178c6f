"""Prompt templates of zero-shot classification and segmentation: from a class's name to the texts that describe it.

`plain` is ours and suits any set; ImageNet's published prompts and class names come from the open_clip package.
"""

from collections.abc import Callable
from typing import Any

from encoders.errors import UsageError

Template = Callable[[str], str]

PLAIN = ("{}", "a {}", "a picture of a {}", "there is a {}")
OPENAI_SETS = {"imagenet": "OPENAI_IMAGENET_TEMPLATES", "imagenet7": "SIMPLE_IMAGENET_TEMPLATES"}
DEFAULT_SET = "plain"
TEMPLATE_SETS = (
    DEFAULT_SET,
    *OPENAI_SETS,
)  # imagenet is OpenAI's 80 prompts, imagenet7 the 7 that serve nearly as well


def templates(name: str) -> list[Template]:
    """The templates of a set. Raises UsageError for an unknown set, or if it needs open_clip and that is missing."""
    if name == DEFAULT_SET:
        return [pattern.format for pattern in PLAIN]
    if name not in OPENAI_SETS:
        raise UsageError(f"templates {name!r} are unknown; choose one of {', '.join(TEMPLATE_SETS)}")
    return list(_open_clip()[OPENAI_SETS[name]])


def imagenet_names() -> list[str]:
    """Names of the 1,000 classes of ImageNet-1k in the order of their WordNet ids. Raises UsageError as above."""
    return list(_open_clip()["IMAGENET_CLASSNAMES"])


def _open_clip() -> dict[str, Any]:
    try:
        from open_clip import zero_shot_metadata
    except ImportError as error:
        raise UsageError(
            "ImageNet's prompts and class names come from open_clip; install it: pip install 'encoder-swap[open-clip]'"
        ) from error
    return vars(zero_shot_metadata)
