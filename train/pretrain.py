"""Pre-train an encoder on image-text pairs.

    accelerate launch train/pretrain.py --config train/recipes/clips_demo.yaml [--run.steps 500 ...] [--resume]

Reads webdataset tars; writes an encoder run. Without arguments it runs the demo recipe.
"""

from encoders.errors import run_command
from train.config import PretrainConfig, parse


def main() -> None:
    config = parse(PretrainConfig, "clips_demo.yaml")
    # Torch comes in only once the config is known to be right.
    from train import loop, pair_task, signals, start, status

    start.prepare_folder(config.run)
    with signals.StopRequest() as stop:
        accelerator = start.build_accelerator(config.run)
        with status.status(config.run, accelerator):
            task = pair_task.pretrain(config, accelerator)
            loop.train(task, config.run, config.optim, stop, accelerator)


if __name__ == "__main__":
    run_command(main)
