"""`fetch-benches --bench ... --to DIR`: download what the benches read, for runs that have no network.

Only the splits that their tasks read are taken, by one commit per repository, without a token unless a set is gated.
An interrupted download goes on where it stopped; until it is whole, eval-mllm refuses the folder.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from encoders.errors import UsageError, run_command
from eval.benches.benchmarks import BENCHES, resolve
from eval.benches.download import default_folder, fetch


def parser() -> argparse.ArgumentParser:
    """The options of fetch-benches."""
    options = argparse.ArgumentParser(prog="fetch-benches", description=__doc__)
    options.add_argument(
        "--bench", default=",".join(BENCHES), help="comma-separated list, of these or of lmms-eval's tasks: %(default)s"
    )
    options.add_argument(
        "--to", type=Path, metavar="DIR", help="folder to fetch into (default: where eval-mllm looks without --data)"
    )
    options.add_argument(
        "--revision",
        help="branch, tag or commit of the dataset, for benches of one repository (default: the commit that our "
        "tests know, else the newest)",
    )
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch as told by the command line. Raises a SwapError for everything the user can mend."""
    args = parser().parse_args(argv)
    benches = resolve(args.bench)
    repositories = {folder for bench in benches for folder in bench.folders}
    if args.revision is not None and len(repositories) > 1:
        raise UsageError(
            f"--revision names a commit of one repository, but these benches read {', '.join(sorted(repositories))}; "
            "fetch them one by one"
        )
    to = args.to.resolve() if args.to is not None else default_folder()
    for repository, record in fetch(benches, to, args.revision).items():
        print(f"{repository}: {len(record['files'])} files of commit {record['revision']}")
    given = f"--data {to}" if args.to is not None else "no --data"
    print(f"{to}: run eval-mllm with {given}; it needs no network")


def cli() -> None:
    """Console entry point."""
    run_command(main)


if __name__ == "__main__":
    cli()
