"""The message for unknown option names: what to write instead, or the nearest option that exists."""

import difflib
from collections.abc import Iterable, Sequence

_LAUNCH = "start with `accelerate launch --{} -m dpo_fast.train ...`"
_GONE = "it is gone from transformers: leave it out"
# Names from older versions and other programs, with what to do instead.
_HINTS = {
    "torch_dtype": "now dtype",
    "evaluation_strategy": "now eval_strategy",
    "warmup_ratio": "now warmup_steps, which is a share below 1",
    "max_prompt_length": "use max_length",
    "max_completion_length": "use max_length",
    "max_target_length": "use max_length",
    "no_cuda": "now use_cpu",
    "per_gpu_train_batch_size": "now per_device_train_batch_size",
    "per_gpu_eval_batch_size": "now per_device_eval_batch_size",
    "dataset_mixer": "use datasets and dataset_weights",
    "dataset_splits": "use dataset_train_split and dataset_test_split",
    "dataset_configs": "use dataset_config",
    "chat_template": "use chat_template_path",
    "rpo_alpha": "use loss_type sigmoid and sft with loss_weights",
    "reference_free": "use loss_type simpo or orpo",
    "model_revision_name": "use model_revision",
    "ref_model_init_kwargs": "use model_init_kwargs: the reference is the model at its start",
    "use_flash_attention_2": "leave it out: sharing prompts brings its own attention",
    "preprocessing_num_workers": "leave it out: the tokenizer runs in threads",
    "generate_during_eval": "leave it out: evaluation generates nothing",
    "use_logits_to_keep": "leave it out: only scored tokens reach the head",
    "label_pad_token_id": "leave it out: nothing is padded",
    "padding_value": "leave it out: nothing is padded",
    "is_encoder_decoder": "leave it out: only decoders are trained",
    "include_tokens_per_second": "leave it out: the log has perf/tokens_per_second",
    "accelerate_config": _LAUNCH.format("config_file FILE"),
    "config_file": _LAUNCH.format("config_file FILE"),
    "mixed_precision": "use bf16 or fp16",
    **dict.fromkeys(("overwrite_output_dir", "save_safetensors", "logging_dir", "half_precision_backend"), _GONE),
    **dict.fromkeys(("fp16_opt_level", "fp16_backend", "use_mps_device", "use_ipex", "jit_mode_eval"), _GONE),
    **{
        name: _LAUNCH.format(f"{name} N")
        for name in ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "gpu_ids")
    },
}
_LIKENESS = 0.8  # difflib's measure; names that are less alike are not suggested


def unknown(names: Sequence[str], known: Iterable[str]) -> str:
    """One message for all of `names`, each with what to write instead where that is known."""
    known = list(known)
    shown = [name + (f" ({hint})" if (hint := _hint(name, known)) else "") for name in names]
    return f"unknown option{'s' * (len(names) > 1)} {', '.join(shown)}"


def _hint(name: str, known: list[str]) -> str:
    bare = name.lstrip("-").split("=")[0].replace("-", "_")
    if bare in _HINTS:
        return _HINTS[bare]
    near = difflib.get_close_matches(bare, known, 1, _LIKENESS)
    return f"did you mean {near[0]}?" if near else ""
