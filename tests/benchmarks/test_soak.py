"""The short form of `benchmarks/soak.py`: nothing left behind, nothing answered wrongly."""

from soak import soak
from tiny_server import tiny_server


def test_mixed_requests_leave_nothing_behind(tmp_path) -> None:
    with tiny_server(tmp_path) as server:
        report = soak(server, 300)
    assert sum(report.kinds.values()) == 300
    assert min(report.kinds.values()) > 0
    assert {200, 400, 404} <= set(report.statuses)
