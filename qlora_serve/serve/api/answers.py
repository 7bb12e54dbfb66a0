"""The shapes of answers, for the OpenAPI page; the routes write them as plain dictionaries."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ErrorDetail(Answer):
    """What went wrong."""

    message: str
    """What was given, what was expected and what to do."""
    type: Literal[
        "invalid_request_error",
        "not_found_error",
        "permission_error",
        "adapter_error",
        "requests",
        "tokens",
        "server_error",
    ]
    param: str | None
    """The field at fault."""
    code: str | None


class ErrorAnswer(Answer):
    """Every answer that is not a success."""

    error: ErrorDetail


class CachedTokens(Answer):
    """Of the prompt's tokens."""

    cached_tokens: int
    """Not computed again, because an earlier prompt began alike."""


class UsageAnswer(Answer):
    """Counts of tokens, over all choices."""

    prompt_tokens: int
    """A prompt that choices share counts once."""
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CalledFunctionAnswer(Answer):
    """What to call."""

    name: str
    arguments: str
    """JSON, as the model wrote it."""


class ToolCallAnswer(Answer):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: CalledFunctionAnswer


class MessageAnswer(Answer):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallAnswer] | None = None


class ChatChoice(Answer):
    """One of `n` answers."""

    index: int
    message: MessageAnswer
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatAnswer(Answer):
    """A whole `chat.completion`; streams send `chat.completion.chunk`s."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    """Who answered: the adapter's name, or the base's."""
    choices: list[ChatChoice]
    usage: UsageAnswer


class TextChoice(Answer):
    """One of the answers: prompts in order, and for each its `n`."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class TextAnswer(Answer):
    """A whole `text_completion`; streams send pieces of the same shape."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    """Who answered: the adapter's name, or the base's."""
    choices: list[TextChoice]
    usage: UsageAnswer


class ComparedToken(Answer):
    """A token of a variant's answer."""

    id: int
    token: str
    logprob: float
    """The variant's own, before temperature and penalties."""
    bytes: list[int]
    """Exact where the token is only a part of a character."""


class TokenDivergence(Answer):
    """What the adapter did at one token."""

    divergence: float
    """KL(adapter || base) over the vocabulary, in nats."""
    logprob: float
    """Of the token, by the adapter."""
    base_logprob: float
    """Of the token, by the base after the same words."""


class DivergenceAnswer(Answer):
    """How far the adapter's distributions are from the base's."""

    error: str | None
    """Why it is not known."""
    mean: float | None
    max: float | None
    tokens: list[TokenDivergence]
    """One for each token of the answer."""


class VariantAnswer(Answer):
    """One answer of one variant."""

    index: int
    variant: str
    repeat: int
    id: str
    """For feedback."""
    model: str
    finish_reason: Literal["stop", "length", "error"]
    error: str | None
    """What broke; the other answers are not touched by it."""
    usage: UsageAnswer
    ttft_seconds: float | None
    seconds: float
    mean_logprob: float | None
    text: str
    tokens: list[ComparedToken]
    divergence: DivergenceAnswer | None
    """None for the base, and where it was not asked for."""


class CompareAnswer(Answer):
    """A whole comparison; streams send events instead."""

    id: str
    object: Literal["comparison"]
    created: int
    answers: list[VariantAnswer]
    usage: UsageAnswer


class ResponseAnswer(BaseModel):
    """A `response`; streams send its events."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    object: Literal["response"]
    status: Literal["completed", "incomplete"]
    model: str
    """Who answered: the adapter's name, or the base's."""
    output: list[dict[str, Any]]
    """Messages and function calls."""
    usage: dict[str, Any]


class ModelCard(Answer):
    """The base, an adapter or an experiment."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    """The base's name, for an adapter or an experiment."""
    experiment: dict[str, float] | None
    """The variants and their shares, for an experiment."""


class ModelList(Answer):
    """The base first, then every adapter, then every experiment."""

    object: Literal["list"]
    data: list[ModelCard]


class IntervalAnswer(Answer):
    """A value with its 95 % confidence interval."""

    value: float
    low: float | None
    """None where there is too little to tell."""
    high: float | None


class DifferenceAnswer(Answer):
    """This variant minus the first."""

    up_rate: IntervalAnswer | None
    mean_score: IntervalAnswer | None


class ExperimentVariant(Answer):
    """A variant and what came of it."""

    name: str
    share: float | None
    """None for a variant that is no longer part of it."""
    answers: int
    users: int
    """Those that were named."""
    identities: list[str]
    """Of the adapters' content: more than one where it was replaced meanwhile."""
    up: int
    down: int
    up_rate: IntervalAnswer | None
    """None without votes."""
    scores: int
    mean_score: IntervalAnswer | None
    """None without scores."""
    mean_tokens: float | None
    mean_seconds: float | None
    difference_from_first: DifferenceAnswer | None
    """None for the first variant."""


class ExperimentAnswer(Answer):
    """An experiment with its results."""

    id: str
    object: Literal["experiment"]
    state: Literal["running", "ended"]
    confidence: float
    """Of the intervals."""
    variants: list[ExperimentVariant]


class ExperimentCard(Answer):
    """An experiment."""

    id: str
    object: Literal["experiment"]
    state: Literal["running", "ended"]
    variants: dict[str, float]
    """Variants and shares; empty for one that has ended."""


class ExperimentList(Answer):
    """Those that run, then those that have ended and have answers."""

    object: Literal["list"]
    data: list[ExperimentCard]


class FeedbackAnswer(Answer):
    """What is known of an answer now."""

    id: str
    object: Literal["feedback"]
    choice: int
    vote: Literal["up", "down", "best"] | None
    score: float | None


class Standing(Answer):
    """How often a variant was the best."""

    variant: str
    best: int
    of: int
    """Comparisons with a best answer in which it took part."""
    rate: IntervalAnswer


class StandingsAnswer(Answer):
    """The best first."""

    object: Literal["list"]
    is_kept: bool
    """False where all is forgotten when the server ends."""
    data: list[Standing]


class StatusAnswer(Answer):
    """One word, or why not."""

    status: str


ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorAnswer, "description": "No key, or one that is not in force"},
    403: {"model": ErrorAnswer, "description": "The key lacks the scope, or the path is forbidden"},
    429: {"model": ErrorAnswer, "description": "The key has used what it may use for now"},
    400: {"model": ErrorAnswer, "description": "A field is wrong or not supported; it is named"},
    404: {"model": ErrorAnswer, "description": "Nobody has that name; the known ones are listed"},
    413: {"model": ErrorAnswer, "description": "The body is too large"},
    "default": {"model": ErrorAnswer, "description": "Too much to do, or something broke"},
}


def whole_or_stream(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """What a route documents that answers with JSON or, with `stream`, with events."""
    # No schema: one for the whole body would be held against each event by tools that know streams.
    stream = {"example": 'data: {"id": "..."}\n\ndata: [DONE]\n\n'}
    return {200: {"model": model, "content": {"text/event-stream": stream}}}
