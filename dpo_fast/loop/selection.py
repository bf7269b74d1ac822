"""The order in which pairs are labelled. In every order each prompt gives one pair before any gives a second (items.py)."""

from collections import Counter, defaultdict

from .judges import pair_row
from .store import LabelStore

SELECTIONS = ("random", "margin", "disagreement")


def select(store: LabelStore, how: str = "random", *, policy: str | None = None, seed: int = 0) -> None:
    """Put the items of a labels file in the order in which they are to be labelled.

    how     "random"; "margin", which puts first the pairs with a small implicit margin, of which the current policy knows
            least (arXiv 2406.17312); "disagreement", which puts first the pairs on which annotators differ so far
    policy  RUN or RUN#REFERENCE, as in the judge `implicit:RUN`; only for "margin"

    Raises ValueError for an unknown order, a missing policy, and a policy that has no effect.
    """
    if how not in SELECTIONS:
        raise ValueError(f"select={how!r} is not one of {', '.join(SELECTIONS)}")
    if (how == "margin") != (policy is not None):
        needs = "needs a policy" if policy is None else f"makes no use of policy={policy}: leave it out"
        raise ValueError(f"select={how} {needs}")
    if how == "margin":
        from .scoring import implicit_margins, load_policy

        items = store.items("train")
        found = implicit_margins(*load_policy(policy), [pair_row(item) for item in items]).abs().tolist()
        margins = {item.id: margin for item, margin in zip(items, found, strict=True)}
        store.order(lambda item: margins.get(item.id, 0.0), seed)
    elif how == "disagreement":
        choices = defaultdict(Counter)
        for label in store.labels():
            if label.choice != "skip":
                choices[label.item][label.choice] += 1
        split = {key: max(counts.values()) / counts.total() for key, counts in choices.items()}
        store.order(lambda item: split.get(item.id, 1.0), seed)
    else:
        store.order(lambda item: 0.0, seed)
