"""LLaMA-Factory's DPO without logits in memory: one call before its run. python examples/llamafactory_patched.py CONFIG.yaml"""

from llamafactory.train.tuner import run_exp

from dpo_fast.integrations.llamafactory import patch_llamafactory

undo = patch_llamafactory()
run_exp()  # It reads the configuration that the command line names.
undo()
