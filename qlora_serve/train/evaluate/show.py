"""An evaluation as a table for people."""

from typing import Any

from qlora_serve.train.evaluate.run import BASE, Evaluation, Measure

HEADINGS = {
    "loss": "loss", "perplexity": "perplexity", "exact": "exact match", "rouge_l": "ROUGE-L",
    "chrf": "chrF", "json": "valid JSON",
}  # fmt: skip
LOWER_IS_BETTER = ("loss", "perplexity")
SURE = 0.05
_NAME_WIDTH = 9  # beside six metrics on eighty columns


def table(found: Evaluation, width: int) -> Any:
    """A row for each system; what differs surely from the base is coloured.

    Args:
        found: the evaluation.
        width: columns of the terminal; where it is narrow, intervals take two lines.
    """
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=10_000)
    wide = _table(found, narrow=False)
    # rich's minimum is that of single words, though figures are not wrapped; only names are.
    longest = max(len(name) for name in found.systems)
    folded = longest - min(longest, _NAME_WIDTH)
    needed = Measurement.get(console, console.options, wide).maximum - folded
    # Else the numbers would leave no place for the names of what they are about.
    return wide if needed <= width else _table(found, narrow=True)


def _table(found: Evaluation, narrow: bool) -> Any:
    from rich.table import Table

    shown = Table(title=f"{found.rows} held-out rows of {found.data}", show_lines=True)
    longest = max(len(name) for name in found.systems)
    shown.add_column("", overflow="fold", min_width=min(longest, _NAME_WIDTH))
    metrics = list(found.systems[BASE])
    dash, space = (" –\n", "\n") if narrow else (" – ", " ")
    for metric in metrics:
        heading = HEADINGS[metric].replace(" ", space)
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, measures in found.systems.items():
        base = found.systems[BASE]
        shown.add_row(name, *(_cell(m, measures[m], base[m], dash) for m in metrics))
    shown.caption = (
        f"{found.confidence:.0%} intervals by bootstrap over rows; p against the base by paired "
        "randomization, corrected for the number of adapters (Holm)"
    )
    return shown


def figure(metric: str, value: float) -> str:
    """A value as it is shown: shares in per cent, others to three digits."""
    if metric in LOWER_IS_BETTER:
        return f"{value:.3f}" if value < 1000 else f"{value:.3g}"
    return f"{100 * value:.1f} %"


def is_better(metric: str, value: float, base: float) -> bool:
    """Whether a value is better than the base's."""
    return value < base if metric in LOWER_IS_BETTER else value > base


def _cell(metric: str, measure: Measure, base: Measure, dash: str) -> str:
    low, high = figure(metric, measure.low), figure(metric, measure.high)
    text = f"{figure(metric, measure.value)}\n[dim]{low}{dash}{high}[/]"
    if measure.p_value is None:
        return text
    if measure.p_value < SURE:
        colour = "green" if is_better(metric, measure.value, base.value) else "red"
        text = f"[{colour}]{text}[/]"
    return f"{text}\n[dim]p {measure.p_value:.2g}[/]"
