"""The short form of `benchmarks/soak.py`: nothing left behind, nothing answered wrongly."""

import importlib.util
import sys
from pathlib import Path

_FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


def test_mixed_requests_leave_nothing_behind(tmp_path) -> None:
    spec = importlib.util.spec_from_file_location("soak", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module
    spec.loader.exec_module(module)
    with module.tiny_server(tmp_path) as server:
        report = module.soak(server, 300)
    assert sum(report.kinds.values()) == 300
    assert min(report.kinds.values()) > 0
    assert {200, 400, 404} <= set(report.statuses)
