"""A small client of the server's own endpoint, for `compare` and `chat`."""

import json
import os
from collections.abc import Iterator
from typing import Any

import httpx

from qlora_serve.errors import QloraServeError, RequestError

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "QLORA_SERVE_KEY"
"""The environment variable with the key for a server that asks for one."""


class Client:
    """Talks to a running `qlora-serve serve`."""

    def __init__(self, url: str) -> None:
        # People paste either form: with the API's /v1, or the server alone.
        self.url = url.rstrip("/").removesuffix("/v1")
        # An answer may take minutes on a CPU; only connecting has a limit.
        # A key in a flag would be in everybody's list of processes.
        key = os.environ.get(KEY_VARIABLE)
        self._http = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(None, connect=10.0),
            headers={"authorization": f"Bearer {key}"} if key else {},
        )

    def models(self) -> list[str]:
        """The names that the server answers to: the base, adapters, experiments."""
        return [card["id"] for card in self._cards()]

    def adapters(self) -> list[str]:
        """The names of the adapters."""
        return [card["id"] for card in self._cards()[1:] if not card.get("experiment")]

    def _cards(self) -> list[dict[str, Any]]:
        response = self._send(self._http.build_request("GET", "/v1/models"))
        cards: list[dict[str, Any]] = response.json()["data"]
        return cards

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """One whole answer.

        Raises:
            RequestError: the server refuses the request; its own words.
            QloraServeError: no server answers.
        """
        request = self._http.build_request("POST", "/v1/chat/completions", json=body)
        answer: dict[str, Any] = self._send(request).json()
        return answer

    def compare(self, body: dict[str, Any]) -> dict[str, Any]:
        """A whole comparison. Raises as `complete` does."""
        answer: dict[str, Any] = self._send(
            self._http.build_request("POST", "/v1/compare", json=body)
        ).json()
        return answer

    def compare_stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What happens in a comparison. Raises as `complete` does."""
        return self._events("/v1/compare", body)

    def stream(self, body: dict[str, Any]) -> Iterator[str]:
        """The pieces of an answer's text, as they come. Raises as `complete` does."""
        for event in self._events("/v1/chat/completions", body):
            for choice in event["choices"]:
                yield choice["delta"].get("content") or ""

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        request = self._http.build_request("POST", path, json={**body, "stream": True})
        response = self._send(request, stream=True)
        try:
            for line in response.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                event = json.loads(data)
                if "error" in event and "type" not in event:
                    raise RequestError(event["error"]["message"])
                yield event
        except httpx.HTTPError as error:
            raise QloraServeError(f"the connection to {self.url} broke: {error}") from None
        finally:
            response.close()

    def _send(self, request: httpx.Request, stream: bool = False) -> httpx.Response:
        try:
            response = self._http.send(request, stream=stream)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise QloraServeError(
                f"no server answers at {self.url}; start one with `qlora-serve serve BASE`, "
                "or name another with --url"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise QloraServeError(f"cannot talk to {self.url}: {error}") from None
        if response.is_error:
            response.read()
            raise RequestError(_error_message(response))
        return response


def _error_message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status_code}: {response.text[:200]}"
