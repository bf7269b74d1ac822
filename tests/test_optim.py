"""fp32 master weights: small steps add up in bf16 models, exactly as in an fp32 run, and resume to the bit."""

import io

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, Adagrad, AdamW
from torch.optim.lr_scheduler import LambdaLR

from dpo_fast.training.optim import MasterWeights

LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def make_model(dtype=torch.bfloat16, seed=0):
    """Two weights of `dtype` and one fp32 norm, as many bf16 models have."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6).to(dtype), nn.LayerNorm(6), nn.Linear(6, 3, bias=False).to(dtype))


def fp32_twin(model):
    twin = make_model(torch.float32)
    twin.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    return twin


def set_grads(model, step, like=None):
    """Gradients with one sign per weight, in the dtype of the model (or of `like`), the same for every model."""
    generator = torch.Generator().manual_seed(99)
    jitter = torch.Generator().manual_seed(step)
    for p, q in zip(model.parameters(), (like or model).parameters(), strict=True):
        sign = torch.randn(p.shape, generator=generator).sign()
        grad = sign * (1 + 0.1 * torch.randn(p.shape, generator=jitter))
        p.grad = grad.to(q.dtype).to(p.dtype)


def through_disk(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q.to(p.dtype), rtol=0, atol=0)


def test_small_steps_vanish_in_bf16_and_not_with_masters():
    plain, mastered = make_model(), make_model()
    start, exact = fp32_twin(plain), fp32_twin(plain)
    for model in (plain, mastered, start, exact):
        for p in model.parameters():
            p.data.copy_(p.sign() * p.abs().clamp(0.01))
    options = {"lr": 1e-6, "weight_decay": 0.0}
    optimizers = {
        plain: AdamW(plain.parameters(), **options),
        mastered: MasterWeights(mastered.parameters(), AdamW, **options),
        exact: AdamW(exact.parameters(), **options),
    }
    for step in range(1000):
        for model, optimizer in optimizers.items():
            set_grads(model, step, like=plain)
            optimizer.step()
    for index in (0, 2):
        before, after = start[index].weight.bfloat16(), mastered[index].weight
        assert torch.equal(plain[index].weight, before), "1000 steps, and no weight has moved"
        assert after.dtype == torch.bfloat16
        assert (after != before).float().mean() > 0.9
        # each of 1000 steps is about lr, in the direction of the gradient
        assert torch.allclose(exact[index].weight - start[index].weight, after.float() - before.float(), atol=2**-9)
    assert_same(mastered, exact)


@LOW
@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
        (AdamW, {"lr": 1e-3, "fused": True}),
        (AdamW, {"lr": 1e-3, "foreach": True, "amsgrad": True}),
        (SGD, {"lr": 1e-2}),
        (SGD, {"lr": 1e-2, "momentum": 0.9}),
        (Adafactor, {"lr": 1e-3}),
    ],
)
def test_equals_the_fp32_optimizer_fed_the_same_gradients(dtype, optimizer_class, options):
    model = make_model(dtype)
    exact = fp32_twin(model)
    optimizer = MasterWeights(model.parameters(), optimizer_class, **options)
    expected = optimizer_class(exact.parameters(), **options)
    for step in range(20):
        set_grads(model, step)
        set_grads(exact, step, like=model)
        if step % 3 == 1:  # a parameter without a gradient is left alone
            model[2].weight.grad = exact[2].weight.grad = None
        optimizer.step()
        expected.step()
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        master = optimizer._masters.get(p, p)
        assert master.dtype == torch.float32
        assert torch.equal(master, q)
    assert_same(model, exact)
    assert [p.dtype for p in model.parameters()] == [dtype, dtype, torch.float32, torch.float32, dtype]
    assert list(optimizer._masters) == [model[0].weight, model[0].bias, model[2].weight], "fp32 weights have no copy"
    assert all(master.grad is None for master in optimizer._masters.values()), (
        "fp32 gradients live during the step only"
    )
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def train(model, optimizer, steps):
    for step in steps:
        set_grads(model, step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize(
    ("optimizer_class", "options"), [(AdamW, {"lr": 1e-4}), (AdamW, {"lr": 1e-4, "fused": True}), (SGD, {"lr": 1e-4})]
)
def test_resume_is_exact_to_the_bit(optimizer_class, options, weights_first):
    model = make_model()
    optimizer = MasterWeights(model.parameters(), optimizer_class, **options)
    train(model, optimizer, range(10))
    weights, state = through_disk(model.state_dict()), through_disk(optimizer.state_dict())
    train(model, optimizer, range(10, 20))

    resumed = make_model(seed=1)
    again = MasterWeights(resumed.parameters(), optimizer_class, **options)
    if weights_first:
        resumed.load_state_dict(weights)
    again.load_state_dict(state)
    if not weights_first:
        resumed.load_state_dict(weights)
    train(resumed, again, range(10, 20))
    one, two = optimizer.state_dict(), again.state_dict()
    assert one["param_groups"] == two["param_groups"]
    for index in one["state"]:
        assert one["state"][index].keys() == two["state"][index].keys()
        for name, value in one["state"][index].items():
            assert torch.equal(value, two["state"][index][name]), (index, name)
    assert one["state"][0]["master"].dtype == torch.float32
    assert not torch.equal(one["state"][0]["master"], model[0].weight), "the masters know more than the weights"
    assert_same(resumed, model)


def test_the_loaded_masters_are_copies():
    model, other = make_model(), make_model()
    optimizer, copy = (MasterWeights(m.parameters(), SGD, lr=1e-4) for m in (model, other))
    train(model, optimizer, range(3))
    copy.load_state_dict(optimizer.state_dict())
    master = optimizer.state_dict()["state"][0]["master"].clone()
    other.load_state_dict(model.state_dict())
    train(other, copy, range(3))
    assert torch.equal(optimizer.state_dict()["state"][0]["master"], master)


def test_state_of_another_optimizer_is_refused():
    model = make_model()
    plain = AdamW(model.parameters(), lr=1e-3)
    train(model, plain, range(2))
    mastered = MasterWeights(model.parameters(), AdamW, lr=1e-3)
    with pytest.raises(ValueError, match=r"parameter 0 is torch\.bfloat16 and the state has no master weight"):
        mastered.load_state_dict(plain.state_dict())
    train(model, mastered, range(2))
    with pytest.raises(ValueError, match=r"holds a master weight of shape \(6, 5\).*the model's is torch.float32"):
        MasterWeights(fp32_twin(model).parameters(), AdamW, lr=1e-3).load_state_dict(mastered.state_dict())
    with pytest.raises(ValueError, match="number or size"):
        MasterWeights(model[0].parameters(), AdamW, lr=1e-3).load_state_dict(mastered.state_dict())
    transposed = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False)).bfloat16()
    with pytest.raises(ValueError, match=r"the model's is torch.bfloat16 of shape \(5, 6\)"):
        MasterWeights(transposed.parameters(), AdamW, lr=1e-3).load_state_dict(mastered.state_dict())


def test_masters_are_made_at_the_first_step_from_the_weights_of_then():
    model = make_model()
    optimizer = MasterWeights(model.parameters(), SGD, lr=1e-2)
    assert optimizer.state_dict()["state"] == {}
    optimizer.load_state_dict(optimizer.state_dict())  # what accelerate does to place the state on its device
    other = make_model(seed=1)
    model.load_state_dict(other.state_dict())
    train(model, optimizer, range(1))
    expected = fp32_twin(other)
    set_grads(expected, 0, like=other)
    SGD(expected.parameters(), lr=1e-2).step()
    assert_same(model, expected)


def test_a_weight_written_by_someone_else_wins():
    model = make_model()
    optimizer = MasterWeights(model.parameters(), SGD, lr=1e-6)
    train(model, optimizer, range(5))
    fine = optimizer._masters[model[0].weight].clone()
    with torch.no_grad():
        model[0].weight[1] = 7.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert (model[0].weight[1] == 7).all()
    fine[1] = 7
    assert torch.equal(optimizer._masters[model[0].weight], fine), "the other rows keep their low-order bits"


def test_a_model_moved_after_the_first_step_is_refused():
    moved = make_model()[0].to("meta")
    optimizer = MasterWeights(moved.parameters(), SGD, lr=1e-6)
    optimizer._masters = {p: torch.zeros(p.shape) for p in moved.parameters()}
    for p in moved.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="move it before the first step"):
        optimizer.step()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in moved.parameters()]


def test_an_optimizer_that_makes_its_state_early_is_refused():
    with pytest.raises(ValueError, match="Adagrad makes its state before the first step"):
        MasterWeights(make_model().parameters(), Adagrad, lr=1e-3)


def test_groups_schedulers_closures_and_hooks():
    model = make_model()
    decay, rest = [model[0].weight, model[2].weight], [model[0].bias]
    optimizer = MasterWeights(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest}], AdamW, lr=1e-3, weight_decay=0
    )
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 1e-2})
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0, 0]
    assert optimizer.defaults["lr"] == 1e-3
    assert optimizer.param_groups is optimizer.inner.param_groups

    exact = fp32_twin(model)
    expected = AdamW(
        [
            {"params": [exact[0].weight, exact[2].weight], "weight_decay": 0.1},
            {"params": [exact[0].bias]},
            {"params": exact[1].parameters(), "lr": 1e-2},
        ],
        lr=1e-3,
        weight_decay=0,
    )
    schedulers = [LambdaLR(o, lambda step: min(1, step / 5)) for o in (optimizer, expected)]
    hooked = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(optimizer.param_groups[0]["lr"]))
    for step in range(10):
        set_grads(exact, step, like=model)

        def closure(step=step):
            assert torch.is_grad_enabled()
            set_grads(model, step)
            return torch.tensor(float(step))

        assert optimizer.step(closure) == step
        expected.step()
        for scheduler in schedulers:
            scheduler.step()
        if step == 4:  # loading replaces the groups; the scheduler must drive the new ones
            optimizer.load_state_dict(through_disk(optimizer.state_dict()))
    assert hooked == pytest.approx([1e-3 * min(1, step / 5) for step in range(10)])
    assert_same(model, exact)


def test_inside_accelerate():
    accelerate = pytest.importorskip("accelerate")
    x, y = torch.randn(8, 5), torch.randn(8, 3)

    def loss_of(model):
        hidden = model[1](model[0](x.to(model[0].weight.dtype)).float())
        return (model[2](hidden.to(model[2].weight.dtype)).float() - y).square().mean()

    results = []
    for prepare in (True, False):
        model = make_model()
        optimizer = MasterWeights(model.parameters(), AdamW, lr=1e-4)
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        accelerator = accelerate.Accelerator(cpu=True)
        if prepare:
            model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        for _ in range(12):
            loss = loss_of(model)
            accelerator.backward(loss) if prepare else loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        results.append((model, optimizer.state_dict()))
    assert_same(results[0][0], results[1][0])
    assert torch.equal(results[0][1]["state"][0]["master"], results[1][1]["state"][0]["master"])
    assert results[0][1]["param_groups"] == results[1][1]["param_groups"]
