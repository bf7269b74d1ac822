"""From labels to training data and back: export and import."""

import json

import pytest
from label_tools import store_of

pytest.importorskip("crowdkit", reason="agreement and reliability need the extra [loop]")

from dpo_fast.data.sources import load_pairs
from dpo_fast.labels import main
from dpo_fast.loop.export import export_pairs, export_rankings, write_rows
from dpo_fast.loop.imports import import_labels, recognise
from dpo_fast.loop.items import make_items
from dpo_fast.loop.store import LabelStore

store = store_of(("ann", "bob", "cleo"), completions=3)


def quiet(_):
    pass


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
