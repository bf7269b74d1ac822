"""A run of a tiny model that something happens to after a step."""

import tiny
from test_resume_agrees import options
from transformers import TrainerCallback

from dpo_fast import DPOConfig, DPOTrainer


class At(TrainerCallback):
    """Calls `act(model)` once `step` steps are done."""

    def __init__(self, step: int, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.act(model)


def start(folder, *callbacks, rows=None, model=None, **changes) -> DPOTrainer:
    args = DPOConfig(**options(folder, **changes))
    return DPOTrainer(model or tiny.llama(), args=args, train_dataset=rows or tiny.pairs(16), callbacks=list(callbacks))
