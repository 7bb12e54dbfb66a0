"""n, stop, log-probabilities, echo, prompts of every form: chats and completions."""

import openai
import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai_shapes import post, stream
from transformers import AutoModelForCausalLM, AutoTokenizer

MESSAGES = [{"role": "user", "content": "Grüße aus Köln, 你好 🙂"}]
HOT = {"temperature": 1.3, "seed": 3, "max_tokens": 12}


@pytest.fixture(scope="module")
def reference(api_paths):
    model = AutoModelForCausalLM.from_pretrained(api_paths["base"], dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(api_paths["base"])


@pytest.fixture
def chat_url(api_url) -> str:
    return f"{api_url}/v1/chat/completions"


@pytest.fixture
def text_url(api_url) -> str:
    return f"{api_url}/v1/completions"


@torch.inference_mode()
def _logprobs(model, ids: list[int], new: list[int]) -> torch.Tensor:
    """[new, vocabulary]: the model's log-probabilities at each new token."""
    logits = model(torch.tensor([[*ids, *new]])).logits[0]
    return torch.log_softmax(logits.float(), -1)[len(ids) - 1 : len(ids) + len(new) - 1]


def test_n_choices_differ_repeat_under_a_seed_and_stream_alike(chat_url) -> None:
    body = {"messages": MESSAGES, "n": 3, **HOT}
    answer = post(chat_url, body, ChatCompletion)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    single = post(chat_url, {**body, "n": 1}, ChatCompletion)
    assert single.choices[0].message.content == texts[0]
    assert answer.usage.prompt_tokens == single.usage.prompt_tokens
    assert answer.usage.completion_tokens <= 36
    chunks = stream(chat_url, {**body, "stream_options": {"include_usage": True}},
                    ChatCompletionChunk)  # fmt: skip
    streamed = ["", "", ""]
    endings: list[list[str]] = [[], [], []]
    for chunk in chunks[:-1]:
        for choice in chunk.choices:
            assert not endings[choice.index], "nothing follows a finish reason"
            streamed[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                endings[choice.index].append(choice.finish_reason)
    assert streamed == texts
    assert endings == [[choice.finish_reason] for choice in answer.choices]
    # How much of a prompt was in the cache depends on what was asked before.
    counts = {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert chunks[-1].usage.model_dump(include=counts) == answer.usage.model_dump(include=counts)


@pytest.mark.parametrize("streaming", [False, True])
def test_chat_logprobs_are_the_models_own(chat_url, reference, streaming) -> None:
    model, tokenizer = reference
    body = {"messages": MESSAGES, **HOT, "logprobs": True, "top_logprobs": 4, "top_k": 50}
    body |= {"presence_penalty": 1.0, "logit_bias": {"77": 3}}
    if streaming:
        chunks = stream(chat_url, body, ChatCompletionChunk)
        content = [
            t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content
        ]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        choice = post(chat_url, body, ChatCompletion).choices[0]
        content, text = choice.logprobs.content, choice.message.content
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    by_bytes = {_bytes(tokenizer, token): token for token in range(len(tokenizer))}
    new = [by_bytes[bytes(token.bytes)] for token in content]
    assert b"".join(bytes(token.bytes) for token in content).decode(errors="replace") == text
    expected = _logprobs(model, prompt, new)
    for row, token, found in zip(expected, new, content, strict=True):
        assert found.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [top.logprob for top in found.top_logprobs] == pytest.approx(
            row.topk(4).values.tolist(), abs=1e-4
        )


def _bytes(tokenizer, token: int) -> bytes:
    """A byte-level token's bytes, through the decoder of its pre-tokenizer's own alphabet."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    table = {character: byte for byte, character in bytes_to_unicode().items()}
    piece = tokenizer.convert_ids_to_tokens(token)
    return piece.encode() if token < 3 else bytes(table[character] for character in piece)


def test_completion_logprobs_offsets_and_likeliest(text_url, reference) -> None:
    model, tokenizer = reference
    ids = tokenizer("The quick brown")["input_ids"]
    body = {"prompt": ids, "temperature": 0, "max_tokens": 10, "logprobs": 2, "ignore_eos": True}
    choice = post(text_url, body, Completion).choices[0]
    new = model.generate(
        torch.tensor([ids]), max_new_tokens=10, do_sample=False, eos_token_id=None
    )[0, len(ids) :].tolist()
    assert choice.text == tokenizer.decode(new, skip_special_tokens=True)
    expected = _logprobs(model, ids, new)
    chosen = [row[token].item() for row, token in zip(expected, new, strict=True)]
    assert choice.logprobs.token_logprobs == pytest.approx(chosen, abs=1e-4)
    for row, tops in zip(expected, choice.logprobs.top_logprobs, strict=True):
        assert max(tops.values()) == pytest.approx(row.max().item(), abs=1e-4)
        assert len(tops) <= 3
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        if "\ufffd" not in token and token not in tokenizer.all_special_tokens:
            assert choice.text[offset:].startswith(token)


def test_prompts_of_every_form_are_the_same_prompt(text_url, reference) -> None:
    _, tokenizer = reference
    text = "hello world"
    ids = tokenizer(text)["input_ids"]
    body = {"temperature": 0, "max_tokens": 6, "model": "tagging"}
    answers = [
        post(text_url, {**body, "prompt": form}, Completion).choices
        for form in (text, ids, [text, text], [ids, ids])
    ]
    assert [len(choices) for choices in answers] == [1, 1, 2, 2]
    assert len({choice.text for choices in answers for choice in choices}) == 1


def test_many_prompts_and_choices_are_numbered_and_echoed(text_url) -> None:
    body = {"prompt": ["one ", "two "], "n": 2, "echo": True, **HOT}
    answer = post(text_url, body, Completion)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    starts = [choice.text[:4] for choice in answer.choices]
    assert starts == ["one ", "one ", "two ", "two "]
    streamed = ["", "", "", ""]
    for chunk in stream(text_url, body, dict):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == [choice.text for choice in answer.choices]


def test_best_of_keeps_the_likeliest(text_url) -> None:
    body = {"prompt": "hello", "logprobs": 0, **HOT}
    everyone = post(text_url, {**body, "n": 5}, Completion)
    best = post(text_url, {**body, "n": 2, "best_of": 5}, Completion)

    def mean(choice) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    ranked = sorted(everyone.choices, key=mean, reverse=True)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert best.usage.total_tokens == everyone.usage.total_tokens
    # Without log-probabilities in the answer they are found all the same.
    body.pop("logprobs")
    plain = post(text_url, {**body, "n": 2, "best_of": 5}, Completion)
    assert [choice.text for choice in plain.choices] == [choice.text for choice in best.choices]
    assert plain.choices[0].logprobs is None


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stop_text_that_spans_tokens_cuts_text_and_logprobs(chat_url, streaming) -> None:
    body = {"messages": MESSAGES, **HOT, "max_tokens": 24, "logprobs": True}
    whole = post(chat_url, body, ChatCompletion).choices[0]
    tokens = whole.logprobs.content
    at = next(  # the end of one token and the beginning of the next
        n for n in range(4, len(tokens) - 1)
        if len(tokens[n].token.strip()) > 1 and tokens[n + 1].token.strip()
        and "\ufffd" not in tokens[n].token + tokens[n + 1].token
    )  # fmt: skip
    stop = tokens[at].token[-1] + tokens[at + 1].token[0]
    body["stop"] = ["never in there", stop]
    if streaming:
        chunks = [chunk.choices[0] for chunk in stream(chat_url, body, ChatCompletionChunk)]
        text = "".join(choice.delta.content or "" for choice in chunks)
        kept = [t for choice in chunks if choice.logprobs for t in choice.logprobs.content]
        reason = chunks[-1].finish_reason
    else:
        choice = post(chat_url, body, ChatCompletion).choices[0]
        text, kept = choice.message.content, choice.logprobs.content
        reason = choice.finish_reason
    assert reason == "stop"
    assert text == whole.message.content.split(stop)[0]
    assert [t.bytes for t in kept] == [t.bytes for t in tokens[: len(kept)]]
    said = b"".join(bytes(t.bytes) for t in kept).decode(errors="replace")
    assert said.startswith(text)
    assert len(said) - len(text) < len(tokens[at].token)


def test_min_tokens_holds_off_stop_texts_and_end_tokens(chat_url) -> None:
    body = {"messages": MESSAGES, **HOT}
    text = post(chat_url, body, ChatCompletion).choices[0].message.content
    stop = text[0]
    cut = post(chat_url, {**body, "stop": stop}, ChatCompletion)
    assert cut.choices[0].message.content == ""
    held = post(chat_url, {**body, "stop": stop, "min_tokens": 6}, ChatCompletion)
    assert held.usage.completion_tokens > 6
    body["logit_bias"] = {"2": 100}  # the end token
    assert post(chat_url, body, ChatCompletion).usage.completion_tokens == 1
    late = post(chat_url, {**body, "min_tokens": 5}, ChatCompletion)
    assert late.usage.completion_tokens == 6
    assert late.choices[0].finish_reason == "stop"


def test_penalties_and_bias_reach_the_answer(client) -> None:
    def ask(**body) -> str:
        fields = {"prompt": "hello", "model": "tiny", "temperature": 0, "max_tokens": 40}
        return client.completions.create(**(fields | body)).choices[0].text

    plain = ask()
    for settings in (
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"extra_body": {"repetition_penalty": 1.8}},
        {"logit_bias": {"300": 100}},
    ):
        assert ask(**settings) != plain, settings
    # A small top-k or a large min-p leaves one token, as greedy does.
    for extra in ({"top_k": 1}, {"min_p": 1.0}):
        assert ask(temperature=1.5, extra_body=extra) == plain


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"suffix": "x"}, "suffix: this field is not supported"),
        ({"best_of": 1, "n": 2}, "best_of=1 is less than n=2"),
        ({"best_of": 2, "stream": True}, "best_of cannot be streamed"),
        ({"best_of": 33}, "33 answers in one request"),
        ({"prompt": ["a"] * 20, "n": 2}, "40 answers in one request"),
        ({"max_tokens": 0}, "max_tokens=0 gives nothing at all without echo=true"),
        ({"logprobs": 21}, "logprobs: Input should be less than or equal to 20"),
        ({"prompt": [600]}, "there is no token 600"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "", "echo": True, "logprobs": 1, "max_tokens": 0}, "the prompt is empty"),
        ({"prompt": [1.5]}, "prompt"),
        ({"max_tokens": 600}, "at most 512"),
    ],
)  # fmt: skip
def test_refusals_of_completions_name_the_field(client, body, said) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**({"prompt": "hello", "model": "tiny"} | body))
    assert said in str(caught.value)
    assert caught.value.param is not None
