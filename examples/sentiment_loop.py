"""A real loop: a chat model learns to answer cheerfully, judged by VADER's sentiment (pip install vaderSentiment).

    python examples/sentiment_loop.py MODEL PROMPTS [OUTPUT_DIR]

MODEL is a folder or hub name of a chat model, such as SmolLM2-135M-Instruct. PROMPTS is a file in any layout.
"""

import json
import sys

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from dpo_fast.loop.items import read_candidates
from dpo_fast.loop.rounds import round_folder, run_loop
from dpo_fast.loop.settings import AnnotateSection, GenerateSection, Settings

ANALYZER = SentimentIntensityAnalyzer()


def sentiment(prompt, completion: str) -> float:
    """A score from -1 (negative) to 1 (positive)."""
    return ANALYZER.polarity_scores(completion)["compound"]


def main(model: str, prompts: str, output_dir: str = "runs/sentiment", rounds: str = "3") -> None:
    settings = Settings(
        model=model,
        prompts=prompts,
        output_dir=output_dir,
        rounds=int(rounds),
        heldout=32,
        generate=GenerateSection(num_generations=4, max_new_tokens=48, batch_size=64),
        annotate=AnnotateSection(judge=sentiment, max_pairs=192, max_heldout_pairs=64),
        train={
            "learning_rate": 5e-6,
            "per_device_train_batch_size": 8,
            "num_train_epochs": 1,
            "gradient_checkpointing": False,
            "lr_scheduler_type": "constant",
        },
    )
    history = run_loop(settings)
    for metrics in history:
        number = metrics["round"]
        folder = settings.folder / "start" if number == 0 else round_folder(settings, number)
        rows = read_candidates(folder / "samples.jsonl")
        reward = sum(sentiment(row["prompt"], row["completions"][0]["text"]) for row in rows) / len(rows)
        print(
            json.dumps(
                {"round": number, "sentiment": reward, "kl": metrics["kl_start"], "win": metrics.get("win_start")}
            )
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
