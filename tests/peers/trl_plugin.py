"""A pytest plugin that puts dpo_fast's trainer and config in the place of TRL's: `pytest -p trl_plugin` (see run_trl.py)."""

import trl

from dpo_fast.integrations import trl as ours

trl.DPOTrainer, trl.DPOConfig = ours.DPOTrainer, ours.DPOConfig
