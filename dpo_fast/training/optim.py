"""fp32 master weights for models whose trainable weights are bf16 or fp16.

bf16 keeps 8 significant bits: neighbouring numbers near w are |w| / 256 to |w| / 128 apart, and a step of less than
half of that rounds to nothing. At a learning rate of 1e-6 this holds for every weight above about 5e-4, so a plain bf16
run trains almost nothing (Micikevicius et al., arXiv 1710.03740, section 3.1, say so of fp16). `MasterWeights` keeps the
sum of the updates in fp32 and rounds it into the model.
"""

import contextlib

import torch

_LOW_PRECISION = (torch.bfloat16, torch.float16)


class MasterWeights(torch.optim.Optimizer):
    """`optimizer_class(param_groups, **kwargs)`, stepping fp32 copies ("masters") of the bf16 and fp16 parameters.

        optimizer = MasterWeights(model.parameters(), torch.optim.AdamW, lr=1e-6)

    `step()` casts the gradients to fp32, steps the masters, and rounds them (to nearest even) into the model's
    parameters, whose dtype never changes. fp32 parameters are stepped directly. Use it as any torch optimizer:
    `param_groups`, `state` and `defaults` are those of `self.inner`, the optimizer of the given class; `param_groups`
    hold the model's parameters (for zero_grad and clipping), `state` is keyed by the masters.

    Memory: a bf16 or fp16 parameter takes 4 bytes for the master, the inner optimizer's state in fp32 (AdamW: 8 bytes),
    and 4 bytes for the gradient during `step()`.

    A parameter's master is made at the first step that sees a gradient for it, or by `load_state_dict`, on the device
    where the parameter is then: move the model before, not after (RuntimeError). A master only adds low-order bits:
    where other code has written a weight since (a checkpoint was loaded, an average taken), the weight wins. Writes
    through `.data` after the first step cannot be seen and are lost.

    Optimizer classes that make their state before the first step (torch's Adagrad) raise ValueError, since that state
    would have the dtype of the model. A closure is evaluated once per step, so LBFGS raises TypeError.
    """

    def __init__(self, param_groups, optimizer_class: type[torch.optim.Optimizer], **kwargs):
        inner = optimizer_class(param_groups, **kwargs)
        if inner.state:
            raise ValueError(f"{optimizer_class.__name__} makes its state before the first step, in the model's dtype")
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner
        self._masters: dict[torch.Tensor, torch.Tensor] = {}  # parameter -> its fp32 copy
        self._versions: dict[torch.Tensor, int] = {}  # parameter -> its _version when we last wrote it
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state, self.defaults = self.inner.param_groups, self.inner.state, self.inner.defaults

    def add_param_group(self, param_group: dict) -> None:
        # The base class calls this method for its own groups before `inner` exists.
        (self.inner if hasattr(self, "inner") else super()).add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None):
        """One step of the inner optimizer; returns what `closure`, if given, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepped = [p for p in self._params() if p.grad is not None and p.dtype in _LOW_PRECISION]
        with self._on_masters(stepped):
            self.inner.step()
        _copy_all(stepped, [self._masters[p] for p in stepped])
        self._versions.update((p, p._version) for p in stepped)
        return loss

    def state_dict(self) -> dict:
        """The inner optimizer's state dict; each parameter's state also holds its "master" (fp32), if it has one."""
        with self._on_masters():
            state_dict = self.inner.state_dict()
        state = state_dict["state"]
        for index, p in enumerate(self._params()):
            if p in self._masters:
                state[index] = {**state.get(index, {}), "master": self._masters[p]}
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Load a `state_dict()`, before or after the model's weights are loaded; training resumes to the same bits.

        Raises ValueError for the state of an optimizer without masters, of other sizes or of another dtype.
        """
        groups = state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError("the state's parameter groups differ in number or size from the optimizer's")
        state, masters = {}, {}
        for index, p in zip((i for g in groups for i in g["params"]), self._params(), strict=True):
            entry = dict(state_dict["state"].get(index, {}))
            master = entry.pop("master", None)
            if entry:
                state[index] = entry
            if master is not None:
                if p.dtype not in _LOW_PRECISION or master.shape != p.shape:
                    raise ValueError(
                        f"parameter {index}: the state holds a master weight of shape {tuple(master.shape)} for a "
                        f"bf16 or fp16 parameter; the model's is {p.dtype} of shape {tuple(p.shape)}"
                    )
                masters[p] = master.detach().to(p.device, torch.float32, copy=True)
            elif entry and p.dtype in _LOW_PRECISION:
                raise ValueError(
                    f"parameter {index} is {p.dtype} and the state has no master weight for it: it was saved by an "
                    "optimizer without MasterWeights, or for an fp32 model; start without it"
                )
        self._masters, self._versions = masters, {}
        with self._on_masters():
            self.inner.load_state_dict({**state_dict, "state": state})
        self._share()

    def _params(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @contextlib.contextmanager
    def _on_masters(self, stepped=()):
        """Replace the inner optimizer's parameters by their masters inside; those of `stepped` get fp32 gradients."""
        params = [group["params"] for group in self.param_groups]
        try:
            masters = [self._fresh_master(p) for p in stepped]
            gradients = [torch.empty_like(p.grad, dtype=torch.float32) for p in stepped]
            _copy_all(gradients, [p.grad for p in stepped])
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient
            for group in self.param_groups:
                group["params"] = [self._masters.get(p, p) for p in group["params"]]
            yield
        finally:
            # load_state_dict replaces the inner optimizer's list of groups.
            for group, group_params in zip(self.inner.param_groups, params, strict=True):
                group["params"] = group_params
            for p in stepped:
                if p in self._masters:
                    self._masters[p].grad = None

    def _fresh_master(self, p: torch.Tensor) -> torch.Tensor:
        master = self._masters.get(p)
        if master is None:
            master = self._masters[p] = p.detach().float()
        elif master.device != p.device:
            raise RuntimeError(
                f"the model moved to {p.device} after its master weights were made on {master.device}: move it before "
                "the first step and before load_state_dict"
            )
        elif self._versions.get(p) != p._version:
            master.copy_(torch.where(p == master.to(p.dtype), master, p))
        return master


def _copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """`target.copy_(source)` of each pair, in the few launches that torch needs for many tensors on a GPU."""
    if targets:
        torch._foreach_copy_(targets, sources)
