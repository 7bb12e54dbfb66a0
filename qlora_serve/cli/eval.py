"""`qlora-serve eval`."""

import typer

from qlora_serve.cli.help import App
from qlora_serve.cli.options import flags_from
from qlora_serve.cli.output import libraries_on_stderr
from qlora_serve.train.evaluate.config import EvalSettings

app = App()


def evaluate(settings: EvalSettings) -> None:
    """Compare base and adapters on held-out rows: loss, perplexity, and their own answers.

    Every figure has a confidence interval, and every adapter a paired test against the base.

    Examples:

        qlora-serve eval --base smollm2 --adapter mine=adapters/mine --data heldout.jsonl

        qlora-serve eval --base smollm2 --adapter a=runs/a --adapter b=runs/b --data h.jsonl --json

        qlora-serve eval --base smollm2 --data heldout.jsonl --no-answers
    """
    from rich.console import Console

    from qlora_serve.progress import console
    from qlora_serve.train.evaluate.run import evaluate as run
    from qlora_serve.train.evaluate.show import table

    with libraries_on_stderr():
        found = run(settings, lambda line: console.print(line, soft_wrap=True, markup=False))
    if settings.as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    output = Console(highlight=False)
    output.print(table(found, output.width))


app.command("eval")(flags_from(EvalSettings)(evaluate))
