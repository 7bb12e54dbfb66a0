"""What came of an experiment, and who won comparisons: counts with confidence intervals."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from qlora_serve.serve.feedback import intervals
from qlora_serve.serve.feedback.intervals import Interval, Sample
from qlora_serve.serve.feedback.store import FeedbackStore

_COLUMNS = ("id", "variant", "identity", "user", "tokens", "seconds", "vote", "score")


def experiment_results(
    store: FeedbackStore, name: str, shares: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Results by variant; what is different from the first variant is said with its interval.

    Args:
        store: where the answers are.
        name: the experiment's.
        shares: of its variants now; variants that it had earlier have none.
    """
    answers: dict[str, list[dict[str, Any]]] = {label: [] for label in shares}
    for row in store.rows(_COLUMNS, "experiment", name):
        answers.setdefault(row["variant"], []).append(row)
    found = []
    first: Sequence[dict[str, Any]] | None = None
    for label, rows in answers.items():
        difference = None if first is None else _differences(rows, first)
        found.append(
            {
                "name": label,
                "share": shares.get(label),
                **_variant(rows),
                "difference_from_first": difference,
            }
        )
        first = rows if first is None else first
    return found


def _variant(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    votes, scores = _votes(rows), _scores(rows)
    return {
        "answers": len(rows),
        "users": len({row["user"] for row in rows} - {None}),
        "identities": sorted({row["identity"] for row in rows} - {""}),
        "up": int(sum(votes.values)),
        "down": len(votes.values) - int(sum(votes.values)),
        "up_rate": _interval(intervals.rate, votes),
        "scores": len(scores.values),
        "mean_score": _interval(intervals.mean, scores),
        "mean_tokens": fmean(row["tokens"] for row in rows) if rows else None,
        "mean_seconds": fmean(row["seconds"] for row in rows) if rows else None,
    }


def _differences(rows: Sequence[dict[str, Any]], first: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "up_rate": _interval(intervals.rate_difference, _votes(rows), _votes(first)),
        "mean_score": _interval(intervals.mean_difference, _scores(rows), _scores(first)),
    }


def _votes(rows: Iterable[dict[str, Any]]) -> Sample:
    voted = [row for row in rows if row["vote"] in ("up", "down")]
    return Sample([float(row["vote"] == "up") for row in voted], _clusters(voted))


def _scores(rows: Iterable[dict[str, Any]]) -> Sample:
    scored = [row for row in rows if row["score"] is not None]
    return Sample([row["score"] for row in scored], _clusters(scored))


def _clusters(rows: Sequence[dict[str, Any]]) -> list[Any]:
    """Answers to one user may depend on each other, and choices of one answer do."""
    return [row["user"] or row["id"] for row in rows]


def _interval(measure: Callable[..., Interval], *samples: Sample) -> dict[str, Any] | None:
    if not all(sample.values for sample in samples):
        return None
    return asdict(measure(*samples))


def standings(
    store: FeedbackStore, key: str | None, sees: Callable[[str], bool]
) -> list[dict[str, Any]]:
    """How often each variant was the best of the comparisons that have one, the best first.

    Args:
        store: where the answers are.
        key: whose comparisons; None for everybody's.
        sees: whether a model exists for who asks; comparisons with others are left out.
    """
    comparisons: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in store.rows(("source", "variant", "models", "vote"), "comparison", key=key):
        comparisons[row["source"]].append(row)
    best: Counter[str] = Counter()
    among: Counter[str] = Counter()
    for rows in comparisons.values():
        winners = [row["variant"] for row in rows if row["vote"] == "best"]
        if not winners or not all(sees(name) for row in rows for name in json.loads(row["models"])):
            continue
        best.update(winners)
        among.update({row["variant"] for row in rows})
    found = []
    for label, count in among.items():
        won = best[label]
        sample = Sample([1.0] * won + [0.0] * (count - won), range(count))
        found.append(
            {"variant": label, "best": won, "of": count, "rate": asdict(intervals.rate(sample))}
        )
    return sorted(found, key=lambda one: (-one["rate"]["value"], -one["of"], one["variant"]))
