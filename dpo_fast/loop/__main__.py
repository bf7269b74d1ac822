"""`python -m dpo_fast.loop`: rounds of generate, prefer and train. Without options, an embedded demonstration.

The options of each step are in a section of a YAML file (`--config`, loop/settings.py); flags override the file.
"""

import argparse
import sys
from pathlib import Path

from .command import run_command
from .settings import REFERENCES, Settings, read_settings


def parser() -> argparse.ArgumentParser:
    """The options that are also flags."""
    made = argparse.ArgumentParser(prog="python -m dpo_fast.loop", description=__doc__, allow_abbrev=False)
    add = made.add_argument
    add("--config", metavar="FILE", help="YAML file with sections generate, annotate, labels, train, evaluate, limits")
    add("--model", metavar="NAME", help="model folder, hub name, or folder with adapters, to start from")
    add("--prompts", metavar="FILE", help="prompts or pairs in any layout of dpo_fast.train, or .txt lines")
    add("--output_dir", help="where everything is written (runs/loop)")
    add("--rounds", type=int, help="how many (3)")
    add("--reference", choices=REFERENCES, help="of a round's training: the round's start, or the first model (round)")
    add("--replay", type=int, metavar="N", help="train on the pairs of N earlier rounds again (0)")
    add("--heldout", type=float, help="share or number of prompts that are never labelled for training (0.2)")
    add("--patience", type=int, metavar="N", help="end after N rounds without a better win rate; 0 never (2)")
    add("--seed", type=int, help="of split, samples and training (0)")
    add(
        "--judge",
        metavar="SPEC",
        help="annotate.judge: rule:FILE.py:FUNCTION, reward:MODEL, llm:URL#MODEL, implicit:RUN",
    )
    return made


def settings_of(argv: list[str]) -> Settings:
    """The settings of a command line. Raises ValueError or OSError for what a user can mend."""
    flags = {name: value for name, value in vars(parser().parse_args(argv)).items() if value is not None}
    path, judge = flags.pop("config", None), flags.pop("judge", None)
    config = {}
    if path:
        import yaml

        try:
            config = yaml.safe_load(Path(path).read_text()) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path} must hold options and sections, one `name: value` per line")
    config |= flags
    if judge:
        config["annotate"] = {**(config.get("annotate") or {}), "judge": judge}
    return read_settings(config)


def run(argv: list[str]) -> None:
    """Run the loop, or the demonstration, and say where the report is."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not argv:
        from .demonstration import demonstrate

        demonstrate()
        return
    settings = settings_of(argv)
    from .rounds import run_loop

    run_loop(settings)
    print(f"\nThe best model is {settings.folder / 'best'}. Look at the report: {settings.folder / 'report.html'}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
