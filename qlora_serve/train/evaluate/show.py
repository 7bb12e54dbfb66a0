"""An evaluation as a table for people."""

from typing import Any

from qlora_serve.train.evaluate.run import BASE, Evaluation, Measure

HEADINGS = {
    "loss": "loss", "perplexity": "perplexity", "exact": "exact match", "rouge_l": "ROUGE-L",
    "chrf": "chrF", "json": "valid JSON",
}  # fmt: skip
LOWER_IS_BETTER = ("loss", "perplexity")
SURE = 0.05


def table(found: Evaluation) -> Any:
    """A row for each system; what differs surely from the base is coloured."""
    from rich.table import Table

    shown = Table(title=f"{found.rows} held-out rows of {found.data}", show_lines=True)
    shown.add_column("")
    metrics = list(found.systems[BASE])
    for metric in metrics:
        shown.add_column(HEADINGS[metric], justify="right", no_wrap=True)
    for name, measures in found.systems.items():
        base = found.systems[BASE]
        shown.add_row(name, *(_cell(m, measures[m], base[m]) for m in metrics))
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


def _cell(metric: str, measure: Measure, base: Measure) -> str:
    low, high = figure(metric, measure.low), figure(metric, measure.high)
    text = f"{figure(metric, measure.value)}\n[dim]{low} – {high}[/]"
    if measure.p_value is None:
        return text
    if measure.p_value < SURE:
        colour = "green" if is_better(metric, measure.value, base.value) else "red"
        text = f"[{colour}]{text}[/]"
    return f"{text}\n[dim]p {measure.p_value:.2g}[/]"
