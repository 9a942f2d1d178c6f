"""Train a LLaVA around an exported encoder, one stage at a time.

    accelerate launch train/tune_llava.py --stage projector --config train/recipes/projector_demo.yaml [--resume]
    accelerate launch train/tune_llava.py --stage lora --config train/recipes/lora_demo.yaml [--resume]

Stage projector writes a LLaVA folder; stage lora writes the merged LLaVA folder with its adapter/ inside.
"""

from encoders.errors import run_command
from train.config import LlavaConfig, parse


def main() -> None:
    config = parse(LlavaConfig, "projector_demo.yaml")
    # Torch comes in only once the config is known to be right.
    from train import llava_task, loop, signals, start, status

    start.prepare_folder(config.run)
    with signals.StopRequest() as stop:
        accelerator = start.build_accelerator(config.run)
        with status.status(config.run, accelerator):
            task = llava_task.projector(config) if config.stage == "projector" else llava_task.lora(config)
            loop.train(task, config.run, config.optim, stop, accelerator)


if __name__ == "__main__":
    run_command(main)
