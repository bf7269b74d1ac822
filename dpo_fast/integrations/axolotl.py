"""Axolotl: with one line in its YAML, its own DPO trainer uses our log-probs.

plugins: [dpo_fast.integrations.axolotl.DPOFastPlugin]
"""

from axolotl.integrations.base import BasePlugin

from .trl import patch_trl


class DPOFastPlugin(BasePlugin):
    """Patches the TRL that Axolotl pins (1.8 or 1.9) before the model is loaded, for DPO and IPO runs that name the plugin."""

    def __init__(self):
        super().__init__()
        self.undo = None

    def pre_model_load(self, cfg) -> None:
        """Axolotl calls this before a run. Raises ImportError for a TRL that was not tested."""
        self.post_train_unload(cfg)  # An earlier run of this process may have failed.
        # Axolotl keeps a plugin for the whole process, also for runs whose YAML does not name it.
        named = f"{__name__}.{type(self).__name__}" in (cfg.plugins or [])
        if named and str(getattr(cfg.rl, "value", cfg.rl)) in ("dpo", "ipo"):
            self.undo = patch_trl()

    def post_train_unload(self, cfg) -> None:
        """Axolotl calls this at the end of a run."""
        if self.undo is not None:
            self.undo()
            self.undo = None
