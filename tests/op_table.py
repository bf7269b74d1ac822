"""One table per op: its truth, its back ends, and rows of samples. A new op is an entry of `OPS`, a new option is one row.

test_op_table.py drives everything from here: values, gradients, memory that is not read, same bits, opcheck, torch.compile.
The rows are in op_log_probs.py and op_losses.py, what they are made of in op_options.py; how a row becomes tensors is in
op_samples.py; tolerances are `FLOORS` of op_tools.py, one number per type. Errors are in test_op_refusals.py.
"""

import op_log_probs
import op_losses

OPS = {
    "token_logps": op_log_probs.token_logps,
    "sequence_logps": op_log_probs.sequence_logps,
    "linear_token_logps": op_log_probs.linear_token_logps,
    "linear_sequence_logps": op_log_probs.linear_sequence_logps,
    "dpo_loss": op_losses.dpo_loss,
    "linear_dpo_loss": op_losses.linear_dpo_loss,
    "preference_loss": op_losses.preference_loss,
}
