"""The body of `POST /v1/compare`."""

from typing import Any

from pydantic import ConfigDict, Field, ValidationError, field_validator

from qlora_serve.errors import RequestError
from qlora_serve.serve.api.chat_body import ChatMessage, ChatRequest, ResponseFormat
from qlora_serve.serve.api.schemas import AskingBody, Body, StructuredOutputs


class SamplingChoice(Body):
    """How an answer is chosen; each field is what it is in a chat, and its default too."""

    max_tokens: int | None = Field(default=None, ge=1)
    """The most tokens to generate."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """0 takes the most likely token each time."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample among the fewest tokens whose probabilities reach this sum."""
    top_k: int | None = Field(default=None, ge=-1)
    """Sample among this many most likely tokens."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Drop tokens less likely than this share of the likeliest."""
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    """Fixes the draws; each repeat has its own, derived from it."""
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    """Subtracted from the logits of tokens that the answer holds."""
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    """Subtracted once for each time that the answer holds a token."""
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    """Divides positive logits of tokens of prompt and answer, multiplies negative ones."""
    logit_bias: dict[str, float] | None = None
    """Token ids and what is added to their logits, from -100 to 100."""
    stop: list[str] | str | None = None
    """Texts that end the answer and are not part of it."""
    min_tokens: int | None = Field(default=None, ge=0)
    """No end before this many tokens."""
    ignore_eos: bool | None = None
    """Go on past the model's end token."""


class Variant(SamplingChoice, AskingBody):
    """Who answers and how; what is left out is as in the comparison."""

    name: str | None = Field(default=None, min_length=1, max_length=64)
    """What to call it; by default the model's or adapter's name, with its scale."""
    repeats: int = Field(default=1, ge=1)
    """How often it answers."""

    @property
    def label(self) -> str:
        """What it is called."""
        if self.name is not None:
            return self.name
        if isinstance(self.adapter, list):
            return "+".join(f"{part.name}@{part.weight:g}" for part in self.adapter)
        scale = "" if self.adapter_scale is None else f"@{self.adapter_scale:g}"
        return f"{self.adapter or self.model or 'base'}{scale}"


class CompareRequest(SamplingChoice):
    """`POST /v1/compare`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "messages": [{"role": "user", "content": "Rain stopped the final."}],
                    "variants": ["base", "tagging", {"adapter": "tagging", "adapter_scale": 0.5}],
                    "temperature": 0,
                    "max_tokens": 64,
                }
            ]
        },
    )
    labels = AskingBody.labels

    messages: list[ChatMessage] = Field(min_length=1)
    """The chat so far, the same for all."""
    variants: list[str | Variant] = Field(min_length=1)
    """Names of the base and of adapters, or objects that say more."""
    divergence: bool = True
    """Whether to compare each adapter's distribution with the base's at every token; it costs
    two more passes over the finished answer."""
    response_format: ResponseFormat | None = None
    """What every answer's text must be."""
    structured_outputs: StructuredOutputs | None = None
    """A grammar that every answer must follow."""
    stream: bool = False
    """Send what happens as server-sent events."""

    @field_validator("variants")
    @classmethod
    def _named_apart(cls, value: list[str | Variant]) -> list[str | Variant]:
        labels = [one.label for one in map(as_variant, value)]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"two are called {twice!r}; give them different names")
        return value

    def chat_of(self, variant: Variant) -> ChatRequest:
        """The chat that one variant is asked.

        Raises:
            RequestError: its settings contradict each other.
        """
        shared = self.model_dump(
            exclude={"messages", "variants", "divergence", "stream"},
            exclude_none=True,
            by_alias=True,
        )
        own = variant.model_dump(exclude={"name", "repeats"}, exclude_none=True, by_alias=True)
        fields: dict[str, Any] = {**shared, **own, "n": variant.repeats, "logprobs": True}
        try:
            return ChatRequest.model_validate({**fields, "messages": self.messages})
        except ValidationError as error:
            first = error.errors()[0]
            message = str(first["msg"]).removeprefix("Value error, ")
            where = ".".join(map(str, first["loc"]))
            raise RequestError(
                f"variant {variant.label!r}: {where + ': ' if where else ''}{message}", "variants"
            ) from None


def as_variant(given: str | Variant) -> Variant:
    """A variant, whichever way it was given."""
    return Variant(model=given) if isinstance(given, str) else given
