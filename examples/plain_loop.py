"""DPO in your own loop: hidden states of the model's trunk, one loss, one backward pass. python examples/plain_loop.py"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_fast.integrations.torch import LinearDPOLoss

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2))
ids = torch.randint(3, 64, (8, 12))  # four chosen sequences, then the four rejected ones, prompts of 5 tokens
targets = ids.roll(-1, dims=1)
targets[:, :4], targets[:, -1] = -100, -100  # a prompt is not scored, and nothing follows the last token
loss = LinearDPOLoss(beta=0.1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

ref_logps = None
for step in range(10):
    hidden = model.model(input_ids=ids).last_hidden_state
    out = loss(hidden, model.lm_head.weight, targets, ref_logps)
    if ref_logps is None:  # before the first step the policy is its own reference
        ref_logps = torch.cat([out.chosen_logps, out.rejected_logps]).detach()
        continue
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(
        f"step {step}  loss {out.loss.item():.4f}  margin {(out.chosen_rewards - out.rejected_rewards).mean().item():.3f}"
    )
