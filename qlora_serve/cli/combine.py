"""`qlora-serve combine`."""

from qlora_serve.cli.help import App
from qlora_serve.cli.options import flags_from
from qlora_serve.cli.output import libraries_on_stderr
from qlora_serve.merge.config import CombineSettings

app = App()


def combine(settings: CombineSettings) -> None:
    """Make one adapter of several adapters of the same base, each with a weight.

    Examples:

        qlora-serve combine adapters/polite=0.7 adapters/support=0.3 --output adapters/both

        qlora-serve combine a b c --method ties --density 0.3 --output adapters/all
    """
    from qlora_serve.cli.new_adapter import show
    from qlora_serve.merge.combine import combine_adapters

    with libraries_on_stderr():
        report = combine_adapters(settings)
    show(report, settings.as_json)


app.command()(flags_from(CombineSettings, positional=("adapters",))(combine))
