"""Feedback over HTTP: votes and scores, standings, and rows to train on."""

import json
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import ConfigDict, Field, model_validator

from qlora_serve.errors import ForbiddenError
from qlora_serve.serve.api.access import require_scope
from qlora_serve.serve.api.answers import FeedbackAnswer, StandingsAnswer
from qlora_serve.serve.api.caller import current_caller
from qlora_serve.serve.api.schemas import Body, refused
from qlora_serve.serve.api.service import Service
from qlora_serve.serve.feedback.export import ExportForm, Wanted, export_rows
from qlora_serve.serve.feedback.results import standings
from qlora_serve.serve.feedback.store import FeedbackStore, Said

router = APIRouter(tags=["feedback"])
_ROWS_AT_ONCE = 200
_JSONL: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/jsonl": {"example": '{"messages": [...]}\n'}}}
}


class FeedbackBody(Body):
    """`POST /v1/feedback`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"id": "chatcmpl-0123", "vote": "up"}]},
    )

    id: str = Field(min_length=1)
    """The answer's id: of an experiment's answer, or of one of a comparison's."""
    choice: int = Field(default=0, ge=0, lt=2**31)
    """Which choice of an answer with several."""
    vote: Literal["up", "down", "best", "none"] | None = None
    """`best` is for comparisons, where it moves; `none` takes a vote back."""
    score: float | None = Field(default=None, ge=-1e6, le=1e6, allow_inf_nan=False)
    """A number on a scale of your own, the same for all answers."""

    @model_validator(mode="after")
    def _says_something(self) -> "FeedbackBody":
        if self.vote is None and self.score is None:
            raise refused("vote", "give a vote or a score")
        return self


class ExportQuery(Body):
    """Which answers to export."""

    model_config = ConfigDict(strict=False)

    experiment: str | None = None
    """One experiment's answers only."""
    variant: str | None = None
    """One variant's answers only."""
    vote: Literal["up", "down", "best"] | None = None
    """With this vote only."""
    min_score: float | None = None
    """Scored at least so high."""
    form: ExportForm = "chat"
    """`chat` for chats as `messages`, `text` for completions as `text`."""
    cut: bool = False
    """Also answers that were cut at their most tokens."""


@router.post(
    "/v1/feedback", summary="Vote for an answer, or score it",
    dependencies=[Depends(require_scope("infer"))],
)  # fmt: skip
async def give_feedback(body: FeedbackBody, request: Request) -> FeedbackAnswer:
    """Replaces what was said of the answer before. A key speaks of its own answers only."""
    service: Service = request.app.state.service
    said = Said(body.id, body.choice, body.vote, body.score)
    key = _own_key()  # who asks is known to this task only, and the store has its own thread
    found = await service.feedback.run(lambda store: store.say(said, key))
    return FeedbackAnswer(object="feedback", **found)


@router.get("/v1/feedback/standings", summary="Who won comparisons")
async def show_standings(request: Request) -> StandingsAnswer:
    """Each variant's share of the comparisons that have a best answer, with a confidence interval.

    Over one's own key's comparisons; for admins over everybody's.
    """
    service: Service = request.app.state.service
    key, sees = _own_key(), service.sees
    known = {
        name
        for _, models in await service.feedback.run(lambda store: store.sources("comparison"))
        for name in models
    }
    visible = set(filter(sees, known))
    found = await service.feedback.run(lambda store: standings(store, key, visible.__contains__))
    return StandingsAnswer.model_validate(
        {"object": "list", "is_kept": service.feedback.is_kept, "data": found}
    )


@router.get(
    "/v1/feedback/export", summary="Answers as rows to train on", response_model=None,
    responses=_JSONL, dependencies=[Depends(require_scope("admin"))],
)  # fmt: skip
async def export(request: Request, query: Annotated[ExportQuery, Query()]) -> StreamingResponse:
    """JSON Lines that `qlora-serve train --data` reads. Only for keys that nothing is hidden from:
    the rows are everybody's."""
    service: Service = request.app.state.service
    if not current_caller().sees_all:
        raise ForbiddenError("this needs a key that may use every adapter and the base")
    wanted = Wanted(**query.model_dump())

    async def lines() -> AsyncIterator[str]:
        rows: Iterator[dict[str, Any]] | None = None

        def more(store: FeedbackStore) -> list[str]:
            nonlocal rows
            rows = export_rows(store, wanted) if rows is None else rows
            return [json.dumps(row, ensure_ascii=False) for row in islice(rows, _ROWS_AT_ONCE)]

        while found := await service.feedback.run(more):
            yield "\n".join(found) + "\n"

    return StreamingResponse(lines(), media_type="application/jsonl")


def _own_key() -> str | None:
    """Whose answers the caller may speak of: its key's; None for everybody's."""
    caller = current_caller()
    if caller.record is None or (caller.has("admin") and caller.sees_all):
        return None
    return caller.record.id
