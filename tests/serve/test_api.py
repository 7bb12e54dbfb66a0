"""The HTTP surface, asked by the official openai client over a real connection."""

import asyncio
import json

import httpx
import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Order 4711 arrived broken, 你好 🙂"},
]


@pytest.fixture(scope="module")
def expected(api_paths) -> dict[str, str]:
    """What `generate` alone answers: the base, and each adapter through PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(api_paths["base"])
    prompt = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answers = {}
    for name in ("tiny", "tagging", "tickets"):
        model = AutoModelForCausalLM.from_pretrained(api_paths["base"], dtype=torch.float32)
        if name != "tiny":
            model = PeftModel.from_pretrained(model, api_paths["adapters"] / name)
        new = model.eval().generate(**prompt, max_new_tokens=24, do_sample=False)
        tokens = new[0, prompt["input_ids"].shape[1] :]
        answers[name] = tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(set(answers.values())) == 3, "the adapters must answer differently"
    return answers


def _ask(client, **body):
    fields = {"messages": MESSAGES, "model": "tiny", "temperature": 0, "max_tokens": 24}
    return client.chat.completions.create(**(fields | body))


@pytest.mark.parametrize(
    ("body", "who"),
    [
        ({}, "tiny"),
        ({"model": "base"}, "tiny"),
        ({"model": "tagging"}, "tagging"),
        ({"extra_body": {"adapter": "tickets"}}, "tickets"),
        ({"model": "tagging", "extra_body": {"adapter": "tickets"}}, "tickets"),
    ],
)
def test_model_and_adapter_choose_who_answers(client, expected, body, who) -> None:
    answer = _ask(client, **body)
    assert answer.choices[0].message.content == expected[who]
    assert answer.model == who
    assert answer.object == "chat.completion"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_stream_carries_the_same_text_an_ending_and_usage(client, expected) -> None:
    chunks = list(
        _ask(client, model="tagging", stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected["tagging"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert {c.model for c in chunks} == {"tagging"}


def test_async_requests_mixed_in_one_batch_each_get_their_own_answer(api_url, expected) -> None:
    async def one(client, who: str, stream: bool) -> tuple[str, str]:
        answer = await _ask(client, model=who, stream=stream)
        if not stream:
            return who, answer.choices[0].message.content
        pieces = [c.choices[0].delta.content or "" async for c in answer]
        return who, "".join(pieces)

    async def everyone() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=f"{api_url}/v1", api_key="unused") as client:
            names = ["tiny", "tagging", "tickets"] * 4
            return await asyncio.gather(*(one(client, w, n % 2 == 0) for n, w in enumerate(names)))

    for who, text in asyncio.run(everyone()):
        assert text == expected[who]


def test_models_are_listed_with_their_parent(client) -> None:
    cards = {card.id: card.parent for card in client.models.list().data}
    assert cards == {"tiny": None, "tagging": "tiny", "tickets": "tiny"}
    assert client.models.retrieve("tagging").id == "tagging"
    with pytest.raises(openai.NotFoundError, match="known here: tagging, tickets, tiny"):
        client.models.retrieve("other")


@pytest.mark.parametrize("body", [{"model": "nobody"}, {"extra_body": {"adapter": "nobody"}}])
def test_an_unknown_name_is_404_and_lists_the_known_ones(client, body) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        _ask(client, **body)
    assert "'nobody'" in str(caught.value)
    assert "known here: tagging, tickets, tiny" in str(caught.value)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"n": 33}, "n: 33 answers in one request; this server takes at most 32"),
        ({"n": "2"}, "n: Input should be a valid integer"),
        ({"stop": ["x"] * 17}, "stop: 17 texts; this server takes at most 16"),
        ({"stop": "x" * 1025}, "stop: 1025 characters in one text"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs=true"),
        ({"logit_bias": {"512": 1}}, "there is no token 512; ids are 0 to 511"),
        ({"logit_bias": {"x": 1}}, "expected token ids as keys"),
        ({"logit_bias": {"5": 101}}, "the bias of token 5 is 101.0; expected -100 to 100"),
        ({"extra_body": {"min_tokens": 9}, "max_tokens": 8}, "min_tokens=9 is more than"),
        ({"store": True}, "store=True is not supported here"),
        ({"modalities": ["text", "audio"]}, "modalities=['text', 'audio'] is not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort: this field is not supported"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction: this field is not"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "needs the tool_call_id"),
        ({"messages": [{"role": "user"}]}, "messages.0: content is missing"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "name is not supported"),
        ({"extra_body": {"beam_width": 4}}, "beam_width: this field is not supported"),
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ({"top_p": 0}, "top_p: Input should be greater than 0"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "differ; give one of them"),
        ({"max_tokens": 5000}, "this server takes at most 512 together"),
        ({"stop": ["a", ""]}, "an empty text cannot end an answer"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "long " * 900}]}, "at most 512"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_it(client, body, said) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        _ask(client, **({"max_tokens": None} | body))
    assert said in str(caught.value)


def test_neutral_and_null_fields_are_accepted(client, expected) -> None:
    answer = _ask(client, n=1, presence_penalty=0, logit_bias=None, user="me", stop=None)
    assert answer.choices[0].message.content == expected["tiny"]


def test_seed_stop_and_text_parts(client) -> None:
    hot = {"temperature": 1.2, "top_p": 0.95, "seed": 7}
    first, second = (_ask(client, **hot).choices[0].message.content for _ in range(2))
    assert first == second
    stop = first[3:6]
    cut = _ask(client, **hot, stop=stop).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.message.content == first[: first.index(stop)]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
    assert _ask(client, **hot, messages=parts).choices[0].message.content == first


def test_health_ready_and_bad_bodies(api_url) -> None:
    with httpx.Client(base_url=api_url) as http:
        assert http.get("/health").json() == {"status": "alive"}
        assert http.get("/ready").json() == {"status": "ready"}
        for content, header, said in (
            (b"{not json", "application/json", "the body is not JSON"),
            (b"[1]", "application/json", "expected a JSON object"),
            (b'{"messages": []}', "text/plain", "Content-Type: application/json"),
            (b"", "application/json", "expected a JSON object"),
        ):
            bad = http.post(
                "/v1/chat/completions", content=content, headers={"content-type": header}
            )
            assert bad.status_code == 400
            assert said in bad.json()["error"]["message"]
        assert http.get("/nothing").json()["error"]["type"] == "not_found_error"
        assert "/v1/chat/completions" in http.get("/openapi.json").json()["paths"]


def test_raw_stream_ends_with_done(api_url) -> None:
    body = {"messages": MESSAGES, "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{api_url}/v1/chat/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data:")]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line[5:])["object"] == "chat.completion.chunk" for line in lines[:-1])
