"""Who asks: known to everything that works on a request, so that no route can forget it."""

from contextvars import ContextVar
from dataclasses import dataclass

from qlora_serve.errors import ForbiddenError
from qlora_serve.serve.api.quota import Quota
from qlora_serve.serve.keys import KeyRecord, Role


@dataclass(frozen=True, eq=False)
class Caller:
    """Who sent a request, and what it may do."""

    id: str = ""
    """The key's id. Without keys the address that it came from, which is good for sharing out
    places fairly and for nothing else."""
    record: KeyRecord | None = None
    """Its key's; without one everything is allowed, since the server asks for none."""
    quota: Quota | None = None
    """What its key has used."""

    def allows(self, adapter: str) -> bool:
        """Whether adapters of this name exist for it. Decided by the name alone, whatever there
        is, so that neither the answer nor its time depends on what is hidden."""
        return self.record is None or self.record.allows(adapter)

    @property
    def may_use_base(self) -> bool:
        """Whether it may ask the base itself."""
        return self.record is None or self.record.base

    @property
    def sees_all(self) -> bool:
        """Whether nothing is hidden from it."""
        return self.record is None or (self.record.sees_all and self.record.base)

    def has(self, role: Role) -> bool:
        """Whether its key has a scope."""
        return self.record is None or role in self.record.scopes


ANYBODY = Caller()
"""Where no keys are asked for, or outside of a request."""
NOBODY = Caller(
    record=KeyRecord(
        id="key_000000000000", name="nobody", sha256="0" * 64, created="", scopes=(), adapters=(),
        base=False,
    )
)  # fmt: skip
"""Who shows no key where that is allowed."""
CALLER: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")


def current_caller() -> Caller:
    """Who sent the request that is being worked on."""
    return CALLER.get()


def current_request_id() -> str:
    """The `x-request-id` of the request that is being worked on; empty outside of one."""
    return REQUEST_ID.get()


def need_scope(role: Role) -> None:
    """Goes on if the caller has a scope.

    Raises:
        ForbiddenError: its key has not.
    """
    caller = current_caller()
    if not caller.has(role):
        scopes = ", ".join(caller.record.scopes) if caller.record and caller.record.scopes else ""
        raise ForbiddenError(
            f"this needs a key with the scope {role!r}; yours has: {scopes or 'none'}"
        )
