"""Options of the command line with the few that every run needs."""

from dpo_fast.cli.parse import parse

BASE = {"model_name_or_path": "model", "dataset_name": "pairs", "use_cpu": True}


def parsed(**changes):
    return parse([], BASE | changes)
