"""What the loop measures, against plain computations, and what it says of the numbers."""

import random

import pytest
import torch
from tiny import llama, sequence_logp

from dpo_fast.demo.questions import byte_tokenizer
from dpo_fast.loop.items import prompt_id
from dpo_fast.loop.judges import make_judge
from dpo_fast.loop.limits import warnings
from dpo_fast.loop.measure import sample_examples, sequence_statistics, text_statistics, wilson, win_rate
from dpo_fast.loop.rounds import best_round
from dpo_fast.loop.settings import Limits


def rows_of(texts, **changes):
    """Lines of a samples file, one per prompt p0, p1, ..."""
    completion = {"tokens": 3, "truncated": False, "empty": False, **changes}
    rows = [{"prompt": f"p{i}", "completions": [{**completion, "text": text}]} for i, text in enumerate(texts)]
    return [{**row, "id": prompt_id(row["prompt"]), "split": "heldout"} for row in rows]


def test_win_rate_asks_in_both_orders():
    judge = make_judge(lambda prompt, completion: len(completion))
    found = win_rate(judge, rows_of(["long", "a", "same", "xy"]), rows_of(["no", "long", "same", "zz"]))
    # A win, a loss, equal texts and a tie.
    assert (found["rate"], found["prompts"]) == (0.5, 4)


def test_a_judge_that_likes_the_left_side_gives_no_wins():
    judge = make_judge(lambda prompt, a, b: 1.0)
    assert win_rate(judge, rows_of("abc"), rows_of("xyz"))["rate"] == 0.5


def test_the_interval_holds_the_true_rate_in_nineteen_of_twenty():
    rng, hits = random.Random(0), 0
    for _ in range(2000):
        share = sum(rng.random() < 0.8 for _ in range(40)) / 40
        bounds = wilson(share, 40)
        hits += bounds["low"] <= 0.8 <= bounds["high"]
    assert 0.93 < hits / 2000 < 0.98
    assert wilson(1.0, 20)["low"] < 1.0 == wilson(1.0, 20)["high"]
    assert wilson(0.0, 20)["low"] == 0.0 < wilson(0.0, 20)["high"]


def test_log_probs_and_entropy_of_samples_are_those_of_the_plain_forward():
    model, tokenizer = llama(vocab_size=259).eval(), byte_tokenizer()
    rows = rows_of(["one", "another text", ""]) + rows_of(["cut"], truncated=True)
    examples = sample_examples(rows, tokenizer)
    # The end of a completion is scored with it, but not of one that was cut.
    assert [e["chosen_ids"][-1] == tokenizer.eos_token_id for e in examples] == [True, True, True, False]
    logps, entropies, tokens = sequence_statistics(model, examples)
    assert tokens == sum(len(e["chosen_ids"]) for e in examples) == 4 + 13 + 1 + 3
    for example, logp, entropy in zip(examples, logps, entropies, strict=True):
        prompt, ids = example["prompt_ids"], example["chosen_ids"]
        with torch.no_grad():
            assert float(logp) == pytest.approx(float(sequence_logp(model, prompt, ids)), rel=1e-6)
            logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        plain = -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
        assert float(entropy) == pytest.approx(float(plain), rel=1e-6)


def test_statistics_of_texts():
    rows = rows_of(["a b c d a b c d", "a b c"])
    found = text_statistics(rows)
    # abcd bcda cdab dabc abcd: one of five came before; a text of three words has no 4-gram.
    assert found["repetition"] == pytest.approx(0.1)
    assert found["length"] == 3


START = {"length": 20.0, "repetition": 0.0, "entropy": 2.0}
FINE = {
    "kl_start": 0.1, "length": 22.0, "repetition": 0.02, "entropy": 1.8, "chosen_delta": -2.0, "accuracy": 0.8,
    "train_accuracy": 0.85, "heldout_pairs": 100, "train_sample": 100, "win_before": {"rate": 0.6, "low": 0.5, "high": 0.7},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kl_start": 0.7}, "raise beta"),
        ({"length": 40.0}, "the judge may reward length"),
        ({"length": 8.0}, "the judge may reward length"),
        ({"repetition": 0.2}, "4-grams are repeated"),
        ({"entropy": 0.5}, "collapses"),
        ({"chosen_delta": -25.0}, "lost 25.0 nats"),
        ({"train_accuracy": 1.0}, "label_smoothing"),
        ({"win_before": {"rate": 0.2, "low": 0.1, "high": 0.3}}, "this round made it worse"),
    ],
)
def test_what_passes_a_limit_is_said_with_what_to_do(change, sentence):
    assert warnings(FINE, START, Limits()) == []
    said = warnings({**FINE, **change}, START, Limits())
    assert len(said) == 1
    assert sentence in said[0]


def test_a_limit_can_be_switched_off_and_chance_is_no_overfitting():
    assert warnings({**FINE, "kl_start": 9.0}, START, Limits(kl=None)) == []
    assert warnings({**FINE, "train_accuracy": 1.0, "heldout_pairs": 4}, START, Limits()) == []
    assert warnings({**FINE, "accuracy": None, "chosen_delta": None}, START, Limits()) == []


def test_the_best_round_is_the_one_with_the_highest_win_rate():
    def history(*rates):
        return [{}] + [{"win_start": rate if rate is None else {"rate": rate}} for rate in rates]

    assert [best_round(history(*r)) for r in [(), (0.4,), (0.6,), (0.6, 0.6), (0.6, 0.9, 0.7), (None, None)]] == [
        0, 0, 1, 1, 2, 2,
    ]  # fmt: skip
