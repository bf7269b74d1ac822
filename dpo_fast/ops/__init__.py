"""The public ops: token log-probs and preference losses, from logits or from hidden states and the output layer.

    token_logps           logits in, a log-prob per token out
    sequence_logps        logits in, a log-prob per sequence out
    dpo_loss              logits in, loss and gradient in one pass
    linear_token_logps    hidden states in, a log-prob per token out; the [N, V] logits never exist
    linear_sequence_logps hidden states in, a log-prob per sequence out
    linear_dpo_loss       hidden states in, loss and gradients in one pass

The fronts (signatures, checks of shapes, which op runs) are in on_logits.py and on_hidden.py, what their losses share in
pair_inputs.py. The ops are torch.library ops (logits.py, head.py) that work under torch.compile(fullgraph=True); the rows
are computed by a back end (backends/).

Every op takes `backend` (None: the fastest that is there) and `debug` (True: values are checked on a GPU too, which
waits for the device). On the CPU values are always checked. Rows whose target is `ignore_index` do not count, and their
gradient is 0. Padded batches of pairs hold 2B sequences, the B chosen first, then the B rejected in the same order;
packed ones are flat rows with `cu_seqlens`, int32 [2B + 1] from 0 to N, on the device of the rows or on the CPU.
The log-probs of a sequence are summed in float64, with and without a gradient. A second derivative is an error.
"""

from .on_hidden import linear_dpo_loss, linear_sequence_logps, linear_token_logps
from .on_logits import dpo_loss, sequence_logps, token_logps
from .tiles import WORKSPACE_BYTES

__all__ = [
    "WORKSPACE_BYTES",
    "dpo_loss",
    "linear_dpo_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "sequence_logps",
    "token_logps",
]
