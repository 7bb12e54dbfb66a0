"""`qlora-serve export`."""

import typer

from qlora_serve.cli.help import App
from qlora_serve.cli.options import flags_from
from qlora_serve.cli.output import libraries_on_stderr
from qlora_serve.merge.config import ExportSettings

app = App()


def export(settings: ExportSettings) -> None:
    """Write a model or an adapter as GGUF, for llama.cpp and Ollama.

    A model's file is read again and its logits are compared before it appears.

    Examples:

        qlora-serve export merged --gguf f16 --gguf q8_0 --output merged-gguf

        qlora-serve export adapters/mine --gguf f16 --output mine-gguf
    """
    from qlora_serve.merge.gguf.export import export as run

    with libraries_on_stderr():
        report = run(settings)
    if settings.as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    for name in report.files:
        check = report.checks.get(name)
        note = ""
        if check is not None:
            note = (
                f": largest logit difference {check.relative_difference:.2g} standard deviations, "
                f"same most likely token {check.top1_agreement:.1%}"
            )
        typer.echo(f"{settings.output / name}{note}")


app.command()(flags_from(ExportSettings, positional=("source",))(export))
