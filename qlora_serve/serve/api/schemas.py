"""What the bodies of requests share: what is accepted, and nothing that would be ignored."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

# Labels for the caller's own books.
LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})


def refused(param: str, message: str) -> PydanticCustomError:
    """A refusal of a body as a whole, which names the field at fault."""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


class Body(BaseModel):
    """A JSON object whose every field is known; null means "not given", as in OpenAI's API."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """OpenAI's fields that are accepted only with values that change nothing."""
    labels: ClassVar[frozenset[str]] = frozenset()
    """OpenAI's fields that are accepted because they are for the caller's own books."""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_says_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            if value is None or name in cls.labels:
                continue
            for text in value if isinstance(value, list) else (value,):
                if isinstance(text, str) and not _is_text(text):
                    raise refused(_printable(name), f"{_printable(name)}: half a surrogate pair")
            if name not in cls.neutral:
                kept[name] = value
            elif value not in cls.neutral[name]:
                raise refused(name, f"{name}={_short(value)} is not supported here")
        return kept


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool = False
    """Send a last chunk with the counts of tokens."""
    include_obfuscation: Literal[False] | None = None
    """Chunks are never padded."""


class StructuredOutputs(Body):
    """A grammar that the answer must follow: exactly one of these."""

    json_schema: dict[str, Any] | str | None = Field(default=None, alias="json")
    """A JSON schema."""
    regex: str | None = None
    """A regular expression for the whole answer (Rust's syntax, no look-around)."""
    grammar: str | None = None
    """A context-free grammar, in Lark's or GBNF's syntax."""
    choice: list[str] | None = Field(default=None, min_length=1)
    """Texts of which the answer is one."""

    @model_validator(mode="after")
    def _exactly_one(self) -> "StructuredOutputs":
        if len(self.model_fields_set) != 1:
            raise ValueError("give exactly one of json, regex, grammar and choice")
        return self


MAX_SCALE = 10.0
Scale = Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE, allow_inf_nan=False)]
"""A finite number; beyond ten times what was trained, answers are noise."""


class WeightedAdapter(Body):
    """A part of a composition."""

    name: str
    """An adapter's name."""
    weight: Scale = 1.0
    """Multiplies its update."""


class AskingBody(Body):
    """What every body that asks for an answer can say: who answers."""

    labels = LABELS

    model: str | None = None
    """The base's name or an adapter's; the base when left out."""
    adapter: str | Annotated[list[WeightedAdapter], Field(min_length=1, max_length=8)] | None = None
    """An adapter's name, or up to 8 names with weights, whose updates are added; wins over
    `model`."""
    adapter_scale: Scale | None = None
    """Multiplies the adapter's update; the adapter's own default, usually 1, when left out."""

    @field_validator("adapter")
    @classmethod
    def _each_once(
        cls, value: str | list[WeightedAdapter] | None
    ) -> str | list[WeightedAdapter] | None:
        if isinstance(value, list):
            names = [part.name for part in value]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{twice!r} is listed twice; list it once with the whole weight")
        return value

    @property
    def wanted_adapter(self) -> str | list[tuple[str, float]] | None:
        """`adapter` as the service takes it."""
        if isinstance(self.adapter, list):
            return [(part.name, part.weight) for part in self.adapter]
        return self.adapter


class UserBody(AskingBody):
    """What every body can say that one model answers: for whom."""

    labels = LABELS - {"user"}

    user: str | None = None
    """Whom it is for: an experiment answers the same user with the same variant."""


class SamplingBody(UserBody):
    """How an answer is chosen, for chats and completions alike."""

    max_tokens: int | None = Field(default=None, ge=1)
    """The most tokens to generate."""
    n: int = Field(default=1, ge=1)
    """Answers to the same prompt."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """0 takes the most likely token each time."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the fewest tokens whose probabilities reach this sum."""
    top_k: int = Field(default=0, ge=-1)
    """Sample among this many most likely tokens; 0 or -1 is all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Drop tokens less likely than this share of the likeliest."""
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    """The same seed, body and adapter give the same answer; each of `n` has its own."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted from the logits of tokens that the answer holds."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted from a token's logit once for each time that the answer holds it."""
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    """Divides positive logits of tokens of prompt and answer, multiplies negative ones."""
    logit_bias: dict[str, float] = Field(default_factory=dict)
    """Token ids and what is added to their logits, from -100 to 100."""
    stop: list[str] | str = Field(default_factory=list)
    """Texts that end the answer and are not part of it."""
    min_tokens: int = Field(default=0, ge=0)
    """No end token and no stop text ends the answer before it has this many tokens."""
    ignore_eos: bool = False
    """Go on past the model's end token, for measurements."""
    stream: bool = False
    """Send the answer as server-sent events."""
    stream_options: StreamOptions | None = None
    """Needs `stream`."""
    structured_outputs: StructuredOutputs | None = None
    """A grammar that the answer must follow."""

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: list[str] | str) -> list[str]:
        texts = [value] if isinstance(value, str) else value
        if "" in texts:
            raise ValueError("an empty text cannot end an answer")
        return texts

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float]) -> dict[str, float]:
        for token, bias in value.items():
            if not (token.isascii() and token.isdigit() and len(token) < 10):
                raise ValueError(f'expected token ids as keys, such as "50256", not {token!r}')
            if not -100 <= bias <= 100:
                raise ValueError(f"the bias of token {token} is {bias}; expected -100 to 100")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "SamplingBody":
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "stream_options needs stream=true")
        limit = self.token_limit
        if limit is not None and self.min_tokens > limit:
            raise refused(
                "min_tokens", f"min_tokens={self.min_tokens} is more than max_tokens={limit}"
            )
        if self.structured_outputs is not None:
            self.check_guided("structured_outputs")
        return self

    def check_guided(self, field: str) -> None:
        """Refuses what cannot go with a grammar, which decides by itself where an answer ends."""
        for name, given in (("ignore_eos", self.ignore_eos), ("min_tokens", self.min_tokens)):
            if given:
                raise refused(name, f"{name} cannot be combined with {field}")

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate; None for as many as fit."""
        return self.max_tokens

    @property
    def asked_tokens(self) -> int | None:
        """`token_limit` when the body itself says it; a default gives way where it does not fit."""
        is_asked = not {"max_tokens", "max_completion_tokens"}.isdisjoint(self.model_fields_set)
        return self.token_limit if is_asked else None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """`stop` as a list."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def reported_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report; None for no log-probabilities at all."""
        return None


def _is_text(text: str) -> bool:
    """Whether it can be encoded; JSON can spell out half a surrogate pair, which cannot."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _printable(name: Any) -> str:
    return str(name).encode("utf-8", "replace").decode()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
