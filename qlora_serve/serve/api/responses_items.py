"""The output items of a response, built up piece by piece, and the events that tell of it."""

import json
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from qlora_serve.serve.api.tool_parser import CallStart, Piece


class OutputItems:
    """Messages and function calls as they come.

    Every method that changes something gives the events that say so; whoever wants the whole
    answer lets them pass and takes `items`.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        """The output so far, in the order of the answer."""
        self._numbers = 0
        self._is_open = False

    def event(self, kind: str, **fields: Any) -> dict[str, str]:
        """One numbered server-sent event."""
        data = {"type": kind, "sequence_number": self._numbers, **fields}
        self._numbers += 1
        return {"event": kind, "data": json.dumps(data, ensure_ascii=False)}

    def add(self, pieces: Iterable[Piece]) -> Iterator[dict[str, str]]:
        """Takes text and parts of calls."""
        for piece in pieces:
            if isinstance(piece, str):
                yield from self._add_text(piece)
            elif isinstance(piece, CallStart):
                yield from self.close()
                yield from self._open(
                    {
                        "id": f"fc_{uuid.uuid4().hex}",
                        "type": "function_call",
                        "status": "in_progress",
                        "call_id": piece.call_id,
                        "name": piece.name,
                        "arguments": "",
                    }
                )
            else:
                self.items[-1]["arguments"] += piece.text
                kind = "response.function_call_arguments.delta"
                yield self.event(kind, **self._place(), delta=piece.text)

    def close(self, status: str = "completed") -> Iterator[dict[str, str]]:
        """Ends the item that is open, if one is."""
        if not self._is_open:
            return
        self._is_open = False
        item, place = self.items[-1], self._place()
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            at = {**place, "content_index": 0}
            yield self.event("response.output_text.done", **at, text=part["text"], logprobs=[])
            yield self.event("response.content_part.done", **at, part=part)
        else:
            yield self.event(
                "response.function_call_arguments.done", **place, arguments=item["arguments"]
            )
        yield self.event("response.output_item.done", output_index=place["output_index"], item=item)

    def _add_text(self, text: str) -> Iterator[dict[str, str]]:
        if not (self._is_open and self.items[-1]["type"] == "message"):
            yield from self.close()
            message = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant"}
            yield from self._open({**message, "status": "in_progress", "content": []})
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield self.event(
                "response.content_part.added", **self._place(), content_index=0, part=part
            )
            self.items[-1]["content"].append(part)
        self.items[-1]["content"][0]["text"] += text
        yield self.event(
            "response.output_text.delta", **self._place(), content_index=0, delta=text, logprobs=[]
        )

    def _open(self, item: dict[str, Any]) -> Iterator[dict[str, str]]:
        self.items.append(item)
        self._is_open = True
        index = len(self.items) - 1
        yield self.event("response.output_item.added", output_index=index, item=item)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
