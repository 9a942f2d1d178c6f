"""eval-mllm: a LLaVA folder -> results.json, samples.jsonl and images/, by lmms-eval's own unmodified tasks.

Every question gets an answer row or the run fails: nothing is written then, and the exit code is not 0.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encoders import manifest
from encoders.errors import DataError, EvaluationIncomplete, ModelError, SwapError, UsageError, run_command
from eval.answers import Row, checked_metrics, collect_rows, printed_metrics
from eval.benchmarks import BENCHES, Bench, resolve
from eval.identity import data_fingerprint, encoder_facts
from eval.staging import check_datasets, staged

if TYPE_CHECKING:  # these take 10 seconds to import: too long for --help
    from lmms_eval.api.task import Task
    from lmms_eval.tasks import TaskManager

    from eval.lmms_model import EncoderSwapLlava

NO_MODEL = (
    "no model named; pass --model DIR, where DIR is a LLaVA folder that `accelerate launch train/tune_llava.py` wrote,"
    " or any folder that transformers' LlavaForConditionalGeneration and its processor were saved to"
)


def parser() -> argparse.ArgumentParser:
    """The options of eval-mllm."""
    options = argparse.ArgumentParser(prog="eval-mllm", description=__doc__)
    options.add_argument("--model", type=Path, metavar="DIR", help="folder of a LlavaForConditionalGeneration")
    options.add_argument("--bench", default=",".join(BENCHES), help="comma-separated list of: %(default)s")
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
        "--out", type=Path, metavar="DIR", help="results folder (default: the model's name + -results)"
    )
    options.add_argument("--overwrite", action="store_true", help="replace an earlier results folder")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as told by the command line. Raises a SwapError for everything the user can mend."""
    args = parser().parse_args(argv)
    benches = resolve(args.bench)
    model, data, out = _checked_paths(args, benches)
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit must be at least 1, not {args.limit}")
    if args.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, not {args.batch_size}")
    if data is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which is later
    settings = {
        "benches": [bench.name for bench in benches],
        "limit": args.limit,
        "batch_size": args.batch_size,
        "device": args.device,
        "dtype": args.dtype,
    }
    parents = {"model": model} if data is None else {"model": model, "data": data}
    with manifest.create(out, "results", settings, parents, args.overwrite) as draft:
        results = evaluate(model, benches, data, draft.path, settings)
        draft.metrics.update({name: bench["metrics"] for name, bench in results["benches"].items()})
    print_table(results)
    print(f"results: {out}")


def evaluate(
    model: Path, benches: Sequence[Bench], data: Path | None, folder: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Ask a LLaVA folder all questions and write results.json, samples.jsonl and images/ into `folder`.

    Data is loaded before the model, so that what is wrong with it shows at once. Returns the content of results.json.
    """
    thumbnails = folder / "images"
    thumbnails.mkdir()
    with staged(data, [dataset for bench in benches for dataset in bench.folders]):
        tasks = {bench.name: load_task(bench) for bench in benches}
        from eval.lmms_model import EncoderSwapLlava

        lm = EncoderSwapLlava(
            str(model),
            batch_size=settings["batch_size"],
            device=settings["device"],
            dtype=settings["dtype"],
            thumbnails=str(thumbnails),
        )
        rows: dict[str, list[Row]] = {}
        figures: dict[str, dict[str, Any]] = {}
        for bench in benches:
            rows[bench.name], figures[bench.name] = run_bench(bench, tasks[bench.name], lm, settings["limit"])
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as stream:
        for row in (row for of_bench in rows.values() for row in of_bench):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    results = {
        "model": {"path": str(model), "fingerprint": manifest.fingerprint(model)},
        "encoder": encoder_facts(model, lm.chat.model.config.to_dict()),
        "settings": {
            "eval": {
                **settings,
                "device": lm.chat.device.type,
                "dtype": str(lm.chat.dtype).removeprefix("torch."),
                "decoding": "greedy",
                "max_new_tokens": {bench.name: bench.max_new_tokens for bench in benches},
                "stop_ids": lm.chat.stop_ids,
                "chat": lm.chat.prompt("QUESTION"),
            },
            "model": manifest.read(model).config if (model / manifest.MANIFEST).is_file() else {},
            "data": {name: data_fingerprint(of_bench) for name, of_bench in rows.items()},
            "versions": manifest.library_versions(),
        },
        "benches": figures,
    }
    manifest.write_json(folder / "results.json", results)
    return results


def load_task(bench: Bench) -> "Task":
    """lmms-eval's task with its questions. Raises DataError if they cannot be loaded."""
    manager = task_manager()
    from lmms_eval.tasks import get_task_dict

    try:
        (task,) = get_task_dict([bench.task], manager, "simple").values()
    except Exception as error:
        raise DataError(
            f"{bench.name}: cannot load {', '.join(bench.folders)} for lmms-eval's task {bench.task!r} "
            f"({_cause(error)}); check the files, or name a folder that has them with --data"
        ) from error
    return task


def run_bench(
    bench: Bench, task: "Task", lm: "EncoderSwapLlava", limit: int | None
) -> tuple[list[Row], dict[str, Any]]:
    """Ask and score one benchmark: its rows and its entry in results.json.

    Raises EvaluationIncomplete if any question has no answer or lmms-eval could not score them.
    """
    from lmms_eval.evaluator import simple_evaluate

    if limit is not None and bench.task == "mme":
        limit += limit % 2  # scored in pairs
    available = len(task.eval_docs)
    questions = available if limit is None else min(limit, available)
    lm.max_new_tokens = bench.max_new_tokens
    start = time.perf_counter()
    options = argparse.Namespace(output_path=".", process_with_media=False)  # scoring need not decode pictures again
    try:
        output = simple_evaluate(
            lm, tasks=[task], task_manager=task_manager(), limit=limit, bootstrap_iters=0, cli_args=options
        )
    except SwapError:
        raise
    except Exception as error:
        raise EvaluationIncomplete(f"{bench.name}: lmms-eval could not score the answers ({_cause(error)})") from error
    rows = collect_rows(bench, output["samples"][bench.task], lm.image_ids, questions)
    metrics = checked_metrics(bench, rows, printed_metrics(output["results"][bench.task]))
    return rows, {
        "task": bench.task,
        "metrics": metrics,
        "questions": questions,
        "images": len({row["image_id"] for row in rows}),
        "answered": len(rows),
        "empty": sum(row["empty"] for row in rows),
        "seconds": round(time.perf_counter() - start, 2),
        "protocol": {"max_new_tokens": str(bench.max_new_tokens), **bench.protocol},
    }


@cache
def task_manager() -> "TaskManager":
    """lmms-eval's index of its tasks; building it takes seconds."""
    import lmms_eval.models  # noqa: F401 (sets up lmms-eval's logging; else scanning the tasks floods stderr)
    from lmms_eval.tasks import TaskManager

    return TaskManager("WARNING", model_name="encoder_swap_llava")


def print_table(results: Mapping[str, Any]) -> None:
    """Print each benchmark's leading figures (fractions as percent), its questions and what they took."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=results["model"]["path"], title_justify="left")
    for column in ("bench", "metric", "score", "questions", "images", "empty", "seconds"):
        table.add_column(column, justify="left" if column in ("bench", "metric") else "right")
    for name, entry in results["benches"].items():
        bench = BENCHES[name]
        shown = [metric for metric in bench.headline if metric in entry["metrics"]]
        scores = [f"{entry['metrics'][metric] * (100 if bench.percent else 1):.2f}" for metric in shown]
        facts = [str(entry[fact]) for fact in ("questions", "images", "empty", "seconds")]
        table.add_row(name, "\n".join(shown), "\n".join(scores), *facts)
    Console().print(table)


def _checked_paths(args: argparse.Namespace, benches: Sequence[Bench]) -> tuple[Path, Path | None, Path]:
    """Absolute paths of the model, the data and the output, as far as they can be checked without heavy imports."""
    if args.model is None:
        raise UsageError(NO_MODEL)
    model: Path = args.model.resolve()
    if not (model / "config.json").is_file():
        raise ModelError(f"{model} is not a model folder: it has no config.json; {NO_MODEL.partition('; ')[2]}")
    kind = json.loads((model / "config.json").read_text()).get("model_type")
    if kind != "llava":
        raise ModelError(
            f"{model / 'config.json'} says model_type {kind!r}, not 'llava'; {NO_MODEL.partition('; ')[2]}"
        )
    data = args.data.resolve() if args.data is not None else None
    if data is not None:
        check_datasets(data, [dataset for bench in benches for dataset in bench.folders])
    out = args.out.resolve() if args.out is not None else model.with_name(f"{model.name}-results")
    return model, data, out


def _cause(error: BaseException) -> str:
    """What went wrong, in words; lmms-eval retries some steps and then says only that it did."""
    from tenacity import RetryError

    inner = error.last_attempt.exception() if isinstance(error, RetryError) else None
    told = error if inner is None else inner
    return f"{type(told).__name__}: {told}"


def cli() -> None:
    """Console entry point."""
    run_command(main)


if __name__ == "__main__":
    cli()
