"""The learning rate over a run."""

import pytest

from qlora_serve.train.schedule import Schedule, rate_factor, warmup_steps


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("linear", 0, [1.0, 0.75, 0.5, 0.25]),
        ("linear", 2, [0.5, 1.0, 1.0, 0.5]),
        ("cosine", 0, [1.0, 0.8535534, 0.5, 0.1464466]),
        ("cosine", 2, [0.5, 1.0, 1.0, 0.5]),
        ("constant", 0, [1.0] * 4),
        ("constant", 3, [1 / 3, 2 / 3, 1.0, 1.0]),
    ],
)
def test_four_steps(schedule: Schedule, warmup: int, expected: list[float]) -> None:
    found = [rate_factor(step, 4, warmup, schedule) for step in range(4)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 100])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 0.999])
def test_no_step_is_wasted(schedule: Schedule, total: int, ratio: float) -> None:
    warmup = warmup_steps(ratio, total)
    factors = [rate_factor(step, total, warmup, schedule) for step in range(total)]
    assert min(factors) > 0
    assert max(factors) == 1
