"""`qlora-serve base`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", add_completion=False)


class Quantize(StrEnum):
    """What a prepared copy is quantized to."""

    none = "none"
    nf4 = "nf4"


@app.callback()
def base() -> None:
    """Prepare base models."""


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="smollm2, or any base to make an NF4 copy of.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Where to write it; the cache folder (QLORA_SERVE_CACHE) when left out."),
    ] = None,
    quantize: Annotated[Quantize, typer.Option(help="Write a quantized copy.")] = Quantize.none,
) -> None:
    """Write a base model that the other commands take by name or directory.

    Examples:

        qlora-serve base prepare smollm2

        qlora-serve base prepare smollm2 --quantize nf4 --output bases/smollm2-nf4
    """
    from qlora_serve.base.prepare import prepare_base
    from qlora_serve.progress import console, progress

    def report(line: str) -> None:
        console.print(line, soft_wrap=True)

    with progress(f"preparing {name}"):
        target = prepare_base(name, output, quantize.value, report)
    typer.echo(target)
