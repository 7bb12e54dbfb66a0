"""Choosing the next token of each row."""

import torch
from torch import Tensor

from qlora_serve.serve.engine.request import Sampling


def make_generator(sampling: Sampling) -> torch.Generator | None:
    """A request's own source of chance, so that its choices do not depend on its neighbours."""
    if sampling.temperature == 0:
        return None
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def sample(logits: Tensor, rows: list[tuple[Sampling, torch.Generator | None]]) -> list[int | None]:
    """The next token of each row; None where the logits hold NaN or infinity.

    Args:
        logits: [rows, vocabulary]
        rows: each row's settings and generator.
    """
    # One number a row tells: max() hands on NaN, and +inf is itself.
    largest, likeliest = logits.float().max(dim=-1)
    is_sound = largest.isfinite().tolist()
    greedy = likeliest.tolist()
    tokens: list[int | None] = []
    for row, (sampling, generator) in enumerate(rows):
        if not is_sound[row]:
            tokens.append(None)
        elif generator is None:
            tokens.append(int(greedy[row]))
        else:
            tokens.append(_draw(logits[row].float().cpu(), sampling, generator))
    return tokens


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draws one token from [vocabulary] logits."""
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(descending=True, stable=True)
        # A token stays when the sum before it has not reached top_p: the first always stays.
        outside = ordered.cumsum(0) - ordered >= sampling.top_p
        ordered[outside] = 0.0
        return int(order[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))
