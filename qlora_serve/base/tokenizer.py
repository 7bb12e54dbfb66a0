"""The tokenizer, the chat template, and the tokens at which an answer ends."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlora_serve.base.source import BaseSource, loading_reason
from qlora_serve.errors import BaseModelError

Message = Mapping[str, Any]


def load_tokenizer(source: BaseSource) -> Any:
    """Loads the tokenizer of a base; it must bring a chat template.

    Raises:
        BaseModelError: there is no tokenizer, it is not a fast one, or it has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        reason = loading_reason(error, 200)
        raise BaseModelError(f"cannot load the tokenizer of {source.path}: {reason}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise BaseModelError(
            f"{source.path} has only a slow tokenizer; the loss mask needs the character offsets "
            "of a fast one (tokenizer.json)"
        )
    if not tokenizer.chat_template:
        raise BaseModelError(
            f"{source.path} has no chat template; put a chat_template.jinja beside its tokenizer"
        )
    return tokenizer


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The text of a chat under the tokenizer's template.

    Args:
        tokenizer: with a chat template.
        messages: the chat.
        add_generation_prompt: end with what opens an assistant's turn.
        tools: definitions of functions that the template may offer to the model.

    Raises:
        BaseModelError: the template refuses these messages (unknown role, wrong order ...).
    """
    import jinja2

    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )
    except (jinja2.TemplateError, TypeError) as error:
        # A template that adds text to a missing value raises a TypeError.
        raise BaseModelError(f"the chat template refuses these messages: {error}") from None


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered chat; the template has already written its special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


Render = Callable[[Sequence[Message]], str]


def stop_token_ids(tokenizer: Any, *configs: Any, render: Render | None = None) -> frozenset[int]:
    """Every token that ends an answer.

    The union of the tokenizer's end token, the end tokens of the given (generation) configs, and
    the token that the chat template writes after an assistant's turn. Any one of them alone is
    missing or wrong in some published model, which then never stops.

    Args:
        tokenizer: with a chat template.
        configs: with end tokens of their own.
        render: writes a chat with that template; `render_chat` when left out.
    """
    ids: set[int] = set()
    candidates = [tokenizer.eos_token_id, *(getattr(c, "eos_token_id", None) for c in configs)]
    for candidate in candidates:
        if isinstance(candidate, int):
            ids.add(candidate)
        elif candidate is not None:
            ids.update(int(item) for item in candidate)
    end_of_turn = end_of_turn_id(tokenizer, render)
    if end_of_turn is not None:
        ids.add(end_of_turn)
    return frozenset(ids)


def end_of_turn_id(tokenizer: Any, render: Render | None = None) -> int | None:
    """The special token that the chat template writes right after an assistant's content."""
    content = "answer"
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": content}]
    text = render(chat) if render is not None else render_chat(tokenizer, chat)
    if content not in text:
        return None  # a template that leaves answers out
    tail = text[text.rindex(content) + len(content) :]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for token in encode_text(tokenizer, tail):
        if token in special:
            return token
        if tokenizer.decode([token]).strip():
            return None  # ordinary text follows: this template has no end-of-turn token
    return None
