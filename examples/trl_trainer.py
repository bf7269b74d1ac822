"""Our trainer under TRL's names: only the import line changes. python examples/trl_trainer.py MODEL PAIRS.jsonl [STEPS]"""

import sys

import torch
from datasets import load_dataset

from dpo_fast.integrations.trl import DPOConfig, DPOTrainer  # was: from trl import DPOConfig, DPOTrainer

if len(sys.argv) not in (3, 4):
    sys.exit(__doc__)
model, pairs, steps = (*sys.argv[1:], "-1")[:3]
trainer = DPOTrainer(
    model,
    args=DPOConfig(
        output_dir="runs/trl_example",
        max_steps=int(steps),
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=load_dataset("json", data_files=pairs, split="train"),
)
trainer.train()
