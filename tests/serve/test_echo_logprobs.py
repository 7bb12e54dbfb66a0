"""`echo` with `logprobs`: what the model thinks of a prompt, against PEFT and plain log-softmax."""

import json
from typing import Any

import httpx
import openai
import pytest
import torch
from mixed_batch import reference
from openai_shapes import checked
from transformers import AutoTokenizer

PROMPT = "hello fox 你好 🙂 order 4711"


@torch.inference_mode()
def _expected(base, adapter, ids: list[int]) -> torch.Tensor:
    """[tokens - 1, vocabulary]: the distribution of each token but the first."""
    logits = reference(base, adapter)(torch.tensor([ids])).logits[0, :-1]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("model", ["base", "tagging"])
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_the_prompts_are_the_models_own(client, api_paths, model, max_tokens) -> None:
    tokenizer = AutoTokenizer.from_pretrained(api_paths["base"])
    ids = tokenizer(PROMPT)["input_ids"]
    asked = {"model": model, "echo": True, "logprobs": 4, "max_tokens": max_tokens}
    answer = client.completions.create(prompt=PROMPT, temperature=0, **asked)
    [choice] = answer.choices
    assert choice.text.startswith(PROMPT)
    assert answer.usage.completion_tokens == max_tokens
    assert answer.usage.prompt_tokens == len(ids)
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(ids) + max_tokens
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    adapter = None if model == "base" else api_paths["adapters"] / model
    expected = _expected(api_paths["base"], adapter, ids)
    own = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert found.token_logprobs[1 : len(ids)] == pytest.approx(own.tolist(), abs=1e-4)
    for place, row in enumerate(expected, start=1):
        highest = row.topk(4).values.tolist()
        # Tokens that read the same share an entry, and the chosen one is always there.
        given = sorted(found.top_logprobs[place].values(), reverse=True)
        assert given[0] == pytest.approx(highest[0], abs=1e-4)
        assert found.tokens[place] in found.top_logprobs[place]
    # ASCII tokens begin where it is said.
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        if token.isascii():
            assert choice.text[offset:].startswith(token)


def test_streams_and_choices_say_the_same(api_url, client) -> None:
    body: dict[str, Any] = {
        "model": "tagging", "prompt": ["hello fox", "you", "x"], "echo": True, "logprobs": 1,
        "n": 2, "max_tokens": 4, "seed": 1,
    }  # fmt: skip
    whole = httpx.post(f"{api_url}/v1/completions", json=body).json()
    chunks = list(client.completions.create(**body, stream=True))
    for choice in whole["choices"]:
        mine = [c.choices[0] for c in chunks if c.choices[0].index == choice["index"]]
        assert "".join(one.text for one in mine) == choice["text"]
        parts = [one.logprobs.model_dump() for one in mine if one.logprobs is not None]
        joined = {name: [item for part in parts for item in part[name]] for name in parts[0]}
        assert joined.pop("token_logprobs")[1:] == pytest.approx(
            choice["logprobs"]["token_logprobs"][1:], abs=1e-4
        )
        assert joined["tokens"] == choice["logprobs"]["tokens"]
        assert joined["text_offset"] == choice["logprobs"]["text_offset"]
        # OpenAI's own answers have null there, which the client's types do not say.
        for name in ("token_logprobs", "top_logprobs"):
            choice["logprobs"][name][0] = {} if name == "top_logprobs" else 0.0
    checked(openai.types.Completion, whole)
    counts = [
        httpx.post(f"{api_url}/tokenize", json={"prompt": prompt}).json()["count"]
        for prompt in body["prompt"]
    ]
    assert whole["usage"]["prompt_tokens"] == sum(counts)
    ids = httpx.post(
        f"{api_url}/v1/completions",
        json={"prompt": [[5, 6, 7], [9]], "echo": True, "logprobs": 0, "max_tokens": 0},
    ).json()["choices"]
    assert [len(one["logprobs"]["tokens"]) for one in ids] == [3, 1]
    assert ids[1]["logprobs"]["token_logprobs"] == [None]


def test_a_prompt_alone_can_be_streamed(api_url) -> None:
    body = {"prompt": "hello", "max_tokens": 0, "echo": True, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    lines = httpx.post(f"{api_url}/v1/completions", json=body).text.split("\n")
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    chunks = [json.loads(one) for one in data[:-1]]
    assert [chunk["choices"][0]["text"] for chunk in chunks[:-1]] == ["hello", ""]
    assert chunks[1]["choices"][0]["finish_reason"] == "length"
    assert chunks[2]["usage"]["completion_tokens"] == 0
