"""Flags made from settings, so that a flag, its YAML key, default and help are written once."""

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from qlora_serve.settings import Settings, load_settings

Command = Callable[..., None]


def flags_from(
    kind: type[Settings], positional: Iterable[str] = (), panels: dict[str, str] | None = None
) -> Callable[[Callable[[Any], None]], Command]:
    """Makes a typer command of a function that takes one settings object.

    Each field becomes a flag (those named in `positional` an argument), and `--config FILE` reads
    a YAML file of the same keys. Flags that are not given are None, so that the file and then the
    field's default apply.

    Args:
        kind: the settings class.
        positional: fields that are arguments rather than flags.
        panels: field → the heading under which `--help` lists it.
    """
    arguments = set(positional)

    def make(function: Callable[[Any], None]) -> Command:
        @wraps(function)
        def command(config: Path | None = None, **flags: Any) -> None:
            given = {name: value for name, value in flags.items() if value not in (None, [])}
            function(load_settings(kind, config, given, arguments))

        parameters = [
            # An alias is for a name that pydantic keeps for itself, such as `json`.
            _parameter(field.alias or name, field, name in arguments, (panels or {}).get(name))
            for name, field in kind.model_fields.items()
        ]
        parameters.append(_keyword("config", Path | None, _CONFIG_OPTION))
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return make


_CONFIG_OPTION = typer.Option(
    None, "--config", metavar="FILE.yaml", help="A YAML file with these flags as keys; flags win."
)


def _parameter(name: str, field: Any, is_argument: bool, panel: str | None) -> inspect.Parameter:
    annotation = _flag_type(field.annotation)
    if is_argument:
        # Optional here, because the YAML file may give it; settings say when it is missing.
        argument = typer.Argument(None, metavar=name.upper(), help=field.description)
        return _keyword(name, annotation, argument)
    flag = "--" + name.replace("_", "-")
    declaration = flag
    if get_args(annotation)[:1] == (bool,):
        declaration = f"{flag}/--no-{name.replace('_', '-')}"
    extra = field.json_schema_extra or {}
    option = typer.Option(
        None,
        declaration,
        help=_help(field),
        show_default=False,
        rich_help_panel=panel,
        metavar=extra.get("metavar"),
    )
    return _keyword(name, annotation, option)


def _help(field: Any) -> str:
    text = field.description or ""
    if field.is_required() or field.default_factory or field.default in (None, ()):
        return text
    default = field.default
    if isinstance(default, bool):
        default = "on" if default else "off"
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return f"{text} [default: {default}]"


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default
    )


def _flag_type(annotation: Any) -> Any:
    """The type that typer parses: always optional; collections and unions as (lists of) text."""
    inner = [item for item in get_args(annotation) if item is not type(None)]
    if get_origin(annotation) is Literal or annotation in (str, int, float, bool, Path):
        return annotation | None
    # A text or several: such a flag can be given again, too, and none of its values is lost.
    if any(get_origin(item) in (tuple, list, dict) for item in (annotation, *inner)):
        return list[str] | None
    if len(inner) == 1:
        return _flag_type(inner[0])
    return str | None
