"""How much one request may ask for."""

from dataclasses import dataclass

from qlora_serve.errors import RequestError


@dataclass(frozen=True)
class ApiLimits:
    """Caps that hold for every request; each is a setting of the server."""

    body_bytes: int = 4 * 2**20
    """Bytes of a request's body."""
    messages: int = 1024
    """Messages of a chat."""
    output_tokens: int | None = None
    """The most that `max_tokens` may be; None leaves it to the context's length."""
    choices: int = 32
    """Answers that one request may generate: prompts times `n` (or `best_of`)."""
    variants: int = 16
    """Variants of one comparison."""
    stop_texts: int = 16
    """Texts in `stop`."""
    stop_length: int = 1024
    """Characters of each text in `stop`."""
    logit_biases: int = 1024
    """Entries of `logit_bias`."""
    tools: int = 128
    """Functions in `tools`."""
    schema_bytes: int = 64 * 2**10
    """Bytes of a schema, regular expression or grammar."""
    schema_seconds: float = 5.0
    """Time that compiling a grammar may take."""
    concurrent: int = 1024
    """Requests that are worked on at once, those that wait included."""
    queued: int = 1024
    """Answers that may wait for a place in the batch."""
    wait_seconds: float | None = None
    """How long a request may wait for its first token."""
    run_seconds: float | None = None
    """How long a request may take in all."""
    cors_origins: tuple[str, ...] = ()
    """Web pages' origins that may call this server from a browser."""

    def check(self, given: int, most: int, param: str, what: str) -> None:
        """Refuses more than a cap.

        Raises:
            RequestError: saying what was given and what this server takes.
        """
        if given > most:
            raise RequestError(f"{param}: {given} {what}; this server takes at most {most}", param)
