"""Token ids to text as they come: whole characters only, and nothing of a stop text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_serve.serve.engine.request import Delta, TokenLogprobs

# What a tokenizer writes for bytes that do not (yet) make a character.
_INCOMPLETE = "\ufffd"


class TextAssembler:
    """Assembles one answer's text.

    A token may hold a part of a character, and a stop text may span tokens. So text is held back
    while it ends in an incomplete character or in the beginning of a stop text.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), visible_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden = (
            frozenset(tokenizer.all_special_ids) - set(visible_ids) if visible_ids else None
        )
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # Decoding starts a few tokens back, since a token's text can depend on the one before it.
        self._context_start = 0
        self._decoded_to = 0
        self._held = ""
        self.decoded = 0
        """Characters of the tokens so far, those that are held back included."""
        self.released = 0
        """Characters given out so far."""
        self.stopped = False
        """Whether a stop text was met; nothing more comes out."""

    def push(self, token_id: int, may_stop: bool = True) -> str:
        """Takes one token and returns the text that can be given out now.

        Args:
            token_id: the token.
            may_stop: whether a stop text may end the answer yet; if not, all text goes out.
        """
        self._ids.append(token_id)
        return self._release(self._new_text(), may_stop)

    def finish(self) -> str:
        """The text that was held back, at the end of the answer."""
        if self.stopped:
            return ""
        before = self._decode(self._context_start, self._decoded_to)
        rest = self._decode(self._context_start, len(self._ids))[len(before) :]
        self._decoded_to = len(self._ids)
        text = self._release(rest)
        held, self._held = self._held, ""
        self.released += len(held)
        return text + held

    def _new_text(self) -> str:
        before = self._decode(self._context_start, self._decoded_to)
        now = self._decode(self._context_start, len(self._ids))
        if len(now) <= len(before) or now.endswith(_INCOMPLETE):
            return ""
        self._context_start, self._decoded_to = self._decoded_to, len(self._ids)
        return now[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        ids = self._ids[start:end]
        if self._hidden is not None:
            ids = [token for token in ids if token not in self._hidden]
        return str(
            self._tokenizer.decode(
                ids,
                skip_special_tokens=self._hidden is None,
                clean_up_tokenization_spaces=False,
            )
        )

    def _release(self, text: str, may_stop: bool = True) -> str:
        if self.stopped or not text:
            return ""
        self.decoded += len(text)
        given = self._cut(self._held + text, may_stop)
        self.released += len(given)
        return given

    def _cut(self, candidate: str, may_stop: bool) -> str:
        """The part of `candidate` that can go out; the rest is held back, or dropped at a stop."""
        if not (self._stop and may_stop):
            self._held = ""
            return candidate
        at = min((i for i in map(candidate.find, self._stop) if i >= 0), default=-1)
        if at >= 0:
            self.stopped, self._held = True, ""
            return candidate[:at]
        keep = max(_overlap(candidate, stop) for stop in self._stop)
        self._held = candidate[len(candidate) - keep :]
        return candidate[: len(candidate) - keep]


@dataclass(frozen=True)
class _Pending:
    """A token whose text has not been given out."""

    token_id: int
    offset: int
    logprobs: TokenLogprobs | None


class AnswerStream:
    """One answer as it goes out: text, and the tokens that belong to it."""

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), visible_ids: Sequence[int] = ()
    ) -> None:
        self._text = TextAssembler(tokenizer, stop, visible_ids)
        self._pending: list[_Pending] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop text was met."""
        return self._text.stopped

    def push(
        self, token_id: int, logprobs: TokenLogprobs | None = None, may_stop: bool = True
    ) -> Delta | None:
        """Takes one token; returns what can go out now, if anything."""
        self._pending.append(_Pending(token_id, self._text.decoded, logprobs))
        text = self._text.push(token_id, may_stop)
        return self._delta(text, all_tokens=False) if text else None

    def finish(self) -> Delta | None:
        """What was held back, at the answer's end. Tokens of a stop text are dropped with it."""
        text = self._text.finish()
        delta = self._delta(text, all_tokens=not self.stopped)
        return delta if text or delta.token_ids else None

    def _delta(self, text: str, all_tokens: bool) -> Delta:
        count = len(self._pending)
        if not all_tokens:
            count = sum(token.offset < self._text.released for token in self._pending)
        out, self._pending = self._pending[:count], self._pending[count:]
        return Delta(
            text,
            tuple(token.token_id for token in out),
            tuple(token.offset for token in out),
            tuple(token.logprobs for token in out if token.logprobs is not None),
        )


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
