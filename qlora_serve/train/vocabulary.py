"""Tokens that a run adds to its base's vocabulary."""

from collections.abc import Sequence
from typing import Any

import torch

from qlora_serve.base.load import LoadedBase
from qlora_serve.base.tokenizer import encode_text
from qlora_serve.errors import ConfigError
from qlora_serve.train.save import GREW


def add_tokens(base: LoadedBase, tokens: Sequence[str]) -> None:
    """Gives a base new tokens, in place: its tokenizer, and rows of its embedding and output head.

    A new row begins as the mean of the rows of the tokens that its text was made of before, which
    needs no random numbers and means something from the start. Where the base's matrices have
    unused rows (padding), these are taken; else both grow.

    Raises:
        ConfigError: one of them is a token of the base already, or nothing but space.
    """
    if not tokens:
        return
    tokenizer, model = base.tokenizer, base.model
    vocabulary = tokenizer.get_vocab()
    known = [token for token in tokens if token in vocabulary]
    if known:
        raise ConfigError(
            f"add_tokens: {', '.join(map(repr, known))} are tokens of {base.source.name} already; "
            "--trainable-tokens trains their rows"
        )
    blank = [token for token in tokens if not token.strip()]
    if blank or len(set(tokens)) < len(tokens):
        raise ConfigError(f"add_tokens: {', '.join(map(repr, tokens))} must be texts, each once")
    pieces = {token: encode_text(tokenizer, token) for token in tokens}
    tokenizer.add_tokens(list(tokens))
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in tokens}
    if max(ids.values()) >= len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(max(ids.values()) + 1, mean_resizing=False)
        setattr(model, GREW, True)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        _begin_rows(layer, {ids[token]: pieces[token] for token in tokens})


@torch.no_grad()
def _begin_rows(layer: Any, rows: dict[int, list[int]]) -> None:
    if layer is None:
        return
    for parameter in (layer.weight, getattr(layer, "bias", None)):
        if parameter is None:
            continue
        means = {row: parameter[pieces].float().mean(0) for row, pieces in rows.items()}
        for row, mean in means.items():
            parameter[row] = mean.to(parameter.dtype)
