"""What a run says about the limits."""

import json

import pytest
from limits import RATIO_LIMITS, SPEED_LIMITS, judge
from report import print_report, write_json
from results import Outcome, Results
from rich.console import Console
from scenarios import SCENARIOS
from servers import OWN_NAME
from workload import CASES, Measurement

RUN = [case.name for case in CASES]


def turn(tokens_per_second: float) -> Measurement:
    return Measurement(1.0, int(tokens_per_second), ttfts=[0.1], itls=[0.01])


def verdicts_of(results: Results, cases: list[str], outcomes: dict[str, Outcome] | None = None):
    return {(v.case, v.claim): v for v in judge(cases, results, outcomes or {})}


def test_every_limit_belongs_to_a_case() -> None:
    names = {case.name for case in CASES}
    assert {limit.case for limit in SPEED_LIMITS} <= names
    assert {limit.reference for limit in SPEED_LIMITS} <= names | {""}
    assert {limit.case for limit in RATIO_LIMITS} == {scenario.name for scenario in SCENARIOS}


def test_rounds_are_compared_pair_by_pair() -> None:
    """Of 50/100, 200/100 and 100/10 the median is 2; the ratio of the medians would be 1."""
    results: Results = {
        "adapters-32": {OWN_NAME: [turn(50), turn(200), turn(100)]},
        "adapters-8": {OWN_NAME: [turn(100), turn(100), turn(10)]},
    }
    verdict = verdicts_of(results, RUN)["adapters-32", "tokens/s against own adapters-8"]
    assert list(verdict.values) == [0.5, 2.0, 10.0]
    assert (verdict.measured, verdict.passed) == (2.0, True)


@pytest.mark.parametrize(("theirs", "passed"), [(90, True), (92, False)])
def test_a_peer_sets_a_limit(theirs: float, passed: bool) -> None:
    results: Results = {"base-8": {OWN_NAME: [turn(100)], "llama.cpp": [turn(theirs)]}}
    assert verdicts_of(results, RUN)["base-8", "tokens/s against llama.cpp"].passed is passed


def test_what_was_not_measured_neither_passes_nor_fails() -> None:
    results: Results = {"base-8": {OWN_NAME: [turn(100)]}}
    found = verdicts_of(results, ["base-8", "start"])
    assert {case for case, _ in found} == {"base-8", "start"}
    assert all(v.passed is None and v.measured is None for v in found.values())


def test_one_long_wait_fails_whatever_the_other_rounds_say() -> None:
    outcome = Outcome(ratios={"throughput": [0.9, 0.6, 0.8], "wait": [1.0, 3.1, 1.0]})
    found = verdicts_of({}, ["zipf-1000"], {"zipf-1000": outcome})
    throughput, wait = found.values()
    assert (throughput.measured, throughput.passed) == (0.8, True)
    assert (wait.measured, wait.passed) == (3.1, False)


def test_the_report_and_the_file_hold_the_verdicts(tmp_path) -> None:
    results: Results = {"base-8": {OWN_NAME: [turn(100)], "llama.cpp": [turn(200)]}}
    cases = [case for case in CASES if case.name == "base-8"]
    outcomes = {"start": Outcome({"start": [1.2, 1.4]}, {"own": [1.2]}, "ready after 1.20 s")}
    verdicts = judge(["base-8", "start"], results, outcomes)
    console = Console(width=130, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    print_report(console, cases, results, outcomes, verdicts)
    text = console.export_text()
    assert "ready after 1.20 s" in text
    lines = {line for line in text.splitlines() if "FAIL" in line}
    assert len(lines) == 1
    assert "0.50 ×" in lines.pop()
    assert "1.30 × (1.20–1.40)" in text
    write_json(tmp_path / "out.json", {}, cases, results, outcomes, verdicts)
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["scenarios"]["start"]["figures"] == {"own": [1.2]}
    passed = {(entry["case"], entry["claim"]): entry["passed"] for entry in content["limits"]}
    assert passed["base-8", "tokens/s against llama.cpp"] is False
    assert passed["base-8", "tokens/s against vLLM"] is None
