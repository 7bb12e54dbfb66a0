"""`qlora-serve adapters`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qlora_serve.adapters.files import AdapterFiles
    from qlora_serve.base.source import BaseSource

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")

_Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
_Directory = Annotated[Path, typer.Argument(help="The adapter's directory.", metavar="DIR")]


@app.callback()
def adapters() -> None:
    """List, show and check adapters."""


@app.command("list")
def list_adapters(
    folder: Annotated[
        Path, typer.Argument(help="A folder with one directory for each adapter.")
    ] = Path("adapters"),
    as_json: _Json = False,
) -> None:
    """List the adapters in a folder; a broken one is listed with its reason.

    Examples:

        qlora-serve adapters list

        qlora-serve adapters list /srv/adapters --json
    """
    from qlora_serve.adapters.describe import describe_folder

    rows = describe_folder(folder)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif rows:
        _print_list(rows)
    else:
        typer.echo(f"no adapters in {folder}; make one with `qlora-serve train`")


@app.command()
def show(directory: _Directory, as_json: _Json = False) -> None:
    """Show what an adapter is and how it was trained.

    Examples:

        qlora-serve adapters show adapters/mine
    """
    from qlora_serve.adapters.describe import describe
    from qlora_serve.adapters.files import read_adapter

    adapter = read_adapter(directory)
    shown = describe(adapter) | {
        "alpha": adapter.config.get("lora_alpha"),
        "tensors": len(adapter.tensors),
        "parameters": sum(_count(info.shape) for info in adapter.tensors.values()),
    }
    manifest = adapter.manifest
    training = manifest.model_dump(exclude={"probes"}) if manifest is not None else None
    if as_json:
        config = dict(adapter.config)
        typer.echo(json.dumps(shown | {"training": training, "config": config}, indent=2))
        return
    _print_fields(shown)
    if training is None:
        typer.echo("\nno qlora_serve.json: made elsewhere, so its training is not recorded")
        return
    for title, part in training.items():
        if isinstance(part, dict) and part:
            typer.echo(f"\n{title}")
            _print_fields(part, indent="  ")


@app.command()
def check(
    directory: _Directory,
    base: Annotated[
        str | None, typer.Option(help="The base to check against; by default the adapter's own.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Check all that a server checks when it loads an adapter; exits 1 when it would refuse.

    Examples:

        qlora-serve adapters check adapters/mine

        qlora-serve adapters check adapters/mine --base smollm2 --json
    """
    from qlora_serve.errors import QloraServeError

    try:
        result = _check(directory, base)
    except QloraServeError as error:
        if as_json:
            typer.echo(json.dumps({"ok": False, "error": str(error)}, indent=2))
        raise
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    for warning in result["warnings"]:
        typer.echo(f"warning: {warning}")
    norms = result["layer_norms"]
    shown = "  ".join(f"{layer}:{norm:.3g}" for layer, norm in norms.items())
    typer.echo(f"size of the update in each layer: {shown}")
    typer.echo(
        f"ok: {directory} fits {result['base']} ({result['modules']} modules, rank "
        f"{result['max_rank']}, {result['identity'][:19]})"
    )


def _check(directory: Path, base: str | None) -> dict[str, Any]:
    from qlora_serve.adapters.describe import layer_norms
    from qlora_serve.adapters.files import read_adapter
    from qlora_serve.adapters.fit import FitChecker
    from qlora_serve.adapters.weights import load_weights

    adapter = read_adapter(directory)
    source = _locate(adapter, base)
    weights = load_weights(adapter, FitChecker(source))
    warnings = []
    if weights.is_dead:
        warnings.append("every update is zero: this adapter answers exactly as the base does")
    other = _other_weights(adapter, source)
    if other is not None:
        warnings.append(other)
    return {
        "ok": True,
        "base": source.display_name,
        "identity": weights.identity,
        "modules": len(weights.modules),
        "max_rank": weights.max_rank,
        "warnings": warnings,
        "layer_norms": layer_norms(weights),
    }


def _locate(adapter: "AdapterFiles", base: str | None) -> "BaseSource":
    from qlora_serve.base.source import locate_base
    from qlora_serve.errors import AdapterError, BaseModelError

    if base is not None:
        return locate_base(base)
    if adapter.base_name is None:
        raise AdapterError(
            f"adapter {adapter.path} does not say which base it was trained on; pass --base"
        )
    try:
        return locate_base(adapter.base_name)
    except BaseModelError as error:
        raise AdapterError(
            f"the base of adapter {adapter.path} is not here ({error}); pass --base with where it "
            "is now"
        ) from None


def _other_weights(adapter: "AdapterFiles", source: "BaseSource") -> str | None:
    from qlora_serve.base.identity import fingerprint

    if adapter.manifest is None:
        return None
    trained_on = adapter.manifest.base
    if trained_on.fingerprint in (fingerprint(source), source.unquantized_fingerprint):
        return None
    return (
        f"{source.display_name} does not hold the weights that the adapter was trained on "
        f"({trained_on.name}); answers are only right if it is the same model in another dtype or "
        "quantization"
    )


def _print_list(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading in ("name", "kind", "rank", "targets", "size", "base", "identity"):
        table.add_column(heading, overflow="fold")
    broken = [row for row in rows if "error" in row]
    for row in rows:
        if "error" in row:
            table.add_row(Text(row["name"]), Text("broken", style="red"), *[""] * 5)
            continue
        table.add_row(
            Text(row["name"]),
            row["kind"],
            row["rank"],
            Text(", ".join(row["target_modules"])),
            f"{row['size_bytes'] / 2**20:.1f} MB",
            Text(row["base"] or "not recorded"),
            row["identity"].removeprefix("sha256:")[:12],
        )
    Console(highlight=False).print(table)
    for row in broken:
        typer.echo(f"broken: {row['error']}")


def _print_fields(fields: dict[str, Any], indent: str = "") -> None:
    width = max(len(name) for name in fields)
    for name, value in fields.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        typer.echo(f"{indent}{name.replace('_', ' '):<{width}}  {text}")


def _count(shape: tuple[int, ...]) -> int:
    from math import prod

    return prod(shape)
