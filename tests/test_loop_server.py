"""Servers of real (tiny) models: one that dies in the middle of a round of the loop, and one that judges."""

import json
import sys
from pathlib import Path

import pytest
import torch
from loop_tools import make_folder, settings
from tiny import llama

from dpo_fast.demo.questions import byte_tokenizer
from dpo_fast.loop.engines import folder_fingerprint
from dpo_fast.loop.items import read_candidates
from dpo_fast.loop.judges import run_judge
from dpo_fast.loop.rounds import run_loop
from dpo_fast.loop.serve import serving
from dpo_fast.loop.settings import GenerateSection
from dpo_fast.loop.store import LabelStore

SERVE = f"{sys.executable} {Path(__file__).parent / 'tiny_server.py'} {{model}} {{port}}"


def gone(pid):
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_of_a_round(tmp_path):
    """Requests 1 to 12 of the round's server are answered; nothing of that is asked again, and the loop goes on."""
    place, flag = make_folder(tmp_path), tmp_path / "died"
    generate = GenerateSection(
        num_generations=2, max_new_tokens=6, serve=f"{SERVE} 13 {flag}", concurrency=2, retries=1
    )
    options, part = settings(place, tmp_path, rounds=1, generate=generate), tmp_path / "loop" / "round-01.part"
    with pytest.raises(ValueError, match=r"the server ended with status 9.*run the same command again"):
        run_loop(options, str)
    assert gone(int(flag.read_text()))
    kept = (part / "candidates.jsonl").read_bytes()
    assert 4 <= kept.count(b"\n") < 11
    history = run_loop(options, str)
    assert [m["round"] for m in history] == [0, 1]
    folder = tmp_path / "loop" / "round-01"
    assert (folder / "candidates.jsonl").read_bytes().startswith(kept)
    rows = read_candidates(folder / "candidates.jsonl")
    assert len(rows) == 11
    # The samples after the round are those of its own weights.
    (mark,) = {row["model"] for row in read_candidates(folder / "samples.jsonl")}
    assert mark == folder_fingerprint(folder / "model") != rows[0]["model"]


@pytest.mark.slow
def test_transformers_serve_with_each_rounds_weights(tmp_path):
    pytest.importorskip("openai", reason="`transformers serve` imports it")
    place = make_folder(tmp_path)
    program = Path(sys.executable).parent / "transformers"
    generate = GenerateSection(
        num_generations=2,
        max_new_tokens=6,
        serve=f"{program} serve {{model}} --port {{port}} --host 127.0.0.1 --device cpu",
        extra_body={"generation_config": json.dumps({"do_sample": True, "top_k": 0})},
    )
    history = run_loop(settings(place, tmp_path, rounds=1, generate=generate), str)
    assert [m["round"] for m in history] == [0, 1]
    folder = tmp_path / "loop" / "round-01"
    assert len(read_candidates(folder / "candidates.jsonl")) == 11
    (mark,) = {row["model"] for row in read_candidates(folder / "samples.jsonl")}
    assert mark == folder_fingerprint(folder / "model")


WORTH = {"good": 2, "fair": 1, "poor": 0}
TEMPLATE = "{prompt}|{a}|{b}|"


def make_judge(folder):
    """A model that knows which word is better where the prompt begins with q, and always says A where it begins with r."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model = llama(vocab_size=259, dtype=torch.float32, num_hidden_layers=2, bos_token_id=0, eos_token_id=1)
    rows = [
        (f"{prompt}|{a}|{b}|", "A" if prompt == "r" or WORTH[a] > WORTH[b] else "B")
        for prompt in "qr"
        for a in WORTH
        for b in WORTH
        if a != b
    ]
    ids = torch.tensor([tokenizer(text + verdict + tokenizer.eos_token)["input_ids"] for text, verdict in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        logits = model(input_ids=ids[:, :-1]).logits[:, -2:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.02:
            break
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
def test_a_served_model_judges_in_both_orders(tmp_path):
    make_judge(tmp_path / "judge")
    rows = [{"id": p, "prompt": p, "completions": [{"text": text} for text in WORTH]} for p in "qr"]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (
        LabelStore(tmp_path / "l.sqlite", tmp_path / "c.jsonl") as store,
        serving(SERVE, str(tmp_path / "judge"), tmp_path / "log", timeout=120) as (url, _),
    ):
        counts = run_judge(store, f"llm:{url}#judge", name="model", template=TEMPLATE, max_tokens=4, log=str)
        labels = {label.item: label for label in store.labels()}
        assert counts.total() == len(labels) == 6
        for item in store.items():
            label = labels[item.id]
            if item.prompt == "q":
                assert label.choice == ("a" if WORTH[item.a] > WORTH[item.b] else "b")
            else:
                assert (label.choice, label.note) == ("tie", "the orders disagree: a, b")
