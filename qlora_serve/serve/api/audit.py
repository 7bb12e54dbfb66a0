"""One line for each act of an administrator: who, what, which adapter, how it ended."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qlora_serve.serve.api.caller import current_caller, current_request_id

log = logging.getLogger("qlora_serve.audit")


@contextmanager
def audited(act: str, name: str, what: str = "adapter", **more: Any) -> Iterator[None]:
    """Writes the line when the block ends, well or not.

    Args:
        act: what is being done.
        name: the name that it is done to.
        what: whose name it is.
        more: what else says what was wanted; never a key, never a prompt.
    """
    try:
        yield
    except Exception as error:
        _write(act, {what: name}, type(error).__name__, more)
        raise
    _write(act, {what: name}, "done", more)


def _write(act: str, named: dict[str, str], result: str, more: dict[str, Any]) -> None:
    caller = current_caller()
    # The name comes from outside: as JSON it stays on its line.
    fields = {
        "by": caller.record.id if caller.record else f"address {caller.id or 'unknown'}",
        "act": act,
        **named,
        **{name: str(value) for name, value in more.items() if value is not None},
        "result": result,
        "request_id": current_request_id(),
    }
    text = " ".join(f"{name}={json.dumps(value)}" for name, value in fields.items())
    log.info("%s", text, extra={"fields": fields})
