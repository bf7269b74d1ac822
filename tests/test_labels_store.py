"""The labels file: what may be labelled, by whom, and that nothing saved is lost."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from label_tools import candidates, store_of

from dpo_fast.loop import store as store_module
from dpo_fast.loop.items import fingerprint, in_rounds, make_items, read_candidates
from dpo_fast.loop.store import LabelStore

store = store_of(("ann", "bob", "cleo"))


def test_items_are_the_pairs_that_can_be_trained_on():
    texts = ["yes", "", "no", "yes", "  \n"]
    row = {"id": "p", "prompt": "q", "split": "train", "completions": [{"text": t} for t in texts]}
    assert {(item.a, item.b) for item in make_items([row])} == {("yes", "no"), ("no", "yes")}
    with pytest.raises(ValueError, match="two completions that differ"):
        make_items([row | {"completions": [{"text": "yes"}, {"text": "yes"}]}])


def test_order_is_one_pair_per_prompt_before_a_second_one(tmp_path):
    rows = read_candidates(candidates(tmp_path / "c.jsonl", prompts=5, completions=3))
    ordered = in_rounds(make_items(rows), lambda item: {"p3": -1.0}.get(item.prompt_id, 0.0))
    for start in (0, 5, 10):
        assert {item.prompt_id for item in ordered[start : start + 5]} == {f"p{i}" for i in range(5)}
        assert ordered[start].prompt_id == "p3"
    assert [i.id for i in in_rounds(make_items(rows[::-1]))] == [i.id for i in in_rounds(make_items(rows))]


def test_a_labels_file_knows_its_candidates(tmp_path, store):
    first, other = tmp_path / "c.jsonl", candidates(tmp_path / "other.jsonl", prompts=5)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(reversed(first.read_text().splitlines(keepends=True))))
    LabelStore(store.path, shuffled).close()
    with pytest.raises(ValueError, match="labels of other candidates"):
        LabelStore(store.path, other)
    changed = read_candidates(first)
    changed[0]["split"] = "heldout"
    assert fingerprint(changed) != fingerprint(read_candidates(first))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"prompt": "q", "completions": [{"te', "line 1 .* cut"),
        ('{"prompt": "q", "completions": [{"text": 3}]}\n', "line 1 .*'completions'"),
        ('{"prompt": "q", "completions": []}\n{"prompt": "q", "completions": []}\n', "line 2 has the prompt of line 1"),
        ('{"prompt": [{"role": "user"}], "completions": []}\n', "'prompt'"),
        ("[1]\n", "an object"),
        ("\n", "holds no candidates"),
        ('{"prompt": "q", "split": "dev", "completions": []}\n', "'split'"),
    ],
)
def test_a_bad_candidates_file_is_named_and_makes_no_labels_file(tmp_path, text, match):
    path = tmp_path / "c.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        LabelStore(tmp_path / "labels.sqlite", path)
    assert not (tmp_path / "labels.sqlite").exists()


def test_what_is_no_labels_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such labels file"):
        LabelStore(tmp_path / "none.sqlite")
    (tmp_path / "text").write_text("hello" * 100)
    with pytest.raises(ValueError, match="is no labels file"):
        LabelStore(tmp_path / "text")


def test_a_label_is_there_once(store):
    key = store.items()[0].id
    store.add_label("ann", key, "a", seconds=2.0, shown_left="b")
    with pytest.raises(ValueError, match="has labelled pair"):
        store.add_label("ann", key, "b")
    for annotator, item, choice in (("ann", key, "left"), ("dan", key, "a"), ("bob", "x", "a")):
        with pytest.raises(ValueError, match=r"is one of|has no"):
            store.add_label(annotator, item, choice)
    (label,) = store.labels()
    assert (label.item, label.annotator, label.choice, label.seconds, label.shown_left) == (key, "ann", "a", 2.0, "b")
    with pytest.raises(ValueError, match="is a person"):
        store.add_annotator("ann", "judge")


def test_left_and_right_are_what_was_shown(store):
    lefts = Counter()
    for choice in ("left", "right") * 2:
        showing = store.show("ann")
        lefts[showing.shown_left] += 1
        store.label_showing("ann", showing.token, choice)
        label = store.labels()[-1]
        assert (label.choice == label.shown_left) == (choice == "left")
        assert label.shown_left == showing.shown_left
    assert store.show("ann") is None


def test_sides_are_drawn_at_each_showing(store):
    assert {store.show("ann").shown_left for _ in range(40)} == {"a", "b"}
    assert len({store.show("ann").item.id for _ in range(5)}) == 1


def test_two_people_never_have_one_pair_at_once(store):
    first, second = store.show("ann", labels_per_pair=2), store.show("bob", labels_per_pair=2)
    assert first.item.id != second.item.id
    assert store.show("cleo", labels_per_pair=2, overlap=True).item.id in (first.item.id, second.item.id)


def test_each_pair_gets_its_labels_and_no_more(store):
    for name in ("ann", "bob", "cleo") * 8:
        showing = store.show(name, labels_per_pair=2)
        if showing:
            store.label_showing(name, showing.token, "left")
    assert Counter(Counter(x.item for x in store.labels()).values()) == {2: 4}
    assert store.counts(2) == {"items": 4, "labels": 8, "wanted": 8, "done": 8}


def test_a_skip_is_no_label_and_does_not_come_back(store):
    showing = store.show("ann")
    store.label_showing("ann", showing.token, "skip")
    assert store.counts()["done"] == 0
    assert showing.item.id not in {store.show("ann").item.id for _ in range(3)}
    assert showing.item.id in {store.show("bob").item.id}


def test_nobody_is_waited_for_who_skipped(store):
    assert store.waiting(["ann", "bob"]) == 4
    store.label_showing("ann", store.show("ann").token, "skip")
    assert (store.waiting(["ann"]), store.waiting(["ann", "bob"])) == (3, 4)
    store.label_showing("bob", store.show("bob").token, "skip")
    assert store.waiting(["ann", "bob"]) == 3  # both skipped the same one
    while showing := store.show("ann"):
        store.label_showing("ann", showing.token, "left")
    assert store.waiting(["ann", "bob"]) == 0
    assert (store.waiting(["ann"], 2), store.waiting(["ann", "bob"], 2)) == (0, 3)
    assert store.waiting(["ann", "bob"], 2, limit=2) == 1


def test_a_pair_left_open_is_given_to_another(store, monkeypatch):
    left_open = store.show("ann")
    monkeypatch.setattr(store_module, "SHOWN_SECONDS", -1)
    assert store.show("bob").item.id == left_open.item.id


def test_a_link_in_two_windows_saves_one_label(store):
    first = store.show("ann")
    second = store.show("ann")
    assert first.item.id == second.item.id
    with pytest.raises(ValueError, match="another window"):
        store.label_showing("ann", first.token, "left")
    store.label_showing("ann", second.token, "left")
    with pytest.raises(ValueError, match="came twice"):
        store.label_showing("ann", second.token, "left")
    assert len(store.labels()) == 1


def test_undo_brings_the_pair_back(store):
    assert store.undo("ann") is None
    done = []
    for _ in range(2):
        showing = store.show("ann")
        store.label_showing("ann", showing.token, "tie")
        done.append(showing.item.id)
    store.show("ann")
    assert store.undo("ann") == done[1]
    assert store.show("ann").item.id == done[1]
    assert [label.item for label in store.labels()] == done[:1]


def test_held_out_prompts_are_not_shown(tmp_path):
    path = candidates(tmp_path / "c.jsonl", split="heldout")
    with LabelStore(tmp_path / "l.sqlite", path) as store:
        store.add_annotator("ann")
        assert store.show("ann") is None
        assert len(store.items("heldout")) == 4
        assert store.counts()["items"] == 0


def test_gold_questions_are_mixed_in_and_kept_apart(tmp_path):
    from dpo_fast.loop.items import read_gold

    gold = tmp_path / "gold.jsonl"
    rows = [{"prompt": f"gold {i}", "chosen": "good", "rejected": "bad"} for i in range(3)]
    gold.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with LabelStore(tmp_path / "l.sqlite", candidates(tmp_path / "c.jsonl", prompts=20)) as store:
        store.add_annotator("ann")
        store.add_gold(read_gold(str(gold)))
        store.add_gold(read_gold(str(gold)))
        seen = []
        while showing := store.show("ann", gold_every=5):
            store.label_showing("ann", showing.token, "left")
            seen.append(showing.item.gold)
        assert (seen.count("a"), len(seen)) == (3, 23)
        assert [i for i, g in enumerate(seen) if g] == [2, 7, 12]
        assert (len(store.labels()), len(store.labels(gold=True)), len(store.items())) == (20, 3, 20)


def test_several_writers_lose_nothing(tmp_path):
    path = candidates(tmp_path / "c.jsonl", prompts=30)
    LabelStore(tmp_path / "l.sqlite", path).close()

    def work(name):
        with LabelStore(tmp_path / "l.sqlite", path) as store:
            store.add_annotator(name)
            while showing := store.show(name, labels_per_pair=2):
                store.label_showing(name, showing.token, "left")

    threads = [threading.Thread(target=work, args=[f"person {i}"]) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with LabelStore(tmp_path / "l.sqlite") as store:
        # At the end a pair may be before one person while another looks for work and leaves.
        assert 57 <= store.counts(2)["done"] <= 60
        assert max(Counter(x.item for x in store.labels()).values()) <= 2


_WRITER = """
import sys
from dpo_fast.loop.store import LabelStore
store = LabelStore(sys.argv[1])
store.add_annotator("ann")
while showing := store.show("ann"):
    store.label_showing("ann", showing.token, "left")
    print(showing.item.id, flush=True)
"""


def test_kill_9_loses_nothing_that_was_saved(tmp_path):
    LabelStore(tmp_path / "l.sqlite", candidates(tmp_path / "c.jsonl", prompts=2000)).close()
    command = [sys.executable, "-c", _WRITER, str(tmp_path / "l.sqlite")]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    said = [writer.stdout.readline().strip() for _ in range(25)]
    os.kill(writer.pid, signal.SIGKILL)
    said += writer.stdout.read().split()
    writer.wait()
    with LabelStore(tmp_path / "l.sqlite") as store:
        assert set(said) <= {label.item for label in store.labels()}
        assert len(said) >= 25
