"""`python -m dpo_fast.labels`: agreement of annotators, export of a labels file to training pairs, import of labels."""

import argparse
import sys

from .loop.aggregate import METHODS
from .loop.agreement import agreement, report
from .loop.command import run_command
from .loop.export import export_pairs, export_rankings, write_rows
from .loop.imports import LAYOUTS, import_labels
from .loop.items import SPLITS
from .loop.store import LabelStore


def parser() -> argparse.ArgumentParser:
    """The options of the three commands."""
    made = argparse.ArgumentParser(prog="python -m dpo_fast.labels", description=__doc__, allow_abbrev=False)
    commands = made.add_subparsers(dest="command", required=True)

    shown = commands.add_parser("agreement", help="Krippendorff's alpha, and a table of annotators")
    shown.add_argument("--labels", default="labels.sqlite", help="labels file (%(default)s)")
    shown.add_argument("--split", default="train", choices=SPLITS, help="whose labels (%(default)s)")

    out = commands.add_parser("export", help="pairs for dpo_fast.train, with a soft label each")
    out.add_argument("output", help="JSON-lines file to write")
    out.add_argument("--labels", default="labels.sqlite", help="labels file (%(default)s)")
    out.add_argument("--split", default="train", choices=SPLITS, help="whose labels (%(default)s)")
    out.add_argument(
        "--reliability", default="dawid_skene", choices=METHODS, help="how p_chosen is estimated (%(default)s)"
    )
    out.add_argument("--annotators", nargs="+", metavar="NAME", help="only the labels of these (default: all)")
    kind = out.add_mutually_exclusive_group()
    kind.add_argument(
        "--min_p", type=float, default=0.5, help="leave out pairs with a p_chosen below this (%(default)s)"
    )
    kind.add_argument("--rankings", action="store_true", help="one row per prompt with a score per completion instead")

    read = commands.add_parser("import", help="labels from pairs, rankings, Argilla or Label Studio")
    read.add_argument("input", help="file to read")
    read.add_argument("--labels", default="labels.sqlite", help="labels file; made if absent (%(default)s)")
    read.add_argument("--layout", choices=tuple(LAYOUTS), help="of the file (recognised by default)")
    read.add_argument(
        "--completions",
        nargs="+",
        metavar="NAME",
        help="fields with completions, the left one first (found by default)",
    )
    read.add_argument(
        "--annotator", default="imported", help="who gave labels in a file that does not say (%(default)s)"
    )
    return made


def run(argv: list[str]) -> None:
    """Run one of the three commands. Raises ValueError or OSError for what a user can mend."""
    args = parser().parse_args(argv)
    if args.command == "import":
        import_labels(
            args.input, args.labels, layout=args.layout, annotator=args.annotator, completions=args.completions
        )
        return
    with LabelStore(args.labels) as store:
        if args.command == "agreement":
            labels, gold = store.labels(args.split), store.labels(gold=True)
            if not labels and not gold:
                raise ValueError(
                    f"{args.labels} holds no label yet: label some pairs first (python -m dpo_fast.annotate)"
                )
            print(report(agreement(labels, gold, store.annotators())))
            return
        options = {"method": args.reliability, "split": args.split, "annotators": args.annotators}
        rows = export_rankings(store, **options) if args.rankings else export_pairs(store, min_p=args.min_p, **options)
        write_rows(args.output, rows)
        print(f"wrote {len(rows)} rows to {args.output}. Next: python -m dpo_fast.train --dataset_name {args.output}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
