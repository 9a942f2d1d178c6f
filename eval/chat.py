"""`chat-mllm MODEL --image FILE`: ask a LLaVA about a picture in the terminal; with --vs OTHER, two side by side.

Every question is asked on its own, as the benchmarks ask theirs, and answered greedily. Questions are read line by line
(so they can be piped in); `/image FILE` changes the picture, an empty line or the end of input ends it.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from encoders.errors import DataError, SwapError, UsageError, run_command

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console
    from torch import Tensor

    from eval.answering.chat_model import ChatModel

CHANGE = "/image"


class Shown(NamedTuple):
    """A picture, and what each model sees of it."""

    file: Path
    features: list["Tensor"]


def cli() -> None:
    """Console entry point."""
    run_command(main)


def main() -> None:
    """Load the models, then answer until the input ends."""
    parser = argparse.ArgumentParser(
        prog="chat-mllm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="LLaVA folder, or its id on the Hub")
    parser.add_argument("--image", type=Path, required=True, metavar="FILE", help="picture to ask about")
    parser.add_argument("--vs", metavar="OTHER", help="a second LLaVA that gets the same questions")
    parser.add_argument("--suffix", default="", metavar="TEXT", help="put behind every question, on a line of its own")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto (bfloat16), float32, bfloat16 (%(default)s)")
    asked = parser.parse_args()
    if asked.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {asked.max_new_tokens} but must be at least 1")
    if not asked.image.is_file():
        raise UsageError(f"--image {asked.image} does not exist")

    from eval.answering.chat_model import ChatModel
    from llava_adapter.sources import model_folder

    names = [asked.model] if asked.vs is None else [asked.model, asked.vs]
    models = [ChatModel(model_folder(name), asked.device, asked.dtype) for name in names]
    talk(models, names, asked.image, asked.suffix, asked.max_new_tokens)


def talk(models: Sequence["ChatModel"], names: Sequence[str], image: Path, suffix: str, max_new_tokens: int) -> None:
    """Answer the questions on standard input. Raises DataError if the first picture cannot be read."""
    from rich.console import Console

    console = Console(highlight=False)
    shown = show(models, image)
    console.print(
        f"{shown.file}: ask; {CHANGE} FILE changes the picture, an empty line ends", style="dim", markup=False
    )
    for line in _lines(console):
        try:
            if line.split(maxsplit=1)[0] == CHANGE:
                shown = show(models, Path(line.removeprefix(CHANGE).strip()))
                console.print(str(shown.file), style="dim", markup=False)
                continue
            question = f"{line}\n{suffix}" if suffix else line
            pairs = zip(models, shown.features, strict=True)
            _print_answers(console, names, [_answer(*pair, question, max_new_tokens) for pair in pairs])
        except SwapError as error:  # of this line alone; the next one may do
            console.print(str(error), style="red", markup=False)


def show(models: Sequence["ChatModel"], file: Path) -> Shown:
    """Encode a picture with every model. Raises DataError if it cannot be read."""
    from llava_adapter.data.pictures import open_rgb

    try:
        picture: Image.Image = open_rgb(file)
    except ValueError as error:
        raise DataError(f"picture {file} cannot be read: {error}") from error
    return Shown(file, [model.encode([picture])[0] for model in models])


def _answer(model: "ChatModel", features: "Tensor", question: str, max_new_tokens: int) -> tuple[str, float]:
    """Answer and seconds."""
    began = time.monotonic()
    (text,) = model.answer([model.prompt(question)], [features], max_new_tokens)
    return text, time.monotonic() - began


def _lines(console: "Console") -> Iterator[str]:
    """Questions until an empty line, the end of input, or Ctrl-C."""
    while True:
        try:
            line = console.input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            return
        yield line


def _print_answers(console: "Console", names: Sequence[str], answers: Sequence[tuple[str, float]]) -> None:
    if len(answers) == 1:
        console.print(answers[0][0], markup=False)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True)
    for name, (_, seconds) in zip(names, answers, strict=True):
        table.add_column(Text(f"{name} ({seconds:.1f} s)"), ratio=1, overflow="fold")
    table.add_row(*(Text(text) for text, _ in answers))
    console.print(table)


if __name__ == "__main__":
    cli()
