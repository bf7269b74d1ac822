"""Judges: rules and models against a truth of their own, and what they must not do."""

import random
from collections import Counter

import pytest
import torch
from label_tools import store_of
from tiny import llama, sequence_logp

from dpo_fast.loop.judges import run_judge
from dpo_fast.loop.scoring import implicit_margins, pair_logps
from dpo_fast.loop.selection import select

store = store_of(prompts=5, completions=3)


def quiet(_):
    pass


def test_a_rule_from_a_file_scores_or_compares(tmp_path, store):
    (tmp_path / "rules.py").write_text(
        "def last(prompt, completion):\n    return int(completion[-1])\n"
        "def first(prompt, a, b):\n    return int(b[-1]) - int(a[-1])\n"
        "def level(prompt, completion, weight=1):\n    return len(completion) * weight\n"
    )
    assert run_judge(store, f"rule:{tmp_path}/rules.py:last", log=quiet) == {"b": 15}
    assert run_judge(store, f"rule:{tmp_path}/rules.py:first", log=quiet) == {"a": 15}
    with pytest.raises(ValueError, match="prefers no completion of 15 pairs"):
        run_judge(store, f"rule:{tmp_path}/rules.py:level", log=quiet)
    assert Counter(x.choice for x in store.labels() if x.annotator.endswith(":level")) == {"tie": 15}
    assert set(store.annotators().values()) == {"judge"}


@pytest.mark.parametrize("bad", ["raise", "nan", "none", "text"])
def test_a_judge_that_fails_loses_nothing_and_goes_on(store, bad):
    asked = []

    def judge(prompt, a, b):
        asked.append(a)
        if len(asked) == 7 and bad:
            if bad == "raise":
                raise RuntimeError("out of cheese")
            return {"nan": float("nan"), "none": None, "text": "a"}[bad]
        return 1

    match = {"raise": "RuntimeError: out of cheese", "nan": "NaN", "none": "no number", "text": "no number"}[bad]
    with pytest.raises(ValueError, match=rf"pair p.*{match}.* 6 labels of this run are saved"):
        run_judge(store, judge, name="j", log=quiet)
    assert len(store.labels()) == 6
    bad = None
    assert run_judge(store, judge, name="j", log=quiet) == {"a": 15}
    assert len(asked) == 7 + 9


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("rule:none.py:f", "no such file"), ("rule:f", "no such file"), ("best:model", "a judge is rule"),
        ("llm:127.0.0.1:8000#m", "must be llm:URL#MODEL"), ("llm:http://127.0.0.1:8000", "must be llm:URL#MODEL"),
        ("implicit:none", "no such model folder"), ("", "a judge is rule"),
    ],
)  # fmt: skip
def test_a_spec_that_is_wrong_is_named(store, spec, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        run_judge(store, spec, log=quiet)
    assert store.annotators() == {}


def test_a_rule_file_that_is_wrong_is_named(tmp_path, store):
    (tmp_path / "rules.py").write_text("def one(x):\n    return 1\n")
    with pytest.raises(ValueError, match="it takes 1 arguments"):
        run_judge(store, f"rule:{tmp_path}/rules.py:one", log=quiet)
    with pytest.raises(ValueError, match="no function 'two'"):
        run_judge(store, f"rule:{tmp_path}/rules.py:two", log=quiet)
    (tmp_path / "broken.py").write_text("def one(:\n")
    with pytest.raises(ValueError, match="cannot be loaded: SyntaxError"):
        run_judge(store, f"rule:{tmp_path}/broken.py:one", log=quiet)
    with pytest.raises(ValueError, match="template has no effect"):
        run_judge(store, lambda p, c: 1.0, name="j", template="x", log=quiet)


def test_implicit_margins_are_those_of_single_sequences():
    from transformers import PreTrainedTokenizerFast

    tokenizer = word_tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    policy, reference = llama(0), llama(1)
    rng = random.Random(0)
    rows = [
        {key: " ".join(f"w{rng.randrange(40)}" for _ in range(rng.randint(1, 9))) + " " for key in ("prompt", "chosen", "rejected")}
        for _ in range(7)
    ]  # fmt: skip
    got = implicit_margins(policy, reference, tokenizer, rows, max_tokens=60)

    def truth(model, row, side):
        ids = tokenizer(row["prompt"])["input_ids"]
        return sequence_logp(model, ids, [*tokenizer(row[side])["input_ids"], tokenizer.eos_token_id])

    with torch.no_grad():
        wanted = torch.stack(
            [
                truth(policy, r, "chosen") - truth(reference, r, "chosen")
                - truth(policy, r, "rejected") + truth(reference, r, "rejected") for r in rows
            ]
        )  # fmt: skip
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    mean = pair_logps(policy, [{"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8]}], average=True)
    total = pair_logps(policy, [{"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8]}])
    torch.testing.assert_close(mean, total / torch.tensor([2.0, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="needs a reference"):
        implicit_margins(policy, None, tokenizer, rows)


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<bos>", "<eos>"] + [f"w{i}" for i in range(40)] + ["question", "answer", *"0123456789"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", pad_token="<unk>")


def save(model, path):
    model.float().save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


def test_implicit_and_selection_of_a_trained_policy(tmp_path, store):
    from peft import LoraConfig, get_peft_model

    base, run = save(llama(0), tmp_path / "base"), save(llama(1), tmp_path / "run")
    spec = f"{run}#{base}"
    counts = run_judge(store, f"implicit:{spec}", log=quiet)
    assert counts.total() == 15
    select(store, "margin", policy=spec)
    items = store.items()
    rows = [{"prompt": x.prompt, "chosen": x.a, "rejected": x.b} for x in items]
    margins = implicit_margins(llama(1).float(), llama(0).float(), word_tokenizer(), rows)
    signs = {x.item: x.choice for x in store.labels()}
    assert all(signs[x.id] == ("a" if m > 0 else "b") for x, m in zip(items, margins.tolist(), strict=True))
    for start in (0, 5, 10):
        assert margins[start : start + 5].abs().diff().min() >= 0
    with pytest.raises(ValueError, match="holds a whole model"):
        run_judge(store, f"implicit:{run}", log=quiet)
    # Adapters: the reference is the model under them.
    torch.manual_seed(3)
    adapted = get_peft_model(llama(0).float(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapters")
    word_tokenizer().save_pretrained(tmp_path / "adapters")
    assert run_judge(store, f"implicit:{tmp_path / 'adapters'}", log=quiet).total() == 15
    with pytest.raises(ValueError, match="holds adapters"):
        run_judge(store, f"implicit:{tmp_path / 'adapters'}#{base}", log=quiet)


def test_selection_by_disagreement_and_its_errors(store):
    for name in ("ann", "bob"):
        store.add_annotator(name)
    split = store.items()[-1]
    for item in store.items()[-3:]:
        store.add_label("ann", item.id, "a")
        store.add_label("bob", item.id, "b" if item == split else "a")
    select(store, "disagreement")
    assert store.items()[0] == split
    order = [item.id for item in store.items()]
    select(store, "random", seed=1)
    assert [item.id for item in store.items()] != order
    for how, policy, match in (
        ("best", None, "is not one of"),
        ("margin", None, "needs a policy"),
        ("random", "x", "no use"),
    ):
        with pytest.raises(ValueError, match=match):
            select(store, how, policy=policy)


def test_a_reward_model_judges(tmp_path, store):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=61, num_labels=1, pad_token_id=0, **sizes)
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "reward")
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path / "reward")
    run_judge(store, f"reward:{tmp_path / 'reward'}", log=quiet)
    model.eval()
    for label in store.labels():
        item = store.item(label.item)
        with torch.no_grad():
            a, b = (
                model(**tokenizer(item.prompt + text, return_tensors="pt")).logits.item() for text in (item.a, item.b)
            )
        assert label.choice == ("tie" if a == b else "a" if a > b else "b")
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=61, num_labels=2, **sizes))
    model.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="has 2 outputs"):
        run_judge(store, f"reward:{tmp_path / 'two'}", log=quiet)
