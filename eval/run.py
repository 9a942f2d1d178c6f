"""eval-mllm: a LLaVA folder -> results.json, samples.jsonl and images/, by lmms-eval's own unmodified tasks.

Every question gets an answer row, or no score is given and the exit code is 5. Answers are kept as they come: the same
command goes on where a killed one stopped.
"""

import argparse
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from encoders import manifest
from encoders.errors import EvaluationIncomplete, ModelError, UsageError, run_command
from eval.answering import journal
from eval.bench_run import run_bench, self_check
from eval.benches.answers import Row
from eval.benches.benchmarks import BENCHES, Bench, resolve
from eval.benches.preflight import preflight
from eval.benches.staging import Source, check_datasets, located, staged
from eval.identity import data_fingerprint, dataset_facts, encoder_facts

NO_MODEL = (
    "no model named; pass --model DIR, where DIR is a LLaVA folder that `accelerate launch train/tune_llava.py` wrote,"
    " or any folder that transformers' LlavaForConditionalGeneration and its processor were saved to"
)
HUB_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN")
DEFAULT_BENCHES = "mme,pope,gqa,textvqa"


def parser() -> argparse.ArgumentParser:
    """The options of eval-mllm."""
    options = argparse.ArgumentParser(prog="eval-mllm", description=__doc__)
    options.add_argument("--model", type=Path, metavar="DIR", help="folder of a LlavaForConditionalGeneration")
    options.add_argument("--bench", default=DEFAULT_BENCHES, help=f"comma-separated list of: {', '.join(BENCHES)}")
    options.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="folder that holds the datasets (FOLDER/lmms-lab-encoder/POPE, ...); works offline. Default: the HF hub",
    )
    options.add_argument(
        "--limit", type=int, metavar="N", help="first N questions of each benchmark (of mme: whole pairs, N rounded up)"
    )
    options.add_argument("--batch-size", type=int, default=32, metavar="N", help="questions per batch (%(default)s)")
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16")
    options.add_argument(
        "--processes", type=int, metavar="N", help="models side by side (default: one per GPU, one on a CPU)"
    )
    options.add_argument(
        "--self-check",
        type=int,
        default=0,
        metavar="N",
        help="ask N questions of each benchmark again, one by one through transformers' generate: another answer is an "
        "error in float32, and counted in bfloat16",
    )
    options.add_argument(
        "--allow-errors", action="store_true", help="count questions without answer as wrong and list them"
    )
    options.add_argument(
        "--out", type=Path, metavar="DIR", help="results folder (default: the model's name + -results)"
    )
    options.add_argument("--overwrite", action="store_true", help="replace an earlier results folder")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as told by the command line. Raises a SwapError for everything the user can mend."""
    args = parser().parse_args(argv)
    benches = resolve(args.bench)
    model, data, out = _checked_paths(args, benches)
    for option in ("limit", "batch_size", "processes"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise UsageError(f"--{option.replace('_', '-')} must be at least 1, not {value}")
    if args.self_check < 0:
        raise UsageError(f"--self-check must be at least 0, not {args.self_check}")
    manifest.refuse_to_clobber(out, "results", args.overwrite)
    if data is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which is later
    sources = located(benches, data)
    for name in HUB_SECRETS:  # of no more use, and lmms-eval is fond of printing what it was given
        os.environ.pop(name, None)
    for note in preflight(benches, sources, model, out, args.device, args.dtype, args.processes or 1):
        print(f"{note.level}: {note.text}")
    settings = {
        "benches": [bench.name for bench in benches],
        "limit": args.limit,
        "batch_size": args.batch_size,
        "device": args.device,
        "dtype": args.dtype,
        "allow_errors": args.allow_errors,
    }
    how = {"processes": args.processes, "self_check": args.self_check}
    # Of the data what is read: the folder may hold other sets, and all that belongs to a parent is hashed.
    parents = {"model": model, **{name: source.path for name, source in sources.items()}}
    with journal.working_place(out) as place:
        try:
            with manifest.create(out, "results", settings, parents, args.overwrite) as draft:
                results = evaluate(model, benches, sources, draft.path, place, settings, how)
                draft.metrics.update({name: bench["metrics"] for name, bench in results["benches"].items()})
        except OSError as error:
            raise journal.cannot_write(out, error) from error
        journal.clear(place)
    print_table(results)
    print(f"results: {out}")


def evaluate(
    model: Path,
    benches: Sequence[Bench],
    sources: Mapping[str, Source],
    folder: Path,
    place: Path,
    settings: Mapping[str, Any],
    how: Mapping[str, Any],
) -> dict[str, Any]:
    """Ask a LLaVA folder all questions and write results.json, samples.jsonl and images/ into `folder`.

    Answers are kept in `place` until then. Data is loaded before the model, so that what is wrong with it shows at
    once. Returns the content of results.json. Raises EvaluationIncomplete if a question has no answer, unless
    `settings` allow errors.
    """
    rows: dict[str, list[Row]] = {}
    figures: dict[str, dict[str, Any]] = {}
    with staged(benches, sources):
        from eval.benches.lmms_tasks import load_task

        tasks = {bench.name: load_task(bench) for bench in benches}
        from eval.answering.chat_model import dtype_of, hardware
        from eval.answering.lmms_model import EncoderSwapLlava

        # "auto" may be another device when a killed run goes on.
        asked_how = {"device": hardware(settings["device"]), "dtype": str(dtype_of(settings["dtype"]))}
        asked_how["batch_size"] = settings["batch_size"]
        lm = EncoderSwapLlava(
            str(model),
            batch_size=settings["batch_size"],
            device=settings["device"],
            dtype=settings["dtype"],
            processes=how["processes"],
            place=place,
            identity=journal.identity(model, asked_how),
            keep_failures=True,
        )
        try:
            for bench in benches:
                lm.data = json.dumps([manifest.fingerprint(sources[folder].path) for folder in bench.folders])
                rows[bench.name], entry = run_bench(
                    bench, tasks[bench.name], lm, settings["limit"], settings["allow_errors"]
                )
                entry["dataset"] = dataset_facts(bench, sources, rows[bench.name])
                if how["self_check"]:
                    entry["self_check"] = self_check(bench, lm, how["self_check"])
                figures[bench.name] = entry
        finally:
            lm.close()
    if not settings["allow_errors"]:
        _refuse_failures(figures, place)
    _write_rows(folder, place, [row for of_bench in rows.values() for row in of_bench])
    results = {
        "model": {"path": str(model), "fingerprint": manifest.fingerprint(model)},
        "encoder": encoder_facts(model, lm.chat.config.to_dict()),
        "settings": {
            "eval": {
                **settings,
                "device": lm.team.device,
                "dtype": lm.team.dtype,
                "decoding": "greedy",
                "max_new_tokens": {bench.name: bench.max_new_tokens for bench in benches},
                "stop_ids": lm.chat.stop_ids,
                "chat": lm.chat.prompt("QUESTION"),
            },
            "model": manifest.read(model).config if (model / manifest.MANIFEST).is_file() else {},
            "data": {name: data_fingerprint(of_bench) for name, of_bench in rows.items()},
            "versions": manifest.library_versions(),
        },
        "run": {**how, "processes": lm.team.processes},  # plays no part in the answers
        "benches": figures,
    }
    manifest.write_json(folder / "results.json", results)
    return results


def print_table(results: Mapping[str, Any]) -> None:
    """Print each benchmark's leading figures (fractions as percent), its questions and the seconds they took; how many
    answers are empty, unread or failed where any is."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    benches = results["benches"].values()
    amiss = {
        "empty": [entry["empty"] for entry in benches],
        "unread": [entry["unparsed"] for entry in benches],
        "failed": [len(entry["failed"]) for entry in benches],
    }
    amiss = {column: counts for column, counts in amiss.items() if any(counts)}
    table = Table(title=Text(results["model"]["path"]), title_justify="left", box=SIMPLE_HEAD)
    for column in ("bench", "metric", "score", "asked", "images", *amiss, "s"):
        words = column in ("bench", "metric")
        table.add_column(column, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for at, (name, entry) in enumerate(results["benches"].items()):
        # A task without a figure that can be compared still has those that it printed.
        shown = [metric for metric in entry["headline"] or entry["metrics"] if metric in entry["metrics"]]
        scores = [f"{entry['metrics'][metric] * (100 if entry['percent'] else 1):.2f}" for metric in shown]
        part = f" of {entry['of_questions']:,}" if entry["questions"] != entry["of_questions"] else ""
        facts = [f"{entry['questions']:,}{part}", str(entry["images"]), *(str(counts[at]) for counts in amiss.values())]
        short = (metric.removeprefix(f"{name}_") for metric in shown)  # of pope_accuracy, accuracy
        table.add_row(name, "\n".join(short), "\n".join(scores), *facts, f"{entry['seconds']:.0f}")
    Console().print(table)
    if not amiss:
        print("every question is answered; no answer is empty or unreadable")


def _refuse_failures(figures: Mapping[str, Mapping[str, Any]], place: Path) -> None:
    """Raise EvaluationIncomplete if a question has no answer; all of them are listed in a file."""
    failed = {name: entry["failed"] for name, entry in figures.items() if entry["failed"]}
    if not failed:
        return
    file = place / "failed.json"
    manifest.write_json(file, failed)
    counts = ", ".join(f"{name} {len(rows)} of {figures[name]['questions']}" for name, rows in failed.items())
    name, rows = next(iter(failed.items()))
    raise EvaluationIncomplete(
        f"questions without answer, so no scores: {counts}; all are in {file}; the first, {name} row "
        f"{rows[0]['index']}: {rows[0]['reason']}; mend it and run the same command again (only they are asked again), "
        "or pass --allow-errors to count them as wrong"
    )


def _write_rows(folder: Path, place: Path, rows: Sequence[Row]) -> None:
    """samples.jsonl, and the small pictures that it names."""
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    (folder / "images").mkdir()
    for name in sorted({name for row in rows for name in row["image_id"].split("_") if name}):
        shutil.copyfile(place / "images" / f"{name}.jpg", folder / "images" / f"{name}.jpg")


def _checked_paths(args: argparse.Namespace, benches: Sequence[Bench]) -> tuple[Path, Path | None, Path]:
    """Absolute paths of the model, the data and the output, as far as they can be checked without heavy imports."""
    if args.model is None:
        raise UsageError(NO_MODEL)
    model: Path = args.model.resolve()
    if not (model / "config.json").is_file():
        raise ModelError(f"{model} is not a model folder: it has no config.json; {NO_MODEL.partition('; ')[2]}")
    try:
        kind = json.loads((model / "config.json").read_text())["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{model / 'config.json'} is no model's config ({error!r}); write the folder again") from error
    if kind != "llava":
        raise ModelError(
            f"{model / 'config.json'} says model_type {kind!r}, not 'llava'; {NO_MODEL.partition('; ')[2]}"
        )
    data = args.data.resolve() if args.data is not None else None
    if data is not None:
        check_datasets(data, [dataset for bench in benches for dataset in bench.folders])
    out = args.out.resolve() if args.out is not None else model.with_name(f"{model.name}-results")
    return model, data, out


def cli() -> None:
    """Console entry point."""
    run_command(main)


if __name__ == "__main__":
    cli()
