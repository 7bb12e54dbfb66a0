"""`qlora-serve keys`."""

import json
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from qlora_serve.cli.help import App

app = App(no_args_is_help=True)

_File = Annotated[Path, typer.Option("--keys", help="The keys file.", metavar="FILE")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
_Most = Annotated[int | None, typer.Option(min=1, help="No limit when left out.")]
_FILE = Path("keys.json")


@app.callback()
def keys() -> None:
    """Make, list and revoke the keys of a server."""


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Whose key it is.", metavar="NAME")],
    keys: _File = _FILE,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="infer or admin; may be given again. infer when left out."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="A pattern of adapters' names, such as 'support-*'; may be given again. All when "
            "left out.",
            metavar="PATTERN",
        ),
    ] = None,
    base: Annotated[bool, typer.Option(help="Whether it may ask the base itself.")] = True,
    no_adapters: Annotated[
        bool, typer.Option("--no-adapters", help="Only the base, no adapter.")
    ] = False,
    requests_per_minute: _Most = None,
    tokens_per_minute: _Most = None,
    concurrent_requests: _Most = None,
    tokens_per_day: _Most = None,
    as_json: _Json = False,
) -> None:
    """Make a key; it is shown once, and the file holds only its hash.

    Examples:

        qlora-serve keys add alice --adapter 'support-*' --requests-per-minute 60

        qlora-serve keys add operator --scope admin --scope infer --json
    """
    from qlora_serve.errors import UsageError
    from qlora_serve.serve.keys import Role, add_key

    if no_adapters and adapter:
        raise UsageError("give either --adapter or --no-adapters, not both")
    for item in scope or ():
        if item not in get_args(Role):
            raise UsageError(f"--scope {item}: expected {' or '.join(get_args(Role))}")
    key, record = add_key(
        keys,
        name=name,
        scopes=tuple(dict.fromkeys(scope or ["infer"])),
        adapters=() if no_adapters else tuple(adapter or ["*"]),
        base=base,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrent_requests=concurrent_requests,
        tokens_per_day=tokens_per_day,
    )
    if as_json:
        typer.echo(json.dumps({"key": key, **_shown(record)}, indent=2))
        return
    typer.echo(key)
    typer.echo(f"made {record.id} for {record.name!r} in {keys}; it is not shown again", err=True)


@app.command("list")
def list_keys(keys: _File = _FILE, as_json: _Json = False) -> None:
    """List the keys of a file, the revoked ones too.

    Examples:

        qlora-serve keys list

        qlora-serve keys list --keys /etc/qlora-serve/keys.json --json
    """
    from qlora_serve.serve.keys import read_keys

    records = read_keys(keys)
    if as_json:
        typer.echo(json.dumps([_shown(record) for record in records], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    table.add_column("id", no_wrap=True)  # whole, for `revoke` and for finding it in logs
    for heading in ("name", "state", "scopes", "adapters", "base", "limits"):
        table.add_column(heading, overflow="fold")
    for record in records:
        table.add_row(
            record.id,
            record.name,
            f"revoked {record.revoked}" if record.revoked else "in force",
            ", ".join(record.scopes),
            ", ".join(record.adapters) or "none",
            "yes" if record.base else "no",
            _limits(record) or "none",
        )
    Console().print(table)


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="The key's id or name.", metavar="KEY")],
    keys: _File = _FILE,
    as_json: _Json = False,
) -> None:
    """Make a key worthless, at once on running servers.

    Examples:

        qlora-serve keys revoke alice

        qlora-serve keys revoke key_0123456789ab --keys /etc/qlora-serve/keys.json
    """
    from qlora_serve.serve.keys import revoke_key

    record = revoke_key(keys, key)
    if as_json:
        typer.echo(json.dumps(_shown(record), indent=2))
    else:
        typer.echo(f"revoked {record.id} ({record.name})")


def _shown(record: Any) -> dict[str, Any]:
    """A record without the hash, which is nobody's business."""
    shown: dict[str, Any] = record.model_dump(mode="json", exclude={"sha256"})
    return shown


def _limits(record: Any) -> str:
    kinds = {
        "requests/min": record.requests_per_minute,
        "tokens/min": record.tokens_per_minute,
        "at once": record.concurrent_requests,
        "tokens/day": record.tokens_per_day,
    }
    return ", ".join(f"{most} {kind}" for kind, most in kinds.items() if most is not None)
