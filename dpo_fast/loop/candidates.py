"""Writing the candidates file, which holds one JSON object per prompt and line and is only ever appended to.

A line is written whole and flushed, so a kill leaves at most one cut line at the end, which the next run removes and writes
again. The options that decide the content (model, sampling) are beside it in `<name>.options.json`; a run with other
options is refused. items.py reads candidates.
"""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from .items import prompt_id


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to complete, and its side of the loop's split ("train" or "heldout")."""

    text: str | list[dict]
    split: str = "train"

    @property
    def id(self) -> str:
        """16 hex digits that name the prompt."""
        return prompt_id(self.text)


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled completion.

    tokens     number of sampled tokens, the end-of-sequence token included
    logp       sum of their log-probs in nats under the policy at temperature 1; None where an endpoint does not give it
    truncated  whether max_new_tokens ended it
    empty      whether it is nothing but white space
    count      how many samples had this text
    """

    text: str
    tokens: int
    logp: float | None
    temperature: float
    top_p: float
    seed: int
    truncated: bool
    empty: bool
    count: int = 1


def merge_equal(completions: Sequence[Completion]) -> list[Completion]:
    """The distinct texts, each as its first sample with the number of equal samples in `count`."""
    counts = Counter(c.text for c in completions)
    first = {c.text: c for c in reversed(completions)}
    return [dataclasses.replace(first[text], count=counts[text]) for text in dict.fromkeys(c.text for c in completions)]


class CandidateFile:
    """Appends to a candidates file; its lines so far are kept, and `done` holds their ids.

    `options` decide the content, as JSON; they are compared with those of the run that began the file.
    Raises ValueError for a file of other options and for a line, other than a cut last one, that cannot be read.
    """

    def __init__(self, path: str | Path, options: dict):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".options.json")
        options = json.loads(json.dumps(options))
        if self.path.exists() and self.path.stat().st_size:
            self._compare(beside, options)
        else:
            write_whole(beside, json.dumps(options, indent=1) + "\n")
        self.done = set(self._completed())
        self._file = self.path.open("ab")

    def _compare(self, beside: Path, options: dict) -> None:
        if not beside.exists():
            raise ValueError(
                f"{self.path} is there and {beside.name} is not: name another output, or take the file away"
            )
        before = json.loads(beside.read_text())
        for name in sorted(before.keys() | options.keys()):
            if before.get(name) != options.get(name):
                raise ValueError(
                    f"{self.path} was begun with {name}={before.get(name)!r}, this run has {options.get(name)!r}: "
                    "use the same options to go on, or name another output"
                )

    def _completed(self) -> Iterator[str]:
        """The ids of the whole lines; a cut line at the end is removed."""
        if not self.path.exists():
            return
        end = 0
        with self.path.open("r+b") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    file.truncate(end)
                    return
                try:
                    yield json.loads(line)["id"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{self.path} line {number} is not a line of candidates ({error}): take that line away, and its "
                        "prompt is completed again"
                    ) from None
                end += len(line)

    def add(self, prompt: Prompt, completions: Sequence[Completion], round: int, model: str) -> None:
        """Append one prompt's line; the operating system has it when this returns."""
        line = {
            "id": prompt.id,
            "prompt": prompt.text,
            "completions": [dataclasses.asdict(c) for c in merge_equal(completions)],
            "round": round,
            "model": model,
            "split": prompt.split,
        }
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.done.add(prompt.id)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "CandidateFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def write_whole(path: str | Path, text: str) -> None:
    """Write a file such that a kill leaves the old one or the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
