"""From encoders to a swap report: every stage for every encoder, LLM and seed of one YAML, skipping what is up to date.

    python train/swap.py --config train/recipes/demo.yaml [--dry-run]

Each stage is a command of the data-flow table, run as a subprocess; docs/swap.md has the keys of the YAML.
"""

import shlex
from collections.abc import Sequence

from encoders.errors import run_command
from train.config import parse
from train.pipeline import UP_TO_DATE, Runner, Stage
from train.swap_check import check
from train.swap_config import SwapConfig
from train.swap_plan import plan


def main() -> None:
    config = parse(SwapConfig, "demo.yaml")
    stages = plan(config)
    check(config, stages, hub=not config.dry_run)
    runner = Runner(config.work, config.jobs)
    if config.dry_run:
        print(show(stages, runner))
    elif not runner.run(stages):
        print(runner.log(stages[-1]).read_text(), end="")  # the table, as the last run printed it
        print("all is up to date")


def show(stages: Sequence[Stage], runner: Runner) -> str:
    """What a run would do, stage by stage, with the commands that would run."""
    states = runner.states(stages)
    lines = []
    for stage in stages:
        lines.append(f"{stage.name}: {states[stage.name]}")
        if states[stage.name] != UP_TO_DATE:
            lines.append(f"    {shlex.join(stage.words(states[stage.name]))}")
    late = sum(state != UP_TO_DATE for state in states.values())
    return "\n".join([*lines, f"{late} of {len(stages)} stages to run"])


if __name__ == "__main__":
    run_command(main)
