"""From labels to training data and back: soft labels, agreement, export, import."""

import json
import random
from collections import Counter, defaultdict

import pytest
from test_labels_store import candidates

pytest.importorskip("crowdkit", reason="agreement and reliability need the extra [loop]")

from dpo_fast.data.sources import load_pairs
from dpo_fast.labels import main
from dpo_fast.loop.aggregate import posteriors
from dpo_fast.loop.agreement import agreement, report
from dpo_fast.loop.export import export_pairs, export_rankings, write_rows
from dpo_fast.loop.imports import import_labels, recognise
from dpo_fast.loop.items import make_items
from dpo_fast.loop.label_file import Label
from dpo_fast.loop.store import LabelStore

SKILL = {"good 1": 0.9, "good 2": 0.9, "good 3": 0.85, "noisy": 0.6, "adversary": 0.1}


def quiet(_):
    pass


def label(item, who, choice, left=None, seconds=None):
    return Label(str(item), who, choice, seconds, left, None, 0.0)


def simulated(count, seed=0, votes=3):
    """Labels, and the true better side of each item."""
    rng, labels, truth = random.Random(seed), [], {}
    for i in range(count):
        truth[str(i)] = rng.choice("ab")
        for who in rng.sample(list(SKILL), votes):
            right = rng.random() < SKILL[who]
            labels.append(label(i, who, truth[str(i)] if right else {"a": "b", "b": "a"}[truth[str(i)]]))
    return labels, truth


def test_dawid_skene_finds_the_adversary_where_a_majority_cannot():
    labels, truth = simulated(400)
    right = {
        method: sum((p > 0.5) == (truth[item] == "a") for item, p in posteriors(labels, method).items()) / 400
        for method in ("majority", "dawid_skene")
    }
    assert right["dawid_skene"] > 0.88 > 0.8 > right["majority"]


def test_a_majority_is_the_share_of_votes():
    labels = [label(1, "x", "a"), label(1, "y", "a"), label(1, "z", "b"), label(2, "x", "tie"), label(3, "x", "bad")]
    labels += [label(4, "x", "a"), label(4, "y", "tie"), label(5, "x", "skip")]
    got = posteriors(labels, "majority")
    assert got == pytest.approx({"1": 2 / 3, "2": 0.5, "3": 0.5, "4": 0.75})


@pytest.mark.parametrize("method", ["majority", "dawid_skene"])
def test_which_completion_is_called_a_means_nothing(method):
    labels, _ = simulated(60)
    labels += [label(70, "good 1", "tie"), label(70, "noisy", "a")]
    turned = [label(x.item, x.annotator, {"a": "b", "b": "a"}.get(x.choice, x.choice)) for x in labels]
    there, back = posteriors(labels, method), posteriors(turned, method)
    assert {item: 1 - p for item, p in back.items()} == pytest.approx(there, abs=1e-6)


def test_labels_that_are_all_equal_all_ties_or_none():
    for method in ("majority", "dawid_skene"):
        assert min(posteriors([label(i, "x", "b") for i in range(5)], method).values()) < 1e-6
        assert set(posteriors([label(i, "x", "tie") for i in range(5)], method).values()) == {0.5}
        with pytest.raises(ValueError, match="there is no label yet"):
            posteriors([label(1, "x", "skip")], method)
    with pytest.raises(ValueError, match="is not one of"):
        posteriors([label(1, "x", "a")], "vote")


@pytest.mark.parametrize("names", [("x",), ("x", "y", "z")])
def test_with_one_label_per_pair_there_is_nothing_to_model(names):
    """Whoever gave it: nobody can be compared with anybody, so each label is believed and a tie stays a tie."""
    choices = "aabbbatb"
    labels = [label(i, names[i % len(names)], {"t": "tie"}.get(c, c)) for i, c in enumerate(choices)]
    wanted = {str(i): {"a": 1.0, "b": 0.0, "t": 0.5}[c] for i, c in enumerate(choices)}
    for method in ("majority", "dawid_skene"):
        assert posteriors(labels, method) == pytest.approx(wanted, abs=1e-6)


def krippendorff(labels):
    """Nominal alpha from the coincidence matrix, written out (Krippendorff 2011, section C)."""
    units = defaultdict(list)
    for x in labels:
        units[x.item].append(x.choice)
    coincidences = Counter()
    for values in units.values():
        for i, c in enumerate(values):
            for j, k in enumerate(values):
                if i != j:
                    coincidences[c, k] += 1 / (len(values) - 1)
    totals = Counter()
    for (c, _), weight in coincidences.items():
        totals[c] += weight
    n = sum(totals.values())
    observed = sum(w for (c, k), w in coincidences.items() if c != k) / n
    expected = sum(totals[c] * totals[k] for c in totals for k in totals if c != k) / (n * (n - 1))
    return 1 - observed / expected


def test_alpha_is_krippendorffs_also_with_missing_labels():
    rng = random.Random(1)
    labels = []
    for i in range(40):
        for who in rng.sample("vwxyz", rng.randint(1, 4)):
            labels.append(label(i, who, rng.choice(["a", "a", "b", "tie"]) if rng.random() < 0.4 else "ab"[i % 2]))
    found = agreement(labels, [], dict.fromkeys("vwxyz", "person"))
    assert found.alpha == pytest.approx(krippendorff(labels), abs=1e-9)


def test_the_table_of_annotators_by_hand():
    labels = [
        label(1, "x", "a", "a", 2.0), label(2, "x", "b", "b", 4.0), label(3, "x", "tie", "a", 9.0), label(4, "x", "skip"),
        label(1, "y", "a", "b", 1.0), label(2, "y", "a", "b", 1.0), label(3, "y", "tie", "b", 1.0), label(2, "z", "b"),
    ]  # fmt: skip
    gold = [label("g1", "x", "a", "a"), label("g2", "x", "b", "b"), label("g1", "y", "skip")]
    found = agreement(labels, gold, {"x": "person", "y": "person", "z": "judge"})
    x, y, z = found.annotators
    assert (x.labels, x.skips, x.seconds, x.gold, x.gold_labels, x.left) == (3, 1, 4.0, 0.5, 2, 1.0)
    assert x.ties == pytest.approx(1 / 3)
    assert x.agreement == pytest.approx(3 / 4)  # with y: yes, no, yes; with z: yes
    assert (y.left, z.left, z.seconds, y.gold) == (0.0, None, None, None)
    assert found.pairwise == {("x", "y"): (pytest.approx(2 / 3), 3), ("x", "z"): (1.0, 1), ("y", "z"): (0.0, 1)}
    assert "x          person" in report(found)


def test_what_stands_out_is_said():
    labels = [label(i, "lefty", "ab"[i % 2], "ab"[i % 2]) for i in range(20)]
    labels += [label(i, "x", "ba"[i % 2], "a") for i in range(20)]
    gold = [label(f"g{i}", "x", "b", "a") for i in range(4)]
    text = report(agreement(labels, gold, {"lefty": "person", "x": "person"}))
    assert "lefty chose the left side in 100%" in text
    assert "x chose the left" not in text
    assert "x has 0% of 4 gold questions right" in text
    assert "x agrees with the others in 0%" in text
    text = report(agreement([label(i, "x", "a") for i in range(3)], [], {"x": "person"}))
    assert "alpha is not defined" in text


@pytest.fixture
def store(tmp_path):
    with LabelStore(tmp_path / "l.sqlite", candidates(tmp_path / "c.jsonl", completions=3)) as made:
        for name in ("ann", "bob", "cleo"):
            made.add_annotator(name)
        yield made


def test_export_is_what_the_trainer_reads(tmp_path, store):
    one, two, three, four, five = store.items()[:5]
    for name, choices in (("ann", "abtba"), ("bob", "abtbs"), ("cleo", "bbtxb")):
        for item, choice in zip((one, two, three, four, five), choices, strict=True):
            store.add_label(name, item.id, {"t": "tie", "s": "skip", "x": "bad"}.get(choice, choice))
    rows = export_pairs(store, method="majority", log=quiet)
    assert [row["id"] for row in rows] == [one.id, two.id, four.id]
    assert [row["p_chosen"] for row in rows] == pytest.approx([2 / 3, 1.0, 5 / 6])
    assert (rows[0]["chosen"], rows[1]["chosen"]) == (one.a, two.b)
    assert (rows[0]["n_labels"], rows[0]["annotators"]) == (3, ["ann", "bob", "cleo"])
    rows = export_pairs(store, method="majority", annotators=["bob"], min_p=1.0, log=quiet)
    assert [row["n_labels"] for row in rows] == [1, 1, 1]
    write_rows(tmp_path / "out.jsonl", rows)
    read = load_pairs(str(tmp_path / "out.jsonl"), log=quiet).rows
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in read] == [
        (r["prompt"], r["chosen"], r["rejected"]) for r in rows
    ]
    with pytest.raises(ValueError, match="has no annotator dan"):
        export_pairs(store, annotators=["dan"], log=quiet)
    with pytest.raises(ValueError, match="min_p"):
        export_pairs(store, min_p=0.2, log=quiet)
    with pytest.raises(ValueError, match="there is no label yet"):
        export_pairs(store, split="heldout", log=quiet)


def test_ties_and_bad_pairs_alone_are_no_training_data(store):
    one, two = store.items()[:2]
    store.add_label("ann", one.id, "tie")
    store.add_label("ann", two.id, "bad")
    for method in ("majority", "dawid_skene"):
        with pytest.raises(ValueError, match="of 2 labelled pairs 1 are undecided and 1 bad"):
            export_pairs(store, method=method, log=quiet)


def test_messages_stay_messages_and_rankings_are_read(tmp_path):
    prompt = [{"role": "user", "content": "hello"}]
    row = {"id": "p", "prompt": prompt, "completions": [{"text": t} for t in ("worst", "best", "middle")]}
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    order = {"worst": 0, "middle": 1, "best": 2}
    with LabelStore(tmp_path / "l.sqlite", tmp_path / "c.jsonl") as store:
        store.add_annotator("ann")
        for item in store.items():
            store.add_label("ann", item.id, "a" if order[item.a] > order[item.b] else "b")
        rows, ranking = export_pairs(store, log=quiet), export_rankings(store)
    assert all(order[r["chosen"][0]["content"]] > order[r["rejected"][0]["content"]] for r in rows)
    write_rows(tmp_path / "r.jsonl", ranking)
    read = load_pairs(str(tmp_path / "r.jsonl"), log=quiet).rows
    assert len(read) == 3
    assert all(order[r["chosen"][0]["content"]] > order[r["rejected"][0]["content"]] for r in read)


ARGILLA = {
    "fields": {"prompt": "q", "response_1": "one", "response_2": "two", "response_3": "three"},
    "responses": {
        "preference": [
            {"value": ["response_2", "response_1", "response_3"], "user_id": "u1"},
            {"value": [{"value": "response_1", "rank": 1}, {"value": "response_2", "rank": 1},
                       {"value": "response_3", "rank": 2}], "user_id": "u2"},
        ],
        "comment": [{"value": "nice", "user_id": "u1"}],
    },
}  # fmt: skip
ARGILLA_1 = {
    "fields": {"prompt": "q", "first": "one", "second": "two"},
    "responses": [
        {"user_id": "u1", "status": "submitted", "values": {"best": {"value": "second"}}},
        {"user_id": "u2", "status": "discarded", "values": {"best": {"value": "first"}}},
    ],
}
# As Record.to_dict and to_list(flatten=True) of argilla 2.8 make it: columns of the record and metadata beside the fields.
ARGILLA_FLAT = {
    "id": "r1", "status": "completed", "_server_id": "s1", "model": "m", "prompt": "q", "response-1": "one",
    "response-2": "two", "preference.responses": ["1", "tie", "2", "2"], "comment.responses": None,
    "preference.responses.users": ["u1", "u2", "u3", "u4"],
    "preference.responses.status": ["submitted", "submitted", "discarded", "draft"], "preference.suggestion": "2",
}  # fmt: skip
LABEL_STUDIO = {
    "data": {"prompt": "q", "answer1": "one", "answer2": "two"},
    "annotations": [
        {"completed_by": 7, "lead_time": 3.5,
         "result": [{"type": "pairwise", "to_name": "answer2,answer1", "value": {"selected": "left"}}]},
        {"completed_by": 9, "result": [{"type": "pairwise", "value": {"selected": "none"}}]},
        {"completed_by": {"email": "x@y"}, "result": [{"type": "pairwise", "value": {"selected": "left"}}]},
        {"completed_by": 8, "was_cancelled": True, "result": [{"type": "pairwise", "value": {"selected": "left"}}]},
    ],
}  # fmt: skip


# As the editor makes it (Pairwise.jsx): the tag's own name in to_name; other texts may lie in the task's data.
LABEL_STUDIO_TAG = {
    "id": 1, "project": 83, "data": {"source": "web", "question": "q", "text1": "one", "text2": "two"},
    "annotations": [
        {"id": 5, "completed_by": 7, "was_cancelled": False, "ground_truth": False, "lead_time": 4.3, "task": 1,
         "result": [{"id": "Dx", "from_name": "pw", "to_name": "pw", "type": "pairwise", "origin": "manual",
                     "value": {"selected": "right"}},
                    {"id": "Dy", "from_name": "why", "to_name": "text1", "type": "textarea", "value": {"text": ["x"]}}]},
    ],
    "predictions": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("record", "layout", "wanted"),
    [
        (ARGILLA, "argilla", {("u1", "two", "one"), ("u1", "two", "three"), ("u1", "one", "three"), ("u2", "tie", "one"),
                              ("u2", "one", "three"), ("u2", "two", "three")}),
        (ARGILLA_1, "argilla", {("u1", "two", "one")}),
        (ARGILLA_FLAT, "argilla", {("u1", "one", "two"), ("u2", "tie", "one")}),
        (LABEL_STUDIO, "label_studio", {("7", "two", "one"), ("x@y", "one", "two")}),
        (LABEL_STUDIO_TAG, "label_studio", {("7", "two", "one")}),
        ({"prompt": "q", "chosen": "two", "rejected": "one"}, "pairs", {("imported", "two", "one")}),
        ({"prompt": "q", "completions": ["one", "two"], "ranks": [1, 0]}, "pairs", {("imported", "two", "one")}),
    ],
)  # fmt: skip
def test_labels_given_elsewhere_are_read(tmp_path, record, layout, wanted):
    path = tmp_path / "in.json"
    path.write_text(json.dumps([record]))
    assert recognise(str(path)) == layout
    assert import_labels(str(path), str(tmp_path / "l.sqlite"), log=quiet) == len(wanted)
    with LabelStore(tmp_path / "l.sqlite") as store:
        got = set()
        for x in store.labels():
            item = store.item(x.item)
            texts = {"a": (item.a, item.b), "b": (item.b, item.a), "tie": ("tie", "one")}[x.choice]
            got.add((x.annotator, *texts))
        assert got == wanted
    assert import_labels(str(path), str(tmp_path / "l.sqlite"), log=quiet) == 0


def test_what_cannot_be_imported(tmp_path):
    path, labels = tmp_path / "in.jsonl", str(tmp_path / "l.sqlite")
    path.write_text(json.dumps({"prompt": "q", "chosen": "two", "rejected": "one"}) + "\n")
    import_labels(str(path), labels, log=quiet)
    path.write_text(json.dumps({"prompt": "q", "chosen": "three", "rejected": "one"}) + "\n")
    with pytest.raises(ValueError, match="1 of 1 votes"):
        import_labels(str(path), labels, log=quiet)
    path.write_text(json.dumps(LABEL_STUDIO | {"annotations": []}) + "\n")
    with pytest.raises(ValueError, match="holds no vote"):
        import_labels(str(path), labels, log=quiet)
    unnumbered = {"data": {"prompt": "q", "first": "x", "second": "y", "source": "web"}}
    path.write_text(json.dumps(LABEL_STUDIO_TAG | unnumbered))
    with pytest.raises(ValueError, match="which two of first, second, source were compared"):
        import_labels(str(path), str(tmp_path / "new.sqlite"), log=quiet)
    with pytest.raises(ValueError, match="without the text third: its texts are first, second, source"):
        import_labels(str(path), str(tmp_path / "new.sqlite"), completions=["third"], log=quiet)
    assert import_labels(str(path), str(tmp_path / "new.sqlite"), completions=["first", "second"], log=quiet) == 1
    path.write_text('{"fields": ')
    with pytest.raises(ValueError, match="neither JSON"):
        import_labels(str(path), labels, log=quiet)
    assert (
        len(make_items([{"id": "p", "prompt": "q", "split": "train", "completions": [{"text": "a"}, {"text": "b"}]}]))
        == 1
    )


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys, store):
    labels = str(store.path)
    for argv, said in (
        (["agreement", "--labels", labels], "holds no label yet"),
        (["export", str(tmp_path / "o.jsonl"), "--labels", labels], "there is no label yet"),
        (["agreement", "--labels", "none.sqlite"], "no such labels file"),
        (["import", "none.jsonl", "--labels", labels], "none.jsonl"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert not (tmp_path / "o.jsonl").exists()
    store.add_label("ann", store.items()[0].id, "a")
    assert main(["export", str(tmp_path / "o.jsonl"), "--labels", labels]) == 0
    assert main(["agreement", "--labels", labels]) == 0
    assert "ann" in capsys.readouterr().out
