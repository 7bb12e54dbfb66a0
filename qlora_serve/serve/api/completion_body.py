"""The body of `POST /v1/completions`."""

from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from qlora_serve.serve.api.schemas import SamplingBody, refused

TokenIds = Annotated[list[int], Field(min_length=1)]


class CompletionRequest(SamplingBody):
    """`POST /v1/completions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 8}
            ]
        },
    )

    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1)]
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    max_tokens: int | None = Field(default=16, ge=0)
    """The most tokens to generate; 0 with `echo`, to look at the prompt alone."""
    best_of: int | None = Field(default=None, ge=1)
    """Generate this many and keep the `n` with the highest log-probability per token."""
    echo: bool = False
    """Put the prompt before the answer."""
    logprobs: int | None = Field(default=None, ge=0, le=20)
    """Report each token's log-probability and those of this many likeliest tokens; with `echo` the
    prompt's tokens too, for which the first has none."""

    @model_validator(mode="after")
    def _completion_consistent(self) -> "CompletionRequest":
        if self.best_of is not None:
            if self.best_of < self.n:
                raise refused("best_of", f"best_of={self.best_of} is less than n={self.n}")
            if self.stream and self.best_of > self.n:
                raise refused(
                    "best_of", "best_of cannot be streamed: the best is known only at the end"
                )
        if self.max_tokens == 0 and not self.echo:
            raise refused("max_tokens", "max_tokens=0 gives nothing at all without echo=true")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or many."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @property
    def reported_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report; None for no log-probabilities at all."""
        if self.logprobs is None and (self.best_of or 1) > self.n:
            return 0  # the best is found by them
        return self.logprobs
