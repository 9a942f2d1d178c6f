"""Train a LLaVA around an exported encoder, one stage at a time.

    accelerate launch train/tune_llava.py --stage projector --config train/recipes/projector_demo.yaml [--resume]
    accelerate launch train/tune_llava.py --stage lora --config train/recipes/lora_demo.yaml [--resume]

Every stage writes a LLaVA folder; those with LoRA the merged one, with its adapter/ inside. `--dry-run` prints what a
run would do, write and take, and stops.
"""

from encoders.errors import UsageError, run_command
from train.config import LlavaConfig, parse


def main() -> None:
    config = parse(LlavaConfig, "projector_demo.yaml")
    # Torch comes in only once the config is known to be right.
    if config.stage == "qlora":
        from llava_adapter.quantised import require_bitsandbytes
        from train import sharding

        require_bitsandbytes()
        if sharding.is_asked_for():
            raise UsageError(
                "stage qlora does not run under FSDP2, which cannot shard weights of 4 or 8 bits; launch it with "
                "train/profiles/ddp.yaml (every GPU holds the whole model), or take stage lora"
            )
    if config.dry_run:
        from train import llava_plan

        return llava_plan.show(config)
    from train import llava_task, loop, signals, start, status

    start.prepare_folder(config.run)
    with signals.StopRequest() as stop:
        accelerator = start.build_accelerator(config.run)
        with status.status(config.run, accelerator):
            loop.train(llava_task.build(config), config.run, config.optim, stop, accelerator)


if __name__ == "__main__":
    run_command(main)
