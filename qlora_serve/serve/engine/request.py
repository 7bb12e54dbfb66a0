"""What goes into the engine and what comes out of it. No tensors here."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort", "scored"]
"""`scored` ends a request that generates nothing; see `Score`."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to stop."""

    max_tokens: int
    """The most tokens to generate."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Samples among the fewest tokens whose probabilities reach this sum (arXiv:1904.09751)."""
    top_k: int = 0
    """Samples among this many most likely tokens; 0 is all."""
    min_p: float = 0.0
    """Drops tokens less likely than this share of the likeliest (arXiv:2407.01082)."""
    seed: int | None = None
    """Fixes the random choices, whoever else is in the batch."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens seen in prompt or answer, multiplies negative ones
    (arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer holds."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time that the answer holds it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their logits."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    min_tokens: int = 0
    """No end token and no stop text ends the answer before it has this many tokens."""
    ignore_eos: bool = False
    """Goes on past the model's end tokens, for measurements."""
    logprobs: int | None = None
    """How many of the likeliest tokens to report beside the chosen one; None reports nothing."""


@dataclass(eq=False)
class Score:
    """Looks at tokens that are known instead of generating some: what was each one's distribution?

    The request's prompt is then all that is known without the last token, which no distribution
    depends on. With `top` one pass reports log-probabilities. Else two passes make a comparison.
    The first, by the base, keeps its hidden states before the output head, since distributions over
    a whole vocabulary are a hundred times as large. The second, by an adapter and `against` the
    first, puts these through the head again beside its own, a few positions at a time.
    """

    first: int
    """The position whose next token is the first of `targets`: the prompt's last."""
    targets: tuple[int, ...]
    """The answer's tokens."""
    against: "Score | None" = None
    """The base's finished pass over the same tokens; None for the first pass."""
    top: int | None = None
    """Not a comparison: how many of the likeliest tokens to report at each target."""
    reports: "list[TokenLogprobs]" = field(default_factory=list)
    """With `top`: of each target."""
    hidden: Any = None
    """The first pass's [targets, width], filled by the runner."""
    logprobs: list[float] = field(default_factory=list)
    """The second pass's log-probability of each target."""
    base_logprobs: list[float] = field(default_factory=list)
    """The base's, from the second pass too."""
    divergences: list[float] = field(default_factory=list)
    """KL(adapter || base) over the vocabulary at each target, in nats."""

    @property
    def needs_logits(self) -> bool:
        """Whether the pass looks at distributions, and not only keeps hidden states."""
        return self.against is not None or self.top is not None


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to generate, or to score."""

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
    guide: Any = None
    """A `guide.Guide` that the answer must follow; None for free text."""
    visible_ids: tuple[int, ...] = ()
    """Special tokens that are part of the text; all others are left out of it."""
    score: Score | None = None
    """Given where nothing is to be generated; `sampling` is not read then."""


@dataclass(frozen=True)
class Usage:
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Tokens of the prompt that were not computed again."""


@dataclass(frozen=True)
class TokenLogprobs:
    """The model's own log-probabilities at one token: before bias, penalties and temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest token ids with theirs, the likeliest first."""


@dataclass(frozen=True)
class Delta:
    """Newly generated text; never part of a character, never part of a stop text."""

    text: str
    token_ids: tuple[int, ...]
    """The tokens whose text begins in what has been given out so far."""
    offsets: tuple[int, ...] = ()
    """Where each token's text begins, in characters from the answer's start."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token, when they were asked for."""


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
    """The engine's `text.AnswerStream`."""
    sampler: Any = None
    """The engine's `sampler.RowSampler`; it outlives a preemption, as the answer's text does."""
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
        return Usage(len(self.request.prompt), len(self.generated), self.cached)

    def tokens(self, start: int, count: int) -> list[int]:
        """`count` token ids from `start`."""
        prompt = self.request.prompt
        known = len(prompt)
        if start >= known:  # decoding: the common case, without copying the prompt
            return self.generated[start - known : start - known + count]
        return [*prompt[start : start + count], *self.generated[: max(0, start + count - known)]]
