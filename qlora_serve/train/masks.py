"""Which tokens of a chat count in the loss.

Only what the assistant says counts, with the token that ends its turn: a model that never trained
on that token never stops. The prompt, the words that open the assistant's turn and the line break
after its end do not count, since serving never asks the model for them.

The whole chat is rendered and tokenized once, so that training sees exactly the tokens that
serving would make of it; turns are then found in it by their characters.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_serve.base.tokenizer import Message, encode_text, render_chat
from qlora_serve.errors import BaseModelError, DataError

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class TokenizedRow:
    """A chat as the model sees it."""

    input_ids: list[int]
    trained: list[bool]
    """For each token, whether it counts in the loss."""
    truncated_tokens: int = 0
    """How many tokens were cut off at the end."""

    @property
    def trained_tokens(self) -> int:
        """How many tokens are predicted in the loss; the first of a row never is."""
        return sum(self.trained[1:])


def tokenize_row(
    tokenizer: Any, messages: Sequence[Message], max_length: int, stop_ids: Collection[int]
) -> TokenizedRow:
    """Renders and tokenizes a chat, and marks the tokens that count in the loss.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: the chat.
        max_length: longer rows are cut at the end to this many tokens.
        stop_ids: the tokens at which an answer ends, see `base.tokenizer.stop_token_ids`.

    Raises:
        DataError: the template refuses the chat, rewrites earlier turns, or does not end an
            assistant's turn with one of `stop_ids`.
    """
    text = _render(tokenizer, messages)
    marked = has_generation_markers(tokenizer)
    turns = (_marked_turns if marked else _rendered_turns)(tokenizer, messages, text)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoding["input_ids"])
    spans = _token_ranges(encoding["offset_mapping"], turns)
    trained = [False] * len(ids)
    for first, last in spans:
        end = _end_of_turn(tokenizer, ids, first, last, stop_ids)
        trained[first:end] = [True] * (end - first)
    cut = max(0, len(ids) - max_length)
    return TokenizedRow(ids[:max_length], trained[:max_length], cut)


def has_generation_markers(tokenizer: Any) -> bool:
    """Whether the chat template itself marks what the assistant says."""
    return _GENERATION_MARKER.search(str(tokenizer.get_chat_template())) is not None


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The tokens of the chat up to its first assistant turn, as serving would ask for it."""
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return encode_text(tokenizer, _render(tokenizer, messages[:first], add_generation_prompt=True))


def _marked_turns(tokenizer: Any, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
    """The characters between the template's `{% generation %}` markers.

    transformers can also give the tokens between them, but misses all but the first of the tokens
    that share the last character, such as an emoji's.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, spans = render_jinja_template(
        [list(messages)],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        add_generation_prompt=False,
        **tokenizer.special_tokens_map,
    )
    assert rendered == [text]
    if not spans[0]:
        raise DataError("the chat template's generation markers enclose nothing of this chat")
    return [(start, end) for start, end in spans[0]]


def _rendered_turns(
    tokenizer: Any, messages: Sequence[Message], text: str
) -> list[tuple[int, int]]:
    """The characters of the assistant's turns, found by rendering the chat up to each."""
    if messages[0]["role"] == "assistant":
        raise DataError("message 1 is the assistant's; a chat begins with system or user")
    return [
        _character_span(tokenizer, messages, index, text)
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def _character_span(
    tokenizer: Any, messages: Sequence[Message], index: int, text: str
) -> tuple[int, int]:
    """Where the characters of one assistant turn begin and end in the text of the whole chat."""
    before = _render(tokenizer, messages[:index], add_generation_prompt=True)
    if not text.startswith(before):
        raise DataError(_rewritten(index))
    until = _render(tokenizer, messages[: index + 1])
    if text.startswith(until):
        return len(before), len(until)
    # Some templates close the whole chat with one more token (Phi-3), which is not there when the
    # chat goes on. All that the assistant said must still be there.
    shared = _shared_prefix(text, until)
    if messages[index]["content"].strip() not in text[len(before) : shared]:
        raise DataError(_rewritten(index))
    return len(before), shared


def _shared_prefix(first: str, second: str) -> int:
    """How many leading characters two texts have in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _character_ranges(offsets: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Where each token's characters really begin and end.

    Byte-level tokenizers may report a token without its leading spaces. Tokens follow one another
    without a gap, so a token begins where the one before it ended; those that share one character
    (an emoji of several bytes) all begin at that character.
    """
    begins, ends, reached = [], [], 0
    for start, end in offsets:
        begins.append(min(start, reached))
        reached = max(reached, end)
        ends.append(reached)
    return begins, ends


def _token_ranges(
    offsets: Sequence[tuple[int, int]], turns: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The tokens [first, last) that lie within each range of characters.

    A token that begins before a turn belongs to the prompt even if it ends inside.
    """
    begins, ends = _character_ranges(offsets)
    return [(bisect_left(begins, start), bisect_right(ends, end)) for start, end in turns]


def _end_of_turn(
    tokenizer: Any, ids: Sequence[int], first: int, last: int, stop_ids: Collection[int]
) -> int:
    """The end of the trained range: right after the stop token that closes ids[first:last].

    Behind that token there may be line breaks and other special tokens, which do not count. The
    same token may also have been written by the assistant, in the middle of its answer.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    tail = last
    while tail > first and (
        ids[tail - 1] in special or not tokenizer.decode([ids[tail - 1]]).strip()
    ):
        tail -= 1
    # A marker may leave the end token out.
    for position in range(tail, min(last + 1, len(ids))):
        if ids[position] in stop_ids:
            return position + 1
    raise DataError(
        "the chat template does not end an assistant's turn with a stop token, so the model would "
        "never learn to stop; write the end token into the base's chat template"
    )


def _rewritten(index: int) -> str:
    return (
        f"the chat template changes earlier text when message {index + 1} (assistant) is added, so "
        "what the assistant said cannot be told from the rest; give the base a chat template with "
        "{% generation %} markers, or split the chat into rows of one answer each"
    )


def _render(
    tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False
) -> str:
    try:
        return render_chat(tokenizer, messages, add_generation_prompt)
    except BaseModelError as error:
        raise DataError(str(error)) from None
