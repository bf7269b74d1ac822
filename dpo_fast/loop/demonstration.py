"""The embedded demonstration of `python -m dpo_fast.loop`: a rule prefers polite answers, and three rounds make them common.

The tiny model of the first demonstration (demo/) learns to answer tersely or politely, mostly tersely. Then the loop runs
as it would on any model: it draws four samples per question, a rule judges them, DPO trains on the pairs, and it repeats.
"""

import contextlib
import json
import time
from pathlib import Path

from transformers import set_seed

from ..demo.questions import POLITE, TERSE, byte_tokenizer, judge_style, make_questions
from ..demo.stages import Settings as DemoSettings
from ..demo.stages import make_model, make_trainer, one_thread
from .items import read_candidates
from .rounds import round_folder, run_loop
from .settings import AnnotateSection, GenerateSection, Settings

_SCORES = {POLITE: 1.0, TERSE: 0.0, None: -1.0}


def politeness(prompt: str, completion: str) -> float:
    """The judge: 1 for a polite answer, 0 for a terse one, -1 for one in neither form."""
    return _SCORES[judge_style(completion)]


def demonstrate(
    output_dir: str = "runs/loop_demo",
    rounds: int = 3,
    *,
    questions: int = 240,
    hidden_size: int = 128,
    sft_epochs: float = 6,
) -> list[float]:
    """Run the demonstration, and return the share of polite answers to held-out questions at the start and after each round.

    A quarter of the `questions` is held out. A second call goes on where the first one ended, or shows it again.
    """
    began, folder = time.perf_counter(), Path(output_dir)
    print("dpo_fast loop: sample, prefer, train, and again. All on this machine's CPU.")
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "questions.jsonl"
    asked = make_questions()[0][:questions]
    prompts.write_text("".join(json.dumps({"prompt": q.prompt}) + "\n" for q in asked))
    with one_thread():
        if not (folder / "model").is_dir():
            _first_model(folder, asked, hidden_size, sft_epochs)
        settings = Settings(
            model=str(folder / "model"),
            prompts=str(prompts),
            output_dir=str(folder / "loop"),
            rounds=rounds,
            heldout=questions // 4,
            generate=GenerateSection(num_generations=4, max_new_tokens=48, batch_size=256),
            annotate=AnnotateSection(judge=politeness, max_pairs=400),
            train={
                "loss_type": ["sigmoid", "sft"],
                "beta": 0.5,
                "learning_rate": 1.5e-4,
                "per_device_train_batch_size": 16,
                "num_train_epochs": 2,
                "gradient_checkpointing": False,
                "disable_tqdm": True,
                "dataloader_pin_memory": False,
                "ref_cache_dir": str(folder / "ref_cache"),
            },
        )
        history = run_loop(settings, log=_brief)
    shares = [_polite(settings.folder / "start")]
    shares += [_polite(round_folder(settings, m["round"])) for m in history[1:]]
    print(f"\npolite answers to held-out questions: {' -> '.join(f'{share:.0%}' for share in shares)}")
    print(f"time {time.perf_counter() - began:.0f} s; the best round's model is {settings.folder / 'best'}")
    print(f"Look at the report in a browser: {(settings.folder / 'report.html').absolute().as_uri()}")
    return shares


def _brief(text: str) -> None:
    if text.lstrip().startswith(("round", "warning", "ended")):
        print(text, flush=True)


def _polite(folder: Path) -> float:
    rows = read_candidates(folder / "samples.jsonl")
    return sum(judge_style(row["completions"][0]["text"]) == POLITE for row in rows) / len(rows)


def _first_model(folder: Path, questions, hidden_size: int, epochs: float) -> None:
    """Train a model that answers politely one time in four."""
    print("First a model learns to answer, politely once in four times.", flush=True)
    tokenizer = byte_tokenizer()
    set_seed(0)
    settings = DemoSettings(output_dir=str(folder / "sft"), hidden_size=hidden_size)
    model = make_model(settings, tokenizer)
    # The loss `sft` does not read what is rejected, so that is as short as can be.
    answers = [(q.prompt, q.styled(style)) for q in questions for style in (TERSE, TERSE, TERSE, POLITE)]
    rows = [{"prompt": prompt, "chosen": answer, "rejected": "-"} for prompt, answer in answers]
    options = {"loss_type": "sft", "learning_rate": 2e-3, "num_train_epochs": epochs}
    trainer = make_trainer("sft", model, tokenizer, settings, rows, **options)
    trainer.train()
    part = folder / "model.part"
    with contextlib.suppress(OSError):
        trainer.save_model(str(part))
    part.rename(folder / "model")
