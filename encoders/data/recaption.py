"""`python -m encoders.data.recaption DATA`: a short and a long caption of every picture, by an MLLM.

Reads any data set of the sample contract and asks a model folder (--model) or a server (--server) with DreamLIP's two
prompts. Captions go into one JSONL file per shard beside the data; --merge writes tars that hold them.
"""

import argparse
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from encoders.data.caption_files import FAILED, CaptionFile, Entry, merge_shard
from encoders.errors import ModelError, SwapError, UsageError, run_command

if TYPE_CHECKING:
    from encoders.data.recaption_backends import Answer, Captioner, Question
    from encoders.data.samples import Samples

PROMPTS = {"short": "Describe the image in short:", "long": "Describe the image in details"}  # DreamLIP's
MOST_FAILURES = 64  # in a row: then it is not the pictures
REFUSAL = re.compile(
    r"i('m| am) (very |so )?(sorry|afraid|unable|not able)|(very |so )?sorry\b|my apologies|i apologi[sz]e"
    r"|unfortunately|as an ai\b|i (cannot|can't|can not|could not|couldn't|do not|don't|am not|will not|won't)\b",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


class CaptionsMissing(SwapError):
    """At least one sample has no short or no long caption."""

    exit_code = 5


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser(prog="python -m encoders.data.recaption", description=__doc__)
    options.add_argument("data", type=Path, metavar="DATA", help="what data.path of a recipe may be")
    options.add_argument("--format", choices=("tar", "parquet", "dataset", "csv"), default="tar", help="(%(default)s)")
    options.add_argument("--mapping", default="embedded_world", metavar="M", help="columns, as data.mapping")
    options.add_argument("--images", type=Path, metavar="FOLDER", help="where a table's image paths start")
    options.add_argument("--captions", type=Path, metavar="CSV", help="of mappings with a join")
    options.add_argument(
        "--captioner",
        action="append",
        required=True,
        metavar="NAME",
        help="name of the captions; --merge takes several",
    )
    options.add_argument("--out", type=Path, metavar="FOLDER", help="where SHARD.NAME.jsonl go (beside the shards)")
    options.add_argument("--allow-missing", action="store_true", help="end with 0 although samples lack captions")
    options.add_argument("--rank", type=int, default=os.environ.get("RANK", 0), help="do every WORLDth shard from here")
    options.add_argument("--world", type=int, default=os.environ.get("WORLD_SIZE", 1), help="(RANK, WORLD_SIZE)")
    options.add_argument("--max-tokens", type=int, nargs=2, default=(77, 512), metavar=("SHORT", "LONG"))
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, metavar="FOLDER", help="ask an image-text-to-text folder of transformers")
    what.add_argument("--server", metavar="URL", help="ask an OpenAI-compatible server: http://HOST:8000/v1")
    what.add_argument("--merge", type=Path, metavar="FOLDER", help="ask nobody: write tars that hold the captions")
    options.add_argument("--batch-size", type=int, default=16, metavar="N", help="of --model (%(default)s)")
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="bfloat16 on a GPU")
    options.add_argument("--served-model", metavar="NAME", help="of --server: the name it serves the model under")
    options.add_argument("--concurrency", type=int, default=32, metavar="N", help="open questions (%(default)s)")
    options.add_argument("--key-variable", default="OPENAI_API_KEY", metavar="VARIABLE", help="holds the key, if any")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Caption or merge as told. Raises CaptionsMissing if samples are left without, unless that is allowed."""
    args = parser().parse_args(argv)
    _check(args)
    from encoders.data.formats import open_samples
    from encoders.data.spec import DataSpec

    spec = DataSpec(args.data, args.format, args.mapping, images=args.images, captions=args.captions)
    samples = open_samples(spec)
    out = args.out or args.data
    mine = dict(list(shards(samples, args.format).items())[args.rank :: args.world])
    if args.merge is not None:
        args.merge.mkdir(parents=True, exist_ok=True)
        counts: Counter[str] = Counter()
        for shard, numbers in mine.items():
            counts += merge_shard(samples, shard, numbers, args.captioner, out, args.merge)
        print(f"{args.merge}: {counts.pop('samples', 0):,} samples in {len(mine):,} tars")
        missing = counts
    else:
        missing = _caption(samples, mine, out, args)
    if missing and not args.allow_missing:
        raise CaptionsMissing(
            f"captions are missing ({', '.join(f'{what}: {number:,}' for what, number in sorted(missing.items()))}); "
            "run again to ask once more where asking failed, or pass --allow-missing"
        )


def _check(args: argparse.Namespace) -> None:
    if not 0 <= args.rank < args.world:
        raise UsageError(f"--rank {args.rank} must lie between 0 and --world {args.world} - 1")
    if min(args.batch_size, args.concurrency, *args.max_tokens) < 1:
        raise UsageError("--batch-size, --concurrency and --max-tokens must be at least 1")
    if args.server and not args.served_model:
        raise UsageError("--server needs --served-model, the name it was started with")
    if args.merge is None and len(args.captioner) > 1:
        raise UsageError("only --merge takes several --captioner; a model or a server is one")
    for name in args.captioner:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UsageError(f"--captioner {name!r} becomes part of file names: letters, digits, _ . - only")
    if args.out is None and not args.data.is_dir():
        raise UsageError(f"{args.data} is no folder to put captions beside the shards in; name one with --out")
    if args.merge is not None and args.merge.resolve() == args.data.resolve():
        raise UsageError(f"--merge {args.merge} is the data itself; name another folder")


def shards(samples: "Samples", format: str) -> dict[str, range]:
    """Shard -> numbers of its samples. Raises UsageError if two have one name, since captions are named after them."""
    found: dict[str, range] = {}
    start = 0
    for size in filter(None, samples.sizes.tolist()):
        name = samples.shard(start)
        before = found.get(name, range(start, start))
        # The parts of a table lie side by side in its file; a tar has no parts.
        if before.stop != start or (before and format == "tar"):
            raise UsageError(f"two shards are called {name}; caption them from two folders")
        found[name] = range(before.start, start + size)
        start += size
    return found


def _caption(samples: "Samples", mine: dict[str, range], out: Path, args: argparse.Namespace) -> Counter[str]:
    """Ask for what is not answered yet, shard by shard; the number of missing captions by kind."""
    from rich.console import Console
    from rich.progress import Progress

    captioner = args.captioner[0]
    backend = _backend(args)
    asked_of = {"model": str(args.served_model or args.model), "prompts": PROMPTS, "max_tokens": list(args.max_tokens)}
    problems: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    streak = Streak()
    done = 0
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(captioner, total=len(PROMPTS) * sum(map(len, mine.values())))
        for shard, numbers in mine.items():
            with CaptionFile(samples, shard, numbers, out, captioner, asked_of) as file:
                questions = _questions(samples, numbers, file, args.max_tokens)
                with closing(backend.answers(questions)) as answers:
                    for question, answer in answers:
                        file.add(judge(question, answer))
                        streak.count(answer)
                        progress.update(bar, completed=done + len(file.entries))
            done += len(file.entries)
            for entry in file.entries.values():
                problems[f"{entry.kind}: {entry.problem or 'captioned'}"] += 1
                missing[entry.kind] += entry.caption is None
    for what, number in sorted(problems.items()):
        print(f"{what}: {number:,}")
    return +missing


def _backend(args: argparse.Namespace) -> "Captioner":
    if args.model is not None:
        from encoders.data.recaption_model import FolderModel

        return FolderModel(args.model, args.device, args.dtype, args.batch_size)
    from encoders.data.recaption_backends import Server

    key = os.environ.get(args.key_variable, "")
    return Server(args.server, args.served_model, key, concurrency=args.concurrency)


def _questions(
    samples: "Samples", numbers: range, file: CaptionFile, max_tokens: Sequence[int]
) -> Iterator["Question"]:
    """What the file does not answer yet. A bad sample is not asked about: its entries are written here."""
    from encoders.data.pairs import decode_sample
    from encoders.data.recaption_backends import Question
    from encoders.data.samples import BadSample

    for number in numbers:
        key = samples.key(number)
        kinds = [kind for kind in PROMPTS if (key, kind) not in file.entries]
        if not kinds:
            continue
        try:
            sample = samples[number]
            decode_sample(sample)
        except BadSample as error:
            for kind in kinds:
                file.add(Entry(key, kind, None, error.reason, error.detail[:200]))
            continue
        for kind, most in zip(PROMPTS, max_tokens, strict=True):
            if kind in kinds:
                yield Question(key, kind, sample.image, PROMPTS[kind], most)


def judge(question: "Question", answer: "Answer") -> Entry:
    """A caption, or why there is none. Of one that was cut off, its whole sentences are kept."""
    text = answer.text.strip()
    key, kind = question.key, question.kind
    if answer.failure:
        return Entry(key, kind, None, FAILED, answer.failure)
    if not text:
        return Entry(key, kind, None, "empty")
    if text != text.encode(errors="ignore").decode():  # half a surrogate pair, which no tokenizer takes
        return Entry(key, kind, None, "unreadable", ascii(text)[:200])
    if REFUSAL.match(text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")):
        return Entry(key, kind, None, "refused", text[:200])
    if not answer.ended:
        ends = [found.end() for found in SENTENCE_END.finditer(text)]
        return Entry(key, kind, text[: ends[-1]] if ends else None, "cut off", text[-200:])
    return Entry(key, kind, text)


class Streak:
    """Failures without an answer in between."""

    def __init__(self) -> None:
        self.length = 0

    def count(self, answer: "Answer") -> None:
        """Raises ModelError when it is long enough to be no accident."""
        self.length = self.length + 1 if answer.failure else 0
        if self.length >= MOST_FAILURES:
            raise ModelError(
                f"{self.length} questions in a row failed, the last with {answer.failure}; mend that first"
            )


if __name__ == "__main__":
    run_command(main)
