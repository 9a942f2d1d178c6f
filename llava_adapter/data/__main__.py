"""`python -m llava_adapter.data CHATS... --images DIR`: look through conversations before a run does.

Counts sources, pictures and turns, finds pictures that are missing or (--open-images) damaged. With --model, an LLM's
or a LLaVA's folder, everything is tokenised too: lengths, what does not fit, and with --show what is learned of single
conversations. Exit code 3: something is bad.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from encoders.errors import DataError, UsageError, run_command

if TYPE_CHECKING:
    from transformers import LlavaProcessor

    from llava_adapter.data.readers import Chats


def main() -> None:
    """Parse the options, look through each set."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_adapter.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chats", type=Path, nargs="+", metavar="CHATS", help="json file, or folder of a table format")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder that image paths start from")
    parser.add_argument("--missing", choices=("error", "skip"), default="skip", help="as data.missing (%(default)s)")
    parser.add_argument("--open-images", action="store_true", help="open every picture")
    parser.add_argument("--model", metavar="DIR", help="LLM or LLaVA folder, or its id on the Hub: tokenise")
    parser.add_argument("--template", help="of an LLM: its chat template")
    parser.add_argument("--captions", action="store_true", help="as the projector stage reads them: no chat template")
    parser.add_argument("--image-tokens", type=int, default=576, help="of an LLM: tokens per image (%(default)s)")
    parser.add_argument("--max-length", type=int, default=2048, help="as data.max_length (%(default)s)")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N, what is learned marked")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each Nth conversation only")
    parser.add_argument("--workers", type=int, default=0, help="processes that read; 0: this one")
    asked = parser.parse_args()
    if asked.every < 1 or asked.workers < 0 or asked.image_tokens < 1:
        raise UsageError("--every and --image-tokens must be at least 1, --workers at least 0")
    if asked.show and asked.model is None:
        raise UsageError("--show needs --model DIR, whose tokenizer says what is learned")

    from llava_adapter.data.readers import read_chats

    bad = 0
    for file in asked.chats:
        print(f"== {file}")
        chats = read_chats(file, asked.images, asked.missing)
        if chats.findings.kept:
            print(chats.findings)
        bad += chats.findings.missing.total() + _audit(chats, asked)
    if bad:
        raise DataError(f"{bad} conversations are bad or lack a picture; see above")


def _audit(chats: "Chats", asked: argparse.Namespace) -> int:
    """Print report and views; the number of bad conversations."""
    from rich.console import Console

    from llava_adapter.chat import TEMPLATES, template_of
    from llava_adapter.data.audit import examine, view
    from llava_adapter.data.dataset import ChatDataset

    dataset = None
    if asked.model is not None:
        processor = _processor(asked.model, asked.template, asked.image_tokens)
        name = "plain" if asked.captions else template_of(processor.tokenizer.chat_template)
        dataset = ChatDataset(chats, processor, TEMPLATES[name], asked.max_length)
        for number in range(min(asked.show, len(chats))):
            Console(highlight=False).print(view(dataset, number), soft_wrap=True)
    report = examine(chats, dataset, asked.open_images, asked.every, asked.workers)
    print(report.summary(asked.max_length))
    return len(report.bad)


def _processor(model: str, template: str | None, image_tokens: int) -> "LlavaProcessor":
    """A LLaVA's own, or one around an LLM's tokenizer whose images take so many tokens."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    from llava_adapter.sources import model_folder
    from llava_adapter.tokenizer import chat_template, prepare_tokenizer

    folder = model_folder(model, weights=False)
    if (folder / "processor_config.json").is_file():
        return LlavaProcessor.from_pretrained(folder, local_files_only=True)
    if template is None:
        raise UsageError(f"{model} is an LLM; say which --template its conversations take")
    tokenizer = prepare_tokenizer(folder, chat_template(template))
    row = {"height": 1, "width": image_tokens}
    images = CLIPImageProcessor(size=row, crop_size=row)
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=1, vision_feature_select_strategy="full"
    )


if __name__ == "__main__":
    run_command(main)
