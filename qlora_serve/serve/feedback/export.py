"""Answers as rows that `qlora-serve train` reads."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from qlora_serve.serve.feedback.store import FeedbackStore, Kind

ExportForm = Literal["chat", "text"]
_COLUMNS = (
    "id", "choice", "kind", "source", "variant", "models", "prompt", "answer", "finish_reason",
    "vote", "score",
)  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """Which answers."""

    experiment: str | None = None
    """One experiment's; None for all answers, those of comparisons too."""
    variant: str | None = None
    vote: Literal["up", "down", "best"] | None = None
    min_score: float | None = None
    form: ExportForm = "chat"
    """`chat` gives chats as `messages`, `text` gives completions as `text`: train reads one format
    a file."""
    cut: bool = False
    """Also answers that were cut at their most tokens, which teach a model to stop anywhere."""


def export_rows(store: FeedbackStore, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """The rows, oldest first. What nothing can be learned from (an empty answer) is left out."""
    kind: Kind | None = None if wanted.experiment is None else "experiment"
    for row in store.rows(_COLUMNS, kind, wanted.experiment):
        if _fits(row, wanted):
            content = _content(json.loads(row["prompt"]), json.loads(row["answer"]), wanted.form)
            if content is not None:
                yield {**content, **_labels(row)}


def _fits(row: dict[str, Any], wanted: Wanted) -> bool:
    if row["finish_reason"] == "length" and not wanted.cut:
        return False
    if wanted.min_score is not None and (row["score"] is None or row["score"] < wanted.min_score):
        return False
    return wanted.variant in (None, row["variant"]) and wanted.vote in (None, row["vote"])


def _content(
    prompt: dict[str, Any], answer: dict[str, Any], form: ExportForm
) -> dict[str, Any] | None:
    if "text" in prompt:
        text = prompt["text"] + answer["text"]
        return {"text": text} if form == "text" and text.strip() else None
    has_words = bool((answer.get("content") or "").strip() or answer.get("tool_calls"))
    if form == "text" or not has_words:
        return None
    tools = {"tools": prompt["tools"]} if prompt.get("tools") else {}
    return {"messages": [*prompt["messages"], answer], **tools}


def _labels(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "choice": row["choice"],
        "experiment": row["source"] if row["kind"] == "experiment" else None,
        "comparison": row["source"] if row["kind"] == "comparison" else None,
        "variant": row["variant"],
        "vote": row["vote"],
        "score": row["score"],
    }
