"""`echo` with `logprobs`: what the model thought of a prompt's own tokens."""

from collections.abc import Sequence
from typing import Any

from qlora_serve.errors import EngineStoppedError, QloraServeError, RequestError
from qlora_serve.serve.api.logprobs import completion_logprobs
from qlora_serve.serve.api.service import Service, own_tokens
from qlora_serve.serve.api.token_text import TokenTexts
from qlora_serve.serve.engine.request import (
    Failed,
    GenerationRequest,
    Sampling,
    Score,
    TokenLogprobs,
)
from qlora_serve.serve.engine.text import TextAssembler


async def prompt_logprobs(
    service: Service, asking: Sequence[GenerationRequest], top: int, texts: TokenTexts
) -> list[dict[str, Any]]:
    """The `logprobs` of each prompt, by a pass of its own; the first token has none.

    Args:
        service: that runs the passes, in one batch.
        asking: one request for each prompt.
        top: how many of the likeliest tokens to report.
        texts: what tokens say.

    Raises:
        RequestError: a prompt is empty.
        EngineStoppedError: the engine ended.
        QloraServeError: a pass failed.
    """
    if not all(one.prompt for one in asking):
        raise RequestError("the prompt is empty", param="prompt")
    scores = [Score(0, one.prompt[1:], top=top) for one in asking]
    passes = [
        GenerationRequest(
            f"{one.request_id}-echo", one.prompt[:-1], Sampling(max_tokens=1), one.adapter,
            client=one.client, score=score,
        )
        for one, score in zip(asking, scores, strict=True)
        if score.targets
    ]  # fmt: skip
    if passes:
        async with service.generate_all(passes) as batches:
            async for batch in batches:
                for _, event in batch:
                    if isinstance(event, Failed):
                        kind = QloraServeError if service.engine.is_alive else EngineStoppedError
                        raise kind(event.message)
    return [_shape(service, *pair, texts) for pair in zip(asking, scores, strict=True)]


def _shape(
    service: Service, request: GenerationRequest, score: Score, texts: TokenTexts
) -> dict[str, Any]:
    tokenizer = (own_tokens(request.adapter) or service.base).tokenizer
    assembler = TextAssembler(tokenizer)
    offsets = []
    for token in request.prompt:
        offsets.append(assembler.decoded)
        assembler.push(token)
    first = TokenLogprobs(request.prompt[0], 0.0, ())
    found = completion_logprobs(texts, [first, *score.reports], offsets)
    found["token_logprobs"][0] = found["top_logprobs"][0] = None
    return found
