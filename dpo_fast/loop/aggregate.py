"""Several labels per pair become one probability that `a` is better, by crowd-kit: Dawid-Skene or the share of votes."""

from collections.abc import Sequence

from .label_file import SIDES, Label

METHODS = ("dawid_skene", "majority")


def posteriors(labels: Sequence[Label], method: str = "dawid_skene") -> dict[str, float]:
    """Item id -> probability that `a` is better than `b`, for every item with a label; ties count half for each side.

    method   "majority" takes the share of the votes. "dawid_skene" takes the posterior of the model of Dawid and Skene
             (1979), in which each annotator has a table of how often they give each label for each true one. Every pair
             enters a second time with its sides exchanged, since it means nothing which completion is called `a`. Where
             no pair has two labels, nobody can be compared with anybody, and the labels are taken as they are.

    Raises ValueError for an unknown method and when there is no label.
    """
    if method not in METHODS:
        raise ValueError(f"reliability={method!r} is not one of {', '.join(METHODS)}")
    votes = [(label.item, label.annotator, _vote(label)) for label in labels if label.choice != "skip"]
    if not votes:
        raise ValueError("there is no label yet: label some pairs first (python -m dpo_fast.annotate)")
    import pandas
    from crowdkit.aggregation import DawidSkene, MajorityVote

    columns = ["task", "worker", "label"]
    compared = len(votes) > len({item for item, _, _ in votes})
    if method == "majority" or not compared:
        shares = MajorityVote().fit_predict_proba(pandas.DataFrame(votes, columns=columns))
    else:
        both = [((item, True), who, vote) for item, who, vote in votes]
        both += [((item, False), who, SIDES.get(vote, vote)) for item, who, vote in votes]
        table = DawidSkene(n_iter=100).fit(pandas.DataFrame(both, columns=columns)).probas_
        shares = table[[as_given for _, as_given in table.index]]
        shares.index = [item for item, _ in shares.index]
    zero = 0.0 * shares.iloc[:, 0]
    probability = shares.get("a", zero) + 0.5 * shares.get("tie", zero)
    return {item: min(1.0, max(0.0, float(value))) for item, value in probability.items()}


def _vote(label: Label) -> str:
    return "tie" if label.choice == "bad" else label.choice
