"""The report: the tables, the JSON file and the SVG plot."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from limits import Verdict
from results import Outcome, Results, latencies, milliseconds, rate, ratios
from rich.console import Console
from rich.table import Table
from servers import OWN_NAME
from workload import OUTPUT_TOKENS, PROMPT_TOKENS, Case, Measurement


def print_report(
    console: Console,
    cases: list[Case],
    results: Results,
    outcomes: Mapping[str, Outcome],
    verdicts: Sequence[Verdict],
) -> None:
    """Prints all systems side by side, their cases against one another, and the limits."""
    for table in (_systems_table(cases, results), _cases_table(cases, results)):
        if table.row_count:
            console.print(table)
    for name, outcome in outcomes.items():
        console.print(f"[bold]{name}[/]: {outcome.summary}", soft_wrap=True, highlight=False)
    if verdicts:
        console.print(_limits_table(verdicts))


def _systems_table(cases: list[Case], results: Results) -> Table:
    table = Table(title="Side by side, in turns")
    for column in ("case", "system"):
        table.add_column(column, no_wrap=True)
    figures = ("tokens/s", f"{OWN_NAME} is", "TTFT p50", "p95", "ITL p50", "p95")
    for column in figures:
        table.add_column(column, justify="right")
    for case in cases:
        for system, turns in _measured(results, case.name).items():
            own = results[case.name].get(OWN_NAME, [])
            is_own = system == OWN_NAME
            table.add_row(
                case.name,
                system,
                f"{rate(turns):.1f}",
                "" if is_own else _ratio_text(ratios(own, turns)),
                *(milliseconds(value) for value in latencies(turns).values()),
                style="bold" if is_own else None,
            )
        table.add_section()
    return table


def _cases_table(cases: list[Case], results: Results) -> Table:
    table = Table(title="Each system against itself, tokens/s")
    for column in ("case", "against", "system"):
        table.add_column(column, no_wrap=True)
    table.add_column("is", justify="right")
    for case in cases:
        for system, turns in _measured(results, case.name).items():
            reference = results.get(case.versus or "", {}).get(system)
            if reference:
                table.add_row(case.name, case.versus, system, _ratio_text(ratios(turns, reference)))
    return table


def _limits_table(verdicts: Sequence[Verdict]) -> Table:
    table = Table(title="Against the limits")
    for column in ("case", "what"):
        table.add_column(column, no_wrap=True)
    for column in ("must", "is", ""):
        table.add_column(column, justify="right", no_wrap=True)
    words = {True: "pass", False: "FAIL", None: "–"}
    styles = {True: None, False: "bold red", None: "dim"}
    for verdict in verdicts:
        table.add_row(
            verdict.case,
            verdict.claim,
            verdict.must,
            "not measured" if verdict.measured is None else _measured_text(verdict),
            words[verdict.passed],
            style=styles[verdict.passed],
        )
    return table


def _measured_text(verdict: Verdict) -> str:
    low, high = min(verdict.values), max(verdict.values)
    spread = f" ({low:.2f}–{high:.2f})" if len(verdict.values) > 1 else ""
    return f"{verdict.measured:.2f} ×{spread}"


def _measured(results: Results, case: str) -> dict[str, list[Measurement]]:
    return {system: turns for system, turns in results.get(case, {}).items() if turns}


def _ratio_text(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else ""
    return f"{median(values):.2f} ×{spread}"


def write_json(
    file: Path,
    machine: dict[str, Any],
    cases: list[Case],
    results: Results,
    outcomes: Mapping[str, Outcome],
    verdicts: Sequence[Verdict],
) -> None:
    """Writes every round's figures and their summaries, for the docs and for later comparisons."""
    content = {
        "machine": machine,
        "workload": {"prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS},
        "cases": [
            {
                "name": case.name,
                "meaning": case.meaning,
                "systems": {
                    system: _system_json(turns, results[case.name].get(OWN_NAME, []))
                    for system, turns in _measured(results, case.name).items()
                },
            }
            for case in cases
        ],
        "scenarios": {name: asdict(outcome) for name, outcome in outcomes.items()},
        "limits": [asdict(verdict) for verdict in verdicts],
    }
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _system_json(turns: list[Measurement], own: list[Measurement]) -> dict[str, Any]:
    return {
        "tokens_per_second": rate(turns),
        **latencies(turns),
        "own_ratio_by_round": ratios(own, turns),
        "rounds": [
            {"tokens_per_second": turn.tokens_per_second, **latencies([turn])} for turn in turns
        ],
    }


_BAR, _GAP, _LEFT, _WIDTH, _TOP = 18, 14, 200, 420, 46
_OWN_COLOUR, _PEER_COLOUR, _INK = "#2f6fde", "#a9b4c4", "#1f2933"


def write_svg(file: Path, cases: list[Case], results: Results) -> None:
    """Draws the median tokens per second as bars, one group a case."""
    bars = {
        case: {system: rate(turns) for system, turns in _measured(results, case.name).items()}
        for case in cases
    }
    largest = max((value for group in bars.values() for value in group.values()), default=1.0)
    shapes, y = [], _TOP
    for case, group in bars.items():
        shapes.append(_text(16, y + 12, case.meaning, weight="bold"))
        y += _BAR
        for system, value in group.items():
            length = _WIDTH * value / largest
            colour = _OWN_COLOUR if system == OWN_NAME else _PEER_COLOUR
            shapes.append(_text(_LEFT - 10, y + 13, system, anchor="end"))
            shapes.append(
                f'<rect x="{_LEFT}" y="{y + 2}" width="{length:.1f}" height="{_BAR - 4}" '
                f'rx="2" fill="{colour}"/>'
            )
            shapes.append(_text(_LEFT + length + 6, y + 13, f"{value:.1f}"))
            y += _BAR
        y += _GAP
    width, height = _LEFT + _WIDTH + 80, y
    title = f"Output tokens per second ({PROMPT_TOKENS} in, {OUTPUT_TOKENS} out, greedy)"
    drawing = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(16, 26, title, weight="bold", size=15),
        *shapes,
        "</svg>",
    ]
    file.write_text("\n".join(drawing) + "\n", encoding="utf-8")


def _text(
    x: float, y: float, text: str, anchor: str = "start", weight: str = "normal", size: int = 12
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
        f'font-size="{size}" fill="{_INK}">{escape(text)}</text>'
    )
