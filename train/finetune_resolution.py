"""Fine-tune an encoder at a higher resolution: a finished run, or published weights with both towers.

    accelerate launch train/finetune_resolution.py --config train/recipes/resolution_demo.yaml [--init SOURCE]

Position table, config and preprocessing change together; a run's objective goes on as it was. Writes an encoder run.
"""

from encoders.errors import run_command
from train.config import ResolutionConfig, parse


def main() -> None:
    config = parse(ResolutionConfig, "resolution_demo.yaml")
    # Torch comes in only once the config is known to be right.
    from train import loop, pair_task, signals, start, status

    start.prepare_folder(config.run)
    with signals.StopRequest() as stop:
        accelerator = start.build_accelerator(config.run)
        with status.status(config.run, accelerator):
            task = pair_task.finetune_resolution(config)
            loop.train(task, config.run, config.optim, stop, accelerator)


if __name__ == "__main__":
    run_command(main)
