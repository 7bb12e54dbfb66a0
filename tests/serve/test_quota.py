"""What a key may use, by a clock of our own."""

import pytest

from qlora_serve.errors import RateLimitedError
from qlora_serve.serve.api.quota import Quota
from qlora_serve.serve.keys import KeyRecord


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _record(**limits: int) -> KeyRecord:
    return KeyRecord(id="key_" + "0" * 12, name="x", sha256="0" * 64, created="", **limits)


def _refused(call, *arguments) -> RateLimitedError:
    with pytest.raises(RateLimitedError) as found:
        call(*arguments)
    return found.value


def test_requests_a_minute_come_back_evenly() -> None:
    clock = Clock()
    quota = Quota(_record(requests_per_minute=6), clock)
    for _ in range(6):
        quota.enter()
        quota.leave()
    error = _refused(quota.enter)
    assert error.retry_after == pytest.approx(10)
    assert quota.headers() == {
        "x-ratelimit-limit-requests": "6",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "60.000s",
    }
    clock.now += 10.001
    quota.enter()
    _refused(quota.enter)
    clock.now += 3600
    assert quota.headers()["x-ratelimit-remaining-requests"] == "6", "never more than a minute's"


def test_requests_at_once_wait_for_one_to_leave() -> None:
    quota = Quota(_record(concurrent_requests=2), Clock())
    quota.enter()
    quota.enter()
    assert "2 requests at once" in str(_refused(quota.enter))
    quota.leave()
    quota.enter()
    assert quota.headers() == {}


def test_what_an_answer_takes_too_much_is_owed() -> None:
    clock = Clock()
    quota = Quota(_record(tokens_per_minute=60), clock)
    quota.check(40)
    quota.charge(40)
    error = _refused(quota.check, 30)
    assert error.retry_after == pytest.approx(10)
    quota.charge(50)  # an answer that had begun
    assert quota.headers()["x-ratelimit-remaining-tokens"] == "0"
    assert _refused(quota.check, 1).retry_after == pytest.approx(31)
    clock.now += 31.001
    quota.check(1)


def test_a_prompt_that_is_longer_than_a_minute_allows_waits_for_a_full_bucket() -> None:
    clock = Clock()
    quota = Quota(_record(tokens_per_minute=60), clock)
    quota.check(100)
    quota.charge(100)
    assert _refused(quota.check, 100).retry_after == pytest.approx(100)
    clock.now += 100.001
    quota.check(100)


def test_a_day_ends_at_midnight() -> None:
    wall = Clock()
    wall.now = 86400 * 20000 + 86000
    quota = Quota(_record(tokens_per_day=100), Clock(), wall)
    quota.check(100)
    quota.charge(80)
    error = _refused(quota.check, 30)
    assert (error.code, error.retry_after) == ("insufficient_quota", 400)
    quota.check(20)
    quota.charge(40)
    _refused(quota.check, 0)
    wall.now += 400
    quota.check(100)


def test_new_limits_do_not_forget_what_was_used() -> None:
    quota = Quota(_record(tokens_per_minute=100, tokens_per_day=1000), Clock())
    quota.charge(90)
    quota.follow(_record(tokens_per_minute=200, tokens_per_day=1000))
    assert quota.headers()["x-ratelimit-remaining-tokens"] == "110"
    quota.follow(_record(tokens_per_day=80))
    assert quota.headers() == {}
    _refused(quota.check, 0)
