"""Sampling draws from the distribution that the settings describe, in transformers' order."""

from pathlib import Path

import pytest
import torch
from tiny_models import write_tiny_model
from transformers import AutoModelForCausalLM

from qlora_serve.serve.engine.kernels.native import load_kernels
from qlora_serve.serve.engine.request import GenerationRequest, Sampling
from qlora_serve.serve.engine.sampler import RowSampler, distribution, sample, shape

STOP_IDS = (2, 5)


def _row(prompt=(), **settings) -> RowSampler:
    sampling = Sampling(**({"max_tokens": 99} | settings))
    return RowSampler(GenerationRequest("r", tuple(prompt), sampling), STOP_IDS)


def _draws(logits, count=4000, **settings) -> torch.Tensor:
    row = _row(**settings)
    tokens = [sample(logits[None], [row])[0] for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("sampler")
    base = write_tiny_model(folder / "tiny")
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


BIAS = {7: 4.0, 300: 6.5, 12: -3.0}
# Each with its name in transformers; together they also check the order.
CASES = {
    "temperature": ({"temperature": 0.7}, {"temperature": 0.7}),
    "top_k": ({"top_k": 5}, {"top_k": 5}),
    "top_p": ({"top_p": 0.6}, {"top_p": 0.6}),
    "min_p": ({"min_p": 0.2}, {"min_p": 0.2}),
    "repetition": ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
    "bias": (
        {"logit_bias": tuple(BIAS.items())},
        {"sequence_bias": [[[token], bias] for token, bias in BIAS.items()]},
    ),
    "min_tokens": ({"min_tokens": 6}, {"min_new_tokens": 6}),
}
CASES["all"] = tuple(
    {key: value for case in CASES.values() for key, value in case[side].items()} for side in (0, 1)
)


@pytest.mark.parametrize("case", CASES)
def test_what_is_drawn_from_is_what_transformers_draws_from(model, case) -> None:
    ours, theirs = CASES[case]
    prompt = torch.tensor([[5, 7, 9, 9, 40, 300, 2]])
    torch.manual_seed(3)
    output = model.generate(
        prompt,
        do_sample=True,
        max_new_tokens=12,
        eos_token_id=list(STOP_IDS),
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | theirs),
    )
    row = _row(prompt[0].tolist(), **ours)
    plain = _row(prompt[0].tolist())
    new = output.sequences[0, prompt.shape[1] :].tolist()
    for token, raw, processed in zip(new, output.logits, output.scores, strict=True):
        # Two rows, so that one row's settings would show if they reached the other.
        scores = torch.cat([raw, raw]).float()
        shape(scores, [row, plain])
        weights = distribution(scores, [row, plain])
        found = weights / weights.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(found[0], torch.softmax(processed[0].float(), 0))
        torch.testing.assert_close(found[1], torch.softmax(raw[0].float(), 0))
        row.take(token)
        plain.take(token)


def test_presence_and_frequency_follow_openai_formula() -> None:
    # mu[j] - c[j] * frequency - (c[j] > 0) * presence, over the answer's tokens alone.
    logits = torch.tensor([[1.0, 2.0, 3.0, -1.0]])
    row = _row(prompt=(3, 3), presence_penalty=0.5, frequency_penalty=0.25)
    for token in (0, 2, 2):
        row.take(token)
    scores = logits.clone()
    shape(scores, [row])
    assert scores.tolist() == [[1 - 0.25 - 0.5, 2.0, 3 - 2 * 0.25 - 0.5, -1.0]]


def test_greedy_is_the_most_likely_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    assert sample(logits, [_row(temperature=0.0) for _ in range(2)]) == [1, 0]


def test_greedy_takes_bias_and_penalties_into_account_and_leaves_the_logits_alone() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.5]] * 3)
    before = logits.clone()
    rows = [
        _row(temperature=0.0),
        _row(temperature=0.0, frequency_penalty=1.0),
        _row(temperature=0.0, logit_bias=((0, 10.0),)),
    ]
    assert [sample(logits, rows) for _ in range(3)] == [[1, 1, 0], [1, 2, 0], [1, 1, 0]]
    assert torch.equal(logits, before)


def test_min_tokens_holds_off_every_end_token() -> None:
    logits = torch.tensor([[0.0, 1.0, 9.0, 0.0, 0.0, 8.0]])
    row = _row(temperature=0.0, min_tokens=2)
    assert [sample(logits, [row])[0] for _ in range(3)] == [1, 1, 2]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_softmax(temperature) -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    found = _draws(logits, temperature=temperature, seed=1)
    expected = torch.softmax(logits / temperature, 0)
    # Four standard deviations of a frequency over 4000 draws.
    assert (found - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    logits = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25]))
    found = _draws(logits, top_p=0.7, seed=2)
    assert found[0] == found[2] == 0  # 0.5 + 0.25 already reach 0.7
    assert abs(found[1] - 2 / 3) < 0.03
    for least in (
        0.01,
        4e-183,
    ):  # the likeliest always stays, also below what float32 can tell from 0
        assert _draws(logits, top_p=least, count=50, seed=3)[1] == 1


def test_a_seed_fixes_the_choices_whoever_else_is_in_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(20, 4, 50, generator=generator)
    seeded = {"seed": 11, "top_p": 0.9, "top_k": 30, "presence_penalty": 0.5}
    alone, together = _row(**seeded), _row(**seeded)
    others = [_row(), _row(min_p=0.1), _row(temperature=0.0)]
    for logits in steps:
        first = sample(logits[1:2], [alone])[0]
        assert sample(logits, [others[0], together, *others[1:]])[1] == first


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"logprobs": 2}, {"top_k": 2}])
def test_a_row_that_is_not_finite_gives_none_and_the_others_go_on(bad, settings) -> None:
    logits = torch.tensor([[0.0, 1.0, bad], [0.0, 9.0, -50.0]])
    for kernels in (None, load_kernels()):
        rows = [_row(seed=1, **settings) for _ in range(2)]
        assert sample(logits, rows, kernels) == [None, 1]
        assert "not finite" in rows[0].fault


def test_logprobs_are_the_models_own_whatever_is_done_to_the_scores() -> None:
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(1))
    rows = [
        _row(temperature=0.0, logprobs=3, logit_bias=((4, 50.0),)),
        _row(temperature=0.3, top_k=1, logprobs=0),
    ]
    tokens = sample(logits, rows)
    expected = torch.log_softmax(logits, -1)
    assert tokens == [4, int(logits[1].argmax())]
    for number, row in enumerate(rows):
        found = row.logprobs
        assert found.token_id == tokens[number]
        assert found.logprob == pytest.approx(expected[number, tokens[number]].item())
    values, ids = expected[0].topk(3)
    assert [token for token, _ in rows[0].logprobs.top] == ids.tolist()
    assert [value for _, value in rows[0].logprobs.top] == pytest.approx(values.tolist())
    assert rows[1].logprobs.top == ()
