"""`qlora-serve extract`."""

import typer

from qlora_serve.cli.help import App
from qlora_serve.cli.options import flags_from
from qlora_serve.cli.output import libraries_on_stderr
from qlora_serve.merge.config import ExtractSettings

app = App()


def extract(settings: ExtractSettings) -> None:
    """Make an adapter of the difference between a fine-tuned model and its base.

    Examples:

        qlora-serve extract my-finetune --base smollm2 --output adapters/mine

        qlora-serve extract my-finetune --base smollm2 --rank 32 --save-others --output a
    """
    from qlora_serve.cli.new_adapter import show
    from qlora_serve.merge.extract import extract_adapter

    with libraries_on_stderr():
        report = extract_adapter(settings)
    show(report, settings.as_json)
    if not settings.as_json:
        near, far = report.adapter_against_model, report.base_against_model
        typer.echo(
            f"against the fine-tuned model: KL {near.mean_kl:.3g} (the base alone "
            f"{far.mean_kl:.3g}), same most likely token {near.top1_agreement:.1%} "
            f"({far.top1_agreement:.1%})"
        )


app.command()(flags_from(ExtractSettings, positional=("model",))(extract))
