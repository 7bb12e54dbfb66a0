"""What goes into the engine and what comes out of it. No tensors here."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to stop."""

    max_tokens: int
    """The most tokens to generate."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Samples among the fewest tokens whose probabilities reach this sum (arXiv:1904.09751)."""
    seed: int | None = None
    """Fixes the random choices, whoever else is in the batch."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    ignore_eos: bool = False
    """Goes on past the model's end tokens, for measurements."""


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to generate."""

    request_id: str
    prompt: tuple[int, ...]
    """Token ids."""
    sampling: Sampling
    adapter: Any = None
    """A `slots.AdapterSelection`, pinned for the request's life; None for the base itself.
    The engine compares it by identity of content and scale, never by name."""
    tokens: Any = None
    """The adapter's own `AdapterTokens`; None for the base's tokenizer and end tokens."""
    client: str = ""
    """Who asks. Places are shared out fairly between clients, and between adapters."""
    priority: int = 0
    """The lower, the sooner; 0 is ordinary."""


@dataclass(frozen=True)
class Usage:
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Delta:
    """Newly generated text; never part of a character, never part of a stop text."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Finished:
    """The request's only ending, when all went well or it was aborted."""

    reason: FinishReason
    usage: Usage


@dataclass(frozen=True)
class Failed:
    """The request's only ending, when something broke; others are not touched."""

    message: str
    usage: Usage


Event = Delta | Finished | Failed
Deliver = Callable[[Event], None]


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine: what the scheduler counts."""

    request: GenerationRequest
    deliver: Deliver
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    cached: int = 0
    """Tokens of the prompt that were in the cache already when it was first admitted."""
    arrival: int = 0
    """Its number in the order of arrival."""
    blocks: Any = None
    """The scheduler's `blocks.BlockTable`, while it has a place."""
    generated: list[int] = field(default_factory=list)
    text: Any = None
    """The engine's `text.TextAssembler`."""
    state: Any = None
    """The runner's own: the random generator."""
    ended: bool = False

    @property
    def length(self) -> int:
        """Tokens known so far: prompt and generated."""
        return len(self.request.prompt) + len(self.generated)

    @property
    def most_tokens(self) -> int:
        """Tokens that it can reach."""
        return len(self.request.prompt) + self.request.sampling.max_tokens

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(len(self.request.prompt), len(self.generated))

    def tokens(self, start: int, count: int) -> list[int]:
        """`count` token ids from `start`."""
        prompt = self.request.prompt
        known = len(prompt)
        if start >= known:  # decoding: the common case, without copying the prompt
            return self.generated[start - known : start - known + count]
        return [*prompt[start : start + count], *self.generated[: max(0, start + count - known)]]
