"""Labels that were given elsewhere: pairs and rankings in any layout of the trainer, Argilla's and Label Studio's exports.

Each reader yields votes: (annotator, prompt, text a, text b, choice "a", "b" or "tie", seconds or None).

Argilla 2.8 writes `records.to_json` (and `to_list`, `to_list(flatten=True)`) as its records/_io/_generic.py and
records/_resource.py say; flat records have the record's own columns and its metadata beside the fields. Label Studio's JSON
export is described at labelstud.io/guide/task_format. The result of a `Pairwise` tag names the tag itself in `to_name`
(tags/control/Pairwise.jsx), so the texts are found by their names in the task's data.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..data.sources import load_pairs
from .export import write_rows
from .items import completion_text, prompt_id
from .label_file import SIDES, Label
from .store import LabelStore

Vote = tuple[str, str | list[dict], str, str, str, float | None]
_PROMPTS = ("prompt", "instruction", "question", "input", "text")
_RECORD = ("id", "_server_id", "status", "score")  # columns of a flat Argilla record that are no fields


def import_labels(
    path: str,
    labels: str,
    *,
    layout: str | None = None,
    annotator: str = "imported",
    completions: Sequence[str] | None = None,
    log: Callable[[str], None] = print,
) -> int:
    """Read votes into a labels file, and return the number of labels that are new.

    A labels file that does not exist is made, with a candidates file beside it (`labels` + ".candidates.jsonl").
    layout      "pairs", "argilla" or "label_studio"; None recognises it
    annotator   the name for labels in a file that does not name annotators
    completions names of the fields that hold completions, the left one first; None takes all texts beside the prompt, or
                those of them whose names differ in a last number or letter (response_1, response_2)

    Raises ValueError for a file without votes, and for votes on completions that the labels file does not have.
    """
    layout = layout or recognise(path)
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not one of {', '.join(LAYOUTS)}")
    if completions is not None and layout == "pairs":
        raise ValueError(
            "completions has no effect on pairs: it names the fields of Argilla's and Label Studio's exports"
        )
    votes = list(LAYOUTS[layout](path, annotator, completions))
    if not votes:
        raise ValueError(f"{path} holds no vote on two completions (read as {layout})")
    if not Path(labels).exists():
        candidates = f"{labels}.candidates.jsonl"
        write_rows(candidates, _candidates(votes))
        log(f"wrote {candidates}")
        LabelStore(labels, candidates).close()
    with LabelStore(labels) as store:
        found, unknown = [], 0
        known = {}
        for item in store.items():
            known[prompt_id([item.prompt, item.a, item.b])] = item.id, False
            known[prompt_id([item.prompt, item.b, item.a])] = item.id, True
        there = {(label.annotator, label.item) for label in store.labels()}
        for who, prompt, a, b, choice, seconds in votes:
            key, turned = known.get(prompt_id([prompt, a, b]), (None, False))
            unknown += key is None
            if key is not None and (who, key) not in there:
                there.add((who, key))
                side = SIDES.get(choice, choice) if turned else choice
                found.append(Label(key, who, side, seconds, None, f"from {Path(path).name}", time.time()))
        if unknown:
            raise ValueError(
                f"{unknown} of {len(votes)} votes in {path} are on completions that {labels} does not have: name a new "
                "labels file for them"
            )
        for who in sorted({label.annotator for label in found}):
            store.add_annotator(who, "person")
        store.add_labels(found)
    log(f"{path}: {len(found)} new labels of {len(votes)} votes (read as {layout})")
    return len(found)


def _candidates(votes: list[Vote]) -> list[dict]:
    rows = {}
    for _, prompt, a, b, *_ in votes:
        row = rows.setdefault(prompt_id(prompt), {"id": prompt_id(prompt), "prompt": prompt, "completions": []})
        for text in (a, b):
            if {"text": text} not in row["completions"]:
                row["completions"].append({"text": text})
    return list(rows.values())


def recognise(path: str) -> str:
    """The layout of a file (a key of LAYOUTS), recognised by its first record."""
    if Path(path).suffix not in (".json", ".jsonl"):
        return "pairs"
    record = next(iter(_records(path)), {})
    if "annotations" in record and "data" in record:
        return "label_studio"
    if isinstance(record.get("fields"), dict) or any(key.endswith(".responses") for key in record):
        return "argilla"
    return "pairs"


def _records(path: str) -> list[dict]:
    """The objects of a JSON list, of {"records": [...]} or of JSON lines."""
    text = Path(path).read_text()
    try:
        value = json.loads(text)
    except ValueError:
        try:
            value = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise ValueError(f"{path} is neither JSON nor JSON lines ({error})") from None
    value = value.get("records", [value]) if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        raise ValueError(f"{path} must hold a list of objects")
    return value


def _read_pairs(path: str, annotator: str, _: None) -> Iterator[Vote]:
    for row in load_pairs(path, log=lambda _: None).rows:
        yield annotator, row["prompt"], completion_text(row["chosen"]), completion_text(row["rejected"]), "a", None


def _prompt_and_texts(
    fields: dict, path: str, completions: Sequence[str] | None
) -> tuple[str | list[dict], dict[str, str]]:
    """The prompt, and the completions by the names of their fields."""
    name = next((name for name in _PROMPTS if name in fields), None)
    if name is None:
        raise ValueError(f"{path} has a record without a prompt: its fields are {', '.join(fields)}")
    texts = {key: text for key, text in fields.items() if key != name and isinstance(text, str)}
    if completions is not None:
        lacking = [key for key in completions if key not in texts]
        if lacking:
            raise ValueError(f"{path} has a record without the text {lacking[0]}: its texts are {', '.join(texts)}")
        return fields[name], {key: texts[key] for key in completions}
    if len(texts) > 2:
        stems = Counter(map(_stem, texts))
        numbered = {key: text for key, text in texts.items() if _stem(key) and stems[_stem(key)] > 1}
        texts = numbered or texts
    return fields[name], texts


def _stem(name: str) -> str:
    """A field's name without its last number or letter: of response_1, response-a and answer2."""
    return re.sub(r"([_-][a-zA-Z]|[_-]?\d+)$", "", name)


def _read_label_studio(path: str, annotator: str, completions: Sequence[str] | None) -> Iterator[Vote]:
    """Votes of the JSON export of a project with a <Pairwise> tag; the left text is the first of the two in the data."""
    for record in _records(path):
        prompt, texts = _prompt_and_texts(record["data"], path, completions)
        for annotation in record["annotations"]:
            for result in annotation.get("result", ()):
                if result.get("type") != "pairwise" or annotation.get("was_cancelled"):
                    continue
                names = [name for name in str(result.get("to_name", "")).split(",") if name in texts]
                names = names if len(names) == 2 else list(texts)
                if len(names) != 2:
                    raise ValueError(
                        f"{path}: which two of {', '.join(texts)} were compared? Name them, the left one first (--completions)"
                    )
                choice = {"left": "a", "right": "b"}.get(result.get("value", {}).get("selected"))
                if choice is None:
                    continue  # an older version's "none": nothing was selected
                by = annotation.get("completed_by", annotator)
                by = str(by.get("email", by.get("id", annotator)) if isinstance(by, dict) else by)
                yield by, prompt, texts[names[0]], texts[names[1]], choice, annotation.get("lead_time")


def _read_argilla(path: str, annotator: str, completions: Sequence[str] | None) -> Iterator[Vote]:
    """Votes of records with fields and responses, nested or flat: of a ranking, or of a label that names the better field."""
    for record in _records(path):
        flat = {key: value for key, value in record.items() if "." not in key and key not in _RECORD}
        prompt, texts = _prompt_and_texts(record.get("fields") or flat, path, completions)
        for who, value in _argilla_responses(record, annotator):
            for first, second, choice in _argilla_choices(value, list(texts)):
                yield who, prompt, texts[first], texts[second], choice, None


def _argilla_responses(record: dict, annotator: str) -> Iterator[tuple[str, object]]:
    responses = record.get("responses")
    if isinstance(responses, dict):  # Argilla 2, nested: question -> [{"value", "user_id"}]
        for answers in responses.values():
            yield from ((str(answer.get("user_id", annotator)), answer.get("value")) for answer in answers or ())
    for answer in responses if isinstance(responses, list) else ():  # Argilla 1: [{"user_id", "values": {...}}]
        if answer.get("status", "submitted") == "submitted":
            for value in answer.get("values", {}).values():
                yield str(answer.get("user_id", annotator)), value.get("value")
    for key in [key for key in record if key.endswith(".responses")]:  # Argilla 2, flat
        values, users, states = record[key] or (), record.get(f"{key}.users"), record.get(f"{key}.status")
        for i, value in enumerate(values):
            if not states or states[i] in (None, "submitted"):
                yield (str(users[i]) if users else annotator), value


def _argilla_choices(value, names: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (field, field, choice) of each comparison in a response; a response to another question has none."""
    if isinstance(value, list) and value and all(isinstance(x, dict) and x.get("value") in names for x in value):
        ranked = [(x["value"], x.get("rank", i)) for i, x in enumerate(value)]
    elif isinstance(value, list) and value and all(x in names for x in value):
        ranked = [(name, i) for i, name in enumerate(value)]
    elif isinstance(value, str) and len(names) == 2:
        number = _last_number(value)
        if value in names:
            best = value
        elif value.lower() in ("tie", "equal", "both", "neither"):
            yield names[0], names[1], "tie"
            return
        else:
            best = next((name for name in names if number and _last_number(name) == number), None)
        ranked = [(name, name != best) for name in names] if best else []
    else:
        ranked = []
    for i, (first, rank) in enumerate(ranked):
        for second, other in ranked[i + 1 :]:
            yield first, second, "tie" if rank == other else "a" if rank < other else "b"


def _last_number(text: str) -> str:
    return re.search(r"\d*$", text)[0]


LAYOUTS = {"pairs": _read_pairs, "argilla": _read_argilla, "label_studio": _read_label_studio}
