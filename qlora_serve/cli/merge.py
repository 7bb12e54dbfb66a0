"""`qlora-serve merge`."""

from typing import Any

import typer

from qlora_serve.cli.help import App
from qlora_serve.cli.options import flags_from
from qlora_serve.cli.output import libraries_on_stderr
from qlora_serve.merge.config import MergeSettings

app = App()


def merge(settings: MergeSettings) -> None:
    """Bake an adapter into its unquantized base, and prove that it answers the same.

    The base is reloaded unquantized whatever the adapter was trained on. The merged model is
    written, read again and compared with base and adapter on probe prompts; one that differs is
    not published.

    Examples:

        qlora-serve merge adapters/mine --output merged

        qlora-serve merge adapters/mine --output merged --base smollm2 --dtype float16
    """
    from qlora_serve.merge.run import merge_adapter

    with libraries_on_stderr():
        report = merge_adapter(settings)
    if settings.as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    _show(report)
    typer.echo(f"merged into {settings.output}; serve it: qlora-serve serve {settings.output}")


def _show(report: Any) -> None:
    from qlora_serve.merge.report import report_table
    from qlora_serve.progress import console

    if report.base_match not in ("same", "same values"):
        console.print(
            f"[yellow]warning:[/] base {report.base_match}: {report.base_match_reason}",
            soft_wrap=True,
        )
    console.print(report_table(report))
    if report.fault is not None:
        console.print(
            f"[yellow]warning:[/] published by --force without passing its proof: {report.fault}",
            soft_wrap=True,
        )


app.command()(flags_from(MergeSettings, positional=("adapter",))(merge))
