"""The labels file: pairs, annotators and labels in one SQLite file (WAL), one transaction per label.

A label is on disk before `add_label` returns, so kill -9 loses no label that was reported as saved. People and judges are
annotators in one table. Several processes may use a file at once.
"""

import contextlib
import dataclasses
import json
import random
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .items import Item, fingerprint, in_rounds, make_items, read_candidates

CHOICES = ("a", "b", "tie", "bad", "skip")  # "bad" calls both bad; a skip does not count as a label
SIDES = {"a": "b", "b": "a"}
SHOWN_SECONDS = 1800  # after this time a pair that was shown may be given to another person
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


@dataclasses.dataclass(frozen=True)
class Showing:
    """An item that is shown to a person, with `shown_left` on the left. The token is good for one label."""

    item: Item
    shown_left: str
    token: str


class LabelStore:
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

    def __enter__(self) -> "LabelStore":
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

    # What people see.

    def show(
        self,
        annotator: str,
        *,
        labels_per_pair: int = 1,
        overlap: bool = False,
        limit: int | None = None,
        gold_every: int = 10,
    ) -> Showing | None:
        """The next item for a person, with sides drawn anew, or None when nothing is left for them now.

        An item that was shown and not labelled is shown again. An item that is shown to another person (unless `overlap`)
        or has `labels_per_pair` labels is not given out. Only the first `limit` training items are asked, and one question
        in `gold_every` is a gold one while there are any.
        """
        with self._transaction() as db:
            key = self._pending(db, annotator)
            if key is None:
                (given,) = db.execute("SELECT count(*) FROM labels WHERE annotator = ?", [annotator]).fetchone()
                key = self._free(db, annotator, labels_per_pair, overlap, -1 if limit is None else limit)
                if key is not None and given % gold_every == gold_every // 2:
                    key = self._free_gold(db, annotator) or key
            if key is None:
                return None
            return self._put_up(db, annotator, key)

    def label_showing(self, annotator: str, token: str, choice: str, note: str | None = None) -> None:
        """Save a person's choice for the item that is shown to them: "left", "right", "tie", "bad" or "skip".

        Raises ValueError and saves nothing where `token` is not that of the last showing: the link was opened in another
        window, or the label came twice.
        """
        with self._transaction() as db:
            found = db.execute(
                "SELECT item, shown_left, since FROM showings WHERE annotator = ? AND token = ?", [annotator, token]
            ).fetchone()
            if found is None:
                raise ValueError(
                    "this pair is not open here any more (your link was opened in another window, or the label came "
                    "twice): nothing was saved now and nothing is lost. Reload the page to go on here"
                )
            item, left, since = found
            side = {"left": left, "right": SIDES[left]}.get(choice, choice)
            now = time.time()
            self._insert(db, Label(item, annotator, side, max(0.0, now - since), left, note, now))
            db.execute("DELETE FROM showings WHERE annotator = ?", [annotator])

    def undo(self, annotator: str) -> str | None:
        """Take an annotator's last label back and show them its item again; returns the item's id, or None without a label."""
        with self._transaction() as db:
            query = "SELECT id, item FROM labels WHERE annotator = ? ORDER BY id DESC LIMIT 1"
            found = db.execute(query, [annotator]).fetchone()
            if found is None:
                return None
            db.execute("DELETE FROM labels WHERE id = ?", [found[0]])
            self._put_up(db, annotator, found[1])
            return found[1]

    def showing(self, annotator: str, token: str) -> Showing | None:
        """The showing with this `token`, or None when it is no longer shown to the annotator."""
        found = self._rows(
            "SELECT item, shown_left FROM showings WHERE annotator = ? AND token = ?", [annotator, token]
        )
        return Showing(self.item(found[0][0]), found[0][1], token) if found else None

    def _put_up(self, db: sqlite3.Connection, annotator: str, key: str) -> Showing:
        showing = Showing(self.item(key), random.choice("ab"), secrets.token_urlsafe(12))
        values = [annotator, key, showing.shown_left, showing.token, time.time()]
        db.execute("INSERT OR REPLACE INTO showings VALUES (?, ?, ?, ?, ?)", values)
        return showing

    def _pending(self, db: sqlite3.Connection, annotator: str) -> str | None:
        query = (
            "SELECT item FROM showings s WHERE annotator = ? AND NOT EXISTS "
            "(SELECT 1 FROM labels l WHERE l.item = s.item AND l.annotator = s.annotator)"
        )
        found = db.execute(query, [annotator]).fetchone()
        return found and found[0]

    def _free(self, db: sqlite3.Connection, annotator: str, wanted: int, overlap: bool, limit: int) -> str | None:
        query = """
            WITH asked AS (SELECT id, position FROM items WHERE gold IS NULL AND split = 'train'
                           ORDER BY position LIMIT :limit),
            counted AS (SELECT id, position,
                (SELECT count(*) FROM labels l JOIN annotators p ON p.name = l.annotator
                 WHERE l.item = asked.id AND p.kind = 'person' AND l.choice != 'skip') AS given,
                (SELECT count(*) FROM showings s
                 WHERE s.item = asked.id AND s.annotator != :me AND s.since > :fresh) AS shown FROM asked)
            SELECT id FROM counted WHERE given + shown < :wanted AND (:overlap OR shown = 0)
                AND NOT EXISTS (SELECT 1 FROM labels l WHERE l.item = counted.id AND l.annotator = :me)
            ORDER BY position LIMIT 1"""
        values = {"me": annotator, "fresh": time.time() - SHOWN_SECONDS, "wanted": wanted}
        found = db.execute(query, values | {"overlap": overlap, "limit": limit}).fetchone()
        return found and found[0]

    def _free_gold(self, db: sqlite3.Connection, annotator: str) -> str | None:
        query = (
            "SELECT id FROM items WHERE gold IS NOT NULL AND id NOT IN "
            "(SELECT item FROM labels WHERE annotator = ?) ORDER BY position LIMIT 1"
        )
        found = db.execute(query, [annotator]).fetchone()
        return found and found[0]


def _row(item: Item, position: int) -> tuple:
    return item.id, position, item.gold, item.split, json.dumps(dataclasses.asdict(item))
