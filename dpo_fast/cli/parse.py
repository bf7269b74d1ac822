"""Parse flags and a YAML file into options: every option of options.py and DPOConfig is both a flag and a key.

A flag of a yes-or-no option needs no value and has an opposite, `--no_...`. Names are never shortened.
"""

import argparse
import dataclasses
import logging
import re
import sys
import types
import typing

import torch
from transformers import HfArgumentParser

from ..training.config import DPOConfig
from ..training.unused import sentence, set_back
from .help import help_text
from .options import OLD_UNUSED, ModelArguments, ScriptArguments, check, unused
from .unknown import unknown

logger = logging.getLogger(__name__)
_SEE = "; --help lists all options"
_CLASSES = (ScriptArguments, DPOConfig, ModelArguments)


def parse(argv: list[str], config: dict, path: str | None = None) -> tuple[ScriptArguments, DPOConfig, ModelArguments]:
    """Options from the flags `argv`, which override the YAML file's (`config`), checked as far as that needs no other file.

    Options that change no number are named in one warning and get their defaults. Raises ValueError for unknown names
    (all at once), values of the wrong type, and options that cannot be honoured.
    """
    kinds = {name: _kinds(hint) for cls in _CLASSES for name, hint in typing.get_type_hints(cls).items()}
    parser = _parser(kinds)
    options = _options(parser)
    try:
        _take_file(parser, options, kinds, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from None
    namespace, rest = parser.parse_known_args(argv)
    if rest:
        raise ValueError(unknown([r for r in rest if r.startswith("--")] or rest[:1], options) + _SEE)
    values = vars(namespace)
    defaults = {f.name: f.default for cls in _CLASSES for f in dataclasses.fields(cls)} | DPOConfig.defaults()
    defaults |= dict.fromkeys(OLD_UNUSED)
    found = unused(values, defaults)
    set_back(values, defaults, [name for name in found if name in values])
    script, args, model = (
        cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.init}) for cls in _CLASSES
    )
    check(script, args, model)
    if found:
        logger.warning(sentence(found))
    return script, args, model


def _take_file(parser, options: dict[str, argparse.Action], kinds: dict[str, set], config: dict) -> None:
    """Make the file's options the parser's defaults. Raises ValueError that names every unknown one."""
    opposites = {k: k[3:] for k, v in config.items() if k[:3] == "no_" and k[3:] in options and isinstance(v, bool)}
    if wrong := [key for key in config if opposites.get(key, key) not in options or key == "config"]:
        raise ValueError(unknown(wrong, options) + _SEE)
    for key, value in config.items():
        name = opposites.get(key, key)
        value = not value if key in opposites else value
        parser.set_defaults(**{name: _from_yaml(options[name], kinds[name], value)})


class _Parser(HfArgumentParser):
    def error(self, message):
        raise ValueError(message)

    def format_help(self):
        return help_text(_options(self))


def _kinds(hint) -> set:
    """The types that a hint allows, without their element types: {list, NoneType} of `list[str] | None`."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return {typing.get_origin(kind) or kind for kind in (typing.get_args(hint) if union else (hint,))}


def _parser(kinds: dict[str, set]) -> _Parser:
    parser = _Parser(
        _CLASSES,
        prog="python -m dpo_fast.train",
        allow_abbrev=False,
    )
    for name, action in _options(parser).items():
        if bool in kinds[name]:
            action.nargs, action.const = "?", True
            if str in kinds[name]:  # include_num_input_tokens_seen: a yes, a no, or what is counted
                action.type = _or_text(action.type)
            if f"--no_{name}" not in parser._option_string_actions:
                opposite = (f"--no_{name}", f"--no-{name.replace('_', '-')}")
                parser.add_argument(*opposite, dest=name, action="store_false", default=None, help=argparse.SUPPRESS)
        elif type(None) in kinds[name] and str not in kinds[name] and action.nargs is None:
            action.type = _or_none(action.type)
    for name in OLD_UNUSED:
        parser.add_argument(f"--{name}", nargs="?", const="true", type=str, help=argparse.SUPPRESS)
        kinds[name] = {str, types.NoneType}
    # Without this argparse takes -1e-5 for an option.
    parser._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-inf$|-nan$", re.IGNORECASE)
    # Progress bars are for people, only the main process prints, and without an accelerator only the CPU is left.
    parser.set_defaults(disable_tqdm=not sys.stderr.isatty(), log_level_replica="error")
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())
    return parser


def _options(parser: _Parser) -> dict[str, argparse.Action]:
    """Every option by its name, without the `--no_` opposites."""
    return {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}


def _or_none(kind):
    def convert(text: str):
        return None if text.lower() in ("none", "null") else kind(text)

    convert.__name__ = kind.__name__
    return convert


def _or_text(kind):
    def convert(text: str):
        try:
            return kind(text)
        except argparse.ArgumentTypeError:
            return text

    convert.__name__ = kind.__name__
    return convert


def _from_yaml(action: argparse.Action, kinds: set, value):
    """A YAML value as the option's type."""
    if value is None:
        if type(None) not in kinds:
            raise ValueError(f"option {action.dest} is empty: give it a value or leave it out")
        return None
    if action.dest == "datasets" or (isinstance(value, dict) and dict in kinds):
        return value
    if isinstance(value, list) and list in kinds:
        return [_typed(action, element) for element in value]
    if isinstance(value, dict | list):
        raise ValueError(f"option {action.dest} takes one value, found {value!r}")
    if action.nargs == "+":
        return [] if value == "" else [_typed(action, value)]
    return _typed(action, value)


def _typed(action: argparse.Action, value):
    # YAML reads a bare `no` as false.
    text = "no" if value is False and "no" in (action.choices or ()) else str(value)
    try:
        typed = action.type(text)
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        raise ValueError(f"option {action.dest}: {value!r} is not a valid {action.type.__name__}") from None
    if action.choices is not None and typed not in action.choices:
        raise ValueError(f"option {action.dest}: {value!r} is not one of {', '.join(map(str, action.choices))}")
    return typed
