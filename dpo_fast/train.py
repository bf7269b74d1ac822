"""`python -m dpo_fast.train`: train a model on preference pairs, with TRL's option names. Without options, the demo.

Cheap checks come first (options, files, layouts, tokens, the model's configuration), then the model is loaded. Whatever
a user can mend ends as one line on stderr and exit status 2. Options are in cli/.
"""

import atexit
import contextlib
import logging
import os
import re
import sys
import warnings
from pathlib import Path

import torch

from .cli.config_file import read_config
from .data import cache
from .data.readers import locate
from .data.sources import Pairs, load_pairs, split_pairs
from .data.streamed import SourceRows
from .training import checkpoint
from .training.run_lock import hold

# Packages that the extra [train] brings.
_EXTRA = ("transformers", "accelerate", "datasets", "peft", "safetensors", "tokenizers", "yaml", "jinja2", "pyarrow")
_LIBRARIES = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "peft", "torch")
_LONGEST = 1500  # an error's characters at most; transformers lists every model it knows


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    with _quiet():
        try:
            if not argv:
                from .demo import main as demo

                return demo([])
            return run(argv)
        except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
            if isinstance(error, ModuleNotFoundError) and _package(error) not in _EXTRA:
                raise
            text = " ".join(_explain(error).split())
            rank = os.environ.get("RANK", "0")
            where = "" if rank == "0" else f" on rank {rank}"
            shown = text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
            print(f"dpo_fast: error{where}: {shown}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as stopped:
            print(f"dpo_fast: {stopped or 'interrupted before training: no checkpoint was written'}", file=sys.stderr)
            return 130


def _package(error: ModuleNotFoundError) -> str:
    return (error.name or "").split(".")[0]


def _explain(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{_package(error)} is not installed: pip install 'dpo_fast[train]'"
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: set max_tokens_per_batch or lower per_device_train_batch_size ({error})"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error)


class _OneLine(logging.Formatter):
    def format(self, record):
        return " ".join(super().format(record).split())


@contextlib.contextmanager
def _quiet():
    """The libraries' advice stays off the screen; dpo_fast's own warnings reach stderr, one line each."""
    ours, handler = logging.getLogger("dpo_fast"), logging.StreamHandler()
    handler.setFormatter(_OneLine("dpo_fast: %(message)s"))
    handler.setLevel(logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    levels = {name: logging.getLogger(name).level for name in _LIBRARIES}
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        ours.addHandler(handler)
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            ours.removeHandler(handler)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def run(argv: list[str]) -> int:
    """Train, or inspect the data, as the options say; `main` turns the errors into one line each."""
    # The file's `env` must be set before transformers is imported, which reads the environment.
    path, config = read_config(argv)
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    from .cli.parse import parse
    from .data.pairs import prepare
    from .training.load import load_tokenizer
    from .training.run_setup import plan_run

    script, args, model_args = parse(argv, config, path)
    say = print if args.process_index == 0 else _say_nothing
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if args.disable_tqdm or args.process_index:
        transformers_logging.disable_progress_bar()
    name = model_args.model_name_or_path
    _check_files(script, args, model_args)
    if not script.inspect_data and args.process_index == 0:
        hold(args.output_dir)
    args.resume_from_checkpoint = resume = _resume(args)
    initial = {"dtype": model_args.dtype, "revision": model_args.model_revision}
    if model_args.attn_implementation:
        initial["attn_implementation"] = model_args.attn_implementation
    args.model_init_kwargs = {**initial, **(args.model_init_kwargs or {})}
    tokenizer = load_tokenizer(name, args)
    if tokenizer is None:
        raise ValueError(f"{name} holds no tokenizer (tokenizer.json and tokenizer_config.json)")
    if model_args.chat_template_path:
        tokenizer.chat_template = Path(model_args.chat_template_path).read_text()
    run = None
    if not script.inspect_data:
        adapters, quantisation = model_args.peft_config(), model_args.quantization_config()
        run = plan_run(name, args, peft_config=adapters, quantization_config=quantisation, streamed=script.streaming)
    pairs = _load_pairs(script, args, say)
    if script.streaming:
        pairs["train"] = prepare(pairs["train"], tokenizer, args, run.vocab_size, "train")
    if model_args.chat_template_path and all(part.text for part in pairs.values()):
        raise ValueError("chat_template_path has no effect: the data is text, not messages")
    if script.inspect_data:
        for part, loaded in pairs.items():
            say(f"\n#### {part}\n\n{_inspect(loaded, tokenizer, args, part)}")
        return 0
    data = {part: prepare(loaded, tokenizer, args, run.vocab_size, part) for part, loaded in pairs.items()}
    if not script.streaming and (kept := cache.folders()):
        say(f"rows and tokens are kept in {cache.cache_folder()}: {cache.megabytes(kept)} (see docs/data.md)")
    _train(run, script, args, tokenizer, data, resume, say)
    return 0


def _say_nothing(*_) -> None:
    pass


def _check_files(script, args, model_args) -> None:
    """Raise FileNotFoundError or ValueError unless everything that the options name is there."""
    from .cli.options import eval_sources, train_sources

    name, template = model_args.model_name_or_path, model_args.chat_template_path
    if Path(name).is_dir():
        if model_args.model_revision != "main":
            raise ValueError(f"model_revision has no effect on a folder ({name}): leave it out")
    elif not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"no such model folder: {name} (absolute: {Path(name).absolute()})")
    if template and not Path(template).is_file():
        raise FileNotFoundError(f"no such file: {template} (chat_template_path)")
    for source in train_sources(script):
        locate(source, script.dataset_train_split)
    for source in eval_sources(script) if args.do_eval else ():
        locate(source, script.dataset_test_split)


def _resume(args) -> str | None:
    """The checkpoint to resume from. Raises ValueError where the one that is asked for cannot be used."""
    value = args.resume_from_checkpoint
    known = {"true": True, "false": None}
    return checkpoint.find_checkpoint(known.get(str(value).lower(), value), args.output_dir)


def _load_pairs(script, args, say) -> dict[str, Pairs | SourceRows]:
    """The pairs to train on and, where the run evaluates, those to evaluate on."""
    from .cli.options import eval_sources, train_sources

    common = {
        "skip_bad_rows": args.skip_bad_rows,
        "ranking_pairs": script.ranking_pairs,
        "seed": args.seed,
        "log": say,
        "cache": True,
    }
    sources, split = train_sources(script), script.dataset_train_split
    if script.streaming:
        say(f"streamed, in the order of the rows: {', '.join(source.path for source in sources)}")
        pairs = {"train": SourceRows(sources, split, script.ranking_pairs)}
    else:
        pairs = {"train": load_pairs(sources, split=split, **common)}
    if args.do_eval and script.test_split_size is not None:
        pairs["train"], pairs["eval"] = split_pairs(pairs["train"], script.test_split_size, args.seed)
        say(f"held out: {len(pairs['eval'].rows)} pairs, {len(pairs['train'].rows)} are left to train on")
    elif args.do_eval:
        pairs["eval"] = load_pairs(eval_sources(script), split=script.dataset_test_split, **common)
    loaded = [part for part in pairs.values() if isinstance(part, Pairs)]
    ranked = script.streaming or any("completions" in layout for part in loaded for layout in part.layout.values())
    if script.ranking_pairs != "all" and not ranked:
        raise ValueError(f"ranking_pairs={script.ranking_pairs} has no effect: no row holds ranked completions")
    return pairs


def _inspect(pairs: Pairs, tokenizer, args, part: str) -> str:
    from .data.report import report
    from .data.tokenization import tokenize_pairs
    from .training.batches import evaluation_batches, training_batches

    tokenized = tokenize_pairs(
        pairs.rows,
        tokenizer,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        skip_bad_rows=args.skip_bad_rows,
        num_proc=args.dataset_num_proc,
        log=_say_nothing,
    )
    if part != "train":
        return report(pairs, tokenized, tokenizer, evaluation_batches(tokenized.examples, args))
    others = None if args.tokens_per_step is None else training_batches(tokenized.examples, args, by_tokens=False)
    return report(pairs, tokenized, tokenizer, training_batches(tokenized.examples, args), others)


def _train(plan, script, args, tokenizer, data, resume, say) -> None:
    from .training.trainer import DPOTrainer

    trainer = DPOTrainer(
        plan, args=args, train_dataset=data["train"], eval_dataset=data.get("eval"), processing_class=tokenizer
    )
    say(trainer.setup.checkpointing)
    if script.ignore_bias_buffers:
        buffers = trainer.model.named_buffers()
        trainer.model._ddp_params_and_buffers_to_ignore = [n for n, b in buffers if b.dtype == torch.bool]
    # DeepSpeed's engine begins with training; transformers lets ZeRO-3 alone evaluate before it.
    before = trainer.evaluate() if "eval" in data and not trainer.is_deepspeed_enabled else None
    trainer.train(resume_from_checkpoint=resume)
    speed = trainer.throughput.totals()
    after = _final_metrics(trainer) if "eval" in data else None
    if trainer.is_fsdp_enabled:  # accelerate's default for FSDP2 would leave the weights in shards
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(args.output_dir)  # and uploads it with push_to_hub
    say(f"saved the model and its tokenizer to {args.output_dir}")
    say(_summary(before, after, speed, trainer.state.global_step))
    for tracker in trainer.accelerator.trackers:
        tracker.finish()
    trainer.accelerator.wait_for_everyone()


def _final_metrics(trainer) -> dict:
    """The metrics of the saved model; it is not evaluated again where the last step was."""
    state = trainer.state
    last = [log for log in state.log_history if "eval_loss" in log and log["step"] == state.global_step]
    return last[-1] if last and not trainer.args.load_best_model_at_end else trainer.evaluate()


def _summary(before: dict | None, after: dict | None, speed: dict, steps: int) -> str:
    parts = []
    if before and after:
        accuracy, margin = "eval_rewards/accuracies", "eval_rewards/margins"
        # Where policy and reference are still equal, only rounding decides which reward is larger.
        started = "" if abs(before[margin]) < 0.02 else f"{before[accuracy]:.1%} -> "
        parts.append(f"held-out reward accuracy {started}{after[accuracy]:.1%}")
        parts.append(f"margin {before[margin]:.3f} -> {after[margin]:.3f}")
    parts.append(f"step {steps} reached in {speed['seconds']:.1f} s")
    parts.append(f"{speed['pairs_per_second']:.1f} pairs/s")
    parts.append(
        f"{speed['tokens_saved']:.1%} of packed tokens saved ({speed['tokens_saved_of_padded']:.1%} of padded)"
    )
    return ", ".join(parts)


def leave(status: int) -> None:
    """End this process with `status`; a rank of a gloo group leaves without taking its group down.

    torch's own teardown of a gloo group of two ranks, with nothing of ours in the program, was seen to abort ("terminate
    called without an active exception") in 4 of 24 tries and to wait for ever in others. By then everything is written.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if "gloo" in torch.distributed.get_backend():
            atexit._run_exitfuncs()  # trackers send what they hold here; os._exit would leave it out
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        torch.distributed.destroy_process_group()
    sys.exit(status)


if __name__ == "__main__":
    try:
        code = main()
    except SystemExit as ended:  # --help, an option that is not understood, SIGTERM
        code = ended.code
    leave(code or 0)
