"""Thousands of mixed requests against a real server, and what is left of them afterwards.

    python benchmarks/soak.py                      # 10,000 requests, then the two measurements
    python benchmarks/soak.py --requests 300 --no-measure

Answers whole and streamed, sampled and greedy, several choices, aborts, slow readers, bad bodies
and keys, adapters loaded and unloaded while they are asked. Afterwards nothing may be left: no
answer on its way, no block of keys and values, no adapter in use, no file handle; every answer must
be the one that was given alone, and the log must hold no prompt and no key.
"""

import argparse
import asyncio
import json
import logging
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from slow_clients import slow_clients, sse_overhead
from tiny_server import ADAPTERS, PRIVATE, Server, SoakError, Usage, gauges, tiny_server, usage


@dataclass
class Report:
    """How it went."""

    requests: int
    seconds: float
    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    warm: Usage | None = None
    """After the first tenth."""
    end: Usage | None = None


def soak(server: Server, requests: int, seed: int = 0, workers: int = 24) -> Report:
    """Sends the requests and checks all that is promised.

    Raises:
        SoakError: saying what was broken.
    """
    return asyncio.run(_Soak(server, seed).run(requests, workers))


class _Soak:
    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.bodies = _bodies()
        self.alone: dict[int, Any] = {}
        self.compared: Any = None
        self.report = Report(0, 0.0)
        self._left = 0

    async def run(self, requests: int, workers: int) -> Report:
        began = time.perf_counter()
        async with self.server.client() as http:
            for number in (2, 3):
                await self._load(http, number)
            for number, body in enumerate(self.bodies):
                self.alone[number] = await self._whole(http, body)
            await self._compare(http)
            for number in range(len(self.bodies)):  # a second time, from the cache of prefixes
                _equal(number, self.alone[number], await self._whole(http, self.bodies[number]))
        for count in (requests // 10, requests - requests // 10):
            self._left = count
            async with self.server.client() as http:
                await asyncio.gather(*(self._worker(http) for _ in range(workers)))
            await self._until_idle()
            held = usage(self.server.process)
            self.report.warm, self.report.end = self.report.warm or held, held
        self.report.requests = requests
        self.report.seconds = time.perf_counter() - began
        self._check_the_end()
        return self.report

    async def _worker(self, http: httpx.AsyncClient) -> None:
        kinds = {
            self._ask: 35, self._stream: 21, self._abort: 12, self._slow: 4, self._wrong: 14,
            self._come_and_go: 6, self._look: 6, self._compare: 2,
        }  # fmt: skip
        while self._left > 0:
            self._left -= 1
            [kind] = self.random.choices(list(kinds), list(kinds.values()))
            self.report.kinds[kind.__name__.strip("_")] += 1
            try:
                await kind(http)
            except httpx.HTTPError as error:
                raise SoakError(f"{kind.__name__}: no answer ({error!r})") from error

    async def _whole(self, http: httpx.AsyncClient, body: dict[str, Any]) -> Any:
        answer = await self._post(http, body)
        return _texts(answer.json()) if answer.status_code == 200 else answer

    async def _post(self, http: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
        answer = await http.post("/v1/completions", json=body)
        self.report.statuses[answer.status_code] += 1
        return answer

    def _choose(self) -> tuple[int, dict[str, Any]]:
        number = self.random.randrange(len(self.bodies))
        return number, self.bodies[number]

    def _may_be_gone(self, body: dict[str, Any], answer: Any) -> bool:
        """Whether an answer says that an adapter is not there which comes and goes."""
        return body.get("model") in ("a2", "a3") and answer.status_code == 404

    async def _ask(self, http: httpx.AsyncClient) -> None:
        number, body = self._choose()
        answer = await self._whole(http, body)
        if isinstance(answer, httpx.Response):
            if not self._may_be_gone(body, answer):
                raise SoakError(f"{answer.status_code} for {body}: {answer.text}")
            return
        _equal(number, self.alone[number], answer)

    async def _stream(self, http: httpx.AsyncClient, pause: float = 0.0) -> None:
        number, body = self._choose()
        found: dict[int, dict[str, Any]] = {}
        lines = []
        async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            self.report.statuses[answer.status_code] += 1
            if answer.status_code != 200:
                await answer.aread()
                if not self._may_be_gone(body, answer):
                    raise SoakError(f"{answer.status_code} for {body}: {answer.text}")
                return
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    lines.append(line.removeprefix("data: "))
                    await asyncio.sleep(pause)
        if not lines or lines[-1] != "[DONE]":
            raise SoakError(f"a stream without an ending: {lines[-1:]} for {body}")
        for line in lines[:-1]:
            for choice in json.loads(line)["choices"]:
                one = found.setdefault(choice["index"], {"text": "", "finish_reason": None})
                one["text"] += choice["text"]
                one["finish_reason"] = choice["finish_reason"] or one["finish_reason"]
        texts = [(found[i]["text"], found[i]["finish_reason"]) for i in sorted(found)]
        _equal(number, self.alone[number], texts)

    async def _slow(self, http: httpx.AsyncClient) -> None:
        await self._stream(http, pause=0.02)

    async def _abort(self, http: httpx.AsyncClient) -> None:
        _, body = self._choose()
        body = {**body, "max_tokens": 300, "ignore_eos": True}
        if self.random.random() < 0.5:
            try:
                await http.post("/v1/completions", json=body, timeout=httpx.Timeout(60, read=0.05))
            except httpx.ReadTimeout:
                return
            return
        async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            async for _ in answer.aiter_raw():
                if self.random.random() < 0.3:
                    return

    async def _compare(self, http: httpx.AsyncClient) -> None:
        body = {
            "messages": [{"role": "user", "content": PRIVATE}], "variants": ["base", "a0", "a1"],
            "temperature": 0, "max_tokens": 12,
        }  # fmt: skip
        compared = await http.post("/v1/compare", json=body)
        self.report.statuses[compared.status_code] += 1
        if compared.status_code != 200:
            raise SoakError(f"{compared.status_code} for {body}: {compared.text}")
        answers = compared.json()["answers"]
        texts = [(one["text"], one["finish_reason"]) for one in answers]
        if self.compared is None:
            self.compared = texts
        _equal(-1, self.compared, texts)
        vote = {"id": self.random.choice(answers)["id"], "vote": "best"}
        voted = await http.post("/v1/feedback", json=vote)
        self.report.statuses[voted.status_code] += 1
        if voted.status_code != 200:
            raise SoakError(f"{voted.status_code} for a vote: {voted.text}")

    async def _wrong(self, http: httpx.AsyncClient) -> None:
        large = json.dumps({"prompt": "x" * 5_000_000}).encode()
        bare = {"authorization": "Bearer qls-wrong"}
        status, sent = self.random.choice(
            [
                (400, {"content": b'{"prompt": "' + PRIVATE.encode()}),
                (400, {"json": {"prompt": PRIVATE, "nonsense": 1}}),
                (400, {"json": {"prompt": PRIVATE, "max_tokens": 100_000}}),
                (400, {"json": {"prompt": [], "max_tokens": 4}}),
                (400, {"json": {"prompt": [10**9], "max_tokens": 4}}),
                (400, {"json": [PRIVATE]}),
                (404, {"json": {"prompt": PRIVATE, "model": "nobody"}}),
                (401, {"json": {"prompt": PRIVATE}, "headers": bare}),
                (413, {"content": large}),
            ]
        )
        headers = {"content-type": "application/json", **sent.pop("headers", {})}
        try:
            answer = await http.post("/v1/completions", headers=headers, **sent)
        except (httpx.WriteError, httpx.RemoteProtocolError):
            if status != 413:  # refused before all of it was sent
                raise
            return
        self.report.statuses[answer.status_code] += 1
        if answer.status_code != status or not answer.json()["error"]["message"]:
            raise SoakError(f"{answer.status_code} where {status} was expected: {answer.text}")

    async def _come_and_go(self, http: httpx.AsyncClient) -> None:
        number = self.random.choice((2, 3))
        if self.random.random() < 0.5:
            await self._load(http, number)
            return
        answer = await http.delete(f"/v1/adapters/a{number}")
        self.report.statuses[answer.status_code] += 1
        if answer.status_code not in (200, 404):
            raise SoakError(f"{answer.status_code} for unloading: {answer.text}")

    async def _load(self, http: httpx.AsyncClient, number: int) -> None:
        path = str(self.server.folder / "elsewhere" / f"a{number}")
        answer = await http.post("/v1/adapters", json={"name": f"a{number}", "path": path})
        self.report.statuses[answer.status_code] += 1
        # Unloaded again by another one before its card was written.
        if answer.status_code not in (200, 404):
            raise SoakError(f"{answer.status_code} for loading: {answer.text}")

    async def _look(self, http: httpx.AsyncClient) -> None:
        path = self.random.choice(("/v1/models", "/v1/adapters", "/metrics", "/health", "/ready"))
        answer = await http.get(path)
        self.report.statuses[answer.status_code] += 1
        if answer.status_code != 200:
            raise SoakError(f"{answer.status_code} for {path}")

    async def _until_idle(self) -> None:
        """Waits for the server to have noticed that all have gone."""
        deadline = time.monotonic() + 60
        async with self.server.client() as http:
            while True:
                seen = gauges((await http.get("/metrics")).text)
                cards = (await http.get("/v1/adapters")).json()["data"]
                left = {name: seen[f"qlora_serve_{name}"] for name in _MUST_BE_ZERO}
                left |= {card["id"]: card["requests_in_flight"] for card in cards}
                # This client's own connection is one handle.
                if not any(left.values()):
                    return
                if time.monotonic() > deadline:
                    raise SoakError(f"still there after all have gone: {left}")
                await asyncio.sleep(0.05)

    def _check_the_end(self) -> None:
        warm, end = self.report.warm, self.report.end
        assert warm is not None
        assert end is not None
        if end.handles > warm.handles + 2 or end.threads > warm.threads + 2:
            raise SoakError(f"handles or threads were left behind: {warm} → {end}")
        if self.report.statuses[500] or self.report.statuses[503]:
            raise SoakError(f"answers of 5xx: {self.report.statuses}")
        log = self.server.log.read_text()
        for what in (PRIVATE, self.server.key, "Traceback", "exception"):
            if what in log:
                where = log.index(what)
                raise SoakError(f"the log holds {what!r}: {log[max(0, where - 500) : where + 500]}")


_MUST_BE_ZERO = ("running", "waiting", "kv_blocks_used")


def _bodies() -> list[dict[str, Any]]:
    """Distinct requests, each with one right answer."""
    bodies = []
    for number, model in enumerate(["base", *(f"a{n}" for n in range(ADAPTERS))]):
        for length in (1, 9, 40):
            prompt = f"{PRIVATE} {number} " + "order 4711 arrived broken " * length
            common = {"model": model, "prompt": prompt[: 5 * length + 20], "max_tokens": 6 + length}
            bodies.append({**common, "temperature": 0})
            bodies.append({**common, "temperature": 0.8, "seed": number * 100 + length, "n": 2})
    return bodies


def _texts(answer: dict[str, Any]) -> list[tuple[str, str]]:
    return [(choice["text"], choice["finish_reason"]) for choice in answer["choices"]]


def _equal(number: int, alone: Any, answer: Any) -> None:
    if alone != answer:
        raise SoakError(f"body {number} was answered {answer}, and alone {alone}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, tiny_server(Path(folder)) as server:
        report = soak(server, options.requests, options.seed)
        print(f"{report.requests} requests in {report.seconds:.0f} s: {dict(report.kinds)}")
        print(f"statuses: {dict(sorted(report.statuses.items()))}")
        print(f"after a tenth: {report.warm}")
        print(f"at the end:    {report.end}")
        if options.measure:
            whole, added = sse_overhead(server)
            print(f"a token: {whole * 1e6:.0f} us whole, streaming adds {added * 1e6:.0f} us")
            alone, beside = asyncio.run(slow_clients(server))
            print(
                f"a fast client's answer: {alone * 1e3:.1f} ms alone, {beside * 1e3:.1f} ms beside "
                f"100 slow readers ({beside / alone - 1:+.0%})"
            )


if __name__ == "__main__":
    main()
