"""How far annotators agree with each other and with gold questions, and sentences on what stands out."""

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import median

from .label_file import Label

# A position bias is reported where a fair coin would give such a share of lefts with a chance below this.
UNLIKELY = 0.01


@dataclasses.dataclass(frozen=True)
class AnnotatorRow:
    """The work of one annotator. Shares are None where there is nothing to take a share of."""

    name: str
    kind: str
    labels: int
    skips: int
    seconds: float | None  # median per label
    agreement: float | None  # share of equal labels among all comparisons with another annotator's label
    gold: float | None  # share of gold questions answered right
    gold_labels: int
    left: float | None  # share of left among the labels that say left or right
    left_p: float | None  # chance that a fair coin gives a share at least as far from one half
    ties: float | None  # share of ties and of "both bad"


@dataclasses.dataclass(frozen=True)
class Agreement:
    """`alpha` is Krippendorff's (nominal; a, b, tie, bad), or None where undefined; `pairwise` maps names to (share, items)."""

    alpha: float | None
    annotators: list[AnnotatorRow]
    pairwise: dict[tuple[str, str], tuple[float, int]]


def agreement(labels: Sequence[Label], gold: Sequence[Label], kinds: dict[str, str]) -> Agreement:
    """Agreement on `labels`. `gold` are labels of gold questions, whose right answer is "a"; `kinds` maps names to kinds."""
    given = [label for label in labels if label.choice != "skip"]
    pairwise = _pairwise(given)
    rows = []
    for name, kind in kinds.items():
        mine = [label for label in given if label.annotator == name]
        tests = [label for label in gold if label.annotator == name and label.choice != "skip"]
        seconds = [label.seconds for label in mine if label.seconds is not None]
        sided = [label for label in mine + tests if label.choice in "ab" and label.shown_left]
        lefts = sum(label.choice == label.shown_left for label in sided)
        compared = [(share * n, n) for names, (share, n) in pairwise.items() if name in names]
        rows.append(
            AnnotatorRow(
                name=name,
                kind=kind,
                labels=len(mine),
                skips=sum(label.annotator == name and label.choice == "skip" for label in labels),
                seconds=median(seconds) if seconds else None,
                agreement=_share(sum(equal for equal, _ in compared), sum(n for _, n in compared)),
                gold=_share(sum(label.choice == "a" for label in tests), len(tests)),
                gold_labels=len(tests),
                left=_share(lefts, len(sided)),
                left_p=_fair_coin(lefts, len(sided)),
                ties=_share(sum(label.choice in ("tie", "bad") for label in mine), len(mine)),
            )
        )
    return Agreement(_alpha(given), rows, pairwise)


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _fair_coin(lefts: int, count: int) -> float | None:
    if not count:
        return None
    from scipy.stats import binomtest

    return float(binomtest(lefts, count).pvalue)


def _alpha(given: Sequence[Label]) -> float | None:
    """Krippendorff's alpha, or None where it is undefined: no item has two labels, or all labels on such items are equal."""
    per_item = Counter(label.item for label in given)
    shared = [label for label in given if per_item[label.item] > 1]
    if len({label.choice for label in shared}) < 2:
        return None
    import pandas
    from crowdkit.metrics.data import alpha_krippendorff

    rows = [(label.item, label.annotator, label.choice) for label in shared]
    return alpha_krippendorff(pandas.DataFrame(rows, columns=["task", "worker", "label"]))


def _pairwise(given: Sequence[Label]) -> dict[tuple[str, str], tuple[float, int]]:
    by_item = defaultdict(list)
    for label in given:
        by_item[label.item].append((label.annotator, label.choice))
    equal, together = Counter(), Counter()
    for choices in by_item.values():
        for (one, first), (other, second) in itertools.combinations(sorted(choices), 2):
            together[one, other] += 1
            equal[one, other] += first == second
    return {names: (equal[names] / n, n) for names, n in sorted(together.items())}


def report(found: Agreement) -> str:
    """The tables as text, with sentences below them on what needs a look."""
    alpha = "not defined" if found.alpha is None else f"{found.alpha:.3f}"
    lines = [f"Krippendorff's alpha {alpha} (nominal: a, b, tie, bad)", ""]
    header = ("annotator", "kind", "labels", "skips", "s/label", "agrees", "gold", "left", "ties")
    rows = [
        (
            row.name, row.kind, str(row.labels), str(row.skips), "-" if row.seconds is None else f"{row.seconds:.1f}",
            _percent(row.agreement), _percent(row.gold), _percent(row.left), _percent(row.ties),
        )
        for row in found.annotators
    ]  # fmt: skip
    lines += table(header, rows)
    if found.pairwise:
        rows = [(*names, _percent(share), str(n)) for names, (share, n) in found.pairwise.items()]
        lines += ["", *table(("annotator", "and", "agree", "pairs"), rows)]
    notes = warnings(found)
    return "\n".join(lines + (["", *notes] if notes else []))


def warnings(found: Agreement) -> list[str]:
    """One sentence for each thing that stands out, with what to do about it."""
    notes = []
    if found.alpha is None and any(row.labels for row in found.annotators):
        notes.append(
            "alpha is not defined: no pair has labels of two annotators, or all those labels are equal. "
            "Ask for more labels per pair (--labels_per_pair) to know how far people agree."
        )
    for row in found.annotators:
        if row.left_p is not None and row.left_p < UNLIKELY:
            notes.append(f"{row.name} chose the left side in {row.left:.0%} of the labels: a position bias.")
        if row.gold is not None and row.gold_labels >= 4 and row.gold <= 0.5:
            notes.append(
                f"{row.name} has {row.gold:.0%} of {row.gold_labels} gold questions right: look at the guidelines."
            )
        if row.agreement is not None and row.agreement < 0.4 and row.labels >= 10:
            notes.append(
                f"{row.name} agrees with the others in {row.agreement:.0%} of the cases, less than chance would: "
                "were the keys or the question misunderstood?"
            )
    return notes


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; its first column is flush left, the others are flush right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
