"""What the ops refuse, and in which words: the argument, what was given, what is expected."""

import math

import pytest
import torch

from dpo_fast import dpo_loss, linear_dpo_loss, linear_token_logps, sequence_logps, token_logps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(6)}, r"logits must be floating-point \[N, V\] or \[S, T, V\]"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets must be int64 \[4\], one for each row of logits"),
        ({"targets": torch.tensor([0, 1, 2, 6])}, r"targets lie in \[0, 6\], outside the vocabulary \[0, 6\)"),
        ({"targets": torch.tensor([0, 1, 2, -1])}, "and are not ignore_index=-100"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"softcap": -1.0}, "softcap must be above 0"),
        ({"logit_scale": math.inf}, "logit_scale must be finite"),
        ({"outputs": ("entropy", "loss")}, r"outputs \['loss'\] are not among"),
        ({"outputs": "entropy"}, "outputs must be a tuple of names, got 'entropy'"),
        ({"backend": "fast"}, "backend is 'fast'"),
    ],
)
def test_token_logps(change, message):
    call = {"logits": torch.zeros(4, 6), "targets": torch.tensor([0, 1, 2, 5])}
    assert token_logps(**call).shape == (4,)
    with pytest.raises(ValueError, match=message):
        token_logps(**{**call, **change})


def test_sequence_logps():
    logits, targets = torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="is packed: give cu_seqlens"):
        sequence_logps(logits, targets)
    with pytest.raises(ValueError, match="cu_seqlens must go up from 0 to the 4 rows, got"):
        sequence_logps(logits, targets, cu_seqlens=torch.tensor([0, 3, 5], dtype=torch.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(1, 1, 4, 3)}, r"hidden must be \[N, D\] or \[S, T, D\]"),
        ({"weight": torch.zeros(6, 2)}, r"got \(4, 3\) and \(6, 2\)"),
        ({"weight": torch.zeros(6)}, r"weight \[V, D\]"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, r"targets must be int64 \[4\]"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, "got torch.int32"),
        ({"targets": torch.tensor([0, 1, 2, 6])}, r"targets lie in \[0, 6\], outside the vocabulary \[0, 6\)"),
        ({"targets": torch.tensor([0, 1, 2, -100]), "ignore_index": None}, r"targets lie in \[-100, 2\]"),
        ({"targets": torch.tensor([0, 1, 2, -1])}, r"outside the vocabulary \[0, 6\) and are not ignore_index=-100"),
        ({"bias": torch.zeros(5)}, r"bias must be \[6\]"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"outputs": ("entropy", "perplexity")}, r"outputs \['perplexity'\] are not among entropy, "),
        ({"outputs": "entropy"}, "outputs must be a tuple of names"),
        ({"grad_rows": 5}, r"grad_rows is 5: give a number of rows in \[0, 4\]"),
        ({"grad_rows": -1}, "grad_rows is -1"),
        ({"weight": torch.zeros(6, 3, dtype=torch.bfloat16)}, "cast one of them"),
    ],
)
def test_linear_token_logps(change, message):
    call = {"hidden": torch.zeros(4, 3), "weight": torch.zeros(6, 3), "targets": torch.tensor([0, 1, 2, 5])}
    assert linear_token_logps(**call).shape == (4,)
    with pytest.raises(ValueError, match=message):
        linear_token_logps(**{**call, **change})


def logits_call(**change):
    call = {"logits": torch.zeros(4, 3, 6), "targets": torch.zeros(4, 3, dtype=torch.int64)}
    return {**call, **change}


def packed_call(**change):
    cu = torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32)
    call = {"logits": torch.zeros(12, 6), "targets": torch.zeros(12, dtype=torch.int64), "cu_seqlens": cu}
    return {**call, **change}


REFUSALS = [
    (
        logits_call(logits=torch.zeros(4, 6)),
        r"targets must be int64 \[4\], one for each row of logits, got torch.int64 \[4, 3\]",
    ),
    (
        logits_call(logits=torch.zeros(4, 3, 6, 1)),
        r"logits must be floating-point \[N, V\] or \[S, T, V\], got .* \[4, 3, 6, 1\]",
    ),
    (logits_call(logits=torch.zeros(4, 3, 6, dtype=torch.int32)), "logits must be floating-point .* got torch.int32"),
    (logits_call(logits=torch.zeros(4, 3, 0)), "logits must have V >= 1 words"),
    (logits_call(targets=torch.zeros(4, 3)), r"targets must be int64 \[4, 3\].* got torch.float32"),
    (logits_call(targets=torch.zeros(4, 2, dtype=torch.int64)), r"got torch.int64 \[4, 2\]"),
    (logits_call(targets=torch.full((4, 3), 6)), r"targets lie in \[6, 6\], outside the vocabulary \[0, 6\)"),
    (logits_call(targets=torch.full((4, 3), -1)), r"outside the vocabulary \[0, 6\) and are not ignore_index=-100"),
    (
        logits_call(logits=torch.zeros(3, 3, 6), targets=torch.zeros(3, 3, dtype=torch.int64)),
        "logits must hold 2B sequences, the B chosen and then the B rejected, B >= 1, got 3",
    ),
    (logits_call(logits=torch.zeros(0, 3, 6), targets=torch.zeros(0, 3, dtype=torch.int64)), "B >= 1, got 0"),
    (logits_call(ref_logps=torch.zeros(2)), r"ref_logps must be floating-point \[4\] on cpu, got torch.float32 \[2\]"),
    (logits_call(ref_logps=torch.zeros(4, dtype=torch.int64)), "ref_logps must be floating-point"),
    (logits_call(pair_weights=torch.zeros(4)), r"pair_weights must be floating-point \[2\]"),
    (logits_call(loss_type="dpo"), "loss_type is 'dpo': give one or more of sigmoid"),
    (logits_call(loss_type="simpo", ref_logps=torch.zeros(4)), "loss_type 'simpo' takes no ref_logps"),
    (logits_call(loss_type="hinge", label_smoothing=0.1), "label_smoothing is 0.1 but has no effect"),
    (logits_call(beta=0.0), "beta is 0.0"),
    (logits_call(loss_type="sft", mean_chosen_length=0.0), "mean_chosen_length is 0.0"),
    (logits_call(backend="cuda"), "backend is 'cuda': give one of csrc, triton, torch"),
    (packed_call(cu_seqlens=None), r"logits of shape \[12, 6\] is packed: give cu_seqlens"),
    (
        packed_call(cu_seqlens=torch.tensor([0, 3, 6, 9, 12])),
        r"cu_seqlens must be int32 \[S \+ 1\], got torch.int64 \[5\]",
    ),
    (
        packed_call(cu_seqlens=torch.tensor([0, 6, 9, 12], dtype=torch.int32)),
        "cu_seqlens must hold 2B sequences.* got 3",
    ),
    (
        packed_call(cu_seqlens=torch.tensor([0, 3, 6, 9, 11], dtype=torch.int32)),
        r"go up from 0 to the 12 rows, got \[0, 3, 6, 9, 11\]",
    ),
    (packed_call(cu_seqlens=torch.tensor([1, 3, 6, 9, 12], dtype=torch.int32)), "cu_seqlens must go up from 0"),
    (packed_call(cu_seqlens=torch.tensor([0, 6, 3, 9, 12], dtype=torch.int32)), "cu_seqlens must go up from 0"),
    (
        logits_call(cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32)),
        r"cu_seqlens goes with packed logits \[N, ...\]",
    ),
    (
        logits_call(logits=torch.zeros(4, 4, 6)[:, 1:], inplace=True),
        "inplace=True needs logits whose rows follow each other",
    ),
    (logits_call(logits=torch.zeros(1, 1, 6).expand(4, 3, 6), inplace=True), "inplace=True needs logits whose rows"),
    (
        {
            "logits": torch.zeros(6).expand(2, 6),
            "targets": torch.zeros(2, dtype=torch.int64),
            "cu_seqlens": torch.tensor([0, 1, 2], dtype=torch.int32),
            "inplace": True,
        },
        "inplace=True needs logits whose rows",
    ),
    (logits_call(logits=torch.zeros(4, 3, 6, device="meta")), "targets are on cpu and logits on meta: move one"),
]


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("call", "message"), REFUSALS)
def test_dpo_loss(call, message, gradient):
    if gradient:
        if not call["logits"].is_floating_point() or call["logits"].device.type == "meta" or call.get("inplace"):
            pytest.skip("such a tensor takes no gradient, or is overwritten")
        call = {**call, "logits": call["logits"].clone().requires_grad_()}
    with pytest.raises(ValueError, match=message):
        dpo_loss(**call)


def test_an_unknown_option():
    with pytest.raises(TypeError, match="are no options of a loss: loss_type, "):
        dpo_loss(**logits_call(tau=0.1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 5)}, "hidden of shape .* is packed: give cu_seqlens"),
        ({"hidden": torch.zeros(3)}, r"hidden must be \[N, D\] or \[S, T, D\] and weight \[V, D\]"),
        ({"weight": torch.zeros(6, 4)}, r"got \(4, 3, 5\) and \(6, 4\)"),
        ({"weight": torch.zeros(6, 5, dtype=torch.float64)}, "cast one of them"),
        ({"bias": torch.zeros(5)}, r"bias must be \[6\], got \(5,\)"),
        ({"targets": torch.full((4, 3), 6)}, r"outside the vocabulary \[0, 6\)"),
        ({"softcap": -1.0}, "softcap must be above 0"),
        ({"logit_scale": math.nan}, "logit_scale must be finite"),
        ({"ref_logps": torch.zeros(3)}, r"ref_logps must be floating-point \[4\]"),
        ({"hidden": torch.zeros(3, 3, 5), "targets": torch.zeros(3, 3, dtype=torch.int64)}, "2B sequences.* got 3"),
        ({"weight": torch.zeros(6, 5, device="meta")}, "weight and hidden are on different devices"),
    ],
)
@pytest.mark.parametrize("trained", [False, True])
def test_linear_dpo_loss(change, message, trained):
    call = {
        "hidden": torch.zeros(4, 3, 5),
        "weight": torch.zeros(6, 5),
        "targets": torch.zeros(4, 3, dtype=torch.int64),
    }
    assert linear_dpo_loss(**call).losses.shape == (2,)
    call |= change
    call["hidden"].requires_grad_(trained)
    if "hidden" in change and change["hidden"].ndim == 2:
        call["targets"] = call["targets"][:, 0]
    with pytest.raises(ValueError, match=message):
        linear_dpo_loss(**call)
