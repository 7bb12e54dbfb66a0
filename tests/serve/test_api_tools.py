"""Tools through the openai client: rendered, called, read back, in four families' formats."""

import json

import jsonschema_rs
import openai
import pytest
from in_process_server import serving
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai_shapes import post, stream
from tool_bases import TEMPLATES, write_tool_base

from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.run import build_service

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Köln", "Ulm"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"$ref": "#/$defs/unit"},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["C", "F"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "stop_all", "description": "Stops."}},
]
MESSAGES = [{"role": "user", "content": "hello world"}]


@pytest.fixture(scope="module", params=list(TEMPLATES))
def family(request, tmp_path_factory):
    """(family, service, URL)"""
    base = write_tool_base(tmp_path_factory.mktemp("tools") / "tiny", request.param)
    service = build_service(ServeSettings(base=str(base)))
    with serving(service) as url:
        yield request.param, service, f"{url}/v1/chat/completions"


def _body(**more):
    hot = {"temperature": 1.2, "seed": 2, "max_tokens": 200}
    return {"messages": MESSAGES, "tools": TOOLS, **hot, **more}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_forced_calls_follow_their_schema_whole_and_streamed(family, choice) -> None:
    name, _, url = family
    body = _body(tool_choice=choice, n=3, parallel_tool_calls=name != "llama3")
    answer = post(url, body, ChatCompletion)
    complete = 0
    for number, one in enumerate(answer.choices):
        calls = one.message.tool_calls
        assert not one.message.content
        if one.finish_reason != "tool_calls":  # an endless list of calls
            assert one.finish_reason == "length"
            continue
        complete += 1
        assert calls, number
        for call in calls:
            arguments = json.loads(call.function.arguments)
            if call.function.name == "weather":
                jsonschema_rs.validate(PARAMETERS, arguments)
            else:
                assert (call.function.name, choice) == ("stop_all", "required")
        assert len({call.id for call in calls}) == len(calls)
    assert complete
    streamed: list[list[tuple[str, str]]] = [[] for _ in range(3)]
    reasons = [None] * 3
    for chunk in stream(url, body, ChatCompletionChunk):
        for one in chunk.choices:
            reasons[one.index] = one.finish_reason or reasons[one.index]
            for call in one.delta.tool_calls or []:
                if call.id:
                    assert call.index == len(streamed[one.index])
                    streamed[one.index].append((call.function.name, ""))
                known, so_far = streamed[one.index][call.index]
                streamed[one.index][call.index] = (known, so_far + call.function.arguments)
    assert reasons == [one.finish_reason for one in answer.choices]
    assert streamed == [
        [(c.function.name, c.function.arguments) for c in one.message.tool_calls or []]
        for one in answer.choices
    ]


def test_the_openai_client_reads_a_stream_of_calls(family) -> None:
    url = family[2].removesuffix("/chat/completions")
    client = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)
    fields = {"model": "base", "messages": MESSAGES, "tools": TOOLS, "seed": 1, "max_tokens": 300}
    chosen = {"type": "function", "function": {"name": "weather"}}
    with client.chat.completions.stream(**fields, tool_choice=chosen) as events:
        for _ in events:
            pass
        call = events.get_final_completion().choices[0].message.tool_calls[0]
    jsonschema_rs.validate(PARAMETERS, json.loads(call.function.arguments))


def test_tools_and_earlier_calls_reach_the_prompt(family) -> None:
    _, service, url = family
    seen = []
    submit = service.engine.submit

    def spy(request, deliver):
        seen.append(service.base.tokenizer.decode(request.prompt))
        submit(request, deliver)

    service.engine.submit = spy
    try:
        history = [
            *MESSAGES,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "abcdefghi",
                        "type": "function",
                        "function": {"name": "weather", "arguments": '{"city": "Ulm"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "abcdefghi", "content": "4711 degrees"},
        ]
        answer = post(url, _body(messages=history, max_tokens=2), ChatCompletion)
        post(url, _body(messages=history, max_tokens=2, tool_choice="none"), ChatCompletion)
    finally:
        service.engine.submit = submit
    assert '"stop_all"' in seen[0]
    assert '"city": "Ulm"' in seen[0]
    assert "4711 degrees" in seen[0]
    assert '"stop_all"' not in seen[1], "tool_choice=none: the model is not told of tools"
    # What the client got it can send back.
    returned = answer.choices[0].message.model_dump()
    post(url, _body(messages=[*MESSAGES, returned, *MESSAGES], max_tokens=2), ChatCompletion)


def test_auto_leaves_the_model_free_and_text_is_text(family) -> None:
    _, _, url = family
    with_tools = post(url, _body(max_tokens=30), ChatCompletion).choices[0]
    assert with_tools.message.content
    assert with_tools.message.tool_calls is None
    assert with_tools.finish_reason in ("stop", "length")


def test_auto_with_strict_functions_lets_no_wrong_call_through(family) -> None:
    name, service, url = family
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    body = _body(tools=strict, n=3)
    if name == "llama3":
        with pytest.raises(AssertionError, match="strict functions need tool_choice"):
            post(url, body, ChatCompletion)
        return
    marker = "<tool_call>" if name == "hermes" else "[TOOL_CALLS]"
    # A bias brings the model to begin a call sooner or later; the grammar makes it a right one.
    body["logit_bias"] = {str(service.base.tokenizer.convert_tokens_to_ids(marker)): 6}
    answer = post(url, body, ChatCompletion)
    found = [call for choice in answer.choices for call in choice.message.tool_calls or []]
    complete = [call for call in found if call.function.arguments.endswith("}")]
    assert complete
    for call in complete:
        jsonschema_rs.validate(PARAMETERS, json.loads(call.function.arguments))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"tools": TOOLS}, "tools are not supported by this base"),
        ({"messages": [*MESSAGES, {"role": "tool", "tool_call_id": "1", "content": "x"}]},
         "tools are not supported by this base"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "two functions share a name"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}},
         "no tool is called 'no'"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "cannot be combined with"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"functions": [{"name": "f"}]}, "functions=[{'name': 'f'}] is not supported"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "does not belong"),
        ({"messages": [{"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[]"}}]}]},
         "expected a JSON object as text"),
    ],
)  # fmt: skip
def test_refusals(client, fields, said) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**({"model": "tiny", "messages": MESSAGES} | fields))
    assert said in str(caught.value)
    assert caught.value.param
