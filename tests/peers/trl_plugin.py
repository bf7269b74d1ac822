"""A pytest plugin that puts dpo_fast's trainer and config in the place of TRL's: `pytest -p trl_plugin` (see test_trl.py)."""

import trl

import dpo_fast

trl.DPOTrainer, trl.DPOConfig = dpo_fast.DPOTrainer, dpo_fast.DPOConfig
