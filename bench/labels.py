"""The value of labels, on real pairs and a CPU: which pairs to label, and how to use annotators who differ.

`python -m bench.labels DATA_FOLDER` reads `politeness` and `pandalm` there (prompt, chosen, rejected), hides the labels and

1. reveals them in steps, for random pairs and for those with the smallest implicit margin under the current policy,
2. lets six simulated annotators (three right in 85 % of the cases, two in 65 %, one in 20 %) give every training pair
   three labels, and compares ways to use their votes.

The model is a Llama of two layers over a vocabulary of 1,024 made from the texts. It is first trained on all texts without
their labels and is then the reference. The measure is held-out reward accuracy. Rows go to bench/results/labels.json.
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.common import ROOT, conditions
from dpo_fast import preference_loss, sequence_logps
from dpo_fast.data.sources import load_pairs, split_pairs
from dpo_fast.data.tokenization import tokenize_pairs
from dpo_fast.loop.aggregate import posteriors
from dpo_fast.loop.items import completion_text, prompt_id
from dpo_fast.loop.label_file import Label

SETS = ("politeness", "pandalm")
HELD_OUT = 0.35
MOST = 320  # pairs to label at most, so that five seeds take minutes
MAX_LENGTH = 96
STEPS = (25, 50, 100, 200)
BETA, EPOCHS, BATCH, RATE = 0.3, 4, 32, 2e-3
ANNOTATORS = {"good 1": 0.85, "good 2": 0.85, "good 3": 0.85, "noisy 1": 0.65, "noisy 2": 0.65, "adversary": 0.2}
VOTES = 3


def load(folder: Path, name: str) -> tuple[list[dict], list[dict], PreTrainedTokenizerFast]:
    """Tokenised pairs to label, pairs that are held out (split by prompt), and a tokenizer made from the former's texts."""
    pairs = load_pairs([str(folder / name / f"{split}.jsonl") for split in ("train", "test")], log=lambda _: None)
    for row in pairs.rows:
        row["prompt"] = completion_text(row["prompt"]) + "\n"
        row["chosen"], row["rejected"] = (completion_text(row[side]) for side in ("chosen", "rejected"))
    train, held_out = split_pairs(pairs, HELD_OUT)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<eos>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((text for row in train.rows for text in row.values()), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    ids = []
    for rows in (train.rows, held_out.rows):
        made = tokenize_pairs(rows, fast, max_length=MAX_LENGTH, log=lambda _: None)
        dropped = {index for index, _ in made.dropped}
        keys = [prompt_id(row["prompt"]) for i, row in enumerate(rows) if i not in dropped]
        ids.append([example | {"prompt": key} for example, key in zip(made.examples, keys, strict=True)])
    return ids[0][:MOST], ids[1], fast


def base_model(examples: Sequence[dict], vocabulary: int, seed: int) -> LlamaForCausalLM:
    """A model that has read both completions of every pair and knows no label."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True, initializer_range=0.1, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config)

    def loss(group):
        logps, lengths = sequence_sums(model, group)
        return -(logps / lengths).mean()

    fit(model, examples, loss, epochs=4, rate=5e-3, seed=seed)
    return model


def fit(model, examples: Sequence[dict], loss, *, epochs: int, rate: float, seed: int) -> None:
    """Train by Adam on shuffled batches of `examples`, with a learning rate that falls to zero."""
    rng = random.Random(seed)
    batches = -(-len(examples) // BATCH) * epochs
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / batches)
    for _ in range(epochs):
        order = list(examples)
        rng.shuffle(order)
        for start in range(0, len(order), BATCH):
            group = order[start : start + BATCH]
            optimizer.zero_grad()
            loss(group).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def train_policy(base, examples: Sequence[dict], seed: int) -> LlamaForCausalLM:
    """Train by DPO from `base`; `p` is the probability that chosen is better (a soft label), `w` the weight of the pair."""
    policy = copy.deepcopy(base)

    def loss(group):
        logps, _ = sequence_sums(policy, group)
        ref = torch.tensor([e["ref"] for e in group]).T
        p, w = (torch.tensor([e[key] for e in group]) for key in ("p", "w"))
        # This is conservative DPO with a label smoothing of 1 - p per pair: the weighted losses of both orders.
        right, wrong = (preference_loss(*logps[order], *ref[order], beta=BETA).losses for order in ([0, 1], [1, 0]))
        return (w * (p * right + (1 - p) * wrong)).mean()

    fit(policy, examples, loss, epochs=EPOCHS, rate=RATE, seed=seed)
    return policy


def margins(policy, examples: Sequence[dict]) -> torch.Tensor:
    """Implicit reward margins [B] without beta."""
    ref = torch.tensor([e["ref"] for e in examples])
    return (pair_logps(policy, examples) - ref) @ torch.tensor([1.0, -1.0])


@torch.no_grad()
def pair_logps(model, examples: Sequence[dict]) -> torch.Tensor:
    """Log-probs [B, 2] of chosen and rejected."""
    groups = (examples[start : start + 4 * BATCH] for start in range(0, len(examples), 4 * BATCH))
    return torch.cat([sequence_sums(model, group)[0].T for group in groups])


def sequence_sums(model, group: Sequence[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [2, B] of chosen and rejected, and their numbers of tokens. Padding is the least work for 0.2M weights."""
    rows = [(e["prompt_ids"], e[f"{side}_ids"]) for side in ("chosen", "rejected") for e in group]
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    targets = torch.full_like(ids, -100)
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[i, :end] = torch.tensor(prompt + completion)
        targets[i, len(prompt) : end] = ids[i, len(prompt) : end]
    logps = sequence_logps(model(input_ids=ids, use_cache=False).logits[:, :-1], targets[:, 1:])
    return logps.view(2, -1), (targets >= 0).sum(1).view(2, -1)


def accuracy(policy, held_out: Sequence[dict]) -> float:
    return (margins(policy, held_out) > 0).double().mean().item()


def selection(base, pool: list[dict], held_out: list[dict], how: str, seed: int) -> list[tuple[int, float]]:
    """(labels, held-out accuracy) after each step that reveals labels; `p` and `w` of these are 1."""
    rng = random.Random(seed)
    labelled = [e | {"p": 1.0, "w": 1.0} for e in rng.sample(pool, STEPS[0])]
    found, policy = [], base
    for step, wanted in enumerate(STEPS):
        if step:
            known = {e["number"] for e in labelled}
            rest = [e for e in pool if e["number"] not in known]
            rng.shuffle(rest)
            if how == "margin":
                order = margins(policy, rest).abs().argsort(stable=True).tolist()
                rest = [rest[i] for i in order]
            taken, counts = [], {}
            for e in rest:  # one pair of each prompt before a second one, as in loop/items.py
                counts[e["prompt"]] = counts.get(e["prompt"], 0) + 1
                taken.append((counts[e["prompt"]], len(taken), e))
            taken.sort(key=lambda entry: entry[:2])
            labelled += [e | {"p": 1.0, "w": 1.0} for *_, e in taken[: wanted - len(labelled)]]
        policy = train_policy(base, labelled, seed)
        found.append((len(labelled), accuracy(policy, held_out)))
    return found


def simulate(pool: list[dict], seed: int) -> list[Label]:
    """Three votes on every pair, of which `a` is the completion that is truly chosen."""
    rng, labels = random.Random(seed), []
    for e in pool:
        for name in rng.sample(list(ANNOTATORS), VOTES):
            choice = "a" if rng.random() < ANNOTATORS[name] else "b"
            labels.append(Label(str(e["number"]), name, choice, None, None, None, 0.0))
    return labels


def reliability(base, pool: list[dict], held_out: list[dict], seed: int) -> list[dict]:
    """Held-out accuracy for each use of the votes, and the share of pairs whose hard label is wrong."""
    labels, rows = simulate(pool, seed), []
    votes = {method: posteriors(labels, method) for method in ("majority", "dawid_skene")}
    uses = {
        "majority, hard": ("majority", lambda p: (float(p > 0.5), 1.0)),
        "share of votes, soft": ("majority", lambda p: (p, 1.0)),
        "Dawid-Skene, hard": ("dawid_skene", lambda p: (float(p > 0.5), 1.0)),
        "Dawid-Skene, soft (smoothing)": ("dawid_skene", lambda p: (p, 1.0)),
        "Dawid-Skene, weight": ("dawid_skene", lambda p: (float(p > 0.5), abs(2 * p - 1))),
        "truth": ("dawid_skene", lambda p: (1.0, 1.0)),
    }
    for name, (method, use) in uses.items():
        used = [use(votes[method][str(e["number"])]) for e in pool]
        examples = [e | {"p": p, "w": w} for e, (p, w) in zip(pool, used, strict=True)]
        found = accuracy(train_policy(base, examples, seed), held_out)
        wrong = sum(p < 0.5 for p, _ in used) / len(used)
        rows.append({"labels": name, "seed": seed, "wrong": wrong, "accuracy": found})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with politeness/ and pandalm/")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "labels.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, head, rows = time.perf_counter(), conditions("cpu", "bench.labels"), []
    for seed in range(args.seeds):
        for name in SETS:
            pool, held_out, tokenizer = load(args.data, name)
            base = base_model(pool, len(tokenizer), seed)
            for examples in (pool, held_out):
                for number, (e, ref) in enumerate(zip(examples, pair_logps(base, examples).tolist(), strict=True)):
                    e["ref"], e["number"] = ref, number
            for how in ("random", "margin"):
                for labels, found in selection(base, pool, held_out, how, seed):
                    row = {"set": name, "select": how, "seed": seed, "labels": labels, "accuracy": found}
                    rows.append({"part": "selection"} | row)
            rows += [{"part": "reliability", "set": name} | row for row in reliability(base, pool, held_out, seed)]
            sizes = {"labelled": len(pool), "held_out": len(held_out)}
            print(f"seed {seed} {name} {sizes} {time.perf_counter() - start:.0f} s", flush=True)
            result = head | {"seconds": time.perf_counter() - start, "rows": rows}
            args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
