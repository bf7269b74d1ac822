"""`python -m dpo_fast.annotate`: people on a page, and judges, say which candidate of a pair they prefer, into a labels file.

`--annotators` opens the page and prints a link for each person; it ends when the wanted labels are there, or with Ctrl-C.
`--judge` runs judges (loop/judges.py) first. Every label is saved at once, and the same command goes on where it stopped.
"""

import argparse
import contextlib
import sys
from pathlib import Path

from .loop.command import run_command
from .loop.items import SPLITS, read_gold
from .loop.judges import run_judge
from .loop.selection import SELECTIONS, select
from .loop.server import PageOptions, PageServer
from .loop.store import LabelStore


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m dpo_fast.annotate", description=__doc__, allow_abbrev=False)
    add = made.add_argument
    add("--candidates", help="candidates file of generate; only the first call needs it")
    add("--labels", default="labels.sqlite", help="labels file (%(default)s)")
    add("--annotators", nargs="+", metavar="NAME", help="people; each gets a link of their own")
    add(
        "--judge",
        nargs="+",
        default=[],
        metavar="SPEC",
        help="rule:FILE.py:FUNCTION, reward:MODEL, llm:URL#MODEL, implicit:RUN",
    )
    add("--judge_template", metavar="FILE", help="question to an llm judge, with {prompt}, {a} and {b}")
    add("--judge_api_key", metavar="FILE", help="file with the key of an llm judge's endpoint")
    add("--split", default="train", choices=SPLITS, help="prompts that judges label; people label train (%(default)s)")
    add("--max_pairs", type=int, metavar="N", help="label the first N pairs only")
    add("--select", choices=SELECTIONS, help="which pairs come first (as they are; random at first)")
    add("--policy", metavar="RUN[#REFERENCE]", help="the current policy, for --select margin")
    add("--seed", type=int, default=0, help="of the order (%(default)s)")
    add("--labels_per_pair", type=int, default=1, metavar="K", help="people per pair (%(default)s)")
    add("--overlap", action="store_true", help="two people may have the same pair before them at once")
    add("--gold", metavar="FILE", help="pairs with a known answer that are mixed in, in any layout of dpo_fast.train")
    add("--gold_every", type=int, default=10, metavar="N", help="one question in N is a gold one (%(default)s)")
    add("--guidelines", metavar="FILE", help="text that the page shows")
    add("--host", default="127.0.0.1", help="address to listen on; another than this machine's own needs --token")
    add("--port", type=int, default=8421, help="0 takes a free one (%(default)s)")
    add("--token", help="what the links carry, so that nobody else can open the page")
    return made


def run(argv: list[str]) -> None:
    """Label as the options say; cheap checks come first. Raises ValueError or OSError for what a user can mend."""
    args = parser().parse_args(argv)
    people = args.annotators or ([] if args.judge else ["me"])
    if (args.judge_template or args.judge_api_key) and not any(spec.startswith("llm:") for spec in args.judge):
        raise ValueError("judge_template and judge_api_key have no effect without an llm: judge")
    if args.seed and args.select is None:
        raise ValueError("seed has no effect without --select")
    if args.policy and args.select is None:
        raise ValueError("policy has no effect without --select margin")
    if people and args.split != "train":
        raise ValueError("people label training prompts: --split heldout is for judges")
    if args.max_pairs is not None and args.max_pairs < 1:
        raise ValueError(f"max_pairs={args.max_pairs} must be at least 1")
    llm = {
        "template": args.judge_template and Path(args.judge_template).read_text(),
        "api_key": args.judge_api_key and Path(args.judge_api_key).read_text().strip(),
    }
    gold = read_gold(args.gold) if args.gold else []
    options = PageOptions(
        labels_per_pair=args.labels_per_pair,
        overlap=args.overlap,
        limit=args.max_pairs,
        gold_every=args.gold_every,
        guidelines=Path(args.guidelines).read_text() if args.guidelines else "",
        token=args.token,
    )
    with LabelStore(args.labels, args.candidates) as store:
        if gold:
            store.add_gold(gold)
        if args.select:
            select(store, args.select, policy=args.policy, seed=args.seed)
        for spec in args.judge:
            run_judge(store, spec, split=args.split, limit=args.max_pairs, **(llm if spec.startswith("llm:") else {}))
        if people:
            _serve(store, people, options, args)


def _serve(store: LabelStore, people: list[str], options: PageOptions, args: argparse.Namespace) -> None:
    def finished() -> bool:
        return not store.waiting(people, options.labels_per_pair, limit=options.limit)

    if args.labels_per_pair > len(people):
        print(
            f"dpo_fast: {args.labels_per_pair} labels per pair need that many people, {len(people)} are named",
            file=sys.stderr,
        )
    if finished():
        print("All wanted labels are there already.")
        return
    with PageServer(store, options, host=args.host, port=args.port) as server:
        for name in people:
            print(f"{name}: {server.link(name)}", flush=True)
        print("Ctrl-C ends the page; labels are saved as they come.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.wait(finished)
    counts = store.counts(options.labels_per_pair, limit=options.limit)
    print(f"{counts['done']} of {counts['wanted']} labels are in {args.labels}. Next: python -m dpo_fast.labels --help")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
