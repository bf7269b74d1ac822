"""Our trainer under TRL's names: the import line is what changes. python examples/trl_trainer.py MODEL PAIRS.jsonl"""

import sys

from datasets import load_dataset

from dpo_fast.integrations.trl import DPOConfig, DPOTrainer  # was: from trl import DPOConfig, DPOTrainer

model, pairs = sys.argv[1:3]
trainer = DPOTrainer(
    model,
    args=DPOConfig(output_dir="runs/trl_example", max_steps=int(sys.argv[3]) if len(sys.argv) > 3 else -1),
    train_dataset=load_dataset("json", data_files=pairs, split="train"),
)
trainer.train()
