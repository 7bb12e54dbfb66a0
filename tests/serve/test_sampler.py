"""Sampling draws from the distribution that the settings describe."""

import pytest
import torch

from qlora_serve.serve.engine.request import Sampling
from qlora_serve.serve.engine.sampler import make_generator, sample


def _draws(logits, count=4000, **settings) -> torch.Tensor:
    sampling = Sampling(max_tokens=1, **settings)
    generator = make_generator(sampling)
    tokens = [sample(logits[None], [(sampling, generator)])[0] for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count


def test_greedy_is_the_most_likely_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    row = (Sampling(max_tokens=1, temperature=0.0), None)
    assert sample(logits, [row, row]) == [1, 0]


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
    assert _draws(logits, top_p=0.01, count=50, seed=3)[1] == 1  # the likeliest always stays


def test_a_seed_fixes_the_choices_whoever_else_is_in_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(20, 3, 50, generator=generator)
    seeded = Sampling(max_tokens=1, seed=11)
    alone, together = make_generator(seeded), make_generator(seeded)
    free = Sampling(max_tokens=1)
    others = [(free, make_generator(free)), (free, make_generator(free))]
    for logits in steps:
        first = sample(logits[1:2], [(seeded, alone)])[0]
        assert sample(logits, [others[0], (seeded, together), others[1]])[1] == first


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_gives_none_and_the_others_go_on(bad, temperature) -> None:
    logits = torch.tensor([[0.0, 1.0, bad], [0.0, 9.0, -50.0]])
    sampling = Sampling(max_tokens=1, temperature=temperature, seed=1)
    rows = [(sampling, make_generator(sampling)) for _ in range(2)]
    assert sample(logits, rows) == [None, 1]
