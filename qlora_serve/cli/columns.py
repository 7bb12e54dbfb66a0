"""Answers of a comparison as columns in the terminal."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

# From the base's own words to words that the base would hardly have said: nats of divergence.
_SHADES = ((0.05, ""), (0.25, "on grey19"), (1.0, "on dark_goldenrod"), (3.0, "black on orange3"))
_STRONGEST = "white on red3"


@dataclass
class _Column:
    variant: str
    text: str = ""
    tokens: list[dict[str, Any]] = field(default_factory=list)
    divergence: dict[str, Any] | None = None
    ending: dict[str, Any] | None = None

    def cell(self) -> Text:
        """The answer, shaded where that is known."""
        shades = (self.divergence or {}).get("tokens")
        if not shades:
            return Text(self.text)
        shown = Text()
        pieces = token_texts(token["bytes"] for token in self.tokens)
        for piece, found in zip(pieces, shades, strict=False):
            shown.append(piece, shade(found["divergence"]))
        return shown

    def figures(self) -> Text:
        """Tokens, times and how far it is from the base."""
        ending = self.ending
        if ending is None:
            return Text("…")
        if ending["error"]:
            return Text(f"failed: {ending['error']}", "red")
        first = ending["ttft_seconds"]
        parts = [
            f"{ending['usage']['completion_tokens']} tokens, {ending['seconds']:.1f} s",
            "" if first is None else f" (first after {first:.2f} s)",
            f", ended by {ending['finish_reason']}",
        ]
        if ending["mean_logprob"] is not None:
            parts.append(f"\nmean log-probability {ending['mean_logprob']:.2f}")
        if self.divergence is not None:
            mean = self.divergence["mean"]
            known = f"{mean:.3f} nats a token" if mean is not None else self.divergence["error"]
            parts.append(f"\nfrom the base: {known}")
        return Text("".join(parts))


class Columns:
    """The answers so far."""

    def __init__(self) -> None:
        self._columns: list[_Column] = []

    @classmethod
    def of_whole(cls, answers: Iterable[dict[str, Any]]) -> "Columns":
        """Of answers that have ended."""
        columns = cls()
        for one in answers:
            columns._columns.append(
                _Column(_title(one), one["text"], one["tokens"], one["divergence"], one)
            )
        return columns

    def take(self, event: dict[str, Any]) -> None:
        """Takes the next event of a stream."""
        kind = event["type"]
        if kind == "start":
            self._columns = [_Column(_title(one)) for one in event["answers"]]
        if "index" not in event:
            return
        column = self._columns[event["index"]]
        if kind == "delta":
            column.text += event["text"]
            column.tokens += event["tokens"]
        elif kind == "answer":
            column.ending = event
        elif kind == "divergence":
            column.divergence = event

    def table(self) -> Table:
        """All of them side by side."""
        table = Table(expand=True, show_lines=True)
        for column in self._columns:
            table.add_column(Text(column.variant), ratio=1, overflow="fold")
        table.add_row(*(column.cell() for column in self._columns))
        table.add_row(*(column.figures() for column in self._columns), style="dim")
        return table


def shade(divergence: float) -> str:
    """The style of a word at which the adapter is so many nats from the base.

    >>> shade(0.01), shade(2.0), shade(9.0)
    ('', 'black on orange3', 'white on red3')
    """
    return next((style for most, style in _SHADES if divergence < most), _STRONGEST)


def token_texts(tokens: Iterable[list[int]]) -> list[str]:
    """The text of each token; a character that several tokens make belongs to the last of them.

    >>> token_texts([[240, 159], [153, 130, 33], [97]])
    ['', '🙂!', 'a']
    """
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(bytes(token)) for token in tokens]


def _title(answer: dict[str, Any]) -> str:
    repeat = answer["repeat"]
    return f"{answer['variant']} #{repeat + 1}" if repeat else str(answer["variant"])
