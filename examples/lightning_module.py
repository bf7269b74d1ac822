"""DPO as a Lightning module: Trainer(max_epochs=1).fit(DPO(model), loader), with `pip install lightning`; the step runs without."""

import torch

from dpo_fast import linear_sequence_logps, preference_loss

try:
    from lightning import LightningModule
except ImportError:
    LightningModule = torch.nn.Module


class DPO(LightningModule):
    """`model` is a causal LM of transformers; a batch holds ids and targets [2B, T] and the reference's log-probs [2B]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        """The mean loss of the batch's pairs."""
        hidden = self.model.model(input_ids=batch["ids"]).last_hidden_state
        logps = linear_sequence_logps(hidden, self.model.lm_head.weight, batch["targets"])
        return preference_loss(*logps.chunk(2), *batch["ref_logps"].chunk(2), beta=0.1).loss

    def configure_optimizers(self):
        """The optimizer: AdamW on all weights."""
        return torch.optim.AdamW(self.parameters(), lr=1e-6)
