"""Which tokens of a chat count in the loss.

Only what the assistant says counts, with the token that ends its turn: a model that never trained
on that token never stops. The prompt, the words that open the assistant's turn and the line break
after its end do not count, since serving never asks the model for them.

The whole chat is rendered and tokenized once, so that training sees exactly the tokens that
serving would make of it; turns are then found in it by their characters.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_serve.base.tokenizer import Message, encode_text, render_chat
from qlora_serve.errors import BaseModelError, DataError
from qlora_serve.train.data_settings import TrainOn

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class TokenizedRow:
    """A row as the model sees it."""

    input_ids: list[int]
    trained: list[bool]
    """For each token, whether it counts in the loss."""
    truncated_tokens: int = 0
    """How many tokens were cut off at the end."""

    @property
    def trained_tokens(self) -> int:
        """How many tokens are predicted in the loss; the first of a row never is."""
        return sum(self.trained[1:])


class _RewrittenError(DataError):
    """The template changes or drops an earlier turn when the chat goes on."""


def tokenize_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    max_length: int,
    stop_ids: Collection[int],
    train_on: TrainOn = "assistant",
    tools: Sequence[dict[str, Any]] | None = None,
) -> list[TokenizedRow]:
    """Renders and tokenizes a chat, and marks the tokens that count in the loss.

    Most chats become one row. Templates of reasoning models drop earlier thoughts as a chat goes
    on, so that no single text shows every answer as the model gave it; such a chat becomes one row
    for each answer, rendered as far as that answer and trained on it alone. That is what serving
    shows the model when it asks for that answer.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: the chat.
        max_length: longer rows are cut at the end to this many tokens.
        stop_ids: the tokens at which an answer ends, see `base.tokenizer.stop_token_ids`.
        train_on: what counts: all that the assistant says, its last turn, everything else
            (`prompt`), or all tokens.
        tools: the functions that the chat may call.

    Raises:
        DataError: the template refuses the chat, leaves out some of it, or does not end an
            assistant's turn with one of `stop_ids`.
    """
    chat = _Chat(tokenizer, messages, tools)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        return [_tokenize_whole(chat, max_length, stop_ids, train_on)]
    except _RewrittenError:
        if train_on in ("prompt", "all"):
            raise
        last = answers[-1]
    parts = answers if train_on == "assistant" else [last]
    return [_tokenize_whole(chat.until(index + 1), max_length, stop_ids, "last") for index in parts]


def tokenize_row(
    tokenizer: Any, messages: Sequence[Message], max_length: int, stop_ids: Collection[int]
) -> TokenizedRow:
    """`tokenize_chat` for a chat that makes one row.

    Raises:
        DataError: as there, or the template rewrites earlier turns.
    """
    return _tokenize_whole(_Chat(tokenizer, messages, None), max_length, stop_ids, "assistant")


def tokenize_text(tokenizer: Any, text: str, max_length: int) -> TokenizedRow:
    """Tokenizes a text that was already templated; all of its tokens count.

    What the tokenizer puts before a text (`<s>` of Llama 2) is added unless it is already there.
    """
    # Asked for nothing, a tokenizer answers with what it puts around a text. An end token is left
    # out: whether a text ends is for its author to say.
    around = tokenizer("")["input_ids"][:1]
    starts = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    before = [] if starts or around != [tokenizer.bos_token_id] else around
    ids = [*before, *encode_text(tokenizer, text)]
    cut = max(0, len(ids) - max_length)
    return TokenizedRow(ids[:max_length], [True] * min(len(ids), max_length), cut)


def has_generation_markers(tokenizer: Any) -> bool:
    """Whether the chat template itself marks what the assistant says."""
    return _GENERATION_MARKER.search(str(tokenizer.get_chat_template())) is not None


def prompt_ids(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
) -> list[int]:
    """The tokens of the chat up to its first assistant turn, as serving would ask for it."""
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    chat = _Chat(tokenizer, messages, tools)
    return encode_text(tokenizer, chat.render(first, add_generation_prompt=True))


@dataclass(frozen=True)
class _Chat:
    """A chat under a template."""

    tokenizer: Any
    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None

    def until(self, end: int) -> "_Chat":
        """The chat's first `end` messages."""
        return _Chat(self.tokenizer, self.messages[:end], self.tools)

    def render(self, end: int | None = None, add_generation_prompt: bool = False) -> str:
        """The text of the first `end` messages, or of all."""
        messages = self.messages[:end]
        try:
            return render_chat(self.tokenizer, messages, add_generation_prompt, self.tools)
        except BaseModelError as error:
            raise DataError(str(error)) from None


def _tokenize_whole(
    chat: _Chat, max_length: int, stop_ids: Collection[int], train_on: TrainOn
) -> TokenizedRow:
    tokenizer = chat.tokenizer
    text = chat.render()
    _require_survival(chat, text)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoding["input_ids"])
    trained = [train_on in ("prompt", "all")] * len(ids)
    if train_on != "all":
        turns = _turns(chat, text, only_last=train_on == "last")
        for first, last in _token_ranges(encoding["offset_mapping"], turns):
            end = _end_of_turn(tokenizer, ids, first, last, stop_ids)
            trained[first:end] = [train_on != "prompt"] * (end - first)
    cut = max(0, len(ids) - max_length)
    return TokenizedRow(ids[:max_length], trained[:max_length], cut)


def _require_survival(chat: _Chat, text: str) -> None:
    """Templates that do not know a key leave it out without a word; that is refused.

    Thoughts (`reasoning_content`) and answers are looked at where their turns are found.
    """
    for number, message in enumerate(chat.messages, start=1):
        content = str(message.get("content") or "").strip()
        if message["role"] in ("system", "tool") and not _is_in(content, text):
            raise DataError(
                f"the chat template leaves out message {number} ({message['role']}); use a base "
                "whose template knows it, or leave it out of the data"
            )
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if not all(_is_in(word, text) for word in _words(function)):
                raise DataError(
                    f"the chat template leaves out the call of {function['name']} in message "
                    f"{number}; use a base whose template knows tool_calls"
                )
    for tool in chat.tools or ():
        name = tool.get("function", tool)["name"]
        if name not in text:
            raise DataError(
                f"the chat template leaves out the tools ({name}); use a base whose template knows "
                "them, or write them into the system message"
            )


def _is_in(content: str, text: str) -> bool:
    """Whether a text holds some content, as it stands or escaped as JSON."""
    return content in text or any(
        json.dumps(content, ensure_ascii=ascii_only)[1:-1] in text for ascii_only in (False, True)
    )


def _words(value: Any) -> list[str]:
    """Every string in a JSON value, keys of arguments included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        own = [word for item in value.values() for word in _words(item)]
        return own if "arguments" in value else [*map(str, value), *own]
    if isinstance(value, list):
        return [word for item in value for word in _words(item)]
    return []


def _turns(chat: _Chat, text: str, only_last: bool) -> list[tuple[int, int]]:
    """The characters of the assistant's turns."""
    if has_generation_markers(chat.tokenizer):
        turns = _marked_turns(chat, text)
        _require_said(chat, text, turns, only_last)
        return turns[-1:] if only_last else turns
    if chat.messages[0]["role"] == "assistant":
        raise DataError("message 1 is the assistant's; a chat begins with system or user")
    return [_character_span(chat, index, text) for index in _asked(chat, only_last)]


def _asked(chat: _Chat, only_last: bool) -> list[int]:
    """The indices of the assistant's messages, or of the last one alone."""
    answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    return answers[-1:] if only_last else answers


def _marked_turns(chat: _Chat, text: str) -> list[tuple[int, int]]:
    """The characters between the template's `{% generation %}` markers.

    transformers can also give the tokens between them, but misses all but the first of the tokens
    that share the last character, such as an emoji's.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, spans = render_jinja_template(
        [list(chat.messages)],
        tools=list(chat.tools) if chat.tools else None,
        chat_template=chat.tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        add_generation_prompt=False,
        **chat.tokenizer.special_tokens_map,
    )
    assert rendered == [text]
    if not spans[0]:
        raise DataError("the chat template's generation markers enclose nothing of this chat")
    return [(start, end) for start, end in spans[0]]


def _require_said(
    chat: _Chat, text: str, turns: Sequence[tuple[int, int]], only_last: bool
) -> None:
    """All that the assistant said must stand between markers, in its order."""
    marked = "\n".join(text[start:end] for start, end in turns)
    place = 0
    for index in _asked(chat, only_last):
        for said in _said(chat.messages[index]):
            found = marked.find(said, place)
            if found < 0:
                raise _RewrittenError(_rewritten(index))
            place = found


def _said(message: Message) -> list[str]:
    """What of an assistant's message must be seen in its turn, whatever else the template adds."""
    parts = (message.get("reasoning_content"), message.get("content"))
    return [str(part).strip() for part in parts if part and str(part).strip()]


def _character_span(chat: _Chat, index: int, text: str) -> tuple[int, int]:
    """Where the characters of one assistant turn begin and end in the text of the whole chat."""
    before = chat.render(index, add_generation_prompt=True)
    if not text.startswith(before):
        raise _RewrittenError(_rewritten(index))
    until = chat.render(index + 1)
    end = len(until) if text.startswith(until) else _shared_prefix(text, until)
    # Some templates close the whole chat with one more token (Phi-3), which is not there when the
    # chat goes on. All that the assistant said must still be there.
    turn = text[len(before) : end]
    calls = [call["function"]["name"] for call in chat.messages[index].get("tool_calls", ())]
    # A generation prompt may already hold the opening of a thought.
    seen = all(said in turn for said in _said(chat.messages[index]))
    if not seen or not all(name in turn for name in calls):
        raise _RewrittenError(_rewritten(index))
    return len(before), end


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
        f"the chat template changes or leaves out what stands before or in message {index + 1} "
        "(assistant), so what the assistant said cannot be told from the rest; give the base a "
        "chat template with {% generation %} markers, or split the chat into rows of one answer "
        "each"
    )
