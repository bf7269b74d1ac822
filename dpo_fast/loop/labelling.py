"""One round's labels, from judges and people, and the pairs that they give."""

from collections.abc import Callable
from pathlib import Path

from .export import export_pairs
from .items import read_gold
from .judges import run_judge
from .selection import select
from .server import PageOptions, PageServer
from .settings import Settings
from .store import LabelStore


def label_round(
    settings: Settings, folder: Path, policy: str | None, log: Callable[[str], None]
) -> tuple[list[dict], list[dict]]:
    """(training pairs, held-out pairs) of the candidates in `folder`; labels that are there already are kept.

    policy   folder of the model that the round starts from, for `select: margin`; None in the first round, where that model
             is the reference: all margins are 0 then, and the order is random

    With annotators it shows the page's address and waits until the wanted labels are there. Only the judge labels held-out
    pairs; without a judge there are none. Raises ValueError where a judge fails and where no pair is left to train on.
    """
    options = settings.annotate
    with LabelStore(folder / "labels.sqlite", folder / "candidates.jsonl") as store:
        if not store.items("train"):
            raise ValueError(
                "no training prompt has two completions that differ: generate more of them, or at a higher temperature"
            )
        if options.gold:
            store.add_gold(read_gold(options.gold))
        if options.select == "margin" and policy is not None:
            select(store, "margin", policy=f"{policy}#{settings.model}", seed=settings.seed)
        elif options.select is not None:
            select(store, "random", seed=settings.seed)
        if options.annotators:
            _ask_people(store, settings, log)
        elif options.judge is not None:
            run_judge(store, options.judge, limit=options.max_pairs, log=log, **options.judge_options())
        how = {"method": settings.labels.method, "min_p": settings.labels.min_p, "log": log}
        pairs, heldout = export_pairs(store, **how), []
        if options.judge is not None and store.items("heldout"):
            try:
                limit = options.max_heldout_pairs
                run_judge(store, options.judge, split="heldout", limit=limit, log=log, **options.judge_options())
                heldout = export_pairs(store, split="heldout", **how)
            except ValueError as error:
                if len({label.choice for label in store.labels("heldout")} & {"a", "b"}):
                    raise
                log(f"no held-out pair is preferred, so reward accuracy is not measured in this round: {error}")
    return pairs, heldout


def _ask_people(store: LabelStore, settings: Settings, log: Callable[[str], None]) -> None:
    options = settings.annotate
    page = PageOptions(
        labels_per_pair=options.labels_per_pair,
        limit=options.max_pairs,
        gold_every=options.gold_every,
        guidelines=Path(options.guidelines).read_text() if options.guidelines else "",
        token=options.token,
    )

    def finished() -> bool:
        return not store.waiting(options.annotators, options.labels_per_pair, limit=options.max_pairs)

    if finished():
        return
    with PageServer(store, page, host=options.host, port=options.port) as server:
        for name in options.annotators:
            log(f"{name}: {server.link(name)}")
        log("The loop goes on when the wanted labels are there. Ctrl-C ends it; labels are saved as they come.")
        server.wait(finished)
