"""`qlora-serve base`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qlora_serve.cli.help import App
from qlora_serve.cli.output import libraries_on_stderr
from qlora_serve.errors import ConfigError

app = App(no_args_is_help=True)


class Quantize(StrEnum):
    """What a prepared copy is quantized to."""

    none = "none"
    nf4 = "nf4"
    gptq = "gptq"


# Named as in merge; the short names are as good here, where nothing else has bits or groups.
Bits = Annotated[
    int | None,
    typer.Option("--gptq-bits", "--bits", help="GPTQ only: 2, 3, 4 (default) or 8."),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--gptq-group-size",
        "--group-size",
        help="GPTQ only: inputs that share a scale, 128 by default; -1 for all.",
    ),
]
Symmetric = Annotated[
    bool | None,
    typer.Option(help="GPTQ only: no zero points of the groups' own (default: symmetric)."),
]
ByActivity = Annotated[
    bool | None,
    typer.Option(help="GPTQ only: quantize inputs by their activity (desc_act; default: off)."),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        help='GPTQ only: JSONL rows of {"messages": [...]} or {"text": "..."} to calibrate '
        "with, instead of the 48 that come along."
    ),
]


@app.callback()
def base() -> None:
    """Prepare base models."""


@app.command()
def prepare(
    name: Annotated[
        str,
        typer.Argument(help="smollm2, or any base to make a quantized copy of.", metavar="NAME"),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Where to write it; the cache folder (QLORA_SERVE_CACHE) when left out."),
    ] = None,
    quantize: Annotated[Quantize, typer.Option(help="Write a quantized copy.")] = Quantize.none,
    bits: Bits = None,
    group_size: GroupSize = None,
    symmetric: Symmetric = None,
    by_activity: ByActivity = None,
    calibration: Calibration = None,
) -> None:
    """Write a base model that the other commands take by name or directory.

    Examples:

        qlora-serve base prepare smollm2

        qlora-serve base prepare smollm2 --quantize nf4 --output bases/smollm2-nf4

        qlora-serve base prepare smollm2 --quantize gptq --gptq-group-size 64
    """
    flags: dict[str, Any] = {
        "gptq_bits": bits,
        "gptq_group_size": group_size,
        "symmetric": symmetric,
        "by_activity": by_activity,
        "calibration": calibration,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    if given and quantize is not Quantize.gptq:
        flag = next(iter(given)).replace("_", "-")
        raise ConfigError(f"--{flag} is for --quantize gptq only; leave it out")
    settings = {key.removeprefix("gptq_"): value for key, value in given.items()}
    typer.echo(_prepare(name, output, quantize, settings))


def _prepare(name: str, output: Path | None, quantize: Quantize, gptq: dict[str, Any]) -> Path:
    """Where the base was written; `gptq` are the settings that were given, by name."""
    from qlora_serve.base.prepare import prepare_base
    from qlora_serve.base.quantize_gptq import GptqSettings
    from qlora_serve.progress import console, progress

    def report(line: str) -> None:
        console.print(line, soft_wrap=True)

    if quantize is Quantize.gptq:
        # It shows its own progress, layer by layer.
        with libraries_on_stderr():
            return prepare_base(name, output, "gptq", report, GptqSettings(**gptq))
    kind: Literal["none", "nf4"] = "nf4" if quantize is Quantize.nf4 else "none"
    with progress(f"preparing {name}"), libraries_on_stderr():
        return prepare_base(name, output, kind, report)
