"""The embedded default: `python -m dpo_fast.train` without arguments. DPO at work in about two minutes, offline, on a CPU.

A tiny byte-level Llama first learns, with the loss `sft`, to answer short questions tersely or politely, each style half
of the time. Then DPO prefers the polite style. Before and after, the demo measures on held-out questions how often an
answer is polite, how often it is right (rules in questions.py), and the reward margin. Both stages are ordinary
`DPOTrainer` runs; only the data and the printing are special to the demo.
"""

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, ProgressCallback, set_seed

from ..training.config import DPOConfig
from ..training.trainer import DPOTrainer
from .questions import POLITE, TERSE, Question, byte_tokenizer, is_correct, judge_style, make_questions, pair


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a demo run; the defaults were tuned to fit two minutes."""

    output_dir: str = "runs/demo"
    hidden_size: int = 128
    layers: int = 4
    sft_epochs: float = 14
    dpo_epochs: float = 3
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Stage:
    """Answers to the held-out questions, and what was measured on them."""

    answers: list[str]
    polite: float  # share of the answers in the preferred style
    correct: float  # share of the answers whose content is right
    accuracy: float  # share of the held-out pairs whose polite answer has the higher reward
    margin: float  # mean reward of the polite answer minus that of the terse one


@dataclasses.dataclass(frozen=True)
class Result:
    """The measurements of `run`, and where the checkpoint is."""

    before: Stage
    after: Stage
    questions: list[Question]  # held out
    tokens_saved: float  # share of DPO's packed tokens that sharing left out
    seconds: float
    checkpoint: Path


class Progress(ProgressCallback):
    """transformers' progress bar with a name, and with a short line instead of the whole dictionary at a log step."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.set_description(self.name)

    def on_prediction_step(self, args, state, control, **kwargs):
        """Show no bar, since an evaluation takes a second."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:  # an evaluation, or the summary at the end
            return
        line = f"  step {state.global_step:3d}  loss {logs['loss']:.3f}"
        if args.loss_type == ["sft"]:
            line += f"  bytes predicted right {logs['mean_token_accuracy']:.0%}"
        else:
            line += f"  margin {logs['rewards/margins']:.2f}  accuracy {logs['rewards/accuracies']:.0%}"
        self.training_bar.write(f"{line}  {logs['perf/tokens_per_second']:,.0f} tokens/s")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo, print what it measured, and return 0."""
    parser = argparse.ArgumentParser(
        prog="python -m dpo_fast.demo", description="DPO at work, offline, in two minutes."
    )
    parser.add_argument("--output_dir", default=Settings.output_dir, help="where everything is written (%(default)s)")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="of data, weights and samples (%(default)s)")
    run(Settings(**vars(parser.parse_args(argv))))
    return 0


def run(settings: Settings) -> Result:
    """Run both stages and the measurements around them, and print the results as they come."""
    start = time.perf_counter()
    train, held_out = make_questions(settings.seed)
    tokenizer = byte_tokenizer()
    set_seed(settings.seed)
    model = make_model(settings, tokenizer)
    folder = Path(settings.output_dir)
    weights = sum(p.numel() for p in model.parameters())
    print("dpo_fast demo: a model learns to answer, then DPO teaches it manners. All on this machine's CPU.")
    print(
        f"  {weights / 1e6:.2f}M weights, one token per byte; {len(train)} training and {len(held_out)} held-out questions"
    )
    for style in (TERSE, POLITE):
        print(f"  {style}: {held_out[0].prompt.strip()} {held_out[0].styled(style)}".replace("\n", " "))

    with one_thread():
        print("\n1. Supervised training on both styles, half and half")
        both = [pair(question, style) for question in train for style in (TERSE, POLITE)]
        options = {"loss_type": "sft", "learning_rate": 2e-3, "num_train_epochs": settings.sft_epochs}
        options |= {"ref_cache_dir": str(folder / "ref_cache")}
        sft = make_trainer("sft", model, tokenizer, settings, both, **options)
        sft.train()
        sft.save_model(str(folder / "sft"))

        print("\n2. DPO: the polite answer is chosen, the terse one rejected")
        polite, polite_held_out = ([pair(q, POLITE) for q in questions] for questions in (train, held_out))
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in polite))
        # DPO alone also pushes the right words down: 77 % right answers and 94 % polite ones instead of 88 % and 98 %.
        options = {"loss_type": ["sigmoid", "sft"], "beta": 1.0, "num_train_epochs": settings.dpo_epochs}
        options |= {"learning_rate": 1e-4, "ref_cache_dir": str(folder / "ref_cache")}
        dpo = make_trainer("dpo", model, tokenizer, settings, polite, polite_held_out, **options)
        before = measure(dpo, held_out, settings.seed)
        dpo.train()
        after = measure(dpo, held_out, settings.seed)
        dpo.save_model(str(folder / "model"))

    saved = [log["perf/tokens_saved"] for log in dpo.state.log_history if "perf/tokens_saved" in log]
    seconds = time.perf_counter() - start
    result = Result(before, after, held_out, sum(saved) / len(saved), seconds, folder / "model")
    print(summary(result, folder))
    return result


def make_model(settings: Settings, tokenizer) -> LlamaForCausalLM:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.hidden_size * 5 // 2,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden_size // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,  # with the default 0.02, meant for wide models: 73 % right answers instead of 86 %
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def make_trainer(name: str, model, tokenizer, settings: Settings, train, held_out=None, **options) -> DPOTrainer:
    """A `DPOTrainer` for one stage: on the CPU, in float32, without checkpoints in between."""
    args = DPOConfig(
        output_dir=settings.output_dir,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        adam_beta2=0.98,
        logging_steps=0.125,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        seed=settings.seed,
        **options,
    )
    trainer = DPOTrainer(model, args=args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress(name))
    return trainer


@contextlib.contextmanager
def one_thread():
    """Compute on one thread: while one of two cores was busy, two threads were 4 to 12 times as slow as one (torch 2.13)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure(trainer: DPOTrainer, questions: list[Question], seed: int) -> Stage:
    """Measure the trainer's model on the held-out questions, and its rewards on the held-out pairs."""
    answers = answer(trainer.model, trainer.processing_class, [q.prompt for q in questions], seed)
    rewards = trainer.evaluate()
    return Stage(
        answers=answers,
        polite=sum(judge_style(a) == POLITE for a in answers) / len(answers),
        correct=sum(map(is_correct, questions, answers)) / len(answers),
        accuracy=rewards["eval_rewards/accuracies"],
        margin=rewards["eval_rewards/margins"],
    )


def answer(model, tokenizer, prompts: list[str], seed: int) -> list[str]:
    """One sampled answer (temperature 1) to each prompt, in one batch padded on the left."""
    model.eval()
    batch = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = model.generate(**batch, max_new_tokens=48, do_sample=True, temperature=1.0, top_k=0)
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def summary(result: Result, folder: Path) -> str:
    """The text at the end of a run."""
    before, after = result.before, result.after
    lines = ["", f"Sampled answers to questions that were not trained ({len(result.questions)} in all):"]
    for question, first, second in list(zip(result.questions, before.answers, after.answers, strict=True))[:3]:
        lines += [f"  {question.prompt.splitlines()[0]}", f"    before  {first!r}", f"    after   {second!r}"]
    return "\n".join(
        [
            *lines,
            "",
            f"polite answers   {before.polite:6.1%} before -> {after.polite:6.1%} after",
            f"right answers    {before.correct:6.1%} before -> {after.correct:6.1%} after",
            f"reward accuracy       - before -> {after.accuracy:6.1%} after (before, policy and reference are equal)",
            f"reward margin    {round(before.margin, 2) + 0.0:6.2f} before -> {after.margin:6.2f} after, on held-out pairs",
            f"tokens saved     {result.tokens_saved:6.1%} of DPO's tokens, by computing what pairs share once",
            f"time             {result.seconds:.0f} s",
            "",
            f"The model is in {result.checkpoint}, the one before DPO in {folder / 'sft'}, the pairs in pairs.jsonl. "
            "To load it:",
            f'  AutoModelForCausalLM.from_pretrained("{result.checkpoint}")',
            "The same on your own model and pairs (these names work as they are):",
            f"  python -m dpo_fast.train --model_name_or_path {folder / 'sft'} --dataset_name {folder / 'pairs.jsonl'} "
            "--output_dir runs/mine",
        ]
    )
