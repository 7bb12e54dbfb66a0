"""How `--help` and bad usage look: every flag whole, at any width, under its heading."""

import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

_Any = TypeVar("_Any", bound=Callable[..., Any])
_FLAGS_WIDTH = 30  # a longer flag has a line of its own


class _Help:
    """The parts of a help page, for commands and groups alike."""

    def collect_usage_pieces(self: Any, ctx: Any) -> list[str]:
        """`FILE` for what is needed and `[FILE]` for what is not, as everywhere; not `{FILE}`."""
        pieces = super().collect_usage_pieces(ctx)  # type: ignore[misc]
        return [piece.replace("{", "").replace("}", "") for piece in pieces]

    def format_help_text(self: Any, ctx: Any, formatter: Any) -> None:
        """The docstring: its paragraphs, and its indented examples as they are to be typed."""
        after_example = False
        for paragraph in (self.help or "").split("\n\n"):
            example = paragraph.startswith(" ")
            if not (example and after_example):
                formatter.write_paragraph()
            after_example = example
            margin = "    " if example else "  "
            formatter.write(
                _wrapped(paragraph, formatter.width, margin, margin * (1 + example)) + "\n"
            )

    def format_options(self: Any, ctx: Any, formatter: Any) -> None:
        """The arguments, then the flags by their headings."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
            panel = getattr(parameter, "rich_help_panel", None) or kind
            record = parameter.get_help_record(ctx)
            if record is not None:
                name, text = record
                # One value at a time, of which the range is said at the end of the text.
                name = name.replace("<list[str]>", "<str>").replace(" range>", ">")
                panels.setdefault(panel, []).append((name, text))
        for heading, records in panels.items():
            _write_list(formatter, heading, records)


class Command(_Help, TyperCommand):
    """One command."""


class Group(_Help, TyperGroup):
    """A command of commands."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The flags, then the commands, whose first sentence is never cut."""
        super().format_options(ctx, formatter)
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        helps = [(name, each.get_short_help_str(1000)) for name, each in found if each]
        _write_list(formatter, "Commands", helps)


class App(typer.Typer):
    """A Typer whose help and errors are lines.

    Typer's own are tables, which cut a long flag on a terminal of 80 columns; Click's, which it
    falls back on, break flags at their hyphens.
    """

    def __init__(self, group: type[Group] = Group, **settings: Any) -> None:
        super().__init__(cls=group, add_completion=False, rich_markup_mode=None, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[_Any], _Any]:
        """As Typer's."""
        return super().command(name, cls=Command, **settings)


def _write_list(formatter: Any, heading: str, records: list[tuple[str, str]]) -> None:
    column = 2 + min(max(len(name) for name, _ in records), _FLAGS_WIDTH) + 2
    with formatter.section(heading):
        for name, text in records:
            first = f"  {name}".ljust(column)
            if len(name) > _FLAGS_WIDTH:
                formatter.write(first.rstrip() + "\n")
                first = " " * column
            formatter.write(_wrapped(text, formatter.width, first, " " * column) + "\n")


def _wrapped(text: str, width: int, first: str, others: str) -> str:
    return textwrap.fill(
        " ".join(text.split()),
        width,
        initial_indent=first,
        subsequent_indent=others,
        break_on_hyphens=False,
        break_long_words=False,
    )
