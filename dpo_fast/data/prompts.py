"""Prompts to complete, from files and the hub: rows hold a prompt alone, or are pairs and rankings whose prompts are taken.

A prompt is text or a list of messages that ends before the reply. layouts.py says what a row with completions may look
like; a row without them has `prompt`, `messages` or `conversations`, or is one line of a .txt file.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from .layouts import BadRowError, read_prompt
from .readers import DataError, Source, read_source

_EXTRAS = ("tools", "chat_template_kwargs")


def load_prompts(
    source: Source | str, *, split: str = "train", skip_bad_rows: bool = False, log: Callable[[str], None] = print
) -> list[str | list[dict]]:
    """The distinct prompts of a file, directory or hub data set, in order.

    A .txt file holds one prompt per line. Raises FileNotFoundError for a missing path; DataError for a row without a
    usable prompt (with skip_bad_rows such rows are counted), for text mixed with messages, and where no prompt is left.
    """
    source = Source(source) if isinstance(source, str) else source
    found, dropped, places = {}, [], {}
    for place, row in _rows(source, split):
        try:
            prompt = _prompt(row)
        except BadRowError as error:
            if not skip_bad_rows:
                raise DataError(f"{place}: {error}. Mend the row, or leave such rows out with skip_bad_rows") from None
            dropped.append(f"{place}: {error}")
            continue
        found.setdefault(repr(prompt), prompt)
        places.setdefault("text" if isinstance(prompt, str) else "messages", place)
    first = f"; {len(dropped)} rows left out (first: {dropped[0]})" if dropped else ""
    if not found:
        raise DataError(f"no prompt in {source.path}{first}")
    if len(places) > 1:
        raise DataError(
            f"text and messages are mixed: {places['text']} is text, {places['messages']} is messages. Give all prompts "
            "as messages (the chat template applies) or all as text"
        )
    log(f"{source.path}: {len(found)} distinct prompts as {next(iter(places))}{first}")
    return list(found.values())


def _rows(source: Source, split: str) -> Iterator[tuple[str, object]]:
    path = Path(source.path).expanduser()
    if path.suffix.lower() != ".txt":
        yield from read_source(source, split)
        return
    # The file is opened as text with newline="\n": the other characters that str.splitlines cuts at may belong to a prompt.
    with open(path, encoding="utf-8", newline="\n") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path} line {number}", {"prompt": line.rstrip("\r\n")}
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text: {error}") from None


def _prompt(row) -> str | list[dict]:
    prompt = read_prompt(row)
    for name in _EXTRAS:
        if row.get(name):
            raise BadRowError(f"'{name}' cannot be kept in a candidates file: leave it out")
    if not (prompt.strip() if isinstance(prompt, str) else prompt):
        raise BadRowError("the prompt is empty")
    return prompt
