"""Score model answers on the two example data sets in ``examples/data``.

Two things are measured apart: whether an answer keeps the format exactly, and how much of
what it says is right.  Standard library only, so any script or test can load it.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

LABELS = ("sport", "money", "health", "tech", "travel")
TICKET_FIELDS = ("category", "product", "urgent", "refund")

# One data row as it stands in the JSONL files: {"messages": [system, user, assistant]}.
Row = dict[str, list[dict[str, str]]]

# Both formats are matched as text, not parsed: a JSON parser would let through spaces, another
# order of keys or a key given twice, and whoever reads the answers by program may not.
_LABEL_SCORE = re.compile(rf"({'|'.join(LABELS)})=([0-3])")
_TAGGING = re.compile(" ".join([_LABEL_SCORE.pattern] * len(LABELS)))
_TICKET = re.compile(
    r'\{"category":"(billing|delivery|account|defect)"'
    # One line of plain text; neither blank at its ends nor in need of JSON escapes.
    r',"product":"([^\s"\\](?:[^"\\\n\r\t]*[^\s"\\])?)"'
    r',"urgent":(true|false)'
    r',"refund":(true|false)\}'
)


@dataclass(frozen=True)
class Score:
    """The score of one answer; `content` runs from 0 (all wrong) to 1 (all right)."""

    well_formed: bool
    content: float


@dataclass(frozen=True)
class Summary:
    """The averages of many scores."""

    count: int
    well_formed: float
    content: float


_ILL_FORMED = Score(well_formed=False, content=0.0)


def score_tagging(answer: str, expected: str) -> Score:
    """Score a tagging answer; its content is right if it ranks the right label alone on top."""
    wanted = _top_label(expected)
    if not wanted:
        raise ValueError(f"not a tagging answer with one top label: {expected!r}")
    given = _top_label(answer)
    if given is None:
        return _ILL_FORMED
    return Score(well_formed=True, content=1.0 if given == wanted else 0.0)


def score_tickets(answer: str, expected: str) -> Score:
    """Score a ticket answer; its content is the share of the four fields that are right."""
    wanted = _ticket_values(expected)
    if wanted is None:
        raise ValueError(f"not a ticket answer: {expected!r}")
    given = _ticket_values(answer)
    if given is None:
        return _ILL_FORMED
    right = sum(one == other for one, other in zip(given, wanted, strict=True))
    return Score(well_formed=True, content=right / len(TICKET_FIELDS))


def summarise(scores: Sequence[Score]) -> Summary:
    """Average the scores; ill-formed answers count as 0 in the content."""
    if not scores:
        raise ValueError("no scores to summarise")
    return Summary(
        count=len(scores),
        well_formed=sum(score.well_formed for score in scores) / len(scores),
        content=sum(score.content for score in scores) / len(scores),
    )


def chance_level(rows: Iterable[Row]) -> float:
    """Return the content that the best constant answer reaches on `rows` of one data set.

    This is what a model gets that learned the format and the commonest values but never
    looks at the text: for tagging the share of the commonest top label, for tickets the mean,
    over the four fields, of the share of the commonest value.
    """
    answers = [row["messages"][-1]["content"] for row in rows]
    if not answers:
        raise ValueError("no rows to take the chance level from")
    columns: list[Sequence[str]]
    tops = [top for answer in answers if (top := _top_label(answer))]
    tickets = [values for answer in answers if (values := _ticket_values(answer)) is not None]
    if len(tops) == len(answers):
        columns = [tops]
    elif len(tickets) == len(answers):
        columns = list(zip(*tickets, strict=True))
    else:
        raise ValueError("the rows are neither all tagging rows nor all ticket rows")
    shares = [Counter(column).most_common(1)[0][1] / len(answers) for column in columns]
    return sum(shares) / len(shares)


def read_rows(path: Path) -> list[Row]:
    """Read a JSONL data file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _top_label(answer: str) -> str | None:
    """Return the label with the highest score, "" if several share it, None if ill-formed."""
    if _TAGGING.fullmatch(answer.strip()) is None:
        return None
    pairs = [(label, int(score)) for label, score in _LABEL_SCORE.findall(answer)]
    # The order is part of the format: highest score first, equal scores in the order of LABELS.
    # Building the line anew from its scores also shows a label that is missing or there twice.
    scores = dict(pairs)
    if pairs != sorted(((label, scores.get(label, 0)) for label in LABELS), key=lambda p: -p[1]):
        return None
    # A tie names no label, so it must not be taken for a right answer: "all 3" would win always.
    return pairs[0][0] if pairs[0][1] > pairs[1][1] else ""


def _ticket_values(answer: str) -> tuple[str, ...] | None:
    """Return the four values as they stand in the answer, or None if it is ill-formed."""
    match = _TICKET.fullmatch(answer.strip())
    return None if match is None else match.groups()
