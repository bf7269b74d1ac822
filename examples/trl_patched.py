"""TRL's own trainer with our head: one call before, one after. python examples/trl_patched.py MODEL PAIRS.jsonl [STEPS]"""

import sys

import torch
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

from dpo_fast.integrations.trl import patch_trl

if len(sys.argv) not in (3, 4):
    sys.exit(__doc__)
model, pairs, steps = (*sys.argv[1:], "-1")[:3]
undo = patch_trl()
trainer = DPOTrainer(
    model,
    args=DPOConfig(
        output_dir="runs/trl_patched",
        max_steps=int(steps),
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=load_dataset("json", data_files=pairs, split="train"),
)
trainer.train()
undo()
