"""Log lines for people or for machines; neither ever holds a prompt or a key."""

import json
import logging
import sys
import time
from typing import Any, Literal

LogFormat = Literal["text", "json"]


class JsonLines(logging.Formatter):
    """One JSON object a line, with the id of the request that is being worked on."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        from qlora_serve.serve.api.caller import current_request_id

        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if not line.get("request_id"):
            line.pop("request_id", None)
            if request_id := current_request_id():
                line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up_logging(form: LogFormat) -> None:
    """Sends every log line to stderr in this form.

    A line for each request is written as JSON only: people read `/metrics`.
    """
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(JsonLines())
    else:
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # httpx logs addresses; the names of requests are logged once, at the door.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("qlora_serve.requests").setLevel(
        logging.INFO if form == "json" else logging.WARNING
    )
