"""Answers that must follow a grammar do, even from a model that knows nothing."""

import asyncio
import json
import re
import threading
from typing import Literal

import jsonschema_rs
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai_shapes import post, stream
from pydantic import BaseModel, Field
from tiny_models import write_tiny_model

from qlora_serve.base.load import load_base
from qlora_serve.errors import RequestError
from qlora_serve.serve.api.limits import ApiLimits
from qlora_serve.serve.api.structured import GuideStore

MESSAGES = [{"role": "user", "content": "Order 4711 arrived broken"}]

_SCALARS = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.integers(0, 40).map(lambda low: {"type": "integer", "minimum": low, "maximum": low + 9}),
    st.integers(0, 9).map(lambda most: {"type": "string", "maxLength": most}),
    st.sampled_from([{"type": "string", "pattern": "^[A-Z]{2,4}-[0-9]+$", "maxLength": 9}]),
    st.lists(
        st.sampled_from(["a", "ä", "🙂", '"', "\\", "\n", "x y"]), min_size=1, unique=True
    ).map(lambda values: {"enum": values}),
)


def _containers(inner: st.SearchStrategy) -> st.SearchStrategy:
    names = st.lists(st.sampled_from(["id", "naïve key", 'q"', "urgency"]), unique=True, max_size=3)
    objects = names.flatmap(
        lambda keys: st.tuples(*[inner] * len(keys)).map(
            lambda schemas: {
                "type": "object",
                "properties": dict(zip(keys, schemas, strict=True)),
                "required": keys[:2],
                "additionalProperties": False,
            }
        )
    )
    arrays = inner.map(lambda items: {"type": "array", "items": items, "maxItems": 2})
    choices = st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options})
    return objects | arrays | choices


SCHEMAS = st.recursive(_SCALARS, _containers, max_leaves=4)


def _format(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


@settings(
    deadline=None,
    max_examples=15,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(schema=SCHEMAS)
def test_whatever_the_schema_every_complete_answer_validates(api_url, schema) -> None:
    body = {"messages": MESSAGES, "response_format": _format(schema), "n": 3}
    body |= {"temperature": 1.5, "seed": 5, "max_tokens": 300}
    answer = post(f"{api_url}/v1/chat/completions", body, ChatCompletion)
    validator = jsonschema_rs.validator_for(schema)
    for choice in answer.choices:
        if choice.finish_reason == "stop":
            validator.validate(json.loads(choice.message.content))
        else:  # only white space and digits can go on for ever
            assert choice.finish_reason == "length"
    assert "stop" in [choice.finish_reason for choice in answer.choices]


class Ticket(BaseModel):
    category: Literal["billing", "shipping"]
    order: int = Field(ge=1000, le=9999)
    tags: list[Literal["new", "old"]] = Field(max_length=3)


def test_the_clients_own_parsing_of_pydantic_models(client) -> None:
    answer = client.chat.completions.parse(
        model="tickets", messages=MESSAGES, response_format=Ticket, temperature=1.2, n=4,
        max_tokens=200,
    )  # fmt: skip
    assert len(answer.choices) == 4
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Ticket)


def test_json_object_streams_an_object(api_url) -> None:
    body = {"messages": MESSAGES, "response_format": {"type": "json_object"}, "seed": 1, "n": 6}
    chunks = stream(f"{api_url}/v1/chat/completions", {**body, "max_tokens": 300},
                    ChatCompletionChunk)  # fmt: skip
    texts, reasons = [""] * 6, [""] * 6
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    for text, reason in zip(texts, reasons, strict=True):
        assert text.startswith("{")
        if reason == "stop":
            assert isinstance(json.loads(text), dict)
    assert "stop" in reasons


GBNF = 'root ::= "sport=" [01] " money=" [01]'
LARK = 'start: "sport=" BIT " money=" BIT\nBIT: "0" | "1"'
BITS = re.compile(r"sport=[01] money=[01]")


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "regex", "regex": "[0-9]{3}-(?:é|你){2}"}},
         re.compile("[0-9]{3}-[é你]{2}")),
        ({"response_format": {"type": "grammar", "grammar": LARK}}, BITS),
        ({"structured_outputs": {"grammar": GBNF}}, BITS),
        ({"structured_outputs": {"regex": BITS.pattern}}, BITS),
        ({"structured_outputs": {"choice": ["a b", 'say "no"', "Köln"]}},
         re.compile('a b|say "no"|Köln')),
        ({"structured_outputs": {"json": {"enum": [7, "x"]}}}, re.compile('7|"x"')),
        ({"structured_outputs": {"json": '{"const": true}'}}, re.compile("true")),
    ],
)  # fmt: skip
def test_regex_grammar_and_choice(client, fields, pattern) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, n=4, max_tokens=60, extra_body=fields
    )
    assert len(answer.choices) == 4
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert pattern.fullmatch(choice.message.content), choice.message.content


def test_completions_follow_too_and_a_stop_text_still_cuts(client) -> None:
    def ask(**more) -> str:
        extra = {"structured_outputs": {"regex": "[ab]{5}END[0-9]{4}"}}
        return client.completions.create(
            model="base", prompt="x", seed=4, max_tokens=40, extra_body=extra, **more
        ).choices[0].text  # fmt: skip

    whole = ask()
    assert re.fullmatch("[ab]{5}END[0-9]{4}", whole)
    assert ask(stop=["END"]) == whole[:5]
    assert ask(logprobs=2, temperature=0) == ask(temperature=0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"response_format": _format({"type": "nonsense"})}, "Invalid type: nonsense"),
        ({"response_format": _format({"not": {}})}, "Unimplemented keys"),
        ({"response_format": _format({"$ref": "#/nowhere"})}, "'/nowhere' does not exist"),
        ({"response_format": {"type": "json_schema"}}, "needs the field 'json_schema'"),
        ({"response_format": {"type": "regex", "regex": "(a"}}, "unclosed group"),
        ({"response_format": {"type": "regex", "regex": "(?=a)b"}}, "look-ahead"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, 'unknown name: "nothing"'),
        ({"structured_outputs": {"json": "[1"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one of"),
        ({"structured_outputs": {"regex": "a" * 70000}}, "70000 bytes of grammar"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos cannot be"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 2}, "min_tokens cannot be"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
         "are both given"),
    ],
)  # fmt: skip
def test_a_bad_grammar_is_a_400_with_the_reason(client, fields, said) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=5, extra_body=fields
        )
    assert said in str(caught.value)
    assert caught.value.param


def test_compiling_for_too_long_is_refused_and_a_known_grammar_is_not_compiled_again(
    tmp_path,
) -> None:
    base = load_base(str(write_tiny_model(tmp_path / "tiny")), dtype="float32")

    async def run() -> None:
        store, gate = GuideStore(base, ApiLimits(schema_seconds=0.01)), threading.Event()

        class Slow:
            def compile(self, kind, text):
                gate.wait(60)

        store._compiler = Slow()
        with pytest.raises(RequestError, match=r"took longer than the 0\.01 s"):
            await store.get("regex", "[a-z]+", "response_format")
        gate.set()
        store.close()
        store = GuideStore(base, ApiLimits())
        first = await store.get("regex", "[a-z]+", "response_format")
        assert await store.get("regex", "[a-z]+", "response_format") is first
        for number in range(70):  # more than are remembered
            await store.get("regex", f"[a-z]{{{number}}}", "response_format")
        assert await store.get("regex", "[a-z]+", "response_format") is not first
        store.close()

    asyncio.run(run())
