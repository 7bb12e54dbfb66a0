"""The tokenizer that an adapter brings along, where it is another than its base's."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_serve.base.source import BaseSource
from qlora_serve.base.templates import ChatTemplate, TemplateProcess
from qlora_serve.base.tokenizer import load_tokenizer, stop_token_ids
from qlora_serve.errors import AdapterError, BaseModelError

_TOKENIZER_FILE = "tokenizer.json"
_TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True, eq=False)
class AdapterTokens:
    """What turns an adapter's chats into tokens, and its tokens into text."""

    tokenizer: Any
    stop_token_ids: frozenset[int]
    """See `base.tokenizer.stop_token_ids`."""
    template: ChatTemplate | None = None
    """Where its chat template is another than the base's."""


def own_tokens(
    path: Path,
    base: Any,
    base_stops: frozenset[int],
    vocabulary: int,
    templates: TemplateProcess | None = None,
) -> AdapterTokens | None:
    """An adapter's own tokenizer; None where it brings none, or the same as the base's.

    Training that adds tokens or changes the chat template leaves them beside the adapter.

    Args:
        path: the adapter's directory.
        base: the base's tokenizer.
        base_stops: the tokens at which the base's answers end; they end the adapter's too.
        vocabulary: the tokens that the model knows with this adapter.
        templates: renders a chat template that is another than the base's; None refuses it.

    Raises:
        AdapterError: it cannot be loaded, or has tokens that the model does not know, or a chat
            template that is not allowed.
    """
    own = load_own(path, base)
    if own is None:
        return None
    if own.get_vocab() == base.get_vocab() and own.chat_template == base.chat_template:
        return None
    _require_rows(path, own, base, vocabulary)
    template = None
    if own.chat_template != base.chat_template:
        if templates is None:
            raise AdapterError(
                f"adapter {path} brings a chat template of its own, and a template is a program; "
                "start the server with --adapter-templates if you trust it, or remove its "
                "tokenizer's files to use the base's"
            )
        template = ChatTemplate(own, templates)
    try:
        stops = stop_token_ids(own, render=template.render if template is not None else None)
        return AdapterTokens(own, base_stops | stops, template)
    except BaseModelError as error:
        raise AdapterError(f"the chat template beside adapter {path}: {error}") from None


def load_own(path: Path, base: Any) -> Any:
    """The tokenizer that lies beside an adapter, else the base's with a chat template that does.

    Args:
        path: the adapter's directory.
        base: the base's tokenizer, whose chat template stands in for one that is missing.

    Returns:
        the tokenizer; None where there is neither.

    Raises:
        AdapterError: it cannot be loaded.
    """
    template = path / _TEMPLATE_FILE
    if not (path / _TOKENIZER_FILE).is_file():
        if not template.is_file():
            return None
        own = deepcopy(base)
        own.chat_template = template.read_text(encoding="utf-8")
        return own
    from transformers import AutoTokenizer

    try:
        own = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise AdapterError(
            f"the tokenizer beside adapter {path} cannot be loaded: {reason}; remove its files to "
            "use the base's"
        ) from None
    if not own.chat_template:
        own.chat_template = base.chat_template
    return own


def choose_tokenizer(path: Path, source: BaseSource, vocabulary: int) -> tuple[Any, str]:
    """The tokenizer that goes with an adapter once it is merged, and whose it is, in words.

    Args:
        path: the adapter's directory.
        source: its base.
        vocabulary: the rows of the merged model's embeddings.

    Raises:
        AdapterError: it cannot be loaded, or has tokens that the embeddings have no row for.
    """
    base = load_tokenizer(source)
    own = load_own(path, base)
    if own is None:
        return base, "base"
    _require_rows(path, own, base, vocabulary)
    is_whole = (path / _TOKENIZER_FILE).is_file()
    return own, "adapter" if is_whole else "base, with the adapter's chat template"


def _require_rows(path: Path, own: Any, base: Any, vocabulary: int) -> None:
    largest = max(own.get_vocab().values())
    if largest >= vocabulary and largest > max(base.get_vocab().values()):
        raise AdapterError(
            f"the tokenizer beside adapter {path} has a token {largest}, and the model knows "
            f"{vocabulary} with this adapter; it does not hold the rows of its new tokens"
        )
