"""The five steps of preference learning with an LSTM and a learned preference model: python examples/lstm_loop.py [rounds]

1 the policy completes prompts, 2 a preference model says which of two completions is better, 3 the DPO objective and
4 its update move the policy, 5 and the next round begins. The preference model is learned first, from pairs that a person
labelled (here a rule stands in for the person: the more "la", the better).
"""

import random
import sys
from itertools import combinations

import torch

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.demo.questions import byte_tokenizer
from dpo_fast.loop.candidates import Prompt
from dpo_fast.loop.in_process import InProcess
from dpo_fast.loop.sampling import Sampling

TOKENIZER = byte_tokenizer()
SYLLABLES = ("la", "do", "mi", "re")
PROMPTS = [Prompt(f"{a} {b} ") for a in SYLLABLES for b in SYLLABLES]


class LSTM(torch.nn.Module):
    """A module with these two methods can be sampled and trained; the state after a prompt is computed once."""

    carries_state = True

    def __init__(self, width: int = 64):
        super().__init__()
        self.embed = torch.nn.Embedding(len(TOKENIZER), width)
        self.lstm = torch.nn.LSTM(width, width, batch_first=True)
        self.head = torch.nn.Linear(width, len(TOKENIZER))

    def hidden_states(self, input_ids, state=None):
        return self.lstm(self.embed(input_ids), state)

    def get_output_embeddings(self):
        return self.head


def likes(text: str) -> int:
    return text.split().count("la")  # this rule stands in for the person


def fit(module: torch.nn.Module, rate: float, steps: int, loss_of) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()


def learn_language(model: LSTM, rng: random.Random) -> None:
    """Train on the next token of random songs of six syllables."""

    def loss() -> torch.Tensor:
        songs = [" ".join(rng.choices(SYLLABLES, k=6)) + TOKENIZER.eos_token for _ in range(32)]
        ids = torch.tensor(TOKENIZER(songs)["input_ids"])  # all have the same length
        logits = model.head(model.hidden_states(ids[:, :-1])[0])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    fit(model, 1e-2, 150, loss)


def learn_preferences(pairs: list[list[str]]):
    """A score per text whose differences explain the labels (Bradley and Terry, 1952); `pairs` hold the better one first."""
    count = lambda text: torch.tensor([float(text.split().count(s)) for s in SYLLABLES])  # noqa: E731
    scorer = torch.nn.Linear(len(SYLLABLES), 1, bias=False)
    gaps = torch.stack([count(better) - count(worse) for better, worse in pairs])
    fit(scorer, 0.1, 100, lambda: torch.nn.functional.softplus(-scorer(gaps)).mean())
    return lambda text: scorer(count(text)).item()


def main(rounds: int = 3, seed: int = 0) -> list[float]:
    """The mean number of "la" in a completion, before the first round and after each."""
    torch.manual_seed(seed)
    policy, score, history = LSTM(), None, []
    learn_language(policy, random.Random(seed))
    options = {"learning_rate": 2e-3, "per_device_train_batch_size": 32, "num_train_epochs": 1, "bf16": False}
    args = DPOConfig("runs/lstm", save_strategy="no", report_to="none", **options)
    for number in range(rounds + 1):
        found = InProcess(policy, TOKENIZER).run(PROMPTS, set(), Sampling(8, max_new_tokens=24, seed=seed), number)
        songs = {prompt.text: [c.text.strip() for c in completions] for prompt, completions in found}
        texts = [text for completions in songs.values() for text in completions]
        history.append(sum(map(likes, texts)) / len(texts))
        print(f"round {number}: {history[-1]:.2f} la per song, such as {texts[0]!r}", flush=True)
        if number == rounds:
            return history
        pairs = [(p, *two) for p, found in songs.items() for two in combinations(dict.fromkeys(found), 2) if all(two)]
        if score is None:
            score = learn_preferences([sorted(two, key=likes, reverse=True) for _, *two in pairs[:100]])
        ranked = [(p, *sorted(two, key=score, reverse=True)) for p, *two in pairs]
        rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in ranked]
        DPOTrainer(policy, args=args, train_dataset=rows, processing_class=TOKENIZER).train()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
