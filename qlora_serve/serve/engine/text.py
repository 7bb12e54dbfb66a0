"""Token ids to text as they come: whole characters only, and nothing of a stop text."""

from collections.abc import Sequence
from typing import Any

# What a tokenizer writes for bytes that do not (yet) make a character.
_INCOMPLETE = "\ufffd"


class TextAssembler:
    """Assembles one answer's text.

    A token may hold a part of a character, and a stop text may span tokens. So text is held back
    while it ends in an incomplete character or in the beginning of a stop text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # Decoding starts a few tokens back, since a token's text can depend on the one before it.
        self._context_start = 0
        self._decoded_to = 0
        self._held = ""
        self.stopped = False
        """Whether a stop text was met; nothing more comes out."""

    def push(self, token_id: int) -> str:
        """Takes one token and returns the text that can be given out now."""
        self._ids.append(token_id)
        return self._release(self._new_text())

    def finish(self) -> str:
        """The text that was held back, at the end of the answer."""
        if self.stopped:
            return ""
        before = self._decode(self._context_start, self._decoded_to)
        rest = self._decode(self._context_start, len(self._ids))[len(before) :]
        self._decoded_to = len(self._ids)
        text = self._release(rest)
        held, self._held = self._held, ""
        return text + held

    def _new_text(self) -> str:
        before = self._decode(self._context_start, self._decoded_to)
        now = self._decode(self._context_start, len(self._ids))
        if len(now) <= len(before) or now.endswith(_INCOMPLETE):
            return ""
        self._context_start, self._decoded_to = self._decoded_to, len(self._ids)
        return now[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        return str(
            self._tokenizer.decode(
                self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _release(self, text: str) -> str:
        if self.stopped or not text:
            return ""
        candidate = self._held + text
        if not self._stop:
            return candidate
        at = min((i for i in map(candidate.find, self._stop) if i >= 0), default=-1)
        if at >= 0:
            self.stopped, self._held = True, ""
            return candidate[:at]
        keep = max(_overlap(candidate, stop) for stop in self._stop)
        self._held = candidate[len(candidate) - keep :]
        return candidate[: len(candidate) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
