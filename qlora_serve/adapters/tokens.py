"""The tokenizer that an adapter brings along, where it is another than its base's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_serve.adapters.templates import OwnTemplate, TemplateProcess
from qlora_serve.base.tokenizer import stop_token_ids
from qlora_serve.errors import AdapterError, BaseModelError


@dataclass(frozen=True, eq=False)
class AdapterTokens:
    """What turns an adapter's chats into tokens, and its tokens into text."""

    tokenizer: Any
    stop_token_ids: frozenset[int]
    """See `base.tokenizer.stop_token_ids`."""
    template: OwnTemplate | None = None
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
    if not (path / "tokenizer.json").is_file():
        return None
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
    ids = own.get_vocab()
    if ids == base.get_vocab() and own.chat_template == base.chat_template:
        return None
    largest = max(ids.values())
    if largest >= vocabulary and largest > max(base.get_vocab().values()):
        raise AdapterError(
            f"the tokenizer beside adapter {path} has a token {largest}, and the model knows "
            f"{vocabulary} with this adapter; it does not hold the rows of its new tokens"
        )
    template = None
    if own.chat_template != base.chat_template:
        if templates is None:
            raise AdapterError(
                f"adapter {path} brings a chat template of its own, and a template is a program; "
                "start the server with --adapter-templates if you trust it, or remove its "
                "tokenizer's files to use the base's"
            )
        template = OwnTemplate(own, templates)
    try:
        stops = stop_token_ids(own, render=template.render if template is not None else None)
        return AdapterTokens(own, base_stops | stops, template)
    except BaseModelError as error:
        raise AdapterError(f"the chat template beside adapter {path}: {error}") from None
