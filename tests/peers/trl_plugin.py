"""A pytest plugin that puts dpo_fast's trainer and config in the place of TRL's: `pytest -p trl_plugin` (run_trl.py does)."""

import trl

import dpo_fast

trl.DPOTrainer, trl.DPOConfig = dpo_fast.DPOTrainer, dpo_fast.DPOConfig
