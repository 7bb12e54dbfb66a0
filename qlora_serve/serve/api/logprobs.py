"""Log-probabilities in OpenAI's two shapes."""

from collections.abc import Sequence
from typing import Any

from qlora_serve.serve.api.token_text import TokenTexts
from qlora_serve.serve.engine.request import TokenLogprobs


def chat_logprobs(texts: TokenTexts, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The `logprobs` of a chat's choice or chunk."""
    return {
        "content": [
            {
                **named_logprob(texts, token.token_id, token.logprob),
                "top_logprobs": [named_logprob(texts, *pair) for pair in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def named_logprob(texts: TokenTexts, token_id: int, logprob: float) -> dict[str, Any]:
    """A token's text, exact bytes and log-probability."""
    return {
        "token": texts.text(token_id),
        "logprob": logprob,
        "bytes": list(texts.bytes(token_id)),
    }


def completion_logprobs(
    texts: TokenTexts, tokens: Sequence[TokenLogprobs], offsets: Sequence[int]
) -> dict[str, Any]:
    """The `logprobs` of a completion's choice or chunk.

    The chosen token is among the likeliest ones, so that there may be one more than asked for.
    Two tokens that read the same share an entry, which has the likelier one's.
    """
    likeliest = []
    for token in tokens:
        pairs = [*token.top, (token.token_id, token.logprob)]
        named: dict[str, float] = {}
        for token_id, logprob in pairs:
            named.setdefault(texts.text(token_id), logprob)
        likeliest.append(named)
    return {
        "tokens": [texts.text(token.token_id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": likeliest,
        "text_offset": list(offsets),
    }


def joined_logprobs(*parts: dict[str, Any]) -> dict[str, Any]:
    """Several of `completion_logprobs`, one behind the other."""
    return {name: [item for part in parts for item in part[name]] for name in parts[0]}
