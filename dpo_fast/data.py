"""Preference pairs from files and the hub: every layout in use, turned into one.

A normalised row is `{"prompt", "chosen", "rejected"}`: three strings (plain text) or three message lists
(`[{"role": "user", "content": "..."}]`, for the chat template), and, where the data has them, `tools` (a list) and
`chat_template_kwargs` (a dict). Tokens are made in tokenize.py. Nothing here knows a tokenizer or a model.
"""

import dataclasses
import gzip
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

RANKING_PAIRS = ("all", "best_worst")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"}
SHAREGPT_ROLES |= {role: role for role in ("user", "assistant", "system", "tool")}
SPLIT_NAME = re.compile(r"(^|[-_.])(train|test|validation|valid|val|dev|eval)([-_.\d]|$)")


class DataError(ValueError):
    """A row or file that cannot be used; the message holds the place, the field and what to do."""


class _BadRowError(Exception):
    """What is wrong with one row; details follow the first ': ' so that reasons can be counted."""


@dataclasses.dataclass
class Source:
    """Where pairs come from: a .jsonl, .json or .parquet file (.gz too), a directory of them, or a hub name.

    weight repeats (2 = twice) or subsamples (0.5 = half) the source's pairs. split and name (the hub's configuration)
    choose among a directory's or hub data set's parts; for a file they are an error.
    """

    path: str
    weight: float = 1.0
    split: str | None = None
    name: str | None = None


@dataclasses.dataclass
class Pairs:
    """Normalised rows, the layout found in each source, and (place, reason) of every row left out."""

    rows: list[dict] = dataclasses.field(default_factory=list)
    layout: dict[str, str] = dataclasses.field(default_factory=dict)
    dropped: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def load_pairs(
    sources: "list[Source | str] | Source | str",
    *,
    split: str = "train",
    skip_bad_rows: bool = False,
    ranking_pairs: str = "all",
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> Pairs:
    """Read and normalise every source, in order; pairs of one ranked prompt stay next to each other.

    split: used by directories and hub names whose Source names none. ranking_pairs: "all" strictly ordered pairs of
    ranked completions, or "best_worst". seed: which pairs a fractional weight keeps.
    Raises FileNotFoundError for a missing path; DataError for a row that cannot be used (with skip_bad_rows it is
    counted in `dropped` instead), for text mixed with messages, and when no pair is left.
    """
    sources = [sources] if isinstance(sources, str | Source) else sources
    pairs, kinds = Pairs(), {}
    for source in (Source(s) if isinstance(s, str) else s for s in sources):
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise ValueError(f"{source.path}: weight must be a positive number, got {source.weight}")
        part, part_kinds = _normalise(_read_source(source, split), source.path, ranking_pairs, skip_bad_rows)
        label = ":".join(filter(None, (source.path, source.name, source.split)))
        rows = _weighted(part.rows, source.weight, random.Random(f"{seed}:{label}"))
        text = f"{label}: {len(part.rows)} pairs, layout: {part.layout[source.path]}"
        if source.weight != 1:
            text += f"; {len(rows)} with weight {source.weight:g}"
        if part.dropped:
            text += f"; {len(part.dropped)} left out (first: {': '.join(part.dropped[0])})"
        log(text)
        pairs.rows += rows
        pairs.dropped += part.dropped
        pairs.layout[label] = part.layout[source.path]
        kinds = part_kinds | kinds
    _check_usable(pairs, kinds)
    return pairs


def normalise_rows(
    rows: Iterable[dict], where: str = "rows", *, ranking_pairs: str = "all", skip_bad_rows: bool = False
) -> Pairs:
    """Normalise rows in memory: a list of dicts or a `datasets.Dataset`. `where` names them in messages (from row 0).

    Raises DataError as `load_pairs`.
    """
    located = ((f"{where} row {i}", row) for i, row in enumerate(rows))
    pairs, kinds = _normalise(located, where, ranking_pairs, skip_bad_rows)
    _check_usable(pairs, kinds)
    return pairs


def _check_usable(pairs: Pairs, kinds: dict[str, str]) -> None:
    if not pairs.rows:
        why = f"; the first of {len(pairs.dropped)} left out is {': '.join(pairs.dropped[0])}" if pairs.dropped else ""
        raise DataError(f"no pair to train on in {', '.join(pairs.layout) or 'an empty list of sources'}{why}")
    if len(kinds) > 1:
        raise DataError(
            f"text and messages are mixed: {kinds['text']} is text, {kinds['messages']} is messages. Give all rows as "
            "messages (the chat template applies) or all as text (nothing is added but the EOS)"
        )


def _weighted(rows: list[dict], weight: float, rng: random.Random) -> list[dict]:
    """floor(weight) copies of all rows and a random share, in order, for the rest."""
    whole = math.floor(weight)
    share = sorted(rng.sample(range(len(rows)), round((weight - whole) * len(rows))))
    return rows * whole + [rows[i] for i in share]


# Reading: every reader yields (place, row), or (place, _BadRowError) for a line that is not a row.


def _read_source(source: Source, split: str) -> Iterator[tuple[str, object]]:
    path = Path(source.path).expanduser()
    if path.is_dir():
        if source.name:
            raise ValueError(f"{source.path}: name={source.name!r} is for hub data sets, this is a directory")
        for file in _files_of_split(path, source.split or split):
            yield from _read_file(file)
    elif path.is_file():
        if source.split or source.name:
            raise ValueError(f"{source.path} is one file: split and name have no effect, leave them out")
        yield from _read_file(path)
    elif _reader(path) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source.path):
        raise FileNotFoundError(f"no such file or directory: {source.path} (absolute: {path.absolute()})")
    else:
        yield from _read_hub(source, split)


def _files_of_split(directory: Path, split: str) -> list[Path]:
    """`train.jsonl`, `train-00000-of-00002.parquet`, ...; every data file when none carries a split's name."""

    def stem(file: Path) -> str:
        return file.name.removesuffix(".gz").rpartition(".")[0]

    candidates = sorted(directory.iterdir()) + sorted(directory.glob("data/*"))
    files = [f for f in candidates if f.is_file() and _reader(f) and not f.name.startswith((".", "dataset_info"))]
    matching = [f for f in files if re.fullmatch(re.escape(split) + r"([-_.]\d.*)?", stem(f))]
    if matching or (files and not any(SPLIT_NAME.search(stem(f)) for f in files)):
        return matching or files
    found = ", ".join(f.name for f in files) or f"no file ending in {', '.join(READERS)}"
    raise DataError(f"{directory} has no file of the split {split!r}, found: {found}. Name a file or another split")


def _reader(path: Path) -> Callable[[Path], Iterator] | None:
    name = path.name.lower().removesuffix(".gz")
    return next((read for ending, read in READERS.items() if name.endswith(ending)), None)


def _read_file(path: Path) -> Iterator[tuple[str, object]]:
    read = _reader(path)
    if read is None:
        raise DataError(f"{path}: unknown kind of file, known are {', '.join(READERS)} (and .gz of the JSON ones)")
    return read(path)


def _open(path: Path):
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _read_lines(path: Path) -> Iterator[tuple[str, object]]:
    # Bytes, so that only \n ends a line: str.splitlines also cuts at characters that JSON strings may hold.
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"{path} line {number}", json.loads(line)
                except ValueError as error:
                    yield f"{path} line {number}", _BadRowError(f"the line is not valid JSON: {error}")


def _read_json(path: Path) -> Iterator[tuple[str, object]]:
    """A list of rows, or an object that holds one under "data"; JSON lines under the name .json are read too."""
    with _open(path) as file:
        text = file.read()
    try:
        value = json.loads(text)
    except ValueError as error:
        first = next((line for line in text.splitlines() if line.strip()), b"")
        if first.lstrip().startswith(b"{") and first.rstrip().endswith(b"}"):
            yield from _read_lines(path)
            return
        raise DataError(f"{path} is not valid JSON: {error}") from None
    rows = value.get("data", [value]) if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise DataError(f'{path} must hold a list of rows or {{"data": [...]}}, found {type(rows).__name__}')
    for i, row in enumerate(rows):
        yield f"{path} row {i}", row


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=4096)
    except ValueError as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from None
    rows = (row for batch in batches for row in batch.to_pylist())
    for i, row in enumerate(rows):
        yield f"{path} row {i}", row


def _read_hub(source: Source, split: str) -> Iterator[tuple[str, object]]:
    import datasets

    split = source.split or split
    try:
        rows = datasets.load_dataset(source.path, source.name, split=split)
    except Exception as error:  # hub, network and builder errors share no base class
        raise DataError(
            f"{source.path} is neither a local path ({Path(source.path).absolute()}) nor could it be loaded from the "
            f"hub (split {split!r}, name {source.name!r}): {error}"
        ) from error
    for i, row in enumerate(rows):
        yield f"{source.path} {split} row {i}", row


READERS = {".jsonl": _read_lines, ".ndjson": _read_lines, ".json": _read_json, ".parquet": _read_parquet}


# Normalising: columns decide the layout, a layout gives (tag, prompt, chosen, rejected), _pair does the rest.


def _normalise(located, where: str, ranking_pairs: str, skip_bad_rows: bool) -> tuple[Pairs, dict[str, str]]:
    """Pairs of one source, and the place of its first row of each kind ("text", "messages")."""
    if ranking_pairs not in RANKING_PAIRS:
        raise ValueError(f"ranking_pairs={ranking_pairs!r} is not one of {', '.join(RANKING_PAIRS)}")
    pairs, layouts, kinds = Pairs(), Counter(), {}

    def bad(place: str, error: _BadRowError) -> None:
        if not skip_bad_rows:
            raise DataError(f"{place}: {error}. Mend the row, or leave such rows out with skip_bad_rows=True")
        pairs.dropped.append((place, str(error)))

    for place, row in located:
        try:
            layout, extras, found = _read_row(row, ranking_pairs)
        except _BadRowError as error:
            bad(place, error)
            continue
        if not found:
            pairs.dropped.append((place, "no completion ranks above another"))
        for tag, *sides in found:
            try:
                how, pair = _pair(*sides)
            except _BadRowError as error:
                bad(place + tag, error)
                continue
            pairs.rows.append(pair | extras)
            layouts[f"{layout} as {how}"] += 1
            kinds.setdefault("text" if isinstance(pair["chosen"], str) else "messages", place)
    counted = [name if len(layouts) == 1 else f"{name} ({n})" for name, n in layouts.most_common()]
    pairs.layout[where] = "; ".join(counted) or "none"
    return pairs, kinds


def _read_row(row, ranking_pairs: str) -> tuple[str, dict, list[tuple]]:
    """Layout, extras (tools, chat_template_kwargs) and (tag, prompt, chosen, rejected) of one row."""
    if isinstance(row, _BadRowError):
        raise row
    if not isinstance(row, dict):
        raise _BadRowError(f"the row is not an object of named columns: found {type(row).__name__}")
    given = {key: value for key, value in row.items() if value is not None}
    if given.get("images") or given.get("image"):
        raise _BadRowError("the row has images, only text can be trained on")
    extras = {}
    for key, kind in (("tools", list), ("chat_template_kwargs", dict)):
        if given.get(key):
            extras[key] = _decoded(key, given[key], kind)
    for layout, columns, read in LAYOUTS:
        if all(column in given for column in columns):
            return layout, extras, read(given, ranking_pairs)
    null = ", ".join(key for key in row if key not in given)
    raise _BadRowError(
        f"no known layout has these columns: {', '.join(given) or 'none'}{f' (null: {null})' if null else ''}. Known: "
        + "; ".join(layout for layout, _, _ in LAYOUTS)
    )


def _decoded(key: str, value, kind: type):
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise _BadRowError(f"'{key}' is not valid JSON: {error}") from None
    if not isinstance(value, kind):
        raise _BadRowError(f"'{key}' must be a {kind.__name__}: found {type(value).__name__}")
    return value


def _direct(row: dict, _) -> list[tuple]:
    return [("", row.get("prompt"), row["chosen"], row["rejected"])]


def _sharegpt(row: dict, _) -> list[tuple]:
    prompt = _side("conversations", row["conversations"])
    if isinstance(prompt, str) or prompt[-1]["role"] not in ("user", "tool"):
        raise _BadRowError("'conversations' must be messages that end before the reply, with a user or tool turn")
    return [("", _system(row) + prompt, _reply(row["chosen"]), _reply(row["rejected"]))]


def _alpaca(row: dict, _) -> list[tuple]:
    replies = [row["chosen"], row["rejected"]] if "chosen" in row and "rejected" in row else row["output"]
    if not isinstance(replies, list) or len(replies) != 2:
        raise _BadRowError("'output' must be a list of two, [best, worst]")
    turns = row.get("history", [])
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise _BadRowError("'history' must be a list of [question, answer]")
    if not all(isinstance(row.get(field, ""), str) for field in ("instruction", "input")):
        raise _BadRowError("'instruction' and 'input' must be text")
    prompt = _system(row)
    for question, answer in turns:
        prompt += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return [("", [*prompt, {"role": "user", "content": question}], *map(_reply, replies))]


def _system(row: dict) -> list[dict]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _reply(value):
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def _ranked(row: dict, ranking_pairs: str) -> list[tuple]:
    """Pairs of N completions: all strictly ordered ones, best first, or the best with the worst."""
    completions = row["completions"]
    if not isinstance(completions, list):
        raise _BadRowError(f"'completions' must be a list: found {type(completions).__name__}")
    n = len(completions)
    if "ranks" in row:
        order = _preferred(_numbers("ranks", row["ranks"], n), ranking_pairs)
    elif "scores" in row:
        order = _preferred([-score for score in _numbers("scores", row["scores"], n)], ranking_pairs)
    elif ranking_pairs == "all":
        order = row["preferred_pairs"]
        valid = isinstance(order, list) and all(isinstance(p, list) and len(p) == 2 for p in order)
        if not valid or any(type(i) is not int or not 0 <= i < n for p in order for i in p):
            raise _BadRowError(f"'preferred_pairs' must be [[better, worse], ...] with indices below: {n}")
    else:
        raise ValueError("ranking_pairs='best_worst' needs ranks or scores; preferred_pairs name their pairs already")
    return [(f" completions {i} > {j}", row["prompt"], completions[i], completions[j]) for i, j in order]


def _numbers(field: str, values, n: int) -> list[float]:
    numeric = isinstance(values, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )
    if not numeric or len(values) != n:
        raise _BadRowError(f"'{field}' must hold one number a completion: {n} completions, {field} {values}")
    return values


def _preferred(cost: list[float], ranking_pairs: str) -> list[tuple[int, int]]:
    order = sorted(range(len(cost)), key=cost.__getitem__)
    if ranking_pairs == "best_worst":
        order = [order[0], order[-1]] if order else []
    return [(i, j) for k, i in enumerate(order) for j in order[k + 1 :] if cost[i] < cost[j]]


# (name, columns that must be there, reader); the first match wins.
LAYOUTS = (
    ("prompt, chosen, rejected", ("prompt", "chosen", "rejected"), _direct),
    ("prompt, completions, ranks", ("prompt", "completions", "ranks"), _ranked),
    ("prompt, completions, scores", ("prompt", "completions", "scores"), _ranked),
    ("prompt, completions, preferred_pairs", ("prompt", "completions", "preferred_pairs"), _ranked),
    ("sharegpt conversations, chosen, rejected", ("conversations", "chosen", "rejected"), _sharegpt),
    ("alpaca instruction, input, chosen, rejected", ("instruction", "chosen", "rejected"), _alpaca),
    ("alpaca instruction, input, output [best, worst]", ("instruction", "output"), _alpaca),
    ("chosen, rejected without prompt", ("chosen", "rejected"), _direct),
)


def _pair(prompt, chosen, rejected) -> tuple[str, dict]:
    """How the three values were read, and the normalised pair."""
    chosen, rejected = _side("chosen", chosen), _side("rejected", rejected)
    prompt = prompt if prompt is None else _side("prompt", prompt)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise _BadRowError("one of 'chosen' and 'rejected' is text, the other messages")
    if chosen == rejected:
        raise _BadRowError("'chosen' equals 'rejected'")
    _refuse_empty(chosen, rejected, "")
    if isinstance(chosen, str) and prompt is None:
        n = _common_text(chosen, rejected)
        how, prompt, chosen, rejected = (
            "text, their common beginning is the prompt",
            chosen[:n],
            chosen[n:],
            rejected[n:],
        )
    elif isinstance(chosen, str) and isinstance(prompt, str):
        how = "text"
    elif isinstance(chosen, str):
        how, chosen, rejected = "messages with replies as text", _reply(chosen), _reply(rejected)
    elif prompt is None or _opens(chosen) or _opens(rejected):
        how, prompt, n = _prompt_of_conversations(prompt, chosen, rejected)
        chosen, rejected = chosen[n:], rejected[n:]
    elif isinstance(prompt, str):
        how, prompt = "messages with the prompt as text", [{"role": "user", "content": prompt}]
    else:
        how = "messages"
    _refuse_empty(chosen, rejected, " after the prompt")
    for field, value in (("chosen", chosen), ("rejected", rejected)):
        if _opens(value):
            raise _BadRowError(f"'{field}' goes on with a {value[0]['role']} turn where the reply must be")
    return how, {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _prompt_of_conversations(prompt, chosen: list[dict], rejected: list[dict]) -> tuple[str, list[dict], int]:
    """Prompt of two conversations that hold it, and how many of their first messages belong to it."""
    end = min(len(chosen), len(rejected)) - 1
    common = next((i for i in range(end) if chosen[i] != rejected[i]), end)
    if common == 0:
        raise _BadRowError("'chosen' and 'rejected' do not begin with the same message, so they hold no common prompt")
    if not isinstance(prompt, list):
        tail = "" if prompt is None else " that repeat the text prompt"
        return f"whole conversations{tail}", chosen[:common], common
    how = "messages, the prompt repeated in the completions (stripped)"
    for n in range(min(common, len(prompt)), 0, -1):
        if prompt[-n:] == chosen[:n]:
            return how, prompt, n
    if chosen[:common][-len(prompt) :] == prompt:
        return how, chosen[:common], common
    raise _BadRowError("'chosen' and 'rejected' begin with turns that are not those of 'prompt'")


def _common_text(chosen: str, rejected: str) -> int:
    """Characters of the implicit prompt: at least one is left to each side, a space goes with the completion."""
    end = min(len(chosen), len(rejected)) - 1
    n = next((i for i in range(end + 1) if chosen[i] != rejected[i]), None)
    if n is None:
        return end
    return n - 1 if n and chosen[n - 1] == " " else n


def _side(field: str, value) -> str | list[dict]:
    """Text as it is, or messages with role and content, without null entries."""
    if isinstance(value, str):
        return _text(field, value)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise _BadRowError(f"'{field}' must be text or a list of messages: found {type(value).__name__}")
    if not value:
        raise _BadRowError(f"'{field}' is empty")
    return [_message(field, message) for message in value]


def _message(field: str, message) -> dict:
    if not isinstance(message, dict):
        raise _BadRowError(f"'{field}' must hold messages with role and content: found {type(message).__name__}")
    message = {key: value for key, value in message.items() if value is not None}
    if "from" in message and "role" not in message:
        sender = message.pop("from")
        if not isinstance(sender, str) or sender not in SHAREGPT_ROLES:
            raise _BadRowError(f"'{field}' has an unknown sender, known are {', '.join(SHAREGPT_ROLES)}: {sender!r}")
        message = {"role": SHAREGPT_ROLES[sender], "content": message.pop("value", None)} | message
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise _BadRowError(f"'{field}' has a content part that is not text")
        content = message["content"] = "".join(part["text"] for part in content)
    if not isinstance(message.get("role"), str) or not (isinstance(content, str) or message.get("tool_calls")):
        raise _BadRowError(f"'{field}' has a message without a role or a content as text: keys {', '.join(message)}")
    _text(field, content or "")
    return message


def _text(field: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadRowError(f"'{field}' holds half a surrogate pair, which is no text (cut emoji?)") from None
    return text


def _opens(value) -> bool:
    """A conversation from its beginning, as a reply never starts with these roles."""
    return isinstance(value, list) and value[0]["role"] in ("user", "system", "developer")


def _refuse_empty(chosen, rejected, when: str) -> None:
    for field, value in (("chosen", chosen), ("rejected", rejected)):
        texts = [value] if isinstance(value, str) else [m.get("content", "") for m in value if not m.get("tool_calls")]
        calls = isinstance(value, list) and len(texts) < len(value)
        if not calls and not any(text.strip() for text in texts):
            raise _BadRowError(f"'{field}' is empty{when}")
