"""Experiments over HTTP: who answers whom, what is kept, and for whom any of it exists."""

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from in_process_server import serving
from tiny_models import write_random_adapter
from tool_bases import write_tool_base
from typer.testing import CliRunner

from qlora_serve.cli import data, feedback
from qlora_serve.errors import ConfigError
from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.keys import add_key
from qlora_serve.serve.run import build_service
from qlora_serve.train.formats import read_row
from qlora_serve.train.sources import Source, open_source

MESSAGES = [{"role": "user", "content": "hello fox"}]
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {
    "type": "object", "properties": {}, "additionalProperties": False}}}]  # fmt: skip


class Server:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys: dict[str, str] = {}
        self.base = write_tool_base(folder / "tiny", "hermes")
        for number, name in enumerate(("alpha", "beta")):
            write_random_adapter(folder / "adapters" / name, self.base, seed=number)
        for name, fields in {
            "admin": {"scopes": ("infer", "admin")}, "all": {}, "only-alpha": {"adapters": ("a*",)},
            "other": {}, "no-base": {"base": False},
            "some-admin": {"scopes": ("infer", "admin"), "adapters": ("tone", "alpha")},
        }.items():  # fmt: skip
            self.keys[name], _ = add_key(folder / "keys.json", name=name, **fields)
        self.settings = ServeSettings(
            base=str(self.base), adapters_dir=folder / "adapters", dtype="float32",
            adapters_poll=0, keys=folder / "keys.json", feedback=folder / "feedback.sqlite",
            experiment={"tone": {"base": 0.5, "beta": 0.5}},
        )  # fmt: skip
        self.url = ""

    def http(self, key: str) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.keys[key]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def openai(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys[key], max_retries=0)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("experiments"))
    with serving(build_service(made.settings)) as made.url:
        yield made


def _body(**more: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "max_tokens": 6, "temperature": 0, **more}


def _user_of(server: Server, variant: str, experiment: str = "tone") -> str:
    with server.http("all") as http:
        for number in range(50):
            body = _body(model=experiment, user=f"u{number}", max_tokens=1)
            answer = http.post("/v1/chat/completions", json=body)
            if answer.headers["x-experiment-variant"] == variant:
                return f"u{number}"
    raise AssertionError(f"nobody gets {variant}")


def test_a_user_is_answered_by_one_variant_as_that_variant_answers(server) -> None:
    client = server.openai("all")
    seen = set()
    for user in ("ann", "bob", "carol", "dave", "eve", "fred"):
        raw = [client.chat.completions.with_raw_response.create(**_body(model="tone", user=user))
               for _ in range(2)]  # fmt: skip
        [variant] = {one.headers["x-experiment-variant"] for one in raw}
        assert raw[0].headers["x-experiment"] == "tone"
        answer = raw[0].parse()
        alone = client.chat.completions.create(**_body(model=variant))
        assert answer.choices[0].message.content == alone.choices[0].message.content
        assert answer.model == alone.model
        seen.add(variant)
    assert seen == {"base", "beta"}
    unnamed = {
        client.chat.completions.with_raw_response.create(
            **_body(model="tone", max_tokens=1)
        ).headers["x-experiment-variant"]
        for _ in range(20)
    }
    assert unnamed == {"base", "beta"}


def test_every_kind_of_answer_takes_feedback(server) -> None:
    user = _user_of(server, "beta")
    client, http = server.openai("all"), server.http("all")

    def vote(answer_id: str, choice: int = 0) -> int:
        sent = {"id": answer_id, "choice": choice, "vote": "up", "score": 2}
        return http.post("/v1/feedback", json=sent).status_code

    before = _variant(server, "tone", "beta")
    chat = client.chat.completions.create(**_body(model="tone", user=user, n=2))
    assert [vote(chat.id), vote(chat.id, 1), vote(chat.id, 2)] == [200, 200, 404]
    chunks = list(client.chat.completions.create(**_body(model="tone", user=user), stream=True))
    assert chunks[0].model == "beta"
    assert vote(chunks[0].id) == 200
    text = client.completions.create(
        model="tone", prompt=["a", "b"], user=user, max_tokens=3, n=1, best_of=2
    )
    assert [vote(text.id), vote(text.id, 1), vote(text.id, 2)] == [200, 200, 404]
    response = client.responses.create(model="tone", input="hi", user=user, max_output_tokens=3)
    assert vote(response.id) == 200
    given = client.post("/feedback", body={"id": response.id, "vote": "none"}, cast_to=object)
    assert given["vote"] is None
    assert vote(response.id) == 200
    alone = client.chat.completions.create(**_body(model="beta"))
    assert vote(alone.id) == 404, "not part of an experiment"
    found = _variant(server, "tone", "beta")
    assert found["answers"] - before["answers"] == 6
    assert found["up"] - before["up"] == 6
    assert found["mean_score"]["value"] == 2
    assert found["difference_from_first"]["up_rate"] is None, "nobody voted for the first"


def _variant(server: Server, experiment: str, name: str) -> dict[str, Any]:
    with server.http("all") as http:
        answer = http.get(f"/v1/experiments/{experiment}").json()
    assert (answer["state"], answer["confidence"]) == ("running", 0.95)
    return next(one for one in answer["variants"] if one["name"] == name)


def test_answers_of_a_comparison_take_feedback_and_stand(server) -> None:
    body = {"messages": MESSAGES, "variants": ["base", "alpha", "beta"], "max_tokens": 3}
    with server.http("all") as http:
        for best in (1, 1, 2):
            answers = http.post("/v1/compare", json=body).json()["answers"]
            for index in (0, best):  # the vote moves
                sent = {"id": answers[index]["id"], "vote": "best"}
                given = http.post("/v1/feedback", json=sent)
                assert given.json() == {
                    "id": sent["id"], "object": "feedback", "choice": 0, "vote": "best",
                    "score": None,
                }  # fmt: skip
        found = http.get("/v1/feedback/standings").json()
        assert found["is_kept"] is True
        won = [(one["variant"], one["best"], one["of"]) for one in found["data"]]
        assert won == [("alpha", 2, 3), ("beta", 1, 3), ("base", 0, 3)]
        rate = found["data"][0]["rate"]
        assert (rate["low"], rate["high"]) == pytest.approx((0.2077, 0.9385), abs=1e-4)
        # Somebody else's answers do not exist for a key, nor do its votes count.
        sent = {"id": answers[0]["id"], "vote": "best"}
        with server.http("other") as other:
            assert other.post("/v1/feedback", json=sent).status_code == 404
            assert other.get("/v1/feedback/standings").json()["data"] == []
        with server.http("admin") as admin:
            assert len(admin.get("/v1/feedback/standings").json()["data"]) == 3


def test_an_experiment_with_hidden_variants_does_not_exist(server) -> None:
    def errors(key: str, name: str) -> list[Any]:
        found = []
        with server.http(key) as http:
            for method, path, sent in (
                ("POST", "/v1/chat/completions", _body(model=name)),
                ("POST", "/v1/completions", {"prompt": "x", "model": name}),
                ("POST", "/v1/responses", {"input": "x", "model": name}),
                ("POST", "/v1/compare", {"messages": MESSAGES, "variants": [name]}),
                ("POST", "/tokenize", {"prompt": "x", "model": name}),
                ("GET", f"/v1/models/{name}", None),
                ("GET", f"/v1/experiments/{name}", None),
            ):
                answer = http.request(method, path, json=sent)
                assert answer.status_code == 404, (key, path)
                found.append(answer.text.replace(name, "NAME"))
            names = [card["id"] for card in http.get("/v1/models").json()["data"]]
            listed = http.get("/v1/experiments").json()["data"]
        assert name not in names
        assert listed == []
        return found

    for key in ("only-alpha", "no-base"):
        assert errors(key, "tone") == errors(key, "nothing")
    with server.http("all") as http:
        cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
        assert cards["tone"]["experiment"] == {"base": 0.5, "beta": 0.5}
        assert cards["beta"]["experiment"] is None
        assert http.get("/v1/models/tone").json() == cards["tone"]
        assert server.openai("all").models.retrieve("tone").id == "tone"
        refused = http.post("/v1/chat/completions", json=_body(model="nothing")).json()
        assert "tone" in refused["error"]["message"]
        assert http.post("/tokenize", json={"prompt": "x", "model": "tone"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "sent", "param"),
    [
        ("/v1/chat/completions", _body(model="tone", adapter="alpha"), "adapter"),
        ("/v1/chat/completions", _body(model="tone", adapter_scale=0.5), "adapter_scale"),
        ("/v1/chat/completions", _body(adapter="tone"), "model"),
        ("/v1/chat/completions", _body(model="tone", user=7), "user"),
        ("/v1/compare", {"messages": MESSAGES, "variants": ["tone"]}, "model"),
        ("/v1/feedback", {"id": "x"}, "vote"),
        ("/v1/feedback", {"id": "x", "vote": "great"}, "vote"),
        ("/v1/feedback", {"id": "x", "score": 1e9}, "score"),
    ],
)
def test_refusals_name_the_field(server, path, sent, param) -> None:
    with server.http("all") as http:
        answer = http.post(path, json=sent)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_nobody_replaces_an_experiment_that_is_hidden_from_them(server) -> None:
    taken = {"name": "tone", "variants": {"base": 0.5, "alpha": 0.5}}
    with server.http("some-admin") as http:
        assert http.get("/v1/experiments/tone").status_code == 404  # for beta, which it may not use
        refused = http.post("/v1/experiments", json=taken)
        assert refused.status_code == 403
        assert "may not use the name" in refused.json()["error"]["message"]
    with server.http("all") as http:
        found = http.get("/v1/experiments").json()["data"]
    assert next(one["variants"] for one in found if one["id"] == "tone").keys() == {"base", "beta"}


def test_admins_begin_and_end_experiments(server, caplog) -> None:
    caplog.set_level(logging.INFO, "qlora_serve.audit")
    sent = {"name": "later", "variants": {"alpha": 3, "alpha@0.5": 1}}
    with server.http("all") as http:
        assert http.post("/v1/experiments", json=sent).status_code == 403
        assert http.delete("/v1/experiments/tone").status_code == 403
        assert http.get("/v1/feedback/export").status_code == 403
    with server.http("admin") as http:
        for wrong, status in (
            ({"name": "alpha", "variants": {"base": 1}}, 400),
            ({"name": "base", "variants": {"base": 1}}, 400),
            ({"name": "a b", "variants": {"base": 1}}, 400),
            ({"name": "x", "variants": {"base": 0}}, 400),
            ({"name": "x", "variants": {"nobody": 1}}, 404),
            ({"name": "x", "variants": {"base@2": 1}}, 400),
        ):
            answer = http.post("/v1/experiments", json=wrong)
            assert answer.status_code == status, answer.text
        begun = http.post("/v1/experiments", json=sent).json()
        assert begun["variants"] == {"alpha": 0.75, "alpha@0.5": 0.25}
        user = _user_of(server, "alpha@0.5", "later")
        body = _body(model="later", user=user)
        scaled = http.post("/v1/chat/completions", json=body).json()
        alone = _body(adapter="alpha", adapter_scale=0.5)
        expected = http.post("/v1/chat/completions", json=alone).json()
        assert scaled["choices"] == expected["choices"]
        assert http.post("/v1/adapters", json={"name": "later"}).status_code == 400
        assert http.delete("/v1/experiments/later").json()["deleted"] is True
        assert http.post("/v1/chat/completions", json=body).status_code == 404
        ended = http.get("/v1/experiments/later").json()
        assert ended["state"] == "ended"
        assert {one["name"] for one in ended["variants"]} == {"alpha", "alpha@0.5"}
        assert http.delete("/v1/experiments/later").status_code == 404
    lines = [record.message for record in caplog.records]
    assert any('act="begin" experiment="later"' in line and "done" in line for line in lines)
    assert any('act="end" experiment="later"' in line for line in lines)


def test_a_variant_that_is_gone_is_not_replaced_by_another(server) -> None:
    with server.http("admin") as http:
        http.post("/v1/experiments", json={"name": "gone", "variants": {"alpha": 1}})
        assert http.delete("/v1/adapters/alpha").status_code == 200
        answer = http.post("/v1/chat/completions", json=_body(model="gone", user="u"))
        assert answer.status_code == 422
        assert "experiment 'gone' sends this request to 'alpha'" in answer.text
        assert http.post("/v1/adapters", json={"name": "alpha"}).status_code == 200
        assert http.post("/v1/chat/completions", json=_body(model="gone")).status_code == 200
        http.delete("/v1/experiments/gone")


def test_many_at_once_are_all_counted(server) -> None:
    with server.http("admin") as http:
        http.post("/v1/experiments", json={"name": "busy", "variants": {"base": 1, "alpha": 1}})

        def ask(number: int) -> None:
            body = _body(model="busy", user=f"u{number % 8}", max_tokens=2)
            answer = http.post("/v1/chat/completions", json=body).json()
            vote = {"id": answer["id"], "vote": "up" if number % 2 else "down"}
            assert http.post("/v1/feedback", json=vote).status_code == 200

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(ask, range(96)))
        found = http.get("/v1/experiments/busy").json()["variants"]
        http.delete("/v1/experiments/busy")
    assert sum(one["answers"] for one in found) == 96
    assert sum(one["up"] for one in found) == sum(one["down"] for one in found) == 48
    assert sum(one["users"] for one in found) == 8


def test_what_was_liked_is_read_by_training(server, tmp_path) -> None:
    rows = tmp_path / "liked.jsonl"
    with server.http("admin") as http:
        http.post("/v1/experiments", json={"name": "school", "variants": {"base": 1}})
        called = _body(
            model="school",
            tools=TOOLS,
            tool_choice="required",
            temperature=1,
            seed=1,
            max_tokens=200,
            parallel_tool_calls=False,
        )
        plain = _body(model="school", structured_outputs={"choice": ["Good day."]}, max_tokens=30)
        ids = []
        for body in (plain, called, {**plain, "stream": True}, {**called, "stream": True}):
            answer = http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200
            first = answer.text.removeprefix("data: ").split("\n")[0]
            ids.append(json.loads(first)["id"])
        for answer_id in ids[1:]:
            http.post("/v1/feedback", json={"id": answer_id, "vote": "up"})
        query = {"experiment": "school", "vote": "up"}
        answer = http.get("/v1/feedback/export", params=query)
        assert answer.headers["content-type"].startswith("application/jsonl")
        rows.write_text(answer.text)
        assert http.get("/v1/feedback/export", params={"nonsense": 1}).status_code == 400
        http.delete("/v1/experiments/school")
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["id"] for row in found] == ids[1:]
    assert found[1]["messages"] == [*MESSAGES, {"role": "assistant", "content": "Good day."}]
    contents = [read_row(row, None) for row, _ in open_source(Source(str(rows))).rows]
    assert [form.name for form, _ in contents] == ["chatml"] * 3
    call = contents[0][1].messages[-1]["tool_calls"][0]["function"]
    assert (call["name"], call["arguments"]) == ("now", {})
    assert contents[0][1].tools == TOOLS
    written = tmp_path / "from-the-file.jsonl"
    file = str(server.folder / "feedback.sqlite")
    export = ["export", file, "--experiment", "school", "--vote", "up", "--output", str(written)]
    _run(feedback.app, *export)
    assert written.read_text() == rows.read_text()
    assert "experiment school" in _run(feedback.app, "results", file)
    report = json.loads(_run(data.app, "check", str(rows), "--base", str(server.base), "--json"))
    assert (report["ok"], report["ends"]["rows_with"], report["problems"]) == (True, 3, [])


def _run(app: Any, *arguments: str) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_all_of_it_outlives_the_server(tmp_path) -> None:
    server = Server(tmp_path)
    users = [f"user {number}" for number in range(12)]
    body = {"name": "mine", "variants": {"alpha": 1, "beta": 1}}

    def variants(http: httpx.Client) -> list[str]:
        return [
            http.post("/v1/chat/completions", json=_body(model="mine", user=user)).headers[
                "x-experiment-variant"
            ]
            for user in users
        ]

    with serving(build_service(server.settings)) as server.url, server.http("admin") as http:
        http.post("/v1/experiments", json=body)
        first = variants(http)
    with serving(build_service(server.settings)) as server.url, server.http("admin") as http:
        assert [one["id"] for one in http.get("/v1/experiments").json()["data"]] == ["mine", "tone"]
        assert variants(http) == first
        found = http.get("/v1/experiments/mine").json()["variants"]
        assert [one["answers"] for one in found] == [
            2 * first.count("alpha"),
            2 * first.count("beta"),
        ]
    stored = (tmp_path / "feedback.sqlite").read_bytes()
    assert b"user 11" not in stored, "users are hashed"


def test_settings_that_cannot_be_are_refused_at_once(server, tmp_path) -> None:
    def start(**fields: Any) -> None:
        build_service(ServeSettings(base=str(server.base), **fields))

    split = {"tone": {"base": 1, "alpha": 1}}
    file, folder = tmp_path / "f.sqlite", server.folder / "adapters"
    with pytest.raises(ConfigError, match="needs --feedback FILE"):
        start(experiment=split, adapters_dir=folder)
    with pytest.raises(ConfigError, match="no model is called 'alpha'; known here: base"):
        start(experiment=split, feedback=file)
    with pytest.raises(ConfigError, match="the name means a model"):
        start(experiment={"alpha": {"base": 1}}, feedback=file, adapters_dir=folder)
    with pytest.raises(ConfigError, match="feedback file"):
        start(feedback=server.folder)
