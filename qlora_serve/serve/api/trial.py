"""Who answers a request: the model that it names, or the variant that an experiment gives it."""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_serve.errors import AdapterUnavailableError, RequestError, UnknownAdapterError
from qlora_serve.serve.api.caller import current_caller
from qlora_serve.serve.api.chat_body import ChatRequest
from qlora_serve.serve.api.generation import Gathered
from qlora_serve.serve.api.schemas import UserBody
from qlora_serve.serve.api.service import BASE_ALIAS, Service
from qlora_serve.serve.api.tool_format import ToolFormat
from qlora_serve.serve.api.tool_parser import ToolParser, assistant_message
from qlora_serve.serve.engine.request import Event, Finished, GenerationRequest
from qlora_serve.serve.engine.slots import AdapterSelection
from qlora_serve.serve.feedback.experiment import parse_variant
from qlora_serve.serve.feedback.store import Answered, Kind


@dataclass(frozen=True)
class Trial:
    """That a request is part of an experiment."""

    experiment: str
    variant: str
    user: str | None
    """A hash of the user, whom nobody needs to know."""

    @property
    def headers(self) -> dict[str, str]:
        """What tells the client which variant answered."""
        return {"x-experiment": self.experiment, "x-experiment-variant": self.variant}


def choose(service: Service, body: UserBody) -> tuple[AdapterSelection | None, Trial | None]:
    """The adapters that answer, and the experiment that chose them, if one did.

    Raises:
        UnknownAdapterError: nobody has that name.
        AdapterUnavailableError: the experiment's variant, or the adapter, cannot be used.
        RequestError: an experiment together with an adapter or a scale.
    """
    experiment = None if body.model is None else service.experiment(body.model)
    if experiment is None:
        return service.choose(body.model, body.wanted_adapter, body.adapter_scale), None
    for name, given in (("adapter", body.adapter), ("adapter_scale", body.adapter_scale)):
        if given is not None:
            raise RequestError(
                f"{body.model!r} is an experiment, which chooses who answers; leave {name} out",
                param=name,
            )
    variant = experiment.assign(body.user)
    name, scale = parse_variant(variant)
    try:
        adapter = service.choose(name, None, scale)
    except UnknownAdapterError:
        # Not another variant's answer: the results would be about something else.
        raise AdapterUnavailableError(
            f"experiment {body.model!r} sends this request to {variant!r}, and there is no adapter "
            f"called {name!r} now"
        ) from None
    return adapter, Trial(experiment.name, variant, user_hash(body.user))


def user_hash(user: str | None) -> str | None:
    """By which a user's answers are known to belong together, within one key."""
    if user is None:
        return None
    text = f"{key_id()}\0{user}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()[:32]


def key_id() -> str:
    """The caller's key; empty where none are asked for."""
    record = current_caller().record
    return "" if record is None else record.id


Described = tuple[dict[str, Any], dict[str, Any], int]
"""An answer's prompt, its message or text, and the number of the request that made it."""


class Recorder:
    """Keeps the answers of one request for feedback.

    Args:
        service: with the feedback's log.
        trial: which experiment they are part of.
        answer_id: that feedback will name.
        requests: that make them.
        describe: says what the whole answers are, in the order of their choices.
    """

    def __init__(
        self,
        service: Service,
        trial: Trial,
        answer_id: str,
        requests: Sequence[GenerationRequest],
        describe: Callable[[list[Gathered]], Iterable[Described]],
    ) -> None:
        self._service = service
        self._trial = trial
        self._id = answer_id
        self._requests = requests
        self._describe = describe
        self._gathered = [Gathered() for _ in requests]
        self._seconds = [0.0] * len(requests)
        self._began = time.perf_counter()
        self._key = key_id()

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer."""
        return self._trial.headers

    def event(self, number: int, event: Event) -> None:
        """Takes an event of request `number`; all answers are kept when the last has ended well."""
        self._gathered[number].add(event)
        if isinstance(event, Finished):
            self._seconds[number] = time.perf_counter() - self._began
            if all(isinstance(one.ending, Finished) for one in self._gathered):
                self._service.feedback.record(self._answered())

    def _answered(self) -> list[Answered]:
        found = []
        for choice, (prompt, answer, number) in enumerate(self._describe(self._gathered)):
            ending = self._gathered[number].ending
            assert isinstance(ending, Finished)
            found.append(
                answered(
                    self._requests[number], ending, self._seconds[number], kind="experiment",
                    source=self._trial.experiment, variant=self._trial.variant, key=self._key,
                    user=self._trial.user, prompt=prompt, answer=answer, id=self._id,
                    choice=choice,
                )
            )  # fmt: skip
        return found


def describe_chat(
    body: ChatRequest, form: ToolFormat | None
) -> Callable[[list[Gathered]], Iterable[Described]]:
    """How the answers to a chat are kept: as rows of training data hold them."""
    prompt: dict[str, Any] = {
        "messages": [message.as_template_input() for message in body.messages],
        "tools": [tool.as_template_input() for tool in body.active_tools],
    }

    def describe(gathered: list[Gathered]) -> Iterable[Described]:
        for number, one in enumerate(gathered):
            parser = None if form is None else ToolParser(form, not body.parallel_tool_calls)
            message = assistant_message(one.text, parser)
            del message["refusal"]
            yield prompt, message, number

    return describe


def answered(
    request: GenerationRequest, ending: Finished, seconds: float, *, kind: Kind, **fields: Any
) -> Answered:
    """What is kept of a finished request.

    Args:
        request: that was answered.
        ending: how it ended.
        seconds: how long it took.
        kind: what it is part of.
        fields: the rest of `Answered`.
    """
    adapter = request.adapter
    names = (BASE_ALIAS,)
    if adapter is not None:
        names = tuple(adapter.name.split("+"))
    return Answered(
        kind=kind,
        models=names,
        identity="" if adapter is None else adapter.identity,
        finish_reason=ending.reason,
        tokens=ending.usage.completion_tokens,
        seconds=seconds,
        **fields,
    )
