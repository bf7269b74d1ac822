"""Cut Cross Entropy's loss, ours in its place: the import line is what changes. python examples/cross_entropy.py"""

import torch

from dpo_fast.integrations.cross_entropy import linear_cross_entropy  # was: from cut_cross_entropy import ...

torch.manual_seed(0)
hidden, head = torch.randn(2, 10, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
tokens = torch.randint(100, (2, 10))
tokens[:, :4] = -100  # the prompt is not scored
loss = linear_cross_entropy(hidden, head, tokens, shift=True)
loss.backward()
logits = (hidden[:, :-1] @ head.T).flatten(0, 1)
plain = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
print(f"loss {loss.item():.4f}, of the logits {plain.item():.4f}, gradient of the head {head.grad.norm().item():.4f}")
