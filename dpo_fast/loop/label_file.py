"""The labels file: pairs, annotators and labels in one SQLite file (WAL), one transaction per label.

A label is on disk before `add_label` returns, so kill -9 loses no label that was reported as saved. People and judges are
annotators in one table. Several processes may use a file at once. store.py adds what people are shown.
"""

import contextlib
import dataclasses
import json
import secrets
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

from .items import Item, fingerprint, in_rounds, make_items, read_candidates

CHOICES = ("a", "b", "tie", "bad", "skip")  # "bad" calls both bad; a skip does not count as a label
SIDES = {"a": "b", "b": "a"}
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE items (id TEXT PRIMARY KEY, position INTEGER NOT NULL, gold TEXT, split TEXT NOT NULL, content TEXT NOT NULL);
CREATE TABLE annotators (name TEXT PRIMARY KEY, kind TEXT NOT NULL, secret TEXT UNIQUE NOT NULL);
CREATE TABLE labels (id INTEGER PRIMARY KEY, item TEXT NOT NULL REFERENCES items, annotator TEXT NOT NULL REFERENCES
    annotators, choice TEXT NOT NULL, seconds REAL, shown_left TEXT, note TEXT, created REAL NOT NULL,
    UNIQUE (item, annotator));
CREATE TABLE showings (annotator TEXT PRIMARY KEY, item TEXT NOT NULL, shown_left TEXT NOT NULL, token TEXT NOT NULL,
    since REAL NOT NULL)
"""


@dataclasses.dataclass(frozen=True)
class Label:
    """One annotator's choice for one item. `seconds` and `shown_left` ("a" or "b") are None where they are not known."""

    item: str
    annotator: str
    choice: str
    seconds: float | None
    shown_left: str | None
    note: str | None
    created: float  # Unix time


class LabelFile:
    """Pairs to label and their labels.

    path        labels file; it is created from `candidates` if absent
    candidates  candidates file, needed to create the labels file

    Raises FileNotFoundError for a missing file, ValueError for one that is no labels file or holds other candidates.
    """

    def __init__(self, path: str | Path, candidates: str | Path | None = None):
        self.path = Path(path)
        rows = None if candidates is None else read_candidates(candidates)
        if rows is None and not self.path.exists():
            raise FileNotFoundError(f"no such labels file: {path} (give the candidates file to make it)")
        # There is one connection under one lock; other processes wait for up to half a minute.
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._create_or_check(rows, candidates)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is no labels file ({error})") from None

    def _create_or_check(self, rows: list[dict] | None, candidates) -> None:
        with self._transaction() as db:
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not tables and rows is not None:
                items = in_rounds(make_items(rows))
                for statement in _SCHEMA.split(";\n"):
                    db.execute(statement)
                db.execute("INSERT INTO meta VALUES ('candidates', ?)", [fingerprint(rows)])
                db.executemany("INSERT INTO items VALUES (?, ?, ?, ?, ?)", map(_row, items, range(len(items))))
                return
            if "showings" not in tables:
                raise ValueError(f"{self.path} is no labels file: it has no labels table")
            (found,) = db.execute("SELECT value FROM meta WHERE key = 'candidates'").fetchone()
        if rows is not None and found != fingerprint(rows):
            raise ValueError(
                f"{self.path} holds labels of other candidates than {candidates}: give the candidates file that it was "
                "made from, or name a new labels file"
            )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _rows(self, query: str, values: Sequence = ()) -> list[tuple]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def close(self) -> None:
        """Close the file; labels were saved long before."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # Items.

    def items(self, split: str | None = None, *, gold: bool = False) -> list[Item]:
        """The items of a split (default: all) in the order in which they are to be labelled, or the gold questions."""
        query = "SELECT content FROM items WHERE (gold IS NOT NULL) = ? AND (? IS NULL OR split = ?) ORDER BY position"
        return [Item(**json.loads(content)) for (content,) in self._rows(query, [gold, split, split])]

    def item(self, key: str) -> Item:
        """One item. Raises ValueError for an unknown id."""
        found = self._rows("SELECT content FROM items WHERE id = ?", [key])
        if not found:
            raise ValueError(f"{self.path} has no pair {key}")
        return Item(**json.loads(found[0][0]))

    def add_gold(self, items: Sequence[Item]) -> None:
        """Add questions with a known answer; those that are there already stay."""
        with self._transaction() as db:
            db.executemany("INSERT OR IGNORE INTO items VALUES (?, ?, ?, ?, ?)", map(_row, items, range(len(items))))

    def order(self, priority: Callable[[Item], float], seed: int = 0) -> None:
        """Have the items labelled in rounds over the prompts, lower `priority` first."""
        items = in_rounds(self.items(), priority, seed)
        with self._transaction() as db:
            db.executemany("UPDATE items SET position = ? WHERE id = ?", ((i, x.id) for i, x in enumerate(items)))

    # Annotators.

    def add_annotator(self, name: str, kind: str = "person") -> str:
        """The secret of an annotator's link, which the first call makes. `kind` is "person" or "judge".

        Raises ValueError where the name belongs to an annotator of the other kind.
        """
        if not name.strip():
            raise ValueError("an annotator needs a name")
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO annotators VALUES (?, ?, ?)", [name, kind, secrets.token_urlsafe(12)])
            known, secret = db.execute("SELECT kind, secret FROM annotators WHERE name = ?", [name]).fetchone()
        if known != kind:
            raise ValueError(f"{name} is a {known} in {self.path}, not a {kind}: choose another name")
        return secret

    def annotators(self) -> dict[str, str]:
        """Annotators: name -> kind."""
        return dict(self._rows("SELECT name, kind FROM annotators ORDER BY name"))

    def annotator_of(self, secret: str) -> str | None:
        """The person whose link holds `secret`, or None."""
        found = self._rows("SELECT name FROM annotators WHERE secret = ? AND kind = 'person'", [secret])
        return found[0][0] if found else None

    # Labels.

    def add_label(
        self,
        annotator: str,
        item: str,
        choice: str,
        seconds: float | None = None,
        shown_left: str | None = None,
        note: str | None = None,
    ) -> None:
        """Save the choice, one of CHOICES, of an `annotator` (known by `add_annotator`) for an item.

        Raises ValueError for another choice, an unknown annotator or item, and a second label for the same item.
        """
        self.add_labels([Label(item, annotator, choice, seconds, shown_left, note, time.time())])

    def add_labels(self, labels: Sequence[Label]) -> None:
        """Save several labels at once: all or none."""
        with self._transaction() as db:
            for label in labels:
                self._insert(db, label)

    def _insert(self, db: sqlite3.Connection, label: Label) -> None:
        if label.choice not in CHOICES:
            raise ValueError(f"a choice is one of {', '.join(CHOICES)}, not {label.choice!r}")
        for table, key, value in (("items", "id", label.item), ("annotators", "name", label.annotator)):
            if not db.execute(f"SELECT 1 FROM {table} WHERE {key} = ?", [value]).fetchone():
                raise ValueError(f"{self.path} has no {table[:-1]} {value}")
        try:
            db.execute("INSERT INTO labels VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", dataclasses.astuple(label))
        except sqlite3.IntegrityError:
            raise ValueError(
                f"{label.annotator} has labelled pair {label.item} already: undo that label first"
            ) from None

    def labels(self, split: str | None = None, *, gold: bool = False) -> list[Label]:
        """All labels of a split's items (default: of all items), skips included, oldest first; or those of gold questions."""
        query = (
            "SELECT item, annotator, choice, seconds, shown_left, note, created FROM labels JOIN items ON items.id = item "
            "WHERE (gold IS NOT NULL) = ? AND (? IS NULL OR split = ?) ORDER BY labels.id"
        )
        return [Label(*row) for row in self._rows(query, [gold, split, split])]

    def labelled_by(self, annotator: str) -> set[str]:
        """Ids of the items that an annotator has labelled or skipped."""
        return {item for (item,) in self._rows("SELECT item FROM labels WHERE annotator = ?", [annotator])}

    def counts(self, labels_per_pair: int = 1, *, split: str = "train", limit: int | None = None) -> dict[str, int]:
        """Numbers of `items`, of `labels` on them by people and judges, of `wanted` labels by people, and of those `done`."""
        wanted = self.items(split)[:limit]
        people = {name for name, kind in self.annotators().items() if kind == "person"}
        keys, given = {item.id for item in wanted}, [x for x in self.labels(split) if x.choice != "skip"]
        per_item = {key: 0 for key in keys}
        for label in given:
            if label.item in keys and label.annotator in people:
                per_item[label.item] += 1
        return {
            "items": len(wanted),
            "labels": sum(label.item in keys for label in given),
            "wanted": labels_per_pair * len(wanted),
            "done": sum(min(count, labels_per_pair) for count in per_item.values()),
        }

    def waiting(self, people: Sequence[str], labels_per_pair: int = 1, *, limit: int | None = None) -> int:
        """How many of the first `limit` training pairs lack a label that one of `people` could still give.

        Who labelled or skipped a pair is not asked about it again, so a pair that all of them skipped is not counted.
        """
        given, asked = defaultdict(int), {name: self.labelled_by(name) for name in people}
        persons = {name for name, kind in self.annotators().items() if kind == "person"}
        for label in self.labels("train"):
            given[label.item] += label.annotator in persons and label.choice != "skip"
        open_pairs = [item.id for item in self.items("train")[:limit] if given[item.id] < labels_per_pair]
        return sum(any(key not in done for done in asked.values()) for key in open_pairs)


def _row(item: Item, position: int) -> tuple:
    return item.id, position, item.gold, item.split, json.dumps(dataclasses.asdict(item))
