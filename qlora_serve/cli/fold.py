"""`qlora-serve fold`."""

from qlora_serve.cli.help import App
from qlora_serve.cli.options import flags_from
from qlora_serve.cli.output import libraries_on_stderr
from qlora_serve.merge.config import FoldSettings

app = App()


def fold(settings: FoldSettings) -> None:
    """Make an adapter of a smaller rank that is as near to a given one as can be.

    Examples:

        qlora-serve fold adapters/mine --rank 8 --output adapters/mine-8

        qlora-serve fold adapters/mine --energy 0.99 --output adapters/mine-small
    """
    from qlora_serve.cli.new_adapter import show
    from qlora_serve.merge.combine import fold_adapter

    with libraries_on_stderr():
        report = fold_adapter(settings)
    show(report, settings.as_json)


app.command()(flags_from(FoldSettings, positional=("adapter",))(fold))
