"""`qlora-serve base`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qlora_serve.cli.output import libraries_on_stderr
from qlora_serve.errors import ConfigError

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", add_completion=False)


class Quantize(StrEnum):
    """What a prepared copy is quantized to."""

    none = "none"
    nf4 = "nf4"
    gptq = "gptq"


@app.callback()
def base() -> None:
    """Prepare base models."""


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="smollm2, or any base to make a quantized copy of.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Where to write it; the cache folder (QLORA_SERVE_CACHE) when left out."),
    ] = None,
    quantize: Annotated[Quantize, typer.Option(help="Write a quantized copy.")] = Quantize.none,
    bits: Annotated[int | None, typer.Option(help="GPTQ only: 2, 3, 4 (default) or 8.")] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="GPTQ only: inputs that share a scale, 128 by default; -1 for all."),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(help="GPTQ only: no zero points of the groups' own (default: symmetric)."),
    ] = None,
    by_activity: Annotated[
        bool | None,
        typer.Option(help="GPTQ only: quantize inputs by their activity (desc_act; default: off)."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help='GPTQ only: JSONL rows of {"messages": [...]} or {"text": "..."} to calibrate '
            "with, instead of the 48 that come along."
        ),
    ] = None,
) -> None:
    """Write a base model that the other commands take by name or directory.

    Examples:

        qlora-serve base prepare smollm2

        qlora-serve base prepare smollm2 --quantize nf4 --output bases/smollm2-nf4

        qlora-serve base prepare smollm2 --quantize gptq --bits 4 --group-size 64
    """
    from qlora_serve.base.prepare import prepare_base
    from qlora_serve.base.quantize_gptq import GptqSettings
    from qlora_serve.progress import console, progress

    def report(line: str) -> None:
        console.print(line, soft_wrap=True)

    flags: dict[str, Any] = {
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "by_activity": by_activity,
        "calibration": calibration,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    if quantize is Quantize.gptq:
        # It shows its own progress, layer by layer.
        with libraries_on_stderr():
            target = prepare_base(name, output, "gptq", report, GptqSettings(**given))
    elif given:
        flag = next(iter(given)).replace("_", "-")
        raise ConfigError(f"--{flag} is for --quantize gptq only; leave it out")
    else:
        kind: Literal["none", "nf4"] = "nf4" if quantize is Quantize.nf4 else "none"
        with progress(f"preparing {name}"), libraries_on_stderr():
            target = prepare_base(name, output, kind, report)
    typer.echo(target)
