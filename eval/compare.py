"""`compare-runs A B [C ...]`: did the swap help? Reads results folders, writes one page and the same as JSON.

Each argument is an arm: one results folder, or several of models that differ in the seed only (A0,A1,A2). The first is
the baseline. Uncertainty is a bootstrap over pictures and, with several seeds, the luck of training.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from encoders.errors import UsageError, run_command
from eval.comparing.comparison import TOO_FEW_RUNS, compare, to_json
from eval.comparing.results import load_arm


def parser() -> argparse.ArgumentParser:
    """The options of compare-runs."""
    options = argparse.ArgumentParser(prog="compare-runs", description=__doc__)
    options.add_argument(
        "arms", nargs="*", metavar="ARM", help="a results folder, or several with commas between them; baseline first"
    )
    options.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="the page; JSON goes beside it")
    options.add_argument("--name", nargs="+", help="what to call the arms in the report (default: the folders' names)")
    options.add_argument(
        "--encoders",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="one per arm: an encoder run, which adds retrieval, or an exported encoder, whose parity is shown",
    )
    options.add_argument(
        "--encoder-scores",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE.json",
        help="one per arm: what eval-encoder --out wrote",
    )
    options.add_argument(
        "--allow-differences",
        action="store_true",
        help="compare although settings besides the encoder differ; the report says so at its top",
    )
    options.add_argument(
        "--views", type=int, default=4, metavar="N", help="images to draw through the encoders (%(default)s; 0: none)"
    )
    options.add_argument("--draws", type=int, default=10_000, help="bootstrap draws (default: 10000)")
    options.add_argument("--seed", type=int, default=0, help="of the bootstrap and the gallery (default: 0)")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, compare, write report.html and report.json, print the table."""
    args = parser().parse_args(argv)
    folders = [[Path(folder) for folder in arm.split(",") if folder] for arm in args.arms]
    if len(folders) < 2:
        raise UsageError(TOO_FEW_RUNS)
    if empty := [arm for arm, of_arm in zip(args.arms, folders, strict=True) if not of_arm]:
        raise UsageError(f"the arm {empty[0]!r} names no folder")
    if args.out.suffix != ".html":
        raise UsageError(f"--out {args.out} must end in .html; the JSON is written beside it")
    if args.draws < 100:
        raise UsageError(f"--draws {args.draws} is too few for a 95 % interval; use at least 100")
    if args.views < 0:
        raise UsageError(f"--views {args.views} must not be negative; 0 draws none")
    names = args.name or _names(folders)
    if len(names) != len(folders) or len(set(names)) != len(names):
        raise UsageError(f"--name gives {len(set(names))} different names to {len(folders)} arms; name each once")
    arms = [load_arm(of_arm, name) for of_arm, name in zip(folders, names, strict=True)]
    comparison = compare(
        arms, args.encoders, args.encoder_scores, args.draws, args.seed, allow_differences=args.allow_differences
    )

    from eval.comparing.report import render, write
    from eval.comparing.summary import show
    from eval.comparing.views import draw_views

    page = render(comparison, draw_views(arms, comparison, args.views) if args.views else None)
    write(args.out, page, to_json(comparison))
    show(comparison, args.out)


def cli() -> None:
    """Console entry point."""
    run_command(main)


def _names(arms: Sequence[Sequence[Path]]) -> list[str]:
    """The name of each arm's first folder, or its whole path where names are not different."""
    short = [folders[0].resolve().name for folders in arms]
    return short if len(set(short)) == len(short) else [str(folders[0]) for folders in arms]


if __name__ == "__main__":
    cli()
