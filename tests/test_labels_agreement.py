"""What labels of several people say: soft labels, agreement, and who stands out."""

import random
from collections import Counter, defaultdict

import pytest

pytest.importorskip("crowdkit", reason="agreement and reliability need the extra [loop]")

from dpo_fast.loop.aggregate import posteriors
from dpo_fast.loop.agreement import agreement, report
from dpo_fast.loop.label_file import Label

SKILL = {"good 1": 0.9, "good 2": 0.9, "good 3": 0.85, "noisy": 0.6, "adversary": 0.1}


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
