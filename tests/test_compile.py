"""torch.compile(fullgraph=True): few compilations whatever the lengths and the options, static and dynamic.

AOTAutograd is part of what compiles here, since it specialises on numbers that a graph of dynamo's own still holds as
variables; only the code that inductor would write is left out.
"""

import pytest
import torch
import torch._dynamo.testing
from op_tools import fields

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
TRANSFORM = {"logit_scale": (0.5, 1.0, 3.0), "softcap": (5.0, 7.0, 9.0), "temperature": (0.7, 1.3, 2.0)}
TERMS = ["sigmoid", "discopop", "simpo", "sft"]
# Options that go together take turns through their values together; a tuple is three values.
LOSS = {
    "terms": {
        "loss_type": TERMS,
        "loss_weights": ([1.0, 0.5, 0.3, 0.2], [0.5, 1.0, 2.0, 0.1], [0.2, 2.0, 3.0, 0.3]),
        "beta": (0.1, 0.2, 0.3),
        "label_smoothing": (0.1, 0.2, 0.3),
        "discopop_tau": (0.04, 0.1, 0.3),
        "simpo_gamma": (0.1, 0.2, 0.3),
        "sft_weight": (0.1, 0.2, 0.3),
        "mean_chosen_length": (3.0, 4.0, 5.0),
    },
    "divergence": {
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": (0.2, 0.3, 0.4),
        "beta": (0.1, 0.2, 0.3),
    },
}
LD = {"ld_alpha": (0.1, 0.2, 0.3)}


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


WITH_TRANSFORM = {"terms": LOSS["terms"] | TRANSFORM, "divergence": LOSS["divergence"] | TRANSFORM | LD}
# How an op is called, what its gradient is taken of, and its options.
OPS = {
    "token_logps": (on_logits(token_logps), "logits", {"transform": TRANSFORM}),
    "sequence_logps": (on_logits(sequence_logps), "logits", {"transform": TRANSFORM}),
    "dpo_loss": (on_logits(dpo_loss), "logits", WITH_TRANSFORM),
    "linear_token_logps": (on_hidden(linear_token_logps), "hidden", {"transform": TRANSFORM}),
    "linear_sequence_logps": (on_hidden(linear_sequence_logps), "hidden", {"transform": TRANSFORM}),
    "linear_dpo_loss": (on_hidden(linear_dpo_loss), "hidden", WITH_TRANSFORM),
    "preference_loss": (plain, "logits", LOSS),
}


def loss_and_gradient(function, length, leaf, options):
    x = inputs(length)
    out = function(x, **options)
    loss = out.sum() if isinstance(out, torch.Tensor) else out.loss
    return loss, *torch.autograd.grad(loss, x[leaf])


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, (*_, cases) in OPS.items() for case in ("defaults", *cases)]
)
def test_14_lengths_and_3_values_of_each_option_take_3_compilations(name, case, dynamic):
    function, leaf, cases = OPS[name]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    for i, length in enumerate(LENGTHS):
        given = {k: v[i % 3] if isinstance(v, tuple) else v for k, v in cases.get(case, {}).items()}
        torch.testing.assert_close(*(loss_and_gradient(f, length, leaf, given) for f in (compiled, function)))
    # torch 2.11 compiles again for each value of a number that is compared, as this op alone does outside of an op.
    compares = (name, case) == ("preference_loss", "divergence") and torch.__version__.startswith("2.11.")
    assert counter.frame_count <= (5 if compares else 3)


def test_under_autocast():
    def function(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_token_logps(x["hidden"], x["weight"], x["targets"], logit_scale=0.5)

    x = inputs(5)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    leaves = x["hidden"], x["weight"].requires_grad_()
    expected, ours = (
        (out.detach(), *torch.autograd.grad(out.square().sum() * 3.0, leaves)) for out in (function(x), compiled(x))
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_a_compiled_op_still_refuses_values():
    torch._dynamo.reset()
    x = inputs(5)
    x["targets"][1, 1] = V
    with pytest.raises(ValueError, match=r"outside the vocabulary \[0, 11\)"):
        torch.compile(on_logits(dpo_loss), backend="eager", fullgraph=True)(x)


def test_gradients_of_any_shape():
    torch._dynamo.reset()
    compiled = torch.compile(dpo_loss, backend="aot_eager", fullgraph=True)
    for s, t in ((4, 3), (6, 5), (2, 9)):
        logits, targets = torch.randn(s, t, V).requires_grad_(), torch.randint(V, (s, t))
        one, two = (fields(f(logits, targets), 2.0, logits=logits) for f in (compiled, dpo_loss))
        assert all(torch.equal(one[k], two[k]) for k in one)
