"""`qlora-serve data`."""

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_serve.cli.help import App
from qlora_serve.wording import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from qlora_serve.train.check import CheckedData, DataReport

app = App(no_args_is_help=True)

_LISTED = 20
_SHOWN_CHARACTERS = 2000
_BAR = 40


class TrainOn(StrEnum):
    """What counts in the loss."""

    assistant = "assistant"
    last = "last"
    prompt = "prompt"
    all = "all"


@app.callback()
def data() -> None:
    """Look at training data."""


@app.command()
def check(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE", help="Files or data sets, as --data of train."),
    ],
    base: Annotated[str, typer.Option(help="The base that will be trained.")],
    train_on: Annotated[
        TrainOn, typer.Option(help="What counts in the loss, as in train.")
    ] = TrainOn.assistant,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Where rows are cut; as in train by default.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Read only the first so many rows of each file.")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="How many rows to show.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Show what the model will see of some data, and all that is wrong with it.

    Tokens that count in the loss are coloured (in ⟦brackets⟧ where there are no colours). Exits
    with 1 if training would stop at this data.

    Examples:

        qlora-serve data check chats.jsonl --base smollm2

        qlora-serve data check a.jsonl b.csv --base smollm2 --train-on last --show 5 --json
    """
    checked = _check(files, base, train_on.value, max_length, rows)
    report = checked.report
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2, ensure_ascii=False))
    else:
        _print(checked, show)
    if report.fatal:
        from qlora_serve.errors import DataError

        raise DataError(f"training would stop at this data: {'; '.join(report.fatal)}")


def _check(
    files: list[str], base: str, train_on: Any, max_length: int | None, rows: int | None
) -> "CheckedData":
    from qlora_serve.base.source import locate_base
    from qlora_serve.errors import ConfigError
    from qlora_serve.progress import progress
    from qlora_serve.train.data import read_sources
    from qlora_serve.train.prepare import longest_rows
    from qlora_serve.train.sources import parse_source

    try:
        sources = [parse_source(file) for file in files]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    source = locate_base(base)
    limit = longest_rows(max_length, source)
    read = read_sources(sources, rows)

    # torch comes with these.
    from qlora_serve.base.tokenizer import load_tokenizer
    from qlora_serve.train.check import check_data, stop_ids_of
    from qlora_serve.train.dataset import TokenizeSettings

    with progress("checking"):
        tokenizer = load_tokenizer(source)
        stops = stop_ids_of(source, tokenizer)
        settings = TokenizeSettings(tokenizer, limit, stops, train_on)
        return check_data(read, source, settings)


def _print(checked: "CheckedData", show: int) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    report = checked.report
    for number in range(min(show, len(checked.tokens.rows))):
        chat = checked.chats[checked.tokens.origins[number]]
        console.rule(chat.where, align="left", style="dim")
        console.print(_row_text(checked, number, console.color_system is not None))
    console.rule(style="dim")
    for source in report.sources:
        kind = source.format or "of no known format"
        console.print(f"{source.name}: {kind}, {counted(source.rows, 'row', 'rows')}", markup=False)
    counts = report.counts
    share = 100 * counts.trained_tokens / max(counts.tokens, 1)
    whole = any(source.format == "text" for source in report.sources)
    console.print(
        f"{counted(counts.rows, 'row', 'rows')} to train on, {counts.tokens:,} tokens, of which "
        f"{counts.trained_tokens:,} ({share:.0f} %) count in the loss (train_on {report.train_on}"
        + ("; of text rows every token)" if whole else ")")
    )
    if counts.split_chats:
        console.print(
            f"{counted(counts.split_chats, 'chat', 'chats')} became a row for each answer: the "
            "template rewrites earlier turns"
        )
    _print_lengths(report, console)
    _print_tokens(report, console)
    problems = [str(problem) for problem in report.problems]
    _print_list(console, "row that cannot be used", "rows that cannot be used", problems, "red")
    same = [f"{where} = {first}" for where, first in report.duplicates]
    _print_list(console, "row that is there twice", "rows that are there twice", same, "yellow")
    for line in report.warnings:
        console.print(f"[yellow]warning:[/] {_escaped(line)}")
    if not report.fatal and not report.warnings:
        console.print("[green]nothing to complain of[/]")


def _row_text(checked: "CheckedData", number: int, colours: bool) -> "Text":
    from rich.text import Text

    row = checked.tokens.rows[number]
    text = Text()
    start = 0
    for end in range(1, len(row.input_ids) + 1):
        if end < len(row.input_ids) and row.trained[end] == row.trained[start]:
            continue
        piece = checked.decode(row.input_ids[start:end])
        if row.trained[start]:
            piece = piece if colours else f"⟦{piece}⟧"
        text.append(piece, "bold green" if row.trained[start] else "dim")
        start = end
    if len(text) > _SHOWN_CHARACTERS:
        more = len(text) - _SHOWN_CHARACTERS
        text = text[:_SHOWN_CHARACTERS]
        text.append(f" … {more} characters more", "italic")
    if row.truncated_tokens:
        text.append(
            f"\n✂ {counted(row.truncated_tokens, 'token is', 'tokens are')} cut here", "yellow"
        )
    return text


def _print_lengths(report: "DataReport", console: "Console") -> None:
    if not report.lengths:
        return
    console.print(f"\nlengths in tokens (longest {report.longest}, cut at {report.max_length}):")
    most = max(bucket.rows for bucket in report.lengths)
    width = len(str(report.lengths[-1].last))
    for bucket in report.lengths:
        style = "yellow" if bucket.first > report.max_length else "blue"
        bar = "█" * -(-_BAR * bucket.rows // most)
        until = f"– {bucket.last:<{width}}" if bucket.last > bucket.first else " " * (width + 2)
        console.print(f"  {bucket.first:>{width}} {until} [{style}]{bar}[/] {bucket.rows}")
    console.print()


def _print_tokens(report: "DataReport", console: "Console") -> None:
    ends = report.ends
    rows = report.counts.rows + report.counts.dropped_rows
    stops = " or ".join(ends.stop_tokens)
    console.print(
        f"end token: {stops}; it counts in the loss in {ends.rows_with} of "
        f"{counted(rows, 'row', 'rows')}",
        markup=False,
    )
    if ends.pad_is_stop:
        console.print(
            f"padding: {ends.pad_token} also ends answers; padding is known by its place, so "
            f"{ends.trained_pads} of them stay in the loss",
            markup=False,
        )
    known = ", ".join(report.untrained) + " never learnt" if report.untrained else "all learnt"
    console.print(f"special tokens of the chat template: {known} by the base", markup=False)


def _print_list(console: "Console", one: str, many: str, lines: list[str], style: str) -> None:
    if not lines:
        return
    console.print(f"\n[{style}]{counted(len(lines), one, many)}:[/]")
    for line in lines[:_LISTED]:
        console.print(f"  {line}", markup=False)
    if len(lines) > _LISTED:
        console.print(f"  and {len(lines) - _LISTED} more (--json lists all)")


def _escaped(line: str) -> str:
    from rich.markup import escape

    return escape(line)
