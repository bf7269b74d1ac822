"""`LabelStore`: the labels file (label_file.py), and the pairs that are shown to people: who sees which, and their choices."""

import dataclasses
import random
import secrets
import sqlite3
import time

from .items import Item
from .label_file import SIDES, Label, LabelFile

SHOWN_SECONDS = 1800  # after this time a pair that was shown may be given to another person


@dataclasses.dataclass(frozen=True)
class Showing:
    """An item that is shown to a person, with `shown_left` on the left. The token is good for one label."""

    item: Item
    shown_left: str
    token: str


class LabelStore(LabelFile):
    """Pairs to label and their labels, and what each person is shown; arguments and errors are those of `LabelFile`."""

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
