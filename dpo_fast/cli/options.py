"""The options of `python -m dpo_fast.train` beside DPOConfig's: TRL's names and defaults, and which of them go together.

Options of TRL 1.16 that dpo_fast cannot honour are in `REFUSED`, here (model) and in config.py (training): a
value other than the default is an error that names the option. Options that change no number in their combination are not
used (`unused`).
"""

# ruff: noqa: RUF009 (_option is dataclasses.field)

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from transformers.integrations import get_reporting_integration_callbacks

from ..data.layouts import RANKING_PAIRS
from ..data.readers import Source
from ..training.config import DPOConfig
from ..training.quantised import bits_and_bytes
from ..training.unused import unused_options
from ..training.value_checks import check_streamed
from .unknown import unknown


def _option(default, text: str, **extra):
    return dataclasses.field(default=default, metadata={"help": text, **extra})


@dataclasses.dataclass
class ScriptArguments:
    """Where the pairs come from."""

    config: str | None = _option(None, "YAML file of options; flags override it.")
    dataset_name: list[str] | None = _option(None, "Files, directories or hub names of the training pairs.")
    dataset_config: str | None = _option(None, "Configuration of a hub data set.")
    dataset_train_split: str = _option("train", "Split of directories and hub data sets to train on.")
    dataset_test_split: str = _option("test", "Split of directories and hub data sets to evaluate on.")
    dataset_streaming: bool = _option(False, "The same as streaming.")
    dataset_weights: list[float] | None = _option(None, "One per data set: 2 repeats its pairs, 0.5 takes half.")
    datasets: list[str] | None = _option(None, "In YAML: a list of {path, name, split}, instead of dataset_name.")
    streaming: bool = _option(False, "Read training pairs as they are needed, in their order; with max_steps.")
    test_split_size: float | None = _option(None, "Pairs to hold out: a share below 1, or a number.")
    eval_dataset_name: list[str] | None = _option(None, "Files, directories or hub names to evaluate on.")
    ranking_pairs: str = _option("all", "Pairs of ranked completions.", choices=list(RANKING_PAIRS))
    inspect_data: bool = _option(False, "Print what the trainer would see of the data, and stop.")
    ignore_bias_buffers: bool = _option(False, "Leave boolean buffers out of DistributedDataParallel's broadcast.")

    def __post_init__(self):
        self.streaming = self.streaming or self.dataset_streaming


@dataclasses.dataclass
class ModelArguments:
    """Which model is trained, and its adapters."""

    model_name_or_path: str | None = _option(None, "Folder or hub name of the model.")
    model_revision: str = _option("main", "Branch, tag or commit of a hub model.")
    dtype: str | None = _option("float32", "Type of the weights.", choices=["auto", "bfloat16", "float16", "float32"])
    attn_implementation: str | None = _option(None, "Attention of models whose prompts cannot be shared.")
    chat_template_path: str | None = _option(None, "Jinja file that replaces the tokenizer's chat template.")
    use_peft: bool = _option(False, "Train LoRA adapters instead of the weights.")
    lora_r: int = _option(16, "Rank of the adapters.")
    lora_alpha: int = _option(32, "Scale of the adapters, over their rank.")
    lora_dropout: float = _option(0.05, "Dropout in front of the adapters; 0 with disable_dropout.")
    lora_target_modules: list[str] | None = _option(None, "Modules that get adapters, or all-linear.")
    lora_target_parameters: list[str] | None = _option(None, "Parameters that get adapters (experts).")
    lora_modules_to_save: list[str] | None = _option(None, "Modules that are trained whole.")
    lora_task_type: str = _option("CAUSAL_LM", "Only CAUSAL_LM.")
    use_rslora: bool = _option(False, "Divide lora_alpha by the root of the rank.")
    use_dora: bool = _option(False, "Weight-decomposed adapters.")
    load_in_8bit: bool = _option(False, "Keep the frozen base in 8 bits, with use_peft.")
    load_in_4bit: bool = _option(False, "Keep the frozen base in 4 bits, with use_peft (QLoRA).")
    bnb_4bit_quant_type: str = _option("nf4", "The 16 numbers of load_in_4bit.", choices=["fp4", "nf4"])
    use_bnb_nested_quant: bool = _option(False, "Quantise the scales of load_in_4bit too.")
    bnb_4bit_quant_storage: str | None = _option(None, "Type that holds the 4-bit codes; FSDP wants dtype's.")

    def __post_init__(self):
        # PEFT reads a list as endings of names, a string as a pattern of whole names.
        modules = self.lora_target_modules or []
        if len(modules) == 1 and (modules[0] == "all-linear" or re.search(r"[*+?|()\[\]^$\\]", modules[0])):
            self.lora_target_modules = modules[0]
            try:
                re.compile(modules[0])
            except re.error as error:
                raise ValueError(f"lora_target_modules: {modules[0]!r} is not a valid pattern: {error}") from None

    def peft_config(self):
        """PEFT's LoraConfig, None without use_peft."""
        if not self.use_peft:
            return None
        from peft import LoraConfig

        return LoraConfig(
            task_type=self.lora_task_type,
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
            target_parameters=self.lora_target_parameters,
            modules_to_save=self.lora_modules_to_save,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )

    def quantization_config(self):
        """transformers' BitsAndBytesConfig, None without load_in_4bit and load_in_8bit."""
        if self.load_in_4bit and self.dtype == "auto":
            raise ValueError("load_in_4bit computes in dtype: give float32, bfloat16 or float16 instead of auto")
        return bits_and_bytes(
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
            bnb_4bit_compute_dtype=self.dtype if self.load_in_4bit else None,
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
            bnb_4bit_quant_storage=self.bnb_4bit_quant_storage,
        )


# name -> why only the default is accepted; another value would change what is computed
REFUSED = {
    "lora_task_type": "only causal language models are trained",
}
# name -> why streaming excludes it
UNSTREAMED = {
    "dataset_weights": "a stream has no number of pairs to take a share of; name a data set twice, or leave one out",
    "test_split_size": "a stream has no number of pairs to take a share of; give --eval_dataset_name",
    "inspect_data": "the report is of all pairs; leave streaming out for it",
}
QUANTISATION = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
HUB = ("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision")
# Options of older versions that change no number either; they are accepted and not shown.
OLD_UNUSED = ("group_by_length",)
# Keys of an entry of `datasets` in TRL, with what to do instead for those that are not read.
ENTRY = {
    "path": None,
    "name": None,
    "split": None,
    "data_dir": "name the directory as path",
    "data_files": "name the file as path, an entry each",
    "columns": None,  # not used: columns that no layout has are left out anyway
    "fraction": "set dataset_weights, a number for each data set",
}


def changed(values, names) -> list[str]:
    """The named fields of a dataclass that differ from their defaults."""
    defaults = {f.name: f.default for f in dataclasses.fields(values)}
    return [name for name in names if name in defaults and getattr(values, name) != defaults[name]]


def evaluates(values: Mapping) -> bool:
    """Whether the options ask for evaluation."""
    return bool(values["do_eval"]) or getattr(values["eval_strategy"], "value", values["eval_strategy"]) != "no"


def unused(values: Mapping, defaults: Mapping) -> dict[str, str]:
    """Options among `values` (of all three classes) that change no number, each with a reason, or "" where none is needed."""
    found = unused_options(values, defaults)

    def idle(names, why: str) -> None:
        found.update({name: why for name in names if values[name] != defaults[name]})

    if not values["use_peft"]:
        idle([n for n in values if n.startswith("lora_") or n in ("use_rslora", "use_dora")], "without use_peft")
    elif values["disable_dropout"]:
        idle(["lora_dropout"], "with disable_dropout=True, the default")
    if values["use_peft"] and values["precompute_ref_log_probs"] is None:
        idle(["precompute_ref_batch_size", "ref_cache_dir"], "without precompute_ref_log_probs")
    if not values["load_in_4bit"]:
        idle(QUANTISATION, "without load_in_4bit")
    if not values["push_to_hub"]:
        idle(HUB, "without push_to_hub")
    if not evaluates(values):
        names = ["eval_dataset_name", "eval_steps", "eval_on_start", "eval_delay"]
        idle([*names, *(["dataset_test_split"] if values["test_split_size"] is None else [])], "without evaluation")
    if values["streaming"] or values["dataset_streaming"]:
        idle(["dataset_num_proc"], "with streaming")
    if values["test_split_size"] is not None:
        idle(["dataset_test_split"], "beside test_split_size")
    idle(OLD_UNUSED, "")
    if any(isinstance(entry, dict) and entry.get("columns") for entry in values["datasets"] or ()):
        found["columns"] = "in datasets"
    return found


def check(script: ScriptArguments, args: DPOConfig, model: ModelArguments) -> None:
    """Check what needs no file. Raises ValueError, naming every option that cannot be honoured."""
    for name in changed(model, REFUSED):
        raise ValueError(f"dpo_fast cannot honour {name}={getattr(model, name)!r} ({REFUSED[name]}): remove it")
    if model.load_in_4bit and model.load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit exclude each other: drop one")
    if not model.model_name_or_path:
        raise ValueError("no model: give --model_name_or_path, a folder or a hub name")
    if not (script.dataset_name or script.datasets):
        raise ValueError("no data: give --dataset_name, files, directories or hub names")
    if script.datasets:
        for name in changed(script, ("dataset_name", "dataset_config", "dataset_train_split")):
            raise ValueError(f"{name} has no effect beside datasets, whose entries have path, name and split: drop one")
    if script.streaming:
        check_streamed(args)
        for name in changed(script, UNSTREAMED):
            raise ValueError(f"{name} and streaming exclude each other: {UNSTREAMED[name]}")
    if script.test_split_size is not None:
        size = script.test_split_size
        if not (0 < size < 1 or (size >= 1 and size == int(size))):
            raise ValueError(f"test_split_size={size:g} is neither a share below 1 nor a number of pairs")
        if not args.do_eval:
            raise ValueError(
                "test_split_size would hold pairs out that nothing evaluates: set --eval_strategy steps or epoch, or "
                "leave it out to train on all of them"
            )
        if script.eval_dataset_name:
            raise ValueError("eval_dataset_name has no effect beside test_split_size: drop one")
    if args.n_gpu > 1:
        raise ValueError("several GPUs need one process each: start with `accelerate launch -m dpo_fast.train ...`")
    for tracker in get_reporting_integration_callbacks(args.report_to):
        try:
            tracker()
        except RuntimeError as error:
            raise ImportError(f"report_to: {error}") from error


def train_sources(script: ScriptArguments) -> list[Source]:
    """The sources of the training pairs, each with its weight.

    Raises ValueError for entries of `datasets` that cannot be read, and for options that have no effect on files.
    """
    if script.datasets:
        sources = [_entry(entry) for entry in script.datasets]
    else:
        sources = [Source(path, name=script.dataset_config) for path in script.dataset_name]
        if script.dataset_train_split != "train" and all(_is_file(s) for s in sources):
            raise ValueError("dataset_train_split has no effect on files: leave it out")
    weights = script.dataset_weights or [1.0] * len(sources)
    if len(weights) != len(sources):
        raise ValueError(f"dataset_weights has {len(weights)} numbers for {len(sources)} data sets: give one for each")
    return [dataclasses.replace(source, weight=weight) for source, weight in zip(sources, weights, strict=True)]


def _entry(entry: str | dict) -> Source:
    entry = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not entry.get("path"):
        raise ValueError(f"an entry of datasets must name its path, found {entry!r}")
    for key, value in entry.items():
        if key not in ENTRY:
            raise ValueError(f"in datasets: {unknown([key], ENTRY)}; an entry has path, name and split")
        if ENTRY[key] and value is not None:
            raise ValueError(f"dpo_fast cannot honour {key}={value!r} in datasets: {ENTRY[key]}. Remove it.")
    source = Source(entry["path"], name=entry.get("name"), split=entry.get("split"))
    # split="train" is TRL's default, which has no effect on a file.
    return dataclasses.replace(source, split=None) if source.split == "train" and _is_file(source) else source


def eval_sources(script: ScriptArguments) -> list[Source]:
    """The sources of the evaluation pairs; [] where they are split off the training pairs.

    Raises ValueError where the training data has no split to evaluate on.
    """
    if script.test_split_size is not None:
        return []
    if script.eval_dataset_name:
        sources = [Source(path) for path in script.eval_dataset_name]
        if script.dataset_test_split != "test" and all(_is_file(s) for s in sources):
            raise ValueError("dataset_test_split has no effect on files: leave it out")
        return sources
    sources = [] if script.datasets else [Source(path, name=script.dataset_config) for path in script.dataset_name]
    files = [s.path for s in sources if _is_file(s)]
    if script.datasets or files:
        raise ValueError(
            f"evaluation needs pairs and {files[0] if files else 'a mixture of datasets'} has no split "
            f"{script.dataset_test_split!r}: give --eval_dataset_name, or --test_split_size to hold some out"
        )
    return sources


def _is_file(source: Source) -> bool:
    return Path(source.path).expanduser().is_file()
