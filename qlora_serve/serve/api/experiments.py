"""Experiments over HTTP: what runs, what came of it, beginning and ending."""

from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import ConfigDict, Field

from qlora_serve.adapters.folder import check_name
from qlora_serve.errors import ConfigError, FeedbackError, ForbiddenError, RequestError
from qlora_serve.serve.api.access import require_scope
from qlora_serve.serve.api.answers import ExperimentAnswer, ExperimentCard, ExperimentList
from qlora_serve.serve.api.audit import audited
from qlora_serve.serve.api.caller import current_caller
from qlora_serve.serve.api.schemas import Body
from qlora_serve.serve.api.service import Service
from qlora_serve.serve.feedback.experiment import Experiment, make_experiment, parse_variant
from qlora_serve.serve.feedback.intervals import CONFIDENCE
from qlora_serve.serve.feedback.results import experiment_results

router = APIRouter(tags=["experiments"])
_FOR_ADMINS = [Depends(require_scope("admin"))]


class BeginBody(Body):
    """`POST /v1/experiments`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"name": "tone", "variants": {"base": 0.5, "tagging": 0.5}}]
        },
    )

    name: str
    """What requests will name as their model."""
    variants: dict[str, float] = Field(min_length=1)
    """The base's name, adapters' names or `NAME@SCALE`, each with its share; shares are in
    proportion to each other."""


@router.get("/v1/experiments", summary="Every experiment")
async def list_experiments(request: Request) -> ExperimentList:
    """Those that run, then those that have ended and have answers."""
    service: Service = request.app.state.service
    running = [_card(one) for one in service.experiments()]
    known = await service.feedback.run(lambda store: store.sources())
    ended = [
        ExperimentCard(id=name, object="experiment", state="ended", variants={})
        for name, models in known
        if name not in service.feedback.experiments and service.sees_experiment(name, models)
    ]
    return ExperimentList(object="list", data=[*running, *ended])


@router.get("/v1/experiments/{name}", summary="An experiment's results")
async def show_experiment(name: str, request: Request) -> ExperimentAnswer:
    """By variant: answers, votes and scores with confidence intervals, and how different they are
    from the first variant's. Answers of one user are not taken for independent."""
    service: Service = request.app.state.service
    running = service.experiment(name)
    shares = dict(running.shares) if running is not None else {}
    if running is None:
        if not current_caller().allows(name):  # before anything is looked up, as for adapters
            raise _unknown(name)
        known = dict(await service.feedback.run(lambda store: store.sources()))
        hidden = name in service.feedback.experiments or name not in known
        if hidden or not service.sees_experiment(name, known[name]):
            raise _unknown(name)
    found = await service.feedback.run(lambda store: experiment_results(store, name, shares))
    return ExperimentAnswer.model_validate(
        {
            "id": name,
            "object": "experiment",
            "state": "running" if running is not None else "ended",
            "confidence": CONFIDENCE,
            "variants": found,
        }
    )


@router.post("/v1/experiments", summary="Begin an experiment", dependencies=_FOR_ADMINS)
async def begin_experiment(body: BeginBody, request: Request) -> ExperimentCard:
    """Begins one, or changes the shares of one that runs; it begins again with the server."""
    service: Service = request.app.state.service
    with audited("begin", body.name, "experiment", variants=body.variants):
        experiment = _checked(service, body)
        await service.feedback.run(lambda store: store.begin(experiment))
        service.feedback.experiments[body.name] = experiment
    return _card(experiment)


@router.delete("/v1/experiments/{name}", summary="End an experiment", dependencies=_FOR_ADMINS)
async def end_experiment(name: str, request: Request) -> dict[str, Any]:
    """Its name is unknown from now on; its answers and results stay. One of the server's settings
    begins again when the server does."""
    service: Service = request.app.state.service
    with audited("end", name, "experiment"):
        if service.experiment(name) is None:
            raise _unknown(name)
        await service.feedback.run(lambda store: store.end(name))
        service.feedback.experiments.pop(name, None)
    return {"id": name, "object": "experiment", "deleted": True}


def _checked(service: Service, body: BeginBody) -> Experiment:
    """The experiment that a body means.

    Raises:
        RequestError: the name is taken, or it cannot be kept.
        UnknownAdapterError: a variant that does not exist for the caller.
    """
    try:
        experiment = make_experiment(check_name(body.name), body.variants, "http")
    except ConfigError as error:
        raise RequestError(str(error), param="variants") from None
    if not service.feedback.is_kept:
        raise RequestError(
            "this server keeps no experiments; start it with --feedback FILE", param="name"
        )
    # One that runs and is hidden from the caller, for its variants, is not the caller's to replace.
    is_hidden = body.name in service.feedback.experiments and service.experiment(body.name) is None
    if is_hidden or not current_caller().allows(body.name):
        raise ForbiddenError(f"this key may not use the name {body.name!r}")
    taken = {entry.name for entry in service.adapters.entries()} | service.reserved_names
    if body.name in taken:
        raise RequestError(f"{body.name!r} means a model; choose another name", param="name")
    for label, _ in experiment.shares:
        name, scale = parse_variant(label)
        service.choose(name, None, scale)
    return experiment


def _card(one: Experiment) -> ExperimentCard:
    return ExperimentCard(
        id=one.name, object="experiment", state="running", variants=dict(one.shares)
    )


def _unknown(name: str) -> FeedbackError:
    return FeedbackError(f"no experiment is called {name!r}", "name", is_unknown=True)
