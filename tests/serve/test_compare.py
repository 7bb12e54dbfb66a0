"""`POST /v1/compare`: each variant's answer is the one it gives alone, and divergence is PEFT's."""

import gc
import json
import math
import threading

import httpx
import pytest
import torch
from in_process_server import serving
from mixed_batch import reference
from tiny_models import write_random_adapter, write_tiny_model
from transformers import AutoTokenizer

from qlora_serve.serve.api.answers import CompareAnswer
from qlora_serve.serve.api.traffic import Passage
from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.run import build_service

MESSAGES = [{"role": "user", "content": "Order 4711 arrived broken, 你好 🙂"}]
SHARED = {"messages": MESSAGES, "temperature": 0, "max_tokens": 20}


def _compare(url: str, **body) -> dict:
    response = httpx.post(f"{url}/v1/compare", json=SHARED | body, timeout=120)
    assert response.status_code == 200, response.text
    return CompareAnswer.model_validate(response.json()).model_dump()


def _alone(url: str, **body) -> dict:
    answer = httpx.post(f"{url}/v1/chat/completions", json=SHARED | {"logprobs": True} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


VARIANTS = {
    "base": ({"model": "base"}, "base"),
    "tagging": ({"model": "tagging"}, "tagging"),
    "tickets@0.5": ({"adapter": "tickets", "adapter_scale": 0.5},) * 2,
    "both": (
        {"adapter": [{"name": "tagging", "weight": 0.7}, {"name": "tickets", "weight": 0.4}]},
        {
            "adapter": [{"name": "tagging", "weight": 0.7}, {"name": "tickets", "weight": 0.4}],
            "name": "both",
        },
    ),
    "warm": (
        {"model": "tickets", "temperature": 1.3, "seed": 5, "max_tokens": 9},
        {"adapter": "tickets", "temperature": 1.3, "seed": 5, "max_tokens": 9, "name": "warm"},
    ),
}


@pytest.fixture(scope="module")
def compared(api_url) -> dict:
    return _compare(api_url, variants=[given for _, given in VARIANTS.values()])


def test_every_variant_answers_as_it_does_alone(api_url, compared) -> None:
    assert [one["variant"] for one in compared["answers"]] == list(VARIANTS)
    for one in compared["answers"]:
        alone = _alone(api_url, **VARIANTS[one["variant"]][0])
        assert one["text"] == alone["message"]["content"]
        assert one["finish_reason"] == alone["finish_reason"]
        logprobs = [token["logprob"] for token in alone["logprobs"]["content"]]
        assert [token["logprob"] for token in one["tokens"]] == pytest.approx(logprobs, abs=1e-4)
        assert one["mean_logprob"] == pytest.approx(sum(logprobs) / len(logprobs), abs=1e-4)
        assert 0 < one["ttft_seconds"] <= one["seconds"]
    assert len({one["text"] for one in compared["answers"]}) == len(VARIANTS)
    assert len({one["id"] for one in compared["answers"]}) == len(VARIANTS)


@torch.inference_mode()
def test_divergence_is_that_of_peft_from_the_base(api_url, api_paths) -> None:
    """Token by token, for an answer that was drawn, not only for the likeliest."""
    variants = [
        "base",
        {"adapter": "tagging", "ignore_eos": True, "name": "greedy"},
        {"adapter": "tagging", "temperature": 1.5, "seed": 1, "name": "drawn", "ignore_eos": True},
    ]
    answers = {one["variant"]: one for one in _compare(api_url, variants=variants)["answers"]}
    assert answers["base"]["divergence"] is None
    tokenizer = AutoTokenizer.from_pretrained(api_paths["base"])
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    for name in ("greedy", "drawn"):
        answer = [token["id"] for token in answers[name]["tokens"]]
        assert len(answer) == 20
        tokens = torch.tensor([[*prompt, *answer]])
        own, plain = (
            reference(api_paths["base"], path)(tokens)
            .logits[0, len(prompt) - 1 : -1]
            .log_softmax(-1)
            for path in (api_paths["adapters"] / "tagging", None)
        )
        expected = (own.exp() * (own - plain)).sum(-1)
        found = answers[name]["divergence"]
        assert [t["divergence"] for t in found["tokens"]] == pytest.approx(
            expected.tolist(), abs=1e-4
        )
        assert found["mean"] == pytest.approx(float(expected.mean()), abs=1e-4)
        assert found["max"] == pytest.approx(float(expected.max()), abs=1e-4)
        assert found["mean"] > 0.01
        targets = torch.tensor(answer)[:, None]
        for key, of in (("logprob", own), ("base_logprob", plain)):
            expected_ones = of.gather(1, targets)[:, 0].tolist()
            assert [t[key] for t in found["tokens"]] == pytest.approx(expected_ones, abs=1e-4)


def test_repeats_have_seeds_of_their_own(api_url) -> None:
    variant = {"model": "tagging", "repeats": 3, "temperature": 1.4}
    answers = _compare(api_url, variants=[variant], seed=7)["answers"]
    assert [one["repeat"] for one in answers] == [0, 1, 2]
    assert len({one["text"] for one in answers}) == 3
    again = _compare(api_url, variants=[variant], seed=7)["answers"]
    assert [one["text"] for one in again] == [one["text"] for one in answers]


def _events(url: str, **body) -> list[dict]:
    body = SHARED | {"stream": True} | body
    with httpx.stream("POST", f"{url}/v1/compare", json=body, timeout=120) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line.startswith("data:")]
    events = [line.removeprefix("data:").strip() for line in lines]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def test_a_stream_tells_the_same_side_by_side(api_url, compared) -> None:
    events = _events(api_url, variants=[given for _, given in VARIANTS.values()])
    assert events[0]["type"] == "start"
    assert [one["variant"] for one in events[0]["answers"]] == list(VARIANTS)
    assert events[-1]["type"] == "done"
    for key in ("prompt_tokens", "completion_tokens"):
        assert events[-1]["usage"][key] == compared["usage"][key]
    for one in compared["answers"]:
        mine = [event for event in events[1:-1] if event["index"] == one["index"]]
        assert {event["variant"] for event in mine} == {one["variant"]}
        deltas = [event for event in mine if event["type"] == "delta"]
        assert "".join(event["text"] for event in deltas) == one["text"]
        assert sum(len(event["tokens"]) for event in deltas) == len(one["tokens"])
        kinds = [event["type"] for event in mine]
        assert kinds.count("answer") == 1
        assert kinds[len(deltas)] == "answer"
        last = mine[-1]
        if one["divergence"] is None:
            assert last["type"] == "answer"
        else:
            assert last["type"] == "divergence"
            assert last["mean"] == pytest.approx(one["divergence"]["mean"], abs=1e-4)
            assert len(last["tokens"]) == len(one["tokens"])
    first_end = next(n for n, event in enumerate(events) if event["type"] == "answer")
    begun = {event["index"] for event in events[:first_end] if event["type"] == "delta"}
    assert len(begun) > 1, "the answers come side by side, not one after the other"


def test_divergence_can_be_left_out(api_url) -> None:
    answers = _compare(api_url, variants=["base", "tagging"], divergence=False)["answers"]
    assert [one["divergence"] for one in answers] == [None, None]


def test_a_grammar_holds_for_every_variant(api_url) -> None:
    choice = {"choice": ["red", "blue"]}
    answers = _compare(api_url, variants=["base", "tagging"], structured_outputs=choice)["answers"]
    assert {one["text"] for one in answers} <= {"red", "blue"}
    assert all(math.isfinite(answers[1]["divergence"][key]) for key in ("mean", "max"))


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"variants": ["base", "nobody"]}, 404, "'nobody'; known here: tagging, tickets, tiny"),
        ({"variants": [{"adapter": "nobody"}]}, 404, "'nobody'"),
        ({"variants": []}, 400, "variants"),
        ({"variants": ["base"], "tools": []}, 400, "tools: this field is not supported"),
        ({"variants": [{"model": "base", "sampling": 1}]}, 400, "sampling"),
        ({"variants": ["base"] * 2}, 400, "two are called 'base'"),
        ({"variants": [{"adapter": "tagging", "repeats": 33}]}, 400, "at most 32"),
        ({"variants": [{"name": str(n)} for n in range(17)]}, 400, "at most 16"),
        ({"variants": [{"model": "base", "adapter_scale": 2}]}, 400, "adapter_scale"),
        ({"variants": [{"min_tokens": 30, "name": "x"}]}, 400, "variant 'x': min_tokens=30"),
        ({"variants": ["base"], "max_tokens": 100000}, 400, "this server takes at most"),
        ({"variants": ["base"], "messages": []}, 400, "messages"),
    ],
)  # fmt: skip
def test_wrong_bodies_are_refused_before_anything_runs(api_url, body, status, message) -> None:
    for stream in (False, True):
        response = httpx.post(
            f"{api_url}/v1/compare", json=SHARED | {"stream": stream} | body, timeout=60
        )
        assert response.status_code == status, response.text
        assert message in response.json()["error"]["message"]


def test_a_client_that_leaves_ends_answers_and_scoring(api_paths, request) -> None:
    """Whether it leaves while the answers come or while they are scored, nothing stays behind."""
    settings = ServeSettings(base=str(api_paths["base"]), adapters_dir=api_paths["adapters"])
    service = build_service(settings)
    ended = threading.Event()
    live: list[int] = []
    gc.collect()
    gc.disable()  # nothing may wait for the collector, which comes by rarely
    request.addfinalizer(gc.enable)
    with serving(service) as url:
        real_leave = Passage.leave

        def leave(passage: Passage) -> None:
            real_leave(passage)
            live.append(service.traffic.live)
            ended.set()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Passage, "leave", leave)
            for stop_at in ("delta", "answer"):
                ended.clear()
                body = SHARED | {
                    "variants": ["tagging", {"model": "tickets", "max_tokens": 400}],
                    "stream": True, "ignore_eos": True,
                }  # fmt: skip
                with httpx.stream("POST", f"{url}/v1/compare", json=body, timeout=60) as response:
                    for line in response.iter_lines():
                        if f'"type": "{stop_at}"' in line:
                            break
                while live[-1:] != [0]:
                    assert ended.wait(60)
                    ended.clear()
                live.clear()
        done = _compare(url, variants=["base", "tagging"])
        assert len(done["answers"]) == 2
    assert service.engine.scheduler.sequences() == []
    assert service.engine.scheduler.blocks.used == 0
    assert [len(slot.selections) for slot in service.adapters.residency.slots()] == [0, 0]


def test_an_adapter_with_more_tokens_than_the_base_says_why_it_has_no_divergence(tmp_path) -> None:
    base = write_tiny_model(tmp_path / "base", "llama-untied")
    adapter = write_random_adapter(
        tmp_path / "wide", base, vocabulary=516, target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    service = build_service(ServeSettings(base=str(base), adapter={"wide": adapter}))
    assert service.adapters.entry("wide").content is not None, service.adapters.entry("wide").reason
    with serving(service) as url:
        (answer,) = _compare(url, variants=["wide"], ignore_eos=True)["answers"]
    assert answer["usage"]["completion_tokens"] == 20
    assert answer["divergence"]["mean"] is None
    assert "516 tokens and the base 512" in answer["divergence"]["error"]
