"""`qlora-serve adapters`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_serve.cli import adapter_tables as tables
from qlora_serve.cli.help import App
from qlora_serve.cli.output import libraries_on_stderr
from qlora_serve.wording import counted

app = App(no_args_is_help=True)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
_Adapter = Annotated[
    str,
    typer.Argument(help="The adapter's directory, or its name in the store.", metavar="ADAPTER"),
]
_Name = Annotated[str, typer.Argument(help="The adapter's name in the store.", metavar="NAME")]
_Store = Annotated[
    Path, typer.Option("--adapters-dir", help="The store: a folder of adapters.", metavar="DIR")
]
_Replace = Annotated[
    bool, typer.Option("--replace", help="Replace an adapter of that name, in one step.")
]
_Force = Annotated[
    bool, typer.Option("--force", help="Also touch a directory that was put there by hand.")
]
_FOLDER = Path("adapters")
_MAX_UNPACKED = "4GiB"


@app.callback()
def adapters() -> None:
    """Keep, show, check and convert adapters."""


@app.command("list")
def list_adapters(
    folder: Annotated[
        Path | None, typer.Argument(help="The same as --adapters-dir.", metavar="FOLDER")
    ] = None,
    adapters_dir: Annotated[
        Path | None,
        typer.Option(
            "--adapters-dir", help="A folder of adapters; ./adapters by default.", metavar="DIR"
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """List the adapters in a folder; a broken one is listed with its reason.

    Examples:

        qlora-serve adapters list

        qlora-serve adapters list /srv/adapters --json
    """
    from qlora_serve.adapters.describe import describe_folder
    from qlora_serve.errors import UsageError

    if folder is not None and adapters_dir is not None:
        raise UsageError(f"give either {folder} or --adapters-dir {adapters_dir}, not both")
    chosen = folder or adapters_dir or _FOLDER
    rows = describe_folder(chosen)
    if as_json:
        _print_json(rows)
    elif rows:
        tables.print_list(rows)
    else:
        typer.echo(f"no adapters in {chosen}; make one with `qlora-serve train`")


@app.command()
def show(adapter: _Adapter, adapters_dir: _Store = _FOLDER, as_json: _Json = False) -> None:
    """Show what an adapter is and how it was trained.

    Examples:

        qlora-serve adapters show adapters/mine

        qlora-serve adapters show mine --adapters-dir /srv/adapters
    """
    from math import prod

    from qlora_serve.adapters.describe import describe
    from qlora_serve.adapters.files import read_adapter

    with _located(adapter, adapters_dir) as (path, entry):
        files = read_adapter(path)
        shown = describe(files, entry) | {
            "alpha": files.config.get("lora_alpha"),
            "tensors": len(files.tensors),
            "parameters": sum(prod(info.shape) for info in files.tensors.values()),
        }
    manifest = files.manifest
    training = manifest.model_dump(exclude={"probes"}) if manifest is not None else None
    if as_json:
        _print_json(shown | {"training": training, "config": dict(files.config)})
    else:
        tables.print_adapter(shown, training)


@app.command()
def check(
    adapter: _Adapter,
    base: Annotated[
        str | None, typer.Option(help="The base to check against; by default the adapter's own.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(help="Another adapter to compare it with, layer by layer.", metavar="ADAPTER"),
    ] = None,
    adapters_dir: _Store = _FOLDER,
    as_json: _Json = False,
) -> None:
    """Check all that a server checks when it loads an adapter; exits 1 when it would refuse.

    Examples:

        qlora-serve adapters check adapters/mine

        qlora-serve adapters check adapters/mine --base smollm2 --json

        qlora-serve adapters check adapters/mine --compare adapters/mine-before
    """
    from qlora_serve.adapters.check import check_adapter, compare_adapters
    from qlora_serve.errors import QloraServeError

    try:
        with libraries_on_stderr(), _located(adapter, adapters_dir) as (path, _):
            result = check_adapter(path, base)
            if compare is not None:
                with _located(compare, adapters_dir) as (other, _):
                    result["comparison"] = compare_adapters(path, other, base)
    except QloraServeError as error:
        if as_json:
            _print_json({"ok": False, "error": str(error)})
        raise
    if as_json:
        _print_json(result)
    else:
        tables.print_check(adapter, compare, result)


@app.command()
def add(
    name: _Name,
    source: Annotated[
        str,
        typer.Argument(
            help="A directory, a checkpoint-N directory, an archive (.zip, .tar, .tar.gz), "
            "org/name[@revision] on the hub, or modelscope:org/name[@revision].",
            metavar="SOURCE",
        ),
    ],
    adapters_dir: _Store = _FOLDER,
    replace: _Replace = False,
    force: _Force = False,
    max_unpacked_size: Annotated[
        str, typer.Option(help="What an archive may unpack to, such as 500MB.", metavar="SIZE")
    ] = _MAX_UNPACKED,
    as_json: _Json = False,
) -> None:
    """Take a copy of an adapter into the store.

    A running server sees it at its next look, within `serve --adapters-poll` seconds.

    Examples:

        qlora-serve adapters add mine runs/mine

        qlora-serve adapters add mine runs/mine.checkpoints/checkpoint-200 --replace

        qlora-serve adapters add theirs org/their-adapter@main --adapters-dir /srv/adapters
    """
    from qlora_serve.adapters.sources import find_source
    from qlora_serve.adapters.store import AdapterStore

    fill = find_source(source, _parse_size(max_unpacked_size))
    added = AdapterStore(adapters_dir).add(name, fill, source, replace=replace, force=force)
    if as_json:
        _print_json(
            {
                "name": name,
                "path": str(adapters_dir / name),
                "identity": added.entry.identity,
                "replaced": added.replaced,
                "unchanged": added.unchanged,
                "left_out": list(added.left_out),
            }
        )
        return
    done = "is already in" if added.unchanged else "replaced in" if added.replaced else "added to"
    typer.echo(f"{name} {done} {adapters_dir} ({str(added.entry.identity)[:19]})")
    if added.left_out:
        typer.echo(f"left out, no part of an adapter: {', '.join(added.left_out)}")


@app.command()
def remove(
    name: _Name, adapters_dir: _Store = _FOLDER, force: _Force = False, as_json: _Json = False
) -> None:
    """Remove an adapter from the store.

    A running server lets go of it at its next look, within `serve --adapters-poll` seconds.

    Examples:

        qlora-serve adapters remove mine
    """
    from qlora_serve.adapters.store import AdapterStore

    AdapterStore(adapters_dir).remove(name, force=force)
    if as_json:
        _print_json({"removed": name})
    else:
        typer.echo(f"{name} removed from {adapters_dir}")


@app.command()
def rename(
    name: _Name,
    new_name: Annotated[str, typer.Argument(help="What to call it.", metavar="NEW_NAME")],
    adapters_dir: _Store = _FOLDER,
    replace: _Replace = False,
    force: _Force = False,
    as_json: _Json = False,
) -> None:
    """Give an adapter another name, in one step.

    A running server sees it at its next look, within `serve --adapters-poll` seconds.

    Examples:

        qlora-serve adapters rename mine mine-v1
    """
    from qlora_serve.adapters.store import AdapterStore

    entry = AdapterStore(adapters_dir).rename(name, new_name, replace=replace, force=force)
    if as_json:
        _print_json({"name": new_name, "was": name, "identity": entry.identity})
    else:
        typer.echo(f"{name} is now {new_name} in {adapters_dir}")


@app.command()
def clean(
    adapters_dir: _Store = _FOLDER,
    now: Annotated[
        bool, typer.Option("--now", help="Also what lost its name only minutes ago.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Delete content that no name points to any more, and what killed processes left.

    Every other command that writes does the same in passing.

    Examples:

        qlora-serve adapters clean --now
    """
    from qlora_serve.adapters.store import AdapterStore
    from qlora_serve.errors import ConfigError

    if not adapters_dir.is_dir():
        raise ConfigError(f"no folder of adapters at {adapters_dir}")
    count = AdapterStore(adapters_dir).clean(0 if now else None)
    if as_json:
        _print_json({"removed_objects": count})
    elif count:
        what = counted(count, "adapter that has", "adapters that have")
        typer.echo(f"deleted the content of {what} no name in {adapters_dir}")
    else:
        waits = "" if now else "; what lost its name within ten minutes waits (see --now)"
        typer.echo(f"nothing to delete in {adapters_dir}{waits}")


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(help="A directory or archive with adapter_model.bin.", metavar="SOURCE"),
    ],
    dest: Annotated[Path, typer.Argument(help="The new directory.", metavar="DEST")],
    max_unpacked_size: Annotated[
        str, typer.Option(help="What an archive may unpack to, such as 500MB.", metavar="SIZE")
    ] = _MAX_UNPACKED,
    as_json: _Json = False,
) -> None:
    """Make safetensors of an adapter's pickled weights, in a process with limits.

    Only tensors are read: anything else in the pickle is refused, and nothing in it runs.

    Examples:

        qlora-serve adapters convert old/mine adapters/mine
    """
    from qlora_serve.adapters.convert import convert_adapter
    from qlora_serve.adapters.describe import describe
    from qlora_serve.adapters.files import read_adapter

    left_out = convert_adapter(source, dest, _parse_size(max_unpacked_size))
    shown = describe(read_adapter(dest))
    if as_json:
        _print_json(shown | {"left_out": left_out})
    else:
        typer.echo(f"{source} converted to {dest} ({shown['identity'][:19]})")


@contextmanager
def _located(adapter: str, folder: Path) -> Iterator[tuple[Path, Any]]:
    """A directory, or what a name in the store points to, with errors that say the name.

    A directory wins, unless the store was named with --adapters-dir.
    """
    from qlora_serve.adapters.folder import scan_adapters
    from qlora_serve.adapters.store import AdapterStore
    from qlora_serve.errors import AdapterError

    path = Path(adapter).expanduser()
    is_name = "/" not in adapter
    is_chosen = is_name and folder != _FOLDER and (folder / adapter).is_dir()
    if path.is_dir() and not is_chosen:
        folder, adapter = path.parent, path.name
        found = scan_adapters(folder).entries.get(adapter) if path.is_symlink() else None
        if found is None or not found.is_managed:
            yield path, None
            return
        entry = found
    elif is_name and folder.is_dir():
        entry = AdapterStore(folder).get(adapter)
    else:
        raise AdapterError(f"no adapter at {adapter}: no such directory, nor a store at {folder}")
    try:
        yield entry.path, entry
    except AdapterError as error:
        text = str(error).replace(str(entry.path.resolve()), str(folder / adapter))
        raise AdapterError(text.replace(str(entry.path), str(folder / adapter))) from None


def _parse_size(text: str) -> int:
    from qlora_serve.errors import UsageError
    from qlora_serve.settings import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"--max-unpacked-size: {error}") from None


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2))
