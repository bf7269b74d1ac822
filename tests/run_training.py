"""Training runs in a process of their own, one after the other: `python run_training.py spec.json ...`.

For tests that kill it or start several.

The spec: `model` (folder), `options` (of DPOConfig), `train`, `eval` (rows), `resume` ("last": the last checkpoint, where
there is one), `out` (where rank 0 writes the log history and the final weights), `dtype`, `kill_at` (see
`kill_while_saving`), `kill_event` (see `kill_at_event`), `kill_rank_at` (a step after which rank 1 is killed, once), `lora` (of LoraConfig), `measure` (whether
`out` tells the memory of the reference pass, see `weigh`), `evaluate_first`, `streamed` (whether `train` is), `vision` (whether the
model has a part for images), `quantised` (of BitsAndBytesConfig).
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path

import torch
from datasets import IterableDataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig, TrainerCallback

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.train import leave
from dpo_fast.training.checkpoint import complete_checkpoints


def kill_while_saving(kill_at: int) -> None:
    """Kill this process at the `kill_at`-th file that is opened for writing in a checkpoint folder of step 4."""
    seen = 0

    def hook(event, args):
        nonlocal seen
        if event == "open" and isinstance(args[0], str) and "checkpoint-4" in args[0] and "w" in str(args[1] or ""):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_at_event(event: str, text: str, count: int) -> None:
    """SIGKILL to ourselves at the `count`-th audit event of that name whose first argument ends with `text`."""
    seen = 0

    def hook(name, args):
        nonlocal seen
        if name == event and args and str(args[0]).endswith(text):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


class KillOnce(TrainerCallback):
    """Kill this process after `step`, but only once: a file beside `out` remembers it."""

    def __init__(self, step: int, out: str):
        self.step, self.mark = step, Path(out + ".killed")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def shard_on_cpu() -> None:
    """Let accelerate apply FSDP on CPU processes: torch's FSDP2 does, but accelerate 1.15 asks for an accelerator."""
    from accelerate import PartialState, state

    PartialState(cpu=True)
    real = state.DistributedType

    class Names:
        """The enum, with the CPU in the place of a device that nobody here has."""

        def __getattr__(self, name):
            return getattr(real, "MULTI_CPU" if name == "MULTI_MLU" else name)

    state.DistributedType = Names()


def weigh(model, seen: list[int]) -> None:
    """Append to `seen`, at every call of a layer that is sharded, the bytes of all tensors of numbers in this process."""

    def hook(layer, args):
        if not type(layer).__name__.startswith("FSDP"):
            return  # the checks before the model is sharded
        tensors = (
            t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.is_floating_point()
        )
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
        seen.append(sum(storages.values()))

    for layer in model.model.layers:
        layer.register_forward_pre_hook(hook)


def main(path: str) -> None:
    with open(path) as file:
        spec = json.load(file)
    if spec.get("kill_at"):
        kill_while_saving(spec["kill_at"])
    if spec.get("kill_event"):
        kill_at_event(*spec["kill_event"])
    if spec["options"].get("fsdp"):
        shard_on_cpu()
    weights, seen, model = 0, [], spec["model"]
    if not spec.get("quantised"):
        model = (AutoModelForImageTextToText if spec.get("vision") else AutoModelForCausalLM).from_pretrained(
            spec["model"], dtype=getattr(torch, spec.get("dtype", "float64"))
        )
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if spec.get("measure"):
        weigh(model, seen)
    train = IterableDataset.from_generator(lambda: iter(spec["train"])) if spec.get("streamed") else spec["train"]
    quantised = BitsAndBytesConfig(**spec["quantised"]) if spec.get("quantised") else None
    peft_config = LoraConfig(**spec["lora"]) if spec.get("lora") else None
    trainer = DPOTrainer(
        model, args=DPOConfig(**spec["options"]), train_dataset=train, eval_dataset=spec.get("eval"),
        peft_config=peft_config, quantization_config=quantised,
    )  # fmt: skip
    memory = {"weights": weights, "reference": list(seen)}
    before = trainer.evaluate() if spec.get("evaluate_first") else None
    if spec.get("kill_rank_at") and trainer.args.process_index == 1:
        trainer.add_callback(KillOnce(spec["kill_rank_at"], spec["out"]))
    resume = spec.get("resume")
    trainer.train(
        resume_from_checkpoint=bool(complete_checkpoints(trainer.args.output_dir)) if resume == "last" else resume
    )
    if spec["options"].get("fsdp"):
        assert any(hasattr(p, "full_tensor") for p in trainer.model.parameters()), "nothing was sharded"
    metrics = trainer.evaluate() if spec.get("eval") else None
    state = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.accelerator.is_main_process:
        torch.save({k: v.cpu() for k, v in state.items()}, spec["out"] + ".pt")
        with open(spec["out"], "w") as file:
            found = {"history": trainer.state.log_history, "eval": metrics, "before": before, "memory": memory}
            json.dump(found, file)
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    try:
        for spec in sys.argv[1:]:
            main(spec)
    except SystemExit as ended:  # SIGTERM
        leave(ended.code)
    leave(0)
