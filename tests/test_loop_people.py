"""People in whole rounds of the loop, who label through the page's requests; which pairs they get, and gold questions."""

import json
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="the page needs the extra [loop]")

from loop_tools import make_folder, settings, vowels
from test_annotate import ask

from dpo_fast.loop.command import run_command
from dpo_fast.loop.judges import pair_row
from dpo_fast.loop.rounds import round_folder, run_loop
from dpo_fast.loop.scoring import implicit_margins, load_policy
from dpo_fast.loop.settings import AnnotateSection
from dpo_fast.loop.store import LabelStore


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("people"))
    rows = [{"prompt": f"gold {i}", "chosen": "good", "rejected": "bad"} for i in range(2)]
    (folder / "gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Running:
    """A loop in a thread; `links()` waits for the two links of its next round, None when it is over."""

    def __init__(self, options):
        self.said, self.result = [], None
        self.thread = threading.Thread(target=self.work, args=[options], daemon=True)
        self.thread.start()

    def work(self, options):
        try:
            self.result = run_loop(options, self.said.append)
        except Exception as error:
            self.result = error

    def links(self):
        end = time.monotonic() + 120
        while time.monotonic() < end:
            found = dict(text.split(": ") for text in self.said if text.startswith(("ann: ", "bob: ")))
            if len(found) == 2 and any("goes on when" in text for text in self.said):
                self.said.clear()
                return found
            if not self.thread.is_alive():
                return None
            time.sleep(0.05)
        raise TimeoutError("no links")


def answer(state):
    """What a person with the taste of `vowels` presses, who knows the gold questions."""
    left, right = (state[side]["text"] for side in ("left", "right"))
    if "good" in (left, right):
        return "left" if left == "good" else "right"
    return "left" if vowels("", left) > vowels("", right) else "right"


def label_all(links):
    """ann skips her first pair, which bob gets; both label until nothing is left."""
    choice, open_ = {"ann": "skip"}, dict(links)
    while open_:
        for name, link in list(open_.items()):
            state = json.loads(ask(f"{link}/next")[2])
            if state["done"]:
                del open_[name]
                continue
            gold = "good" in (state["left"]["text"], state["right"]["text"])
            pressed = answer(state) if gold else choice.pop(name, None) or answer(state)
            assert ask(f"{link}/label", {"token": state["token"], "choice": pressed})[0] == 200


@pytest.mark.parametrize(("judge", "rounds"), [pytest.param(vowels, 2, marks=pytest.mark.slow), (None, 1)])
def test_the_loop_waits_for_people_and_goes_on(place, tmp_path, judge, rounds):
    annotate = AnnotateSection(
        judge=judge, annotators=["ann", "bob"], max_pairs=5, select="margin", port=0, gold_every=2,
        gold=str(place / "gold.jsonl"),
    )  # fmt: skip
    options = settings(place, tmp_path, rounds=rounds, annotate=annotate)
    running = Running(options)
    for number in range(1, rounds + 1):
        links = running.links()
        assert links is not None, running.result
        part = tmp_path / "loop" / f"round-{number:02d}.part"
        assert not (part / "training_pairs.jsonl").exists()
        label_all(links)
    running.thread.join(timeout=120)
    assert [m["round"] for m in running.result] == list(range(rounds + 1)), running.result
    for number in range(1, rounds + 1):
        folder = round_folder(options, number)
        with LabelStore(folder / "labels.sqlite") as store:
            items, labels = store.items("train")[:5], store.labels("train")
            assert {x.annotator for x in labels} == {"ann", "bob"}
            assert {x.item for x in labels if x.choice != "skip"} == {item.id for item in items}
            assert [x.choice for x in labels].count("skip") == 1
            assert {x.choice for x in store.labels(gold=True)} == {"a"}
            assert {x.annotator for x in store.labels("heldout")} == ({"vowels"} if judge else set())
        rows = [json.loads(line) for line in (folder / "training_pairs.jsonl").read_text().splitlines()]
        assert {row["id"] for row in rows} <= {item.id for item in items}
        assert all(vowels("", row["chosen"]) >= vowels("", row["rejected"]) for row in rows)
    assert (running.result[1]["win_start"] is None) == (judge is None)
    if rounds == 2:  # the second round's pairs are those of the smallest margin, one per prompt
        policy = load_policy(f"{round_folder(options, 1) / 'model'}#{place / 'model'}")
        margins = implicit_margins(*policy, [pair_row(item) for item in items]).abs()
        assert margins.diff().min() >= 0
        with LabelStore(round_folder(options, 2) / "labels.sqlite") as store:
            first = implicit_margins(*policy, [pair_row(item) for item in store.items("train")[:7]]).abs()
        assert first.diff().min() >= 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotators": "ann"}, "annotators must be a list of names, found 'ann'"),
        ({"annotators": ["ann", "ann"]}, "a name comes twice in annotators"),
        ({"annotators": ["ann"], "labels_per_pair": 2}, "labels_per_pair=2 needs that many annotators, 1 are named"),
        ({"annotators": ["ann"], "select": "disagreement"}, "select='disagreement' is not one of random, margin"),
        ({"annotators": ["ann"], "max_pairs": 0}, "max_pairs must be a whole number of at least 1, found 0"),
        ({"judge": vowels, "gold": "gold.jsonl"}, "gold and guidelines have no effect without annotators"),
    ],
)
def test_sections_that_cannot_work(place, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        settings(place, tmp_path, annotate=AnnotateSection(**change))


@pytest.mark.parametrize("name", ["gold", "guidelines", "judge_template"])
def test_a_file_that_is_not_there_is_named_before_anything_is_sampled(place, tmp_path, name):
    annotate = AnnotateSection(judge=vowels, annotators=["ann"], **{name: "none.jsonl"})
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        run_loop(settings(place, tmp_path, annotate=annotate), str)
    assert not (tmp_path / "loop").exists()


def test_a_template_for_a_judge_that_takes_none(place, tmp_path):
    (tmp_path / "template.txt").write_text("{prompt} {a} {b}")
    annotate = AnnotateSection(judge=vowels, judge_template=str(tmp_path / "template.txt"))
    with pytest.raises(ValueError, match="template has no effect"):
        run_loop(settings(place, tmp_path, annotate=annotate), str)


def test_ctrl_c_is_no_traceback(capsys):
    def stopped(argv):
        raise KeyboardInterrupt

    assert run_command(stopped, []) == 130
    assert capsys.readouterr().err == "dpo_fast: interrupted; the same command goes on where it was\n"
