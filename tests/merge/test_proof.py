"""The measures of the proof, against their definitions."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_serve.merge.proof import Answers, Probes, ask, compare, follow

PROBES = Probes([[1, 50, 60, 70], [1, 300], list(range(100, 180))], "here")


@pytest.fixture
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()


def test_a_model_equals_itself(model):
    answers = ask(model, PROBES, [2], lambda done: None)
    result = compare(answers, answers)
    assert (result.max_difference, result.mean_kl) == (0.0, 0.0)
    assert (result.top1_agreement, result.equal_answers, result.answers) == (1.0, 3, 3)
    # Only the last positions of a long prompt are kept.
    assert [logits.shape[0] for logits in answers.logits] == [4, 2, 32]


def test_measures_are_their_definitions():
    expected = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    got = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]])
    result = compare(Answers([expected], [[1]]), Answers([got], [[2]]))
    p, q = expected.softmax(-1), got.softmax(-1)
    assert result.max_difference == 1.0
    assert result.relative_difference == pytest.approx(1.0 / float(expected.std()))
    assert result.mean_kl == pytest.approx(float((p * (p / q).log()).sum() / 2), rel=1e-5)
    assert result.top1_agreement == 0.5
    assert result.equal_answers == 0


def test_following_equals_generating(model):
    asked = ask(model, PROBES, [2], lambda done: None)
    followed = follow(model, PROBES, asked.greedy, lambda done: None)
    assert followed.greedy == asked.greedy
    for one, other in zip(asked.logits, followed.logits, strict=True):
        torch.testing.assert_close(one, other)


def test_following_sees_another_answer(model):
    asked = ask(model, PROBES, [2], lambda done: None)
    others = [[(token + 1) % 512 for token in answer] for answer in asked.greedy]
    followed = follow(model, PROBES, others, lambda done: None)
    assert all(a != b for a, b in zip(followed.greedy, others, strict=True))
