"""A prepared model: ordinary calls and generation are as before, and restoring undoes everything."""

import copy
import inspect
import re

import pytest
import torch

pytest.importorskip("transformers")

from model_families import SHARED, build
from model_tools import EXAMPLE, A, B, forest_paths, gradients, own_paths

from dpo_fast.forest import attention
from dpo_fast.forest.model import evaluating, prepare_model, restore_model
from dpo_fast.training import start_checks as verify


def ordinary_calls(model):
    """Logits of real tokens and generated tokens, for unpadded and padded batches."""
    ids = torch.tensor([A, [*B, 1, 6, 13, 9, 25, 31]])
    pad = torch.zeros(2, 3, dtype=torch.int64)
    left, right = torch.cat([pad, ids], 1), torch.cat([ids, pad], 1)
    masks = {"left": (left != 0).long(), "right": (right != 0).long()}
    # The second row is longer than the first: it fills what is padding in the first.
    left[1, :3], right[1, -3:] = 7, 7
    masks["left"][1], masks["right"][1] = 1, 1
    out = {}
    with torch.no_grad():
        out["bare"] = model(ids).logits
        out["tuple"] = model(input_ids=ids, return_dict=False, use_cache=False)[0]
        for side, batch in (("left", left), ("right", right)):
            positions = (masks[side].cumsum(1) - 1).clamp(min=0)
            logits = model(batch, attention_mask=masks[side], position_ids=positions).logits
            out[side] = logits[masks[side].bool()]
        options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        options |= {"eos_token_id": None, "pad_token_id": 0}
        for kind, extra in (("masked", {"attention_mask": masks["left"]}), ("inferred", {})):
            generated = model.generate(left, **options, **extra)
            out[f"{kind} tokens"] = generated.sequences
            out[f"{kind} logits"] = torch.stack(generated.logits)
    return out


@pytest.mark.parametrize("name", SHARED)
def test_ordinary_calls_are_as_before(name, in_float64):
    model = build(name)
    before = ordinary_calls(model)
    prepare_model(model)
    after = ordinary_calls(model)
    restore_model(model)
    again = ordinary_calls(model)
    for key, x in before.items():
        assert torch.equal(x, again[key]), key
        torch.testing.assert_close(after[key], x, rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


def test_an_ordinary_loss_and_its_gradients_are_as_before():
    model, ids = build("llama"), torch.tensor([A])
    before = gradients(model, model(ids, labels=ids).loss)
    prepare_model(model)
    after = gradients(model, model(ids, labels=ids).loss)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_the_signature_of_forward_is_kept():
    model = build("llama")
    before = inspect.signature(model.forward)
    prepare_model(model)
    assert inspect.signature(model.forward) == before


def test_restore_undoes_everything():
    model = build("llama")
    before, implementation = dict(vars(model)), model.config._attn_implementation
    prepare_model(model)
    assert model.config._attn_implementation == attention.NAME
    restore_model(model)
    assert vars(model) == before
    assert model.config._attn_implementation == implementation
    with pytest.raises(ValueError, match="input_ids"):
        forest_paths(model, "prefix")
    restore_model(model)
    # A forward that something else had put on the model is put back.
    wrapped = model.forward
    model.forward = wrapped
    prepare_model(model)
    assert model.forward is not wrapped
    restore_model(model)
    assert vars(model)["forward"] is wrapped


def test_a_model_on_the_cpu_is_prepared_for_the_back_end_of_another_device(missing):
    """The trainer moves a model to its GPU after it was checked where it was loaded."""
    model = build("llama")
    plan = prepare_model(model, backend="missing")
    assert plan.path == "shared"
    verify.verify_sharing(model, plan, [EXAMPLE], "prefix")
    with pytest.raises(ValueError, match=re.escape(missing)):
        forest_paths(model, "prefix")


def test_preparing_twice_changes_nothing():
    model = build("llama")
    plan = prepare_model(model)
    forward, saved = model.forward, model._dpo_fast
    assert prepare_model(model) is plan
    assert model.forward == forward
    assert model._dpo_fast is saved
    forest_paths(model, "prefix")
    restore_model(model)
    assert prepare_model(model) == plan


def test_a_copy_of_a_prepared_model_is_a_model_of_its_own():
    model = build("llama")
    prepare_model(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.9)
        assert (own_paths(model) - own_paths(other)).abs().max() > 0.01
        for one in (model, other):
            torch.testing.assert_close(forest_paths(one, "prefix"), own_paths(one), rtol=1e-9, atol=1e-9)


def test_the_trunk_alone_says_what_is_wrong():
    model = build("llama")
    prepare_model(model)
    with pytest.raises(RuntimeError, match="without its prefix forest"):
        model.model(torch.tensor([A]))


def test_dropout_in_attention_is_refused_while_training():
    model = build("llama", attention_dropout=0.1)
    prepare_model(model)
    forest_paths(model, "prefix")
    model.train()
    with pytest.raises(ValueError, match=r"dropout 0\.1"):
        forest_paths(model, "prefix")


def test_preparing_leaves_every_module_in_its_mode():
    model = build("llama")
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    prepare_model(model)
    assert [m.training for m in model.modules()] == modes

    def fail():
        with evaluating(model):
            assert not any(m.training for m in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [m.training for m in model.modules()] == modes
