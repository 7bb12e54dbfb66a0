"""Answers and what was said of them, in SQLite. One thread at a time; see `api.feedback_log`."""

import json
import sqlite3
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_serve.errors import ConfigError, FeedbackError
from qlora_serve.serve.feedback.experiment import Experiment

Kind = Literal["experiment", "comparison"]
Vote = Literal["up", "down", "best"]
_VERSION = 1
_BUSY_SECONDS = 10.0
"""How long another process may keep the file locked."""
_KEPT_IN_MEMORY = 10_000
_BYTES_IN_MEMORY = 64 * 2**20
"""Answers that are kept where there is no file, and their text; the oldest go first."""

_TABLES = """
CREATE TABLE experiments (
  name TEXT PRIMARY KEY, shares TEXT NOT NULL, begun REAL NOT NULL
) STRICT;
CREATE TABLE answers (
  id TEXT NOT NULL,
  choice INTEGER NOT NULL,
  kind TEXT NOT NULL,
  source TEXT NOT NULL,
  variant TEXT NOT NULL,
  models TEXT NOT NULL,
  identity TEXT NOT NULL,
  key TEXT NOT NULL,
  user TEXT,
  created REAL NOT NULL,
  prompt TEXT NOT NULL,
  answer TEXT NOT NULL,
  finish_reason TEXT NOT NULL,
  tokens INTEGER NOT NULL,
  seconds REAL NOT NULL,
  vote TEXT,
  score REAL,
  said REAL,
  PRIMARY KEY (id, choice)
) STRICT;
CREATE INDEX answers_of ON answers (kind, source);
"""


@dataclass(frozen=True)
class Answered:
    """A whole answer that feedback can be given to."""

    id: str
    choice: int
    """Which of the answer's choices."""
    kind: Kind
    source: str
    """The experiment's name, or the comparison's id."""
    variant: str
    """What the variant is called."""
    models: tuple[str, ...]
    """The names of base and adapters that made it."""
    identity: str
    """Of the adapters' content; empty for the base."""
    key: str
    """The key that asked; empty where none are asked for."""
    user: str | None
    """A hash of the user, if one was named."""
    prompt: dict[str, Any]
    """`messages` and `tools`, or `text`."""
    answer: dict[str, Any]
    """The assistant's message, or `text`."""
    finish_reason: str
    tokens: int
    seconds: float
    """From its beginning to its end."""


@dataclass(frozen=True)
class Said:
    """What somebody says of an answer; None takes nothing back."""

    id: str
    choice: int = 0
    vote: Vote | Literal["none"] | None = None
    score: float | None = None


class FeedbackStore:
    """The file.

    Args:
        path: where it is, made when it is not there; None keeps the latest answers in memory.

    Raises:
        ConfigError: it cannot be used.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600, exist_ok=True)  # prompts are nobody else's business
        try:
            self._db = sqlite3.connect(
                path or ":memory:", timeout=_BUSY_SECONDS, check_same_thread=False,
                isolation_level=None,
            )  # fmt: skip
            self._db.row_factory = sqlite3.Row
            # Readers do not wait for a writer, and a crash loses at most the latest answers.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._make_tables()
            self._sizes: deque[int] = deque()
        except sqlite3.Error as error:
            raise ConfigError(f"{path} cannot be used as feedback file: {error}") from None

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def _make_tables(self) -> None:
        with self._changing():  # of two servers that start at once, one makes them
            [version] = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in _TABLES.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {_VERSION}")
            elif version != _VERSION:
                raise ConfigError(
                    f"the feedback file {self.path} has version {version}; this program reads "
                    f"{_VERSION}"
                )

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """All of a change, or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def add(self, answers: Iterable[Answered]) -> None:
        """Keeps answers."""
        now = time.time()
        rows = [
            (
                one.id, one.choice, one.kind, one.source, one.variant, json.dumps(one.models),
                one.identity, one.key, one.user, now, _json(one.prompt), _json(one.answer),
                one.finish_reason, one.tokens, one.seconds,
            )
            for one in answers
        ]  # fmt: skip
        with self._changing():
            self._db.executemany(
                "INSERT INTO answers (id, choice, kind, source, variant, models, identity, key,"
                " user, created, prompt, answer, finish_reason, tokens, seconds)"
                f" VALUES ({', '.join('?' * 15)})",
                rows,
            )
            if self.path is None:
                self._forget([len(row[10]) + len(row[11]) for row in rows])

    def _forget(self, sizes: Iterable[int]) -> None:
        """Lets the oldest answers go where there is no file, now that some of these sizes came."""
        self._sizes.extend(sizes)
        total, gone = sum(self._sizes), 0
        while len(self._sizes) > _KEPT_IN_MEMORY or total > _BYTES_IN_MEMORY:
            total -= self._sizes.popleft()
            gone += 1
        self._db.execute(
            "DELETE FROM answers WHERE rowid IN (SELECT rowid FROM answers ORDER BY rowid LIMIT ?)",
            (gone,),
        )

    def say(self, said: Said, key: str | None) -> dict[str, Any]:
        """Writes down what is said of an answer; it replaces what was said of it before.

        Of a comparison's answers one is the best: the vote moves.

        Args:
            said: what.
            key: whose answers it may be about; None for everybody's.

        Returns:
            What is known of the answer now.

        Raises:
            FeedbackError: there is no such answer, or it is not one of several.
        """
        with self._changing():
            row = self._db.execute(
                "SELECT kind, source, key FROM answers WHERE id = ? AND choice = ?",
                (said.id, said.choice),
            ).fetchone()
            if row is None or key not in (None, row["key"]):
                raise FeedbackError(
                    f"no answer with id {said.id!r} and choice {said.choice} is kept here; those "
                    "of experiments and comparisons are",
                    "id",
                    is_unknown=True,
                )
            if said.vote == "best":
                if row["kind"] != "comparison":
                    raise FeedbackError("only answers of a comparison can be the best", "vote")
                self._db.execute(
                    "UPDATE answers SET vote = NULL WHERE kind = 'comparison' AND source = ?"
                    " AND vote = 'best'",
                    (row["source"],),
                )
            changes: dict[str, Any] = {"said": time.time()}
            if said.vote is not None:
                changes["vote"] = None if said.vote == "none" else said.vote
            if said.score is not None:
                changes["score"] = said.score
            columns = ", ".join(f"{name} = ?" for name in changes)
            where = (said.id, said.choice)
            self._db.execute(
                f"UPDATE answers SET {columns} WHERE id = ? AND choice = ?",
                (*changes.values(), *where),
            )
            found = self._db.execute(
                "SELECT id, choice, vote, score FROM answers WHERE id = ? AND choice = ?", where
            ).fetchone()
        return dict(found)

    def begin(self, experiment: Experiment) -> None:
        """Keeps an experiment that was begun over HTTP, for the next start."""
        with self._changing():
            self._db.execute(
                "INSERT OR REPLACE INTO experiments VALUES (?, ?, ?)",
                (experiment.name, json.dumps(dict(experiment.shares)), time.time()),
            )

    def end(self, name: str) -> None:
        """Forgets an experiment's split; its answers stay."""
        with self._changing():
            self._db.execute("DELETE FROM experiments WHERE name = ?", (name,))

    def begun(self) -> list[Experiment]:
        """The experiments that were begun over HTTP."""
        rows = self._db.execute("SELECT name, shares FROM experiments ORDER BY begun")
        return [
            Experiment(row["name"], tuple(json.loads(row["shares"]).items()), "http")
            for row in rows
        ]

    def sources(self, kind: Kind = "experiment") -> list[tuple[str, frozenset[str]]]:
        """Experiments, or comparisons, that have answers, with the names of who answered."""
        found: dict[str, set[str]] = {}
        rows = self._db.execute(
            "SELECT DISTINCT source, models FROM answers WHERE kind = ? ORDER BY source", (kind,)
        )
        for row in rows:
            found.setdefault(row["source"], set()).update(json.loads(row["models"]))
        return [(source, frozenset(models)) for source, models in found.items()]

    def rows(
        self,
        columns: Sequence[str],
        kind: Kind | None = None,
        source: str | None = None,
        key: str | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Answers in the order in which they came, a few at a time.

        Args:
            columns: of the table.
            kind: of answers; None for all.
            source: an experiment's name or a comparison's id; None for all.
            key: who asked; None for everybody.
        """
        wanted = {"kind": kind, "source": source, "key": key}
        given = {name: value for name, value in wanted.items() if value is not None}
        where = " AND ".join(f"{name} = ?" for name in given) or "1"
        last = 0
        while True:  # in pieces, so that a long export does not hold up a change
            found = self._db.execute(
                f"SELECT rowid AS place, {', '.join(columns)} FROM answers"
                f" WHERE rowid > ? AND {where} ORDER BY rowid LIMIT 500",
                (last, *given.values()),
            ).fetchall()
            if not found:
                return
            last = found[-1]["place"]
            yield from ({name: row[name] for name in columns} for row in found)


def open_existing(path: Path) -> FeedbackStore:
    """The store of a file that must be there.

    Raises:
        ConfigError: there is none, or it is no feedback file.
    """
    if not path.is_file():
        raise ConfigError(f"no feedback file at {path}; `serve --feedback FILE` writes one")
    return FeedbackStore(path)


def _json(value: Any) -> str:
    # Half a surrogate pair, which JSON can spell out, has no place in a file of UTF-8.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()
