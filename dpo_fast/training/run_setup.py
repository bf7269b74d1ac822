"""The parts of a run: `plan_run` checks them before any weight is read, `set_up` loads, wraps and tokenises."""

import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from ..data.pairs import PairDataset, prepare
from ..data.streamed import StreamedPairs, is_stream
from ..forest.gate import Plan, base_model, has_aux_loss, plan_model
from ..forest.head import output_layer
from ..forest.model import own_config, prepare_model, restore_model
from ..losses import LossOptions
from .checkpointing import choose
from .compiling import compile_layers
from .config import DPOConfig
from .dropout import no_dropout, random_router
from .load import adapter_base, add_adapters, check_adapters, empty_model, load_model, load_tokenizer
from .quantised import check_adapters_train, check_shards, choose_quantisation, weight_count
from .ref_model import ADAPTER, CACHED, MODEL, choose_reference, frozen_copy, has_trained_adapters, keep_start_adapters
from .sharding import refuse_tensor_parallel, refuse_zero3
from .start_checks import check_finite, check_positions
from .unused_weights import may_stay_unused
from .value_checks import check_streamed

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """The facts of a run that are known before any weight is read; `DPOTrainer` takes it in place of a model."""

    model: Any  # a name or folder, or the model itself
    ref_model: torch.nn.Module | None
    peft_config: Any
    path: Plan  # how the trunk runs over a forest; the check of `prepare_model` may still change it
    vocab_size: int  # rows of the head
    reference: str  # see ref_model.py
    quantization_config: Any = None  # transformers' BitsAndBytesConfig


def plan_run(
    model, args: DPOConfig, ref_model=None, peft_config=None, quantization_config=None, streamed: bool = False
) -> RunPlan:
    """Check that this model, reference and adapters can be trained together. A model given by name is built without weights.

    streamed: whether the training pairs will be a stream (data/streamed.py).

    Raises ValueError for what cannot work together, and for a model that no path computes correctly.
    """
    if is_deepspeed_zero3_enabled():
        refuse_zero3()
    by_name = isinstance(model, str)
    modules = (m for m in (model, ref_model) if isinstance(m, torch.nn.Module))
    refuse_tensor_parallel(*modules, options=args.model_init_kwargs)
    quantisation = choose_quantisation(quantization_config, args, by_name)
    base = adapter_base(model, args) if by_name else None
    adapters = peft_config is not None or base is not None
    if peft_config is not None:
        check_adapters(peft_config)
    reference = choose_reference(args, model, ref_model, is_sharded(args), adapters, streamed)
    if streamed:
        check_streamed(args, reference == CACHED)
    if by_name:
        empty = empty_model(base or model, args)
        with torch.device("meta"):
            check_adapters_train(quantisation, empty.config, adapters)
            config = empty.config
            path, head = plan_model(empty), empty.get_output_embeddings()
            add_adapters(empty, peft_config)
    else:
        for config in getattr(model, "peft_config", {}).values():
            check_adapters(config)
        restore_model(model)
        config = getattr(base_model(model), "config", None)
        path, head = plan_model(base_model(model)), base_model(model).get_output_embeddings()
    if shards_weights(args):
        check_shards(quantisation, config, args)
    return RunPlan(model, ref_model, peft_config, path, head.weight.shape[0], reference, quantisation)


@dataclasses.dataclass
class Setup:
    """Everything that `DPOTrainer` needs to know about its run; see the fields."""

    model: torch.nn.Module
    start_name: str | None  # what the start weights can be loaded from again
    ref_model: torch.nn.Module | None
    plan: Plan
    tokenizer: Any
    adapters: bool
    train_dataset: PairDataset | StreamedPairs | None
    eval_dataset: PairDataset | dict[str, PairDataset] | None
    vocab_size: int
    share: str  # what is shared; "none" where the model cannot share
    reference: str  # see ref_model.py
    foreign_reference: bool  # the reference was passed in, so it may differ from the policy at the start
    aux_coef: float
    loss_options: LossOptions
    flops: Callable[[float, float, float], float]
    checkpointing: str  # what was decided on it and why


def set_up(run: RunPlan, args: DPOConfig, tokenizer, train_rows, eval_rows) -> Setup:
    """Load, wrap and check what `plan_run` planned. Raises ValueError for what cannot work together."""
    if is_stream(train_rows):
        check_streamed(args, run.reference == CACHED)
        # accelerate's default for streams takes batches of tensors alone.
        args.accelerator_config = dataclasses.replace(args.accelerator_config, dispatch_batches=False)
        if args.dataloader_num_workers > 1:
            logger.warning("the train data is streamed: one worker reads it (dataloader_num_workers=1)")
            args.dataloader_num_workers = 1
    set_seed(args.seed)  # adapters start at random
    model, ref_model, reference = run.model, run.ref_model, run.reference
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", None)
    model = load_model(model, args, run.path.path == "shared", run.quantization_config)
    if tokenizer is None and name:
        tokenizer = load_tokenizer(name, args)
    foreign = ref_model is not None
    check_finite(base_model(model))
    if ref_model is None and reference == MODEL:
        ref_model = frozen_copy(model)
    model = add_adapters(model, run.peft_config)
    vars(base_model(model)).pop("_dpo_fast_start", None)  # of an earlier run
    # Fresh adapters that were asked to start at random (init_lora_weights=False) are no start: the base is the reference.
    random_start = getattr(run.peft_config, "init_lora_weights", True) is False
    if reference in (ADAPTER, CACHED) and not (foreign or random_start) and has_trained_adapters(model):
        if is_sharded(args):
            raise ValueError(
                "the model's adapters are already trained, and a frozen copy of them cannot be kept under FSDP or DeepSpeed: "
                "merge them (merge_and_unload) and pass peft_config, or pass ref_model"
            )
        keep_start_adapters(model)
    for module in filter(None, (model, ref_model)):
        own_config(base_model(module))
        if args.disable_dropout:
            if router := random_router(module):
                raise ValueError(
                    f"{router} draws its experts at random in training mode, which no dropout option turns off: set "
                    "disable_dropout=False to train with its noise"
                )
            no_dropout(module)
    ref_model = ref_model.requires_grad_(False).eval() if ref_model is not None else None
    plan = prepare_model(model, workspace_bytes=args.workspace_bytes, backend=args.backend)
    compile_layers(model, args)
    note_attention(model, plan, args)
    share = args.share
    if not plan.share and share != "none":
        share = "none"
        if args.process_index == 0:
            why = plan.obstacle or "the model carries no state (carries_state=False)"
            logger.warning("prompts are not shared: %s", why)
    head = output_layer(base_model(model))
    vocab_size = head.weight.shape[0]
    datasets = eval_rows if isinstance(eval_rows, dict) else {"eval": eval_rows}
    prepared = {k: prepare(v, tokenizer, args, vocab_size, k, share) for k, v in datasets.items() if v is not None}
    train = None if train_rows is None else prepare(train_rows, tokenizer, args, vocab_size, "train", share)
    check_positions(base_model(model), {**prepared, **({} if train is None else {"train": train})})
    checkpointing = choose(model, ref_model, plan, args, train, share, is_sharded(args))
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = may_stay_unused(model)
    if args.gradient_checkpointing and hasattr(model, "disable_adapter"):
        model.enable_input_require_grads()
    return Setup(
        model=model,
        start_name=name or None,
        ref_model=ref_model,
        plan=plan,
        tokenizer=tokenizer,
        adapters=hasattr(model, "disable_adapter"),
        train_dataset=train,
        eval_dataset=prepared if isinstance(eval_rows, dict) else prepared.get("eval"),
        vocab_size=vocab_size,
        share=share,
        reference=reference,
        foreign_reference=foreign,
        aux_coef=aux_coefficient(model, args),
        loss_options=LossOptions.of(args),
        flops=flop_counter(model, head),
        checkpointing=checkpointing,
    )


def note_attention(model, plan: Plan, args: DPOConfig) -> None:
    """Log which attention runs, as a warning where another was asked for."""
    if plan.path == "segments":
        return
    wanted = (args.model_init_kwargs or {}).get("attn_implementation")
    runs = base_model(model).config._attn_implementation
    name = "dpo_fast's own, exact over shared prompts" if plan.path == "shared" else runs
    level = logging.INFO if wanted in (None, runs) else logging.WARNING
    asked = "" if wanted is None else f" (attn_implementation={wanted} was asked for; the numbers are the same)"
    logger.log(level, "attention: %s%s", name, asked)


def aux_coefficient(model, args: DPOConfig) -> float:
    """The weight of the load-balancing loss, 0 for a model without a router."""
    if not has_aux_loss(model):
        if args.router_aux_loss_coef:
            raise ValueError(f"router_aux_loss_coef={args.router_aux_loss_coef}: the model has no auxiliary loss")
        return 0.0
    default = getattr(base_model(model).config.get_text_config(), "router_aux_loss_coef", 0.0)
    return default if args.router_aux_loss_coef is None else args.router_aux_loss_coef


def is_sharded(args: DPOConfig) -> bool:
    """Whether FSDP or DeepSpeed will own the weights."""
    return shards_weights(args) or bool(args.deepspeed) or _is_set("ACCELERATE_USE_DEEPSPEED")


def shards_weights(args: DPOConfig) -> bool:
    """Whether FSDP will."""
    return bool(args.fsdp) or _is_set("ACCELERATE_USE_FSDP")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def flop_counter(model: torch.nn.Module, head: torch.nn.Module) -> Callable[[float, float, float], float]:
    """A function `flops(rows, live, grad)`: per weight and row, 2 forward, 2 for the input's gradient, 2 more where trained.

    `rows` go through the trunk and `live` rows through the head, of which `grad` take part in the backward pass.
    """

    def cost(parameters) -> int:
        return sum(weight_count(p) * (6 if p.requires_grad else 4) for p in parameters)

    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    trunk = cost(p for p in model.parameters() if p.ndim > 1 and id(p) not in tables | {id(head.weight)})
    forward = 2 * head.weight.numel()
    backward = cost([head.weight]) - forward
    return lambda rows, live, grad: rows * trunk + live * forward + grad * backward
