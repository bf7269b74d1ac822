"""`DPOConfig`: transformers' `TrainingArguments` with TRL's names and defaults for DPO, and dpo_fast's own few options.

Every option of TRL 1.16's DPOConfig is a field here, so that its YAML files and command lines are understood. Options that
would change what is computed and that dpo_fast cannot honour are in `REFUSED`: a value other than the default is an error
that names the option. Options that change no number are in unused.py: they are accepted with a warning.
"""

import dataclasses
import logging
import warnings
from dataclasses import field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_available
from transformers.utils import is_liger_kernel_available

from ..backends import BACKENDS, resolve
from ..forest.packing import SHARE_MODES
from ..loss_options import SFT_MEANS
from ..loss_table import LOSSES
from ..losses import LossOptions
from ..ops import WORKSPACE_BYTES
from .compiling import OFF, check_compile
from .handed_on import check_schedule
from .label_noise import check_label_noise, check_p_chosen
from .unused import sentence, set_back, unused_options
from .value_checks import check_evaluation, check_numbers, check_on_nan, check_reference, check_tokens_per_step

logger = logging.getLogger(__name__)

# name -> (accepted values, why no other is accepted); any other value would change what is computed
REFUSED: dict[str, tuple[tuple, str]] = {
    "neftune_noise_alpha": ((None,), "noise on shared prompts would not be independent"),
    "label_smoothing_factor": ((0.0, 0), "that is cross-entropy's smoothing; DPO's is label_smoothing"),
    "average_tokens_across_devices": ((True,), "a step's loss is the mean over the pairs of all ranks"),
    "parallelism_config": ((None,), "only data parallelism, FSDP and DeepSpeed are supported"),
}
LIGER_HEADS = ("cross_entropy", "fused_linear_cross_entropy")
TRUNCATION_MODES = ("keep_start", "keep_end")


@dataclasses.dataclass
class DPOConfig(TrainingArguments):
    """Options of `DPOTrainer`. Those of TRL 1.16's `DPOConfig` mean the same; see `--help` for each.

    Raises ValueError at construction for a value out of range and for a TRL option that dpo_fast cannot honour. Options
    that change no number, alone or in this combination, are named in one warning and get their defaults.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012 (not a field)

    output_dir: str | None = field(
        default="runs/dpo", metadata={"help": "Where checkpoints and the model are written."}
    )
    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps (or share of all steps, < 1)."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave nan and inf losses out of the log (waits for the device every step)."}
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in backward: less memory, more compute. Default: only where they do not fit."
        },
    )
    torch_compile: bool = field(
        default=False,
        metadata={"help": "Compile the trunk's decoder layers; only their rounding changes, float32 stays float32."},
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "Compute in bfloat16 with float32 weights. Default: on unless fp16 is set."}
    )
    dataloader_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that make batches. Default: 1 on CUDA, else 0 (the main process)."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "No effect: the columns needed are kept."})

    # The model.
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained when the model is given by name."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with the model."})
    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of a mixture of experts' load-balancing loss. Default: the config's."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Turn dropout off in model and reference."})

    # The data.
    max_length: int | None = field(default=1024, metadata={"help": "Longest prompt + completion in tokens."})
    truncation_mode: str = field(
        default="keep_start",
        metadata={
            "help": "What stays of a longer prompt + completion: keep_start (a prompt that fills it drops the row) or keep_end.",
            "choices": list(TRUNCATION_MODES),
        },
    )
    padding_free: bool = field(default=True, metadata={"help": "Always so here: nothing is padded."})
    pad_to_multiple_of: int | str | None = field(default="auto", metadata={"help": "Nothing is padded."})
    dataset_num_proc: int | None = field(
        default=None,
        metadata={"help": "Processes that make tokens of the rows. Default: one, whose tokenizer runs in threads."},
    )
    pad_token: str | None = field(default=None, metadata={"help": "Not used: nothing is padded."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Count and list unusable rows instead of stopping."})

    # The reference.
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the reference's log-probs once, before training, into a cache on disk. "
            "Default: on for full fine-tuning, off with PEFT, streaming, sync_ref_model or a loss without a reference."
        },
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Pairs per batch of that pass. Default: the training batch size."}
    )
    ref_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of the reference cache. Default: ~/.cache/dpo_fast/ref_logps."}
    )
    sync_ref_model: bool = field(
        default=False, metadata={"help": "Move the reference towards the policy every ref_model_sync_steps (TR-DPO)."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "Share of the policy in that move: ref = alpha * policy + (1 - alpha) * ref."}
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "Steps between two moves."})

    # The objective.
    loss_type: list[str] = field(
        default_factory=lambda: [LossOptions.loss_type], metadata={"help": f"One or several of {', '.join(LOSSES)}."}
    )
    loss_weights: list[float] | None = field(
        default=LossOptions.loss_weights, metadata={"help": "A weight for each loss_type."}
    )
    beta: float = field(default=LossOptions.beta, metadata={"help": "Strength of the tie to the reference."})
    label_smoothing: float = field(
        default=LossOptions.label_smoothing, metadata={"help": "Chance that a label is wrong (conservative DPO)."}
    )
    label_noise: str | None = field(
        default=None,
        metadata={
            "help": "What a column p_chosen, the chance that the chosen one is better, does: smoothing (label_smoothing is "
            "1 - p_chosen of each pair), weight (each pair's loss is multiplied by it) or ignore. Default: smoothing."
        },
    )
    sft_weight: float = field(
        default=LossOptions.sft_weight, metadata={"help": "Weight of the chosen completions' likelihood (RPO)."}
    )
    sft_mean: str = field(
        default=LossOptions.sft_mean, metadata={"help": f"What that is a mean over: {' or '.join(SFT_MEANS)}."}
    )
    f_divergence_type: str = field(default=LossOptions.f_divergence_type, metadata={"help": "Divergence of f-DPO."})
    f_alpha_divergence_coef: float = field(
        default=LossOptions.f_alpha_divergence_coef, metadata={"help": "Alpha of the alpha-divergence."}
    )
    ld_alpha: float | None = field(
        default=None, metadata={"help": "LD-DPO: weight of tokens past the shorter completion's length, in [0, 1]."}
    )
    use_weighting: bool = field(default=False, metadata={"help": "WPO: weigh pairs by how likely they are."})
    discopop_tau: float = field(default=LossOptions.discopop_tau, metadata={"help": "Temperature of discopop."})
    simpo_gamma: float = field(default=LossOptions.simpo_gamma, metadata={"help": "Target margin of simpo."})

    # Speed.
    share: str = field(
        default="prefix",
        metadata={"help": f"What is computed once: {', '.join(SHARE_MODES)}. prefix shares common responses too."},
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "Most tokens in one forward pass; larger batches are split, with the same gradient."},
    )
    tokens_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Fill batches up to so many distinct tokens per optimizer step, over all processes, in the place of "
            "per_device_train_batch_size; pairs of one prompt stay side by side. The loss stays the mean over pairs."
        },
    )
    backend: str | None = field(
        default=None, metadata={"help": f"Back end of the head: {', '.join(BACKENDS)}. Default: the fastest there."}
    )
    workspace_bytes: int = field(
        default=WORKSPACE_BYTES,
        metadata={"help": "Bytes of logits that a trained head keeps for backward, at most."},
    )
    use_liger_kernel: bool = field(
        default=False,
        metadata={"help": "Liger's RMSNorm, rotary positions and SwiGLU in the trunk (on a GPU); the head stays ours."},
    )
    verify: bool = field(
        default=True, metadata={"help": "Compare shared with unshared log-probs before the first step."}
    )
    activation_offloading: bool = field(
        default=False, metadata={"help": "Not used: max_tokens_per_batch bounds memory."}
    )

    # Faults.
    on_nan: str = field(
        default="stop",
        metadata={"help": "A loss or gradient that is nan or inf: stop, or skip (waits for the device every step)."},
    )
    resume_changed: list[str] | None = field(
        default=None,
        metadata={"help": "What may differ from the run that is resumed: names of options, model, train_dataset."},
    )

    def __post_init__(self):
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if str(self.fsdp).lower() in ("true", "false"):  # a command line's or a file's yes and no
            self.fsdp = str(self.fsdp).lower() == "true" or None
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        # Without an accelerator there is only the CPU, and transformers demands use_cpu=True before it computes in bf16.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = int(torch.cuda.is_available() and not self.use_cpu)
        check_numbers(self)
        check_evaluation(self)
        check_on_nan(self)
        check_compile(self)
        if unused := unused_options(vars(self), defaults := self.defaults()):
            set_back(vars(self), defaults, unused)
        if self.use_liger_kernel:
            self._take_ligers_trunk()
        if self.deepspeed and not is_deepspeed_available():
            raise ImportError(f"deepspeed={self.deepspeed!r} needs a package that is not here: pip install deepspeed")
        # None, left out, stays so: the trainer decides. The newer name is that of transformers 5.23.
        left_out = self.gradient_checkpointing is None and getattr(self, "activation_checkpointing", None) is None
        with warnings.catch_warnings():
            # TRL's name; transformers 5.23 prefers activation_checkpointing, which older versions lack.
            warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
            # transformers would let float32 products round to TF32, and old ones would tell accelerate by the environment.
            compiled = {name: getattr(self, name) for name in OFF}
            vars(self).update(OFF)
            super().__post_init__()
            vars(self).update(compiled)
        if left_out:
            self.gradient_checkpointing = self.activation_checkpointing = None
        if unused and self.process_index == 0:
            logger.warning(sentence(unused))
        self._refuse()
        check_schedule(self)
        check_label_noise(self)
        weighted = self.use_weighting or self.label_noise == "weight"
        soft = self.label_noise == "smoothing"
        LossOptions.of(self).check(pair_weights=weighted, ld_alpha=self.ld_alpha, soft_labels=soft)

    def _take_ligers_trunk(self) -> None:
        """Liger's norms, rotary positions and MLPs; its heads would take the place of ours."""
        if not is_liger_kernel_available():
            raise ImportError("use_liger_kernel needs a package that is not here: pip install liger-kernel")
        given = self.liger_kernel_config or {}
        if asked := [name for name in LIGER_HEADS if given.get(name)]:
            logger.warning("liger_kernel_config: %s is left off, the head is dpo_fast's own", ", ".join(asked))
        self.liger_kernel_config = {**given, **dict.fromkeys(LIGER_HEADS, False)}

    def check_p_chosen(self, values: list[float], name: str) -> None:
        """Raise ValueError where the loss cannot take these values of the column p_chosen of the `name` data."""
        check_p_chosen(self, values, name)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Every option's name and default."""
        made = {f.name: f.default_factory for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        return {f.name: made[f.name]() if f.name in made else f.default for f in dataclasses.fields(cls)}

    def _refuse(self) -> None:
        for name, (fine, why) in REFUSED.items():
            value = getattr(self, name, fine[0])
            if value not in fine and getattr(value, "value", value) not in fine:
                raise ValueError(f"dpo_fast cannot honour {name}={value!r}: {why}. Remove it.")
        # TRL's default is true. Either way the columns that the layout needs are kept and the others are left out.
        self.remove_unused_columns = False
        if self.share not in SHARE_MODES:
            raise ValueError(f"share={self.share!r} is not one of {', '.join(SHARE_MODES)}")
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(f"truncation_mode={self.truncation_mode!r} is not one of {', '.join(TRUNCATION_MODES)}")
        if self.backend is not None:
            resolve(self.backend, self.device)
        for name in ("max_length", "max_tokens_per_batch", "tokens_per_step", "precompute_ref_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.workspace_bytes < 0:
            raise ValueError(f"workspace_bytes must be at least 0, got {self.workspace_bytes}")
        check_reference(self)
        if self.max_tokens_per_batch is not None and LossOptions.of(self).over_batch:
            raise ValueError(
                f"max_tokens_per_batch cannot split a batch under loss_type {self.loss_type}: it compares all pairs of "
                "the batch; lower per_device_train_batch_size instead"
            )
        check_tokens_per_step(self)
