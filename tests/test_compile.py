"""torch.compile(fullgraph=True): few compilations whatever the lengths and the options, static and dynamic."""

import pytest
import torch
import torch._dynamo.testing

from dpo_fast import (
    dpo_loss,
    linear_dpo_loss,
    linear_sequence_logps,
    linear_token_logps,
    preference_loss,
    sequence_logps,
    token_logps,
)

V, D, PAIRS = 11, 5, 2
LENGTHS = [3, 7, 4, 9, 12, 5, 6, 8, 10, 11, 13, 14, 15, 16]
TRANSFORM = {"logit_scale": (0.5, 2.0, 3.0), "softcap": (5.0, 7.0, 9.0), "temperature": (0.7, 1.3, 2.0)}
LOSS = {
    "beta": (0.1, 0.2, 0.3),
    "label_smoothing": (0.1, 0.2, 0.3),
    "mean_chosen_length": (3.0, 4.0, 5.0),
    "sft_weight": (0.1, 0.2, 0.3),
    "simpo_gamma": (0.1, 0.2, 0.3),
    "discopop_tau": (0.1, 0.2, 0.3),
    "f_alpha_divergence_coef": (0.2, 0.3, 0.4),
    "loss_weights": ([0.5], [2.0], [3.0]),
}
LD = {"ld_alpha": (0.1, 0.2, 0.3)}
# What an option needs beside it.
BESIDE = {
    "mean_chosen_length": {"loss_type": "sft"},
    "simpo_gamma": {"loss_type": "simpo"},
    "discopop_tau": {"loss_type": "discopop"},
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
    "loss_weights": {"loss_type": ["sigmoid"]},
}


def inputs(length):
    rng = torch.Generator().manual_seed(length)
    targets = torch.randint(V, (2 * PAIRS, length), generator=rng)
    targets[:, 0] = -100
    hidden = torch.randn(2 * PAIRS, length, D, generator=rng)
    weight = torch.randn(V, D, generator=rng)
    logits = hidden @ weight.t()
    return {"hidden": hidden.requires_grad_(), "weight": weight, "logits": logits.requires_grad_(), "targets": targets}


def on_logits(op):
    return lambda x, **options: op(x["logits"], x["targets"], **options)


def on_hidden(op):
    return lambda x, **options: op(x["hidden"], x["weight"], x["targets"], **options)


def plain(x, **options):
    """preference_loss of a number of pairs that changes with the length."""
    chosen = x["logits"][0, :, 0]
    lengths = torch.ones_like(chosen)
    both = {"chosen_lengths": lengths, "rejected_lengths": lengths}
    return preference_loss(chosen, x["logits"][1, :, 0], **both, **options)


OPS = {
    "token_logps": (on_logits(token_logps), TRANSFORM),
    "sequence_logps": (on_logits(sequence_logps), TRANSFORM),
    "dpo_loss": (on_logits(dpo_loss), TRANSFORM | LOSS | LD),
    "linear_token_logps": (on_hidden(linear_token_logps), TRANSFORM),
    "linear_sequence_logps": (on_hidden(linear_sequence_logps), TRANSFORM),
    "linear_dpo_loss": (on_hidden(linear_dpo_loss), TRANSFORM | LOSS | LD),
    "preference_loss": (plain, LOSS),
}


def compilations(name, option, dynamic):
    """Of the lengths (six of them with an option, whose values take turns), after each result was compared with the one that is not compiled."""
    function, options = OPS[name]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    for i, length in enumerate(LENGTHS if option is None else LENGTHS[:6]):
        given = BESIDE.get(option, {}) | ({} if option is None else {option: options[option][i % 3]})
        ours, eager = compiled(inputs(length), **given), function(inputs(length), **given)
        ours, eager = (x if isinstance(x, torch.Tensor) else x.loss for x in (ours, eager))
        torch.testing.assert_close(ours, eager)
    return counter.frame_count


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", OPS)
def test_14_lengths_take_3_compilations(name, dynamic):
    assert compilations(name, None, dynamic) <= 3


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("option", LOSS)
def test_3_values_of_an_option_of_preference_loss_take_3_compilations(option, dynamic):
    assert compilations("preference_loss", option, dynamic) <= 3


# A minute and more for all of them: each compiles three or four graphs.
@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("name", "option"), [(n, o) for n, (_, options) in OPS.items() if n != "preference_loss" for o in options]
)
def test_3_values_of_an_option_of_an_op_compile(name, option, dynamic):
    """A number in the schema of a torch.library op is a constant of the graph: one compilation per value, and one for the
    first value again where lengths were constant when it came first.
    """
    assert compilations(name, option, dynamic) <= 4
