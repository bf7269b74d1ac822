"""The text of `--help`: one line per option, dpo_fast's first, then transformers'; unused and refused options come last."""

import argparse
import dataclasses
import textwrap
from collections.abc import Iterable

from ..training import config, unused
from ..training.config import DPOConfig
from . import options as cli

_WIDTH = 120
_NAME = 42  # columns of a name and its value
_USAGE = """\
usage: python -m dpo_fast.train [--config FILE] [--OPTION VALUE ...]

Train a language model on preference pairs. Without any option, an embedded demo runs. Every option is a flag and a key
of the YAML file; flags override the file. A yes-or-no option needs no value, and --no_OPTION is its opposite.
"""


def help_text(actions: dict[str, argparse.Action]) -> str:
    """All options: sections with one line per option, then the names of those that are not used or refused."""
    idle = {*unused.UNUSED, *cli.OLD_UNUSED}
    refused = {*cli.REFUSED, *config.REFUSED}
    # DPOConfig's own options; options of transformers are among them where the default or meaning differs.
    ours = [name for name in DPOConfig.__annotations__ if name in actions]
    sections = {
        "Data": [f.name for f in dataclasses.fields(cli.ScriptArguments)],
        "Model and adapters": [f.name for f in dataclasses.fields(cli.ModelArguments)],
        "Training (dpo_fast and TRL)": ours,
        "Training (transformers)": [f.name for f in dataclasses.fields(DPOConfig)],
    }
    lines, shown = [_USAGE], {*idle, *refused}
    for title, names in sections.items():
        lines.append(f"{title}:")
        for name in names:
            if name in actions and name not in shown:
                lines.append(_line(actions[name]))
                shown.add(name)
        lines.append("")
    lines.append(_names("Accepted and not used, since they change no number here:", idle & actions.keys()))
    lines.append(
        _names("Refused, since they would change what is computed (the error says why):", refused & actions.keys())
    )
    return "\n".join(lines)


def _line(action: argparse.Action) -> str:
    """Name, kind of value, the first sentence of what it does, and the default."""
    value = " A B ..." if action.nargs == "+" else "" if action.const is True else f" {_kind(action)}"
    default = (
        "" if action.default in (None, False, [], "") else f" [{getattr(action.default, 'value', action.default)}]"
    )
    text = " ".join((action.help or "").split()).replace("%%", "%")
    text = text.split(". ")[0].rstrip(".")
    name = f"--{action.dest}{value}"
    room = _WIDTH - max(_NAME, len(name) + 3) - len(default)
    return f"  {name:<{_NAME - 3}} {textwrap.shorten(text, room, placeholder=' ...')}{default}"


def _kind(action: argparse.Action) -> str:
    return {"int": "N", "float": "X", "_or_none": "X"}.get(getattr(action.type, "__name__", ""), "VALUE")


def _names(title: str, names: Iterable[str]) -> str:
    return textwrap.fill(f"{title} {', '.join(sorted(names))}.", _WIDTH, subsequent_indent="  ") + "\n"
