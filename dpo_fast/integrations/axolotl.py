"""Axolotl: with one line in its YAML, its own DPO trainer uses our log-probs.

plugins: [dpo_fast.integrations.axolotl.DPOFastPlugin]
"""

from axolotl.integrations.base import BasePlugin

from .trl import patch_trl


class DPOFastPlugin(BasePlugin):
    """Patches the TRL that Axolotl pins (1.8 or 1.9) before the model is loaded, for DPO runs only."""

    def __init__(self):
        super().__init__()
        self.undo = None

    def pre_model_load(self, cfg) -> None:
        """Axolotl calls this before a run. Raises ImportError for a TRL that was not tested."""
        rl = getattr(cfg, "rl", None)
        if str(getattr(rl, "value", rl)) in ("dpo", "ipo"):
            self.undo = patch_trl()

    def post_train_unload(self, cfg) -> None:
        """Axolotl calls this at the end of a run."""
        if self.undo is not None:
            self.undo()
            self.undo = None
