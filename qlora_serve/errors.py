"""The errors that a user can cause or meet.

Every message is one line that says what was given, what was expected and what to do. They are
raised inside the rooms and translated in one place each: to exit codes in `cli.main`, to HTTP in
`serve.api.errors`.
"""

from collections.abc import Iterable


class QloraServeError(Exception):
    """Anything that is the user's to mend; its message is one line."""


class ConfigError(QloraServeError):
    """A setting, a flag or a YAML key that cannot be used."""


class UsageError(ConfigError):
    """A required flag or argument that is missing."""


class DataError(QloraServeError):
    """A data file or one of its rows that cannot be used."""


class BaseModelError(QloraServeError):
    """A base model that does not exist, cannot be loaded, or is of the wrong kind."""


class AdapterError(QloraServeError):
    """An adapter that cannot be applied exactly."""


class UnknownAdapterError(AdapterError):
    """A name that points to no adapter."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        self.known = sorted(known)
        listed = ", ".join(self.known) if self.known else "none"
        super().__init__(f"no adapter or model is called {name!r}; known here: {listed}")


class AdapterUnavailableError(AdapterError):
    """A name whose adapter cannot be served now; the message says why."""


class ForbiddenPathError(AdapterError):
    """A path that this server was not told to load adapters from."""


class ForbiddenError(QloraServeError):
    """Something that the caller's key does not allow."""


class RateLimitedError(QloraServeError):
    """A key has used what it may use for now."""

    def __init__(
        self, message: str, retry_after: float, kind: str, code: str = "rate_limit_exceeded"
    ) -> None:
        """
        Args:
            message: one line.
            retry_after: seconds until it makes sense to ask again.
            kind: `requests` or `tokens`.
            code: what kind of limit it was.
        """
        self.retry_after = retry_after
        self.kind = kind
        self.code = code
        super().__init__(message)


class TrainError(QloraServeError):
    """A training run that cannot go on, or whose result did not pass its checks."""


class MergeError(QloraServeError):
    """A merge that cannot be made, or that did not pass its proof."""


class OutputError(QloraServeError):
    """An output that cannot be written, or that would overwrite something."""


class RequestError(QloraServeError):
    """A request that the engine cannot accept; `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


class EngineStoppedError(QloraServeError):
    """The engine no longer takes requests."""


class OverloadedError(QloraServeError):
    """Too much is waiting already; the same request may be taken a little later."""


class RequestTimeoutError(QloraServeError):
    """A request waited or ran for longer than the server allows."""


class FeedbackError(RequestError):
    """Feedback that cannot be taken."""

    def __init__(self, message: str, param: str | None = None, is_unknown: bool = False) -> None:
        """
        Args:
            message: one line.
            param: the field at fault.
            is_unknown: whether there is no such answer.
        """
        self.is_unknown = is_unknown
        super().__init__(message, param)


class FeedbackUnavailableError(QloraServeError):
    """The file with the feedback cannot be used now."""
