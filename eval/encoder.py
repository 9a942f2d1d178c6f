"""eval-encoder: an encoder run, or an encoder exported --with-text -> zero-shot retrieval, classification and
segmentation figures.

Every picture of a set counts or the command fails: no score is given for a part of a set.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from encoders import manifest
from encoders.errors import DataError, UsageError, run_command
from eval.zero_shot.measures import MEASURES
from eval.zero_shot.prompts import TEMPLATE_SETS
from eval.zero_shot.spec import KINDS, ZeroShotSpec, parse_spec

SPEC_HELP = """\
A SET is KIND:PATH[,OPTION=VALUE...]; give an option as often as there are sets.
  karpathy:FILE.json   Karpathy's COCO or Flickr30k splits; images=FOLDER, split=test
  shards:FOLDER        webdataset tars; every short caption of a sample counts
  scenes:FOLDER        an embedded world; split=test (segmentation needs its masks)
  dataset:WHERE        Hugging Face: a folder on disk or a hub id; split=test, revision=,
                       image_column=image, caption_column=caption
  folder:FOLDER        classification: one folder per class, names in classes.json or
                       classes=imagenet; segmentation: described by segmentation.json
  all of them: name=, limit=; with class names: templates="""


def parser() -> argparse.ArgumentParser:
    """The options of eval-encoder."""
    options = argparse.ArgumentParser(
        prog="eval-encoder",
        description=__doc__,
        epilog=SPEC_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("run", type=Path, metavar="RUN", help="an encoder run, or an encoder exported --with-text")
    for task, kinds in KINDS.items():
        options.add_argument(f"--{task}", action="append", default=[], metavar="SET", help=f"kinds: {', '.join(kinds)}")
    options.add_argument("--templates", choices=TEMPLATE_SETS, help="prompts of sets that name none (plain)")
    options.add_argument("--limit", type=int, metavar="N", help="N pictures of each set, spread evenly over it")
    options.add_argument("--batch-size", type=int, default=64, metavar="N", help="pictures per batch (%(default)s)")
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options.add_argument("--out", type=Path, metavar="FILE.json", help="also write the figures and how they came about")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as told by the command line. Raises a SwapError for everything the user can mend."""
    args = parser().parse_args(argv)
    specs = _specs(args)
    if args.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, not {args.batch_size}")
    if args.out is not None and not args.out.resolve().parent.is_dir():
        raise UsageError(f"--out {args.out}: its folder does not exist; make it first")
    results = evaluate(args.run, specs, args.device, args.batch_size)
    print_table(results)
    if args.out is not None:
        manifest.write_json(args.out, results)
        print(f"results: {args.out}")


def evaluate(run: Path, specs: Sequence[ZeroShotSpec], device: str, batch_size: int) -> dict[str, Any]:
    """Score a finished run on all sets: {"run": ..., "settings": ..., "sets": [...], "versions": ...}.

    Sets are opened before the model, so that what is wrong with them shows at once.
    """
    kind = _kind(run)  # before any heavy import
    import torch

    from encoders import encoder_run
    from encoders.export import two_towers
    from eval.zero_shot.scorer import open_sets

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    sets = open_sets(specs)
    model, tokenizer = encoder_run.load(run) if kind == "encoder-run" else two_towers.read(run)
    model.to(device)
    entries = []
    for one in sets:
        metrics = one.score(model, tokenizer, torch.device(device), batch_size)
        chosen = {option: value for option, value in asdict(one.spec).items() if value is not None}
        entry = {"name": one.name, "set": chosen, "sizes": one.sizes, "protocol": one.protocol, "metrics": metrics}
        entries.append(entry)
    return {
        "run": {"path": str(run), "fingerprint": manifest.fingerprint(run)},
        "settings": {"device": device, "batch_size": batch_size, "dtype": "float32"},
        "sets": entries,
        "versions": manifest.library_versions(),
    }


def print_table(results: Mapping[str, Any]) -> None:
    """Print every figure in percent beside that of guessing."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(results["run"]["path"]), title_justify="left")
    for column in ("set", "pictures", "measure", "score %", "chance %"):
        table.add_column(column, justify="right" if column in ("pictures", "score %", "chance %") else "left")
    for entry in results["sets"]:
        metrics = entry["metrics"]
        shown = [(metrics[key], *MEASURES[key]) for key in MEASURES if key in metrics]
        table.add_row(
            Text(f"{entry['name']}\n{entry['set']['task']}"),
            str(entry["sizes"]["pictures"]),
            "\n".join(label for _, label, _ in shown),
            "\n".join(f"{100 * value:.1f}" for value, _, _ in shown),
            "\n".join(f"{100 * metrics[chance]:.2f}" if chance is not None else "" for _, _, chance in shown),
            end_section=True,
        )
    Console().print(table)


def _kind(run: Path) -> str:
    """Raises DataError for an artifact that has no two towers."""
    kind = manifest.read(run).kind
    if kind not in ("encoder-run", "encoder"):
        raise DataError(f"{run} holds a {kind!r} artifact where 'encoder-run' or 'encoder' is needed")
    return kind


def _specs(args: argparse.Namespace) -> list[ZeroShotSpec]:
    """The sets of the command line; --templates and --limit stand in where a set says nothing."""
    named = [parse_spec(task, text) for task in KINDS for text in vars(args)[task]]  # type: ignore[arg-type]
    if not named:
        raise UsageError("no evaluation set named; pass --retrieval, --classification or --segmentation (see --help)")
    specs = []
    for spec in named:
        if args.limit is not None and spec.limit is None:
            spec = replace(spec, limit=args.limit)
        if args.templates is not None and spec.takes("templates") and spec.templates is None:
            spec = replace(spec, templates=args.templates)
        specs.append(spec)
    return specs


def cli() -> None:
    """Console entry point."""
    run_command(main)


if __name__ == "__main__":
    cli()
