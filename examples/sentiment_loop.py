"""A real loop: a chat model learns to answer cheerfully, judged by VADER's sentiment (pip install vaderSentiment).

    python examples/sentiment_loop.py MODEL PROMPTS [OUTPUT_DIR] [ROUNDS]

MODEL is a folder or hub name of a chat model, such as SmolLM2-135M-Instruct. PROMPTS is a file in any layout, of which the
first 208 prompts are used. This takes about twenty CPU-minutes; a second call goes on where the first one ended.
"""

import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from dpo_fast.data.prompts import load_prompts
from dpo_fast.loop.items import read_candidates
from dpo_fast.loop.rounds import round_folder, run_loop
from dpo_fast.loop.settings import AnnotateSection, GenerateSection, Settings

ANALYZER = SentimentIntensityAnalyzer()
PROMPTS, HELD_OUT = 208, 80
TRAIN = {
    "learning_rate": 2e-5,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1,
    "gradient_checkpointing": False,
    "bf16": True,
}


def sentiment(prompt, completion: str) -> float:
    """A score from -1 (negative) to 1 (positive)."""
    return ANALYZER.polarity_scores(completion)["compound"]


def main(model: str, prompts: str, output_dir: str = "runs/sentiment", rounds: str = "3") -> None:
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in load_prompts(prompts)[:PROMPTS]]
    (folder / "prompts.jsonl").write_text("".join(rows))
    settings = Settings(
        model=model,
        prompts=str(folder / "prompts.jsonl"),
        output_dir=str(folder / "loop"),
        rounds=int(rounds),
        heldout=HELD_OUT,
        generate=GenerateSection(num_generations=4, max_new_tokens=32, batch_size=128, dtype="bfloat16"),
        annotate=AnnotateSection(judge=sentiment, max_pairs=256, max_heldout_pairs=80),
        train=TRAIN | {"ref_cache_dir": str(folder / "ref_cache")},
    )
    for metrics in run_loop(settings):
        number = metrics["round"]
        samples = read_candidates(
            (settings.folder / "start" if number == 0 else round_folder(settings, number)) / "samples.jsonl"
        )
        scores = [sentiment(row["prompt"], row["completions"][0]["text"]) for row in samples]
        error, win = stdev(scores) / len(scores) ** 0.5, metrics.get("win_start")
        wins = f", wins {win['rate']:.1%} [{win['low']:.0%}, {win['high']:.0%}] against the start" if win else ""
        kl = f"KL to the start {metrics['kl_start']:.3f} nats per token"
        print(f"round {number}: sentiment {mean(scores):+.3f} (standard error {error:.3f}), {kl}{wins}")
    print(f"{time.process_time() / 60:.1f} CPU-minutes in this call; look at {settings.folder / 'report.html'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
