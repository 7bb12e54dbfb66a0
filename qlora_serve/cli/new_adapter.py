"""What `combine`, `fold` and `extract` say about the adapter that they made."""

from typing import Any

import typer

from qlora_serve.wording import counted


def show(report: Any, as_json: bool) -> None:
    """Prints the report: as JSON, or the error of each module and of all together."""
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    if report.errors:
        _print_errors(report)
    ranks = sorted(set(report.ranks.values()))
    shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
    typer.echo(f"{report.output}: {counted(len(report.ranks), 'module', 'modules')}, rank {shown}")
    if report.errors:
        typer.echo(
            f"error of the whole update {report.error:.3g}, kept energy {report.kept_energy:.2%}"
        )


def _print_errors(report: Any) -> None:
    from rich.table import Table

    from qlora_serve.progress import console

    table = Table()
    table.add_column("module")
    for heading in ("rank", "error", "kept energy"):
        table.add_column(heading, justify="right")
    for path in sorted(report.errors, key=_in_layers_order):
        error = report.errors[path]
        table.add_row(path, str(report.ranks[path]), f"{error:.3g}", f"{1 - error**2:.2%}")
    console.print(table)


def _in_layers_order(path: str) -> list[tuple[int, str]]:
    """Layer 2 comes before layer 10."""
    return [(int(part) if part.isdigit() else -1, part) for part in path.split(".")]
