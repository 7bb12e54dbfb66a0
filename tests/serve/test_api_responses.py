"""`/v1/responses`, `/tokenize` and `/detokenize` through the openai client and its types."""

import json

import httpx
import jsonschema_rs
import openai
import pytest
from in_process_server import serving
from openai.types.chat import ChatCompletion
from openai.types.responses import Response, ResponseStreamEvent
from openai_shapes import checked, post
from tool_bases import write_tool_base
from transformers import AutoTokenizer

from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.run import build_service

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Köln", "Ulm"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "weather", "parameters": SCHEMA}


@pytest.fixture(scope="module")
def tool_client(tmp_path_factory):
    base = write_tool_base(tmp_path_factory.mktemp("responses") / "tiny", "hermes")
    with serving(build_service(ServeSettings(base=str(base)))) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def _events(url: str, body) -> list:
    """The checked events of a stream: numbered without a gap, named as they are typed."""
    events, name = [], None
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                events.append(checked(ResponseStreamEvent, json.loads(line[6:])))
                assert events[-1].type == name
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events


def test_text_is_what_the_chat_answers_whole_and_streamed(api_url) -> None:
    chat = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "你好"},
        ],
        "temperature": 0,
        "max_tokens": 20,
        "adapter": "tagging",
    }
    expected = post(f"{api_url}/v1/chat/completions", chat, ChatCompletion)
    body = {
        "instructions": "Be brief.",
        "input": "你好",
        "temperature": 0,
        "max_output_tokens": 20,
        "model": "tagging",
        "metadata": {"run": "7"},
        "store": False,
    }
    url = f"{api_url}/v1/responses"
    answer = post(url, body, Response)
    assert answer.output_text == expected.choices[0].message.content
    assert answer.model == "tagging"
    assert answer.metadata == {"run": "7"}
    assert answer.usage.output_tokens == expected.usage.completion_tokens
    is_complete = expected.choices[0].finish_reason == "stop"
    assert answer.status == ("completed" if is_complete else "incomplete")
    events = _events(url, body)
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == f"response.{answer.status}"
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == answer.output_text == events[-1].response.output_text
    assert len(deltas) > 1
    kinds = [event.type for event in events]
    assert (
        kinds.count("response.output_item.done") == kinds.count("response.output_item.added") == 1
    )
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "你好"}]}]
    assert post(url, {**body, "input": parts}, Response).output_text == answer.output_text


def test_a_function_is_called_and_its_output_goes_back(tool_client) -> None:
    ask = {
        "model": "base",
        "input": [{"role": "user", "content": "hello"}],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": "weather"},
        "max_output_tokens": 150,
    }
    answer = tool_client.responses.create(**ask)
    [call] = answer.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    jsonschema_rs.validate(SCHEMA, json.loads(call.arguments))
    # The client's own items go back as they came.
    history = [*ask["input"], call.model_dump(exclude_none=True)]
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "12 °C"})
    after = tool_client.responses.create(
        model="base", input=history, tools=[TOOL], max_output_tokens=8
    )
    assert after.output[0].type == "message"
    assert after.usage.input_tokens > answer.usage.input_tokens
    history += [item.model_dump(exclude_none=True) for item in after.output]
    tool_client.responses.create(model="base", input=history, max_output_tokens=4)
    url = str(tool_client.base_url) + "responses"
    events = _events(
        url, {**ask, "input": "hello", "tool_choice": "required", "parallel_tool_calls": False}
    )
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    [done] = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == done.arguments == events[-1].response.output[0].arguments


def test_the_clients_stream_helper_and_structured_text(client) -> None:
    wanted = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    with client.responses.stream(model="base", input="x", text=wanted) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    jsonschema_rs.validate(SCHEMA, json.loads(final.output_text))


@pytest.mark.parametrize(
    ("fields", "said", "param"),
    [
        ({"store": True}, "store=True is not supported", "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id: this field is", None),
        ({"background": True}, "background=True is not supported", "background"),
        ({"reasoning": {"effort": "low"}}, "reasoning: this field is not supported", None),
        ({"include": ["reasoning.encrypted_content"]}, "include=", "include"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", None),
        ({"tools": [TOOL]}, "tools are not supported by this base", "tools"),
        ({"input": []}, "input", None),
        ({"input": [{"type": "item_reference", "id": "1"}]}, "item_reference", None),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "type", None),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "x"}]},
         "expected a JSON object as text", None),
        ({"tool_choice": "required"}, "tool_choice needs tools", "tool_choice"),
        ({"max_output_tokens": 9999}, "at most 512", None),
        ({"text": {"format": {"type": "json_schema"}}}, "needs name and schema", "text"),
        ({"text": {"verbosity": "low"}}, "text.verbosity: this field is not supported", None),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_a_400_that_names_it(client, fields, said, param) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**({"model": "base", "input": "x"} | fields))
    assert said in str(caught.value)
    assert caught.value.param == (param or caught.value.param)
    assert caught.value.param


def test_tokenize_and_detokenize(api_url, api_paths) -> None:
    tokenizer = AutoTokenizer.from_pretrained(api_paths["base"])
    chat = [{"role": "user", "content": "Grüße 🙂"}]
    text = "Grüße aus Köln"
    with httpx.Client(base_url=api_url) as http:
        found = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
        assert found["tokens"] == tokenizer(text)["input_ids"]
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
        assert found["max_model_len"] == 512
        back = http.post("/detokenize", json={"tokens": found["tokens"], "model": "tagging"})
        assert back.json() == {"prompt": text}
        for prompt in (True, False):
            body = {"messages": chat, "add_generation_prompt": prompt}
            expected = tokenizer.apply_chat_template(chat, add_generation_prompt=prompt)
            assert http.post("/tokenize", json=body).json()["tokens"] == expected["input_ids"]
        for route, body, said in (
            ("/tokenize", {}, "give either prompt or messages"),
            ("/tokenize", {"prompt": "x", "messages": chat}, "give either prompt or messages"),
            (
                "/tokenize",
                {"messages": chat, "add_special_tokens": True},
                "writes a chat's special",
            ),
            ("/detokenize", {"tokens": [-1]}, "there is no token -1"),
            ("/detokenize", {"tokens": [1], "model": "nobody"}, "nobody"),
        ):
            refused = http.post(route, json=body)
            assert refused.status_code in (400, 404)
            assert said in refused.json()["error"]["message"]
