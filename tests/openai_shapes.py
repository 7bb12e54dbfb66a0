"""Answers held to the openai client's own types, and nothing beside them."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
from pydantic import BaseModel, TypeAdapter


def checked(kind: Any, data: Any) -> Any:
    """`data` as one of the client's types; every field must be one that the type knows."""
    value = TypeAdapter(kind).validate_python(data)
    unknown = list(_unknown_fields(value, ""))
    assert not unknown, f"fields that {kind} does not know: {unknown}"
    return value


def _unknown_fields(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, BaseModel):
        for name in value.model_extra or {}:
            yield f"{where}.{name}"
        for name in value.model_fields_set & type(value).model_fields.keys():
            yield from _unknown_fields(getattr(value, name), f"{where}.{name}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _unknown_fields(item, f"{where}[{number}]")


def post(url: str, body: Any, kind: Any) -> Any:
    """The whole answer to a body."""
    response = httpx.post(url, json=body, timeout=60)
    assert response.status_code == 200, response.text
    return checked(kind, response.json())


def stream(url: str, body: Any, kind: Any) -> list[Any]:
    """The chunks of a streamed answer, which must end with `[DONE]`."""
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert response.status_code == 200
    assert lines[-1] == "[DONE]", lines[-1]
    return [checked(kind, json.loads(line)) for line in lines[:-1]]
