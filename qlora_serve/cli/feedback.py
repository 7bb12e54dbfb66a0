"""`qlora-serve feedback`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qlora_serve.cli.help import App
from qlora_serve.wording import counted

app = App(no_args_is_help=True)

_File = Annotated[
    Path, typer.Argument(help="The file that `serve --feedback` writes.", metavar="FILE")
]


@app.callback()
def feedback() -> None:
    """What people said of answers: results of experiments, and rows to train on."""


@app.command()
def results(
    file: _File,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Show what came of experiments and comparisons, with 95 % confidence intervals.

    Examples:

        qlora-serve feedback results feedback.sqlite

        qlora-serve feedback results feedback.sqlite --json
    """
    from qlora_serve.serve.feedback.results import experiment_results, standings
    from qlora_serve.serve.feedback.store import open_existing

    store = open_existing(file)
    experiments = {name: experiment_results(store, name, {}) for name, _ in store.sources()}
    won = standings(store, None, lambda name: True)
    if as_json:
        typer.echo(json.dumps({"experiments": experiments, "standings": won}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name, variants in experiments.items():
        table = Table(
            "variant", "answers", "users", "up", "down", "share up", "scores", "mean score",
            "against the first", title=f"experiment {name}", title_justify="left", box=None,
        )  # fmt: skip
        for one in variants:
            table.add_row(
                one["name"], *(str(one[key]) for key in ("answers", "users", "up", "down")),
                _interval(one["up_rate"]), str(one["scores"]), _interval(one["mean_score"]),
                _difference(one["difference_from_first"]),
            )  # fmt: skip
        console.print(table)
    if won:
        table = Table(
            "variant", "best", "of", "share", title="comparisons", title_justify="left", box=None
        )
        for one in won:
            table.add_row(one["variant"], str(one["best"]), str(one["of"]), _interval(one["rate"]))
        console.print(table)
    if not (experiments or won):
        console.print("no answers of experiments, and no comparison with a best answer")


@app.command()
def export(
    file: _File,
    output: Annotated[
        Path, typer.Option(help="The JSON Lines file to write; `-` is stdout.", metavar="FILE")
    ],
    experiment: Annotated[str | None, typer.Option(help="One experiment's answers only.")] = None,
    variant: Annotated[str | None, typer.Option(help="One variant's answers only.")] = None,
    vote: Annotated[
        Literal["up", "down", "best"] | None, typer.Option(help="With this vote only.")
    ] = None,
    min_score: Annotated[float | None, typer.Option(help="Scored at least so high.")] = None,
    form: Annotated[
        Literal["chat", "text"],
        typer.Option(help="chat for chats as messages, text for completions as text."),
    ] = "chat",
    cut: Annotated[
        bool, typer.Option("--cut", help="Also answers that were cut at their most tokens.")
    ] = False,
) -> None:
    """Write answers as rows that `train` reads.

    Examples:

        qlora-serve feedback export feedback.sqlite --vote up --output liked.jsonl

        qlora-serve feedback export feedback.sqlite --experiment tone --min-score 4 --output -
    """
    import sys

    from qlora_serve.serve.feedback.export import Wanted, export_rows
    from qlora_serve.serve.feedback.store import open_existing

    store = open_existing(file)
    wanted = Wanted(experiment, variant, vote, min_score, form, cut)
    rows = (json.dumps(row, ensure_ascii=False) for row in export_rows(store, wanted))
    if output == Path("-"):
        for row in rows:
            print(row)
        return
    print(f"{counted(_write(output, rows), 'row', 'rows')} written to {output}", file=sys.stderr)


def _write(output: Path, rows: Iterable[str]) -> int:
    """Writes lines to a new file that only its owner may read; how many.

    Raises:
        OutputError: it is there already, or cannot be written.
    """
    import os

    from qlora_serve.errors import OutputError

    count = 0
    try:
        # Prompts are nobody else's business.
        with open(output, "x", encoding="utf-8", opener=lambda p, f: os.open(p, f, 0o600)) as out:
            for row in rows:
                out.write(row + "\n")
                count += 1
    except FileExistsError:
        raise OutputError(f"{output} exists; name another --output or remove it") from None
    except OSError as error:
        output.unlink(missing_ok=True)  # nothing half-written
        raise OutputError(f"cannot write {output}: {error.strerror}") from None
    return count


def _interval(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    if found["low"] is None:
        return f"{found['value']:.3g}"
    return f"{found['value']:.3g} ({found['low']:.3g} to {found['high']:.3g})"


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    names = {"up_rate": "share up", "mean_score": "score"}
    shown = [
        f"{names[key]} {value['value']:+.3g} ({value['low']:+.3g} to {value['high']:+.3g})"
        for key, value in found.items()
        if value is not None and value["low"] is not None
    ]
    return "\n".join(shown)
