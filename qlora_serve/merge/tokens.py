"""The tokenizer and chat template that go with a merged model."""

from typing import Any

from qlora_serve.adapters.files import AdapterFiles
from qlora_serve.base.source import BaseSource
from qlora_serve.base.tokenizer import load_tokenizer
from qlora_serve.errors import MergeError

_TEMPLATE_FILE = "chat_template.jinja"


def choose_tokenizer(adapter: AdapterFiles, source: BaseSource, vocabulary: int) -> tuple[Any, str]:
    """The adapter's own tokenizer where its directory brings one, else the base's; and whose it is.

    Training that adds tokens or another chat template leaves them beside the adapter; the base
    knows nothing of them.

    Args:
        adapter: the adapter.
        source: its base.
        vocabulary: the rows of the merged model's embeddings.

    Raises:
        MergeError: the tokenizer has tokens that the embeddings have no row for.
    """
    tokenizer, origin = load_tokenizer(source), "base"
    if (adapter.path / "tokenizer.json").is_file():
        tokenizer, origin = _own_tokenizer(adapter, tokenizer.chat_template), "adapter"
    elif (adapter.path / _TEMPLATE_FILE).is_file():
        tokenizer.chat_template = (adapter.path / _TEMPLATE_FILE).read_text(encoding="utf-8")
        origin = "base, with the adapter's chat template"
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocabulary:
        raise MergeError(
            f"the tokenizer beside adapter {adapter.path} has a token with the id {largest}, and "
            f"the merged model has {vocabulary} embeddings; the adapter does not hold the rows of "
            "its new tokens"
        )
    return tokenizer, origin


def _own_tokenizer(adapter: AdapterFiles, base_template: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(adapter.path)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MergeError(
            f"the tokenizer beside adapter {adapter.path} cannot be loaded: {reason}; remove its "
            "tokenizer files to use the base's"
        ) from None
    if not tokenizer.chat_template:
        tokenizer.chat_template = base_template
    return tokenizer
