"""The limits that every release must keep, and what a run says about them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from peers import LLAMA_NAME, VLLM_NAME
from results import Outcome, Results, ratios
from servers import OWN_NAME

PEFT_NAME = "peft"


@dataclass(frozen=True)
class SpeedLimit:
    """Our tokens per second in a case, at least so many times someone's."""

    case: str
    factor: float
    system: str = OWN_NAME
    reference: str = ""
    """The case to compare with; the same one when empty."""

    @property
    def claim(self) -> str:
        """What is compared."""
        if self.system == OWN_NAME:
            return f"tokens/s against own {self.reference}"
        return f"tokens/s against {self.system}"


@dataclass(frozen=True)
class RatioLimit:
    """A ratio of a scenario, at least or at most so much."""

    case: str
    ratio: str
    """Its key in the outcome."""
    claim: str
    bound: float
    at_least: bool = False
    worst: bool = False
    """Whether every round must keep it, not their median."""


@dataclass(frozen=True)
class Verdict:
    """A limit, and how far from it a run was."""

    case: str
    claim: str
    must: str
    values: Sequence[float]
    """One a round; none when it was not measured."""
    measured: float | None
    passed: bool | None
    """None when it was not measured."""


SPEED_LIMITS = (
    SpeedLimit("base-1", 0.9, LLAMA_NAME),
    SpeedLimit("adapter-1", 0.9, LLAMA_NAME),
    SpeedLimit("adapter-1", 0.85, reference="base-1"),
    SpeedLimit("base-8", 1.1, LLAMA_NAME),
    SpeedLimit("base-8", 2.0, VLLM_NAME),
    SpeedLimit("adapters-8", 0.8, reference="base-8"),
    SpeedLimit("adapters-8", 3.5, LLAMA_NAME),
    SpeedLimit("adapters-8", 4.5, VLLM_NAME),
    SpeedLimit("adapters-8", 3.0, PEFT_NAME),
    SpeedLimit("adapters-32", 2.0, reference="adapters-8"),
)
RATIO_LIMITS = (
    RatioLimit("zipf-1000", "throughput", "tokens/s against all resident", 0.7, at_least=True),
    RatioLimit("zipf-1000", "wait", "longest wait, in fair shares", 3.0, worst=True),
    RatioLimit("ttft-prefill", "ttft", "TTFT beside a long prompt against idle", 3.0),
    RatioLimit("start", "start", "start to ready against transformers loading", 1.5),
    RatioLimit("memory", "ready", "memory when ready against weights + caches", 1.25),
    RatioLimit("memory", "cycles", "memory after loading and unloading against before", 1.05),
)
_Bound = Literal["≥", "≤"]


def judge(cases: Sequence[str], results: Results, outcomes: Mapping[str, Outcome]) -> list[Verdict]:
    """Holds a run against the limits of the cases that it was asked for."""
    verdicts = []
    for limit in SPEED_LIMITS:
        if limit.case in cases:
            ours = results.get(limit.case, {}).get(OWN_NAME, [])
            theirs = results.get(limit.reference or limit.case, {}).get(limit.system, [])
            values = ratios(ours, theirs)
            verdicts.append(_verdict(limit.case, limit.claim, "≥", limit.factor, values, False))
    for bound in RATIO_LIMITS:
        if bound.case in cases:
            outcome = outcomes.get(bound.case)
            values = list(outcome.ratios.get(bound.ratio, ())) if outcome else []
            sign: _Bound = "≥" if bound.at_least else "≤"
            verdict = _verdict(bound.case, bound.claim, sign, bound.bound, values, bound.worst)
            verdicts.append(verdict)
    return verdicts


def _verdict(
    case: str, claim: str, sign: _Bound, bound: float, values: list[float], worst: bool
) -> Verdict:
    must = f"{sign} {bound:g} ×"
    if not values:
        return Verdict(case, claim, must, [], None, None)
    if worst:
        measured = min(values) if sign == "≥" else max(values)
    else:
        measured = median(values)
    passed = measured >= bound if sign == "≥" else measured <= bound
    return Verdict(case, claim, must, values, measured, passed)
