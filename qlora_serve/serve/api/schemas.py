"""The bodies of requests: what is accepted, and nothing that would be ignored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_STOP_TEXTS = 16

# Fields of OpenAI's that are accepted only where they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
# Labels for the caller's own books.
_LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    role: Literal["system", "developer", "user", "assistant"]
    """Who speaks; `developer` is read as `system`."""
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    """Text, or a list of text parts."""
    name: None = None

    def as_template_input(self) -> dict[str, str]:
        """The message as chat templates take it."""
        if isinstance(self.content, str):
            text = self.content
        else:
            text = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    include_usage: bool = False
    """Send a last chunk with the counts of tokens."""
    include_obfuscation: Literal[False] | None = None


MAX_SCALE = 10.0
Scale = Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE, allow_inf_nan=False)]
"""A finite number; beyond ten times what was trained, answers are noise."""


class WeightedAdapter(BaseModel):
    """A part of a composition."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: str
    """An adapter's name."""
    weight: Scale = 1.0
    """Multiplies its update."""


class ChatRequest(BaseModel):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [
                {
                    "model": "smollm2",
                    "adapter": "tagging",
                    "messages": [{"role": "user", "content": "Rain stopped the final."}],
                    "temperature": 0,
                }
            ]
        },
    )

    messages: list[ChatMessage] = Field(min_length=1)
    """The chat so far."""
    model: str | None = None
    """The base's name or an adapter's; the base when left out."""
    adapter: str | Annotated[list[WeightedAdapter], Field(min_length=1, max_length=8)] | None = None
    """An adapter's name, or up to 8 names with weights, whose updates are added; wins over
    `model`."""
    adapter_scale: Scale | None = None
    """Multiplies the adapter's update; the adapter's own default, usually 1, when left out."""
    max_tokens: int | None = Field(default=None, ge=1)
    """The most tokens to generate; as many as fit when left out."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """OpenAI's newer name for `max_tokens`."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """0 takes the most likely token each time."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the fewest tokens whose probabilities reach this sum."""
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    """The same seed, body and adapter give the same answer."""
    stop: list[str] = Field(default_factory=list, max_length=MAX_STOP_TEXTS)
    """Up to 16 texts that end the answer."""
    stream: bool = False
    """Send the answer as server-sent events."""
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    """Go on past the model's end token, for measurements."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            # An explicit null means "not given", as in OpenAI's API.
            if value is None or name in _LABELS:
                continue
            if name in _NEUTRAL:
                if value not in _NEUTRAL[name]:
                    raise ValueError(f"{name}={value!r} is not supported here")
                continue
            kept[name] = value
        return kept

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("an empty text cannot end an answer")
        return value

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

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    @property
    def token_limit(self) -> int | None:
        """The asked-for number of tokens, under either name."""
        return self.max_completion_tokens or self.max_tokens
