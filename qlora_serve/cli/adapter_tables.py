"""What `qlora-serve adapters` prints for people."""

from typing import Any

import typer

_PATIENCE = 3  # how many names of one kind are listed before "..."


def print_list(rows: list[dict[str, Any]]) -> None:
    """Prints a line for each adapter, and beneath what is wrong with broken ones."""
    from rich.text import Text

    table = _table("name", "kind", "rank", "targets", "size", "base", "identity", "kept")
    for row in rows:
        if "error" in row:
            table.add_row(Text(row["name"]), Text("broken", style="red"), *[""] * 6)
            continue
        table.add_row(
            Text(row["name"]),
            row["kind"],
            row["rank"],
            Text(_targets(row["target_modules"])),
            _size(row["size_bytes"]),
            Text(_short(row["base"] or "not recorded")),
            row["identity"].removeprefix("sha256:")[:12],
            "store" if row["managed"] else "unmanaged",
        )
    _print(table)
    for row in rows:
        if "error" in row:
            typer.echo(f"broken: {row['error']}")


def print_adapter(shown: dict[str, Any], training: dict[str, Any] | None) -> None:
    """Prints one adapter and how it was trained."""
    fields = shown | {"size_bytes": f"{_size(shown['size_bytes'])} ({shown['size_bytes']} bytes)"}
    fields["size"] = fields.pop("size_bytes")
    fields["kept"] = "in the store" if fields.pop("managed") else "unmanaged"
    _print_fields(fields)
    if training is None:
        typer.echo("\nno qlora_serve.json: made elsewhere, so its training is not recorded")
        return
    for title, part in training.items():
        if isinstance(part, dict) and part:
            typer.echo(f"\n{title}")
            _print_fields(part, indent="  ")


def print_check(adapter: str, other: str | None, result: dict[str, Any]) -> None:
    """Prints what `adapters check` found."""
    for warning in result["warnings"]:
        typer.echo(f"warning: {warning}")
    comparison = result.get("comparison")
    if comparison is None:
        _print_norms(result["layer_norms"])
    else:
        _print_comparison(adapter, str(other), comparison)
    typer.echo(
        f"ok: {adapter} fits {result['base']} ({result['modules']} modules, rank "
        f"{result['max_rank']}, {result['identity'][:19]})"
    )


def _print_norms(norms: dict[str, float]) -> None:
    table = _table("layer", "size of the update", "", numbers=2)
    largest = max(norms.values(), default=0.0)
    for layer, norm in norms.items():
        share = norm / largest if largest else 0.0
        table.add_row(layer, f"{norm:.4g}", "━" * max(1 if norm else 0, round(24 * share)))
    _print(table)


def _print_comparison(first: str, second: str, comparison: dict[str, Any]) -> None:
    table = _table("layer", first, second, "cosine", "difference", numbers=5)
    for layer, found in comparison["layers"].items():
        cosine = "-" if found["cosine"] is None else f"{found['cosine']:.4f}"
        table.add_row(
            layer,
            f"{found['first']:.4g}",
            f"{found['second']:.4g}",
            cosine,
            f"{found['difference']:.2%}",
        )
    _print(table)
    for name, (one, two) in comparison["settings"].items():
        typer.echo(f"{name}: {one} in {first}, {two} in {second}")
    others = comparison["others"]
    if others:
        names = ", ".join(list(others)[:_PATIENCE]) + (", ..." if len(others) > _PATIENCE else "")
        typer.echo(f"{len(others)} other tensors differ: {names}")
    same = "the same adapter" if comparison["identical"] else "different adapters"
    typer.echo(f"{first} and {second} are {same}")


def _print_fields(fields: dict[str, Any], indent: str = "") -> None:
    width = max(len(name) for name in fields)
    for name, value in fields.items():
        if isinstance(value, list):
            text = ", ".join(map(str, value))
        else:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
        typer.echo(f"{indent}{name.replace('_', ' '):<{width}}  {text}")


def _targets(modules: list[str]) -> str:
    """A line must stay a line; `show` has all of them."""
    return ", ".join(modules) if len(modules) <= _PATIENCE else f"{len(modules)} modules"


def _short(base: str) -> str:
    """The last part of a directory, or a hub's id."""
    return base.rstrip("/").rpartition("/")[2] if base.startswith(("/", ".")) else base


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MB"


def _table(*headings: str, numbers: int = 0) -> Any:
    """A table whose first `numbers` columns are aligned to the right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(headings):
        justify: Any = "right" if place < numbers else "left"
        table.add_column(heading, overflow="fold", justify=justify)
    return table


def _print(table: Any) -> None:
    from rich.console import Console

    Console(highlight=False).print(table)
