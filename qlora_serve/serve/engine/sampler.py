"""Choosing the next token of each row.

The order is transformers': bias, repetition penalty, (presence and frequency penalties, which
transformers does not have,) no early end, the guide's mask; then, unless the most likely token is
taken, temperature, top-k, top-p, min-p and the draw. Log-probabilities are the model's own, taken
before any of it.
"""

from collections.abc import Callable, Iterable, Sequence
from math import isfinite

import torch
from torch import Tensor

from qlora_serve.serve.engine.kernels.native import Kernels
from qlora_serve.serve.engine.request import GenerationRequest, Sampling, TokenLogprobs

_NOT_FINITE = "the model's output was not finite (NaN); the adapter may have diverged"
_NO_TOKEN = "no token was left to choose: what the request asks for excludes every one"


class RowSampler:
    """One request's own part of sampling: its chance, its counts, its guide.

    Args:
        request: whose tokens are chosen.
        stop_ids: the model's end tokens, which `min_tokens` holds off.
    """

    def __init__(self, request: GenerationRequest, stop_ids: Iterable[int] = ()) -> None:
        self.sampling = request.sampling
        self.generator = make_generator(request.sampling)
        self.guide = None if request.guide is None else request.guide.start()
        self.stop_ids = sorted(stop_ids) if request.sampling.min_tokens else []
        self.counts: dict[int, int] = {}
        """How often the answer holds each token; kept only where a penalty needs it."""
        self.produced = 0
        self.logprobs: TokenLogprobs | None = None
        """Of the latest token, when they were asked for."""
        self.fault = _NOT_FINITE
        """Why no token could be chosen, if none could."""
        settings = request.sampling
        self._counts_matter = (
            settings.repetition_penalty != 1 or settings.presence_penalty != 0
        ) or settings.frequency_penalty != 0
        self.is_shaped = bool(
            self._counts_matter or settings.logit_bias or self.stop_ids or self.guide is not None
        )
        """Whether anything but the temperature and what follows it changes the logits."""
        self.seen = set(request.prompt) if settings.repetition_penalty != 1 else set()
        """Tokens of prompt and answer; kept only for the repetition penalty."""

    @property
    def is_complete(self) -> bool:
        """Whether the guide has reached its end, so that nothing can follow."""
        return self.guide is not None and self.guide.is_complete

    def take(self, token: int) -> None:
        """Records the chosen token."""
        self.produced += 1
        if self._counts_matter:
            self.counts[token] = self.counts.get(token, 0) + 1
            self.seen.add(token)
        if self.guide is not None:
            self.guide.take(token)


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


def sample(
    logits: Tensor, rows: Sequence[RowSampler], kernels: Kernels | None = None
) -> list[int | None]:
    """The next token of each row; None where there is none, with the row's `fault`.

    Rows that take the most likely token and ask for nothing else cost one maximum.

    Args:
        logits: [rows, vocabulary]
        rows: each row's settings and state, which is moved on by its token.
        kernels: of the engine, where it computes on a CPU.
    """
    scores = logits.float()
    largest, likeliest = _largest(scores, kernels)
    # One number a row tells: the largest is NaN where one is, and +inf is itself.
    is_sound = [isfinite(value) for value in largest.tolist()]
    tokens: list[int | None] = [
        token if sound else None for token, sound in zip(likeliest.tolist(), is_sound, strict=True)
    ]
    special = [
        number
        for number, row in enumerate(rows)
        if is_sound[number] and (row.is_shaped or row.generator is not None)
    ]
    if special:
        chosen = _choose(scores[special], [rows[number] for number in special])
        for number, token in zip(special, chosen, strict=True):
            tokens[number] = token
    _record_logprobs(scores, rows, tokens)
    for row, token in zip(rows, tokens, strict=True):
        if token is not None:
            row.take(token)
    return tokens


def _largest(scores: Tensor, kernels: Kernels | None) -> tuple[Tensor, Tensor]:
    """Each row's largest number, NaN if it holds one, and its place: the first of several.

    torch's own takes 99 µs for 8 rows of 49,152 numbers that are near, and the kernel 12.
    """
    if kernels is None or not scores.is_contiguous():
        largest, places = scores.max(dim=-1)
        return largest, places
    count, size = scores.shape
    largest, places = torch.empty(count), torch.empty(count, dtype=torch.long)
    kernels.largest(scores.data_ptr(), count, size, largest.data_ptr(), places.data_ptr())
    return largest, places


def _choose(scores: Tensor, rows: Sequence[RowSampler]) -> list[int | None]:
    """Tokens for [rows, vocabulary] scores, which are changed in place."""
    shape(scores, rows)
    largest, likeliest = scores.max(dim=-1)
    tokens: list[int | None] = []
    for row, token, best in zip(rows, likeliest.tolist(), largest.tolist(), strict=True):
        has_choice = best != float("-inf")
        tokens.append(token if has_choice else None)
        if not has_choice:
            row.fault = (row.guide and row.guide.fault) or _NO_TOKEN
    drawing = [n for n, row in enumerate(rows) if tokens[n] is not None and row.generator]
    if drawing:
        drawn = _draw(scores[drawing], [rows[number] for number in drawing])
        for number, token in zip(drawing, drawn, strict=True):
            tokens[number] = token
    return tokens


def shape(scores: Tensor, rows: Sequence[RowSampler]) -> None:
    """Applies all that comes before the temperature to [rows, vocabulary] scores, in place."""
    _add_bias(scores, rows)
    _penalise_repetition(scores, rows)
    _penalise_counts(scores, rows)
    for number, row in enumerate(rows):
        if row.produced < row.sampling.min_tokens:
            scores[number, row.stop_ids] = float("-inf")
        if row.guide is not None:
            allowed = row.guide.mask(scores.shape[-1]).to(scores.device)
            scores[number].masked_fill_(~allowed, float("-inf"))


def _entries(
    rows: Sequence[RowSampler], select: Callable[[RowSampler], Iterable[tuple[int, float]]]
) -> tuple[list[int], list[int], list[float]] | None:
    """Row numbers, token ids and values of what `select` gives for each row; None if nothing."""
    numbers: list[int] = []
    ids: list[int] = []
    values: list[float] = []
    for number, row in enumerate(rows):
        for token, value in select(row):
            numbers.append(number)
            ids.append(token)
            values.append(value)
    return (numbers, ids, values) if ids else None


def _add_bias(scores: Tensor, rows: Sequence[RowSampler]) -> None:
    entries = _entries(rows, lambda row: row.sampling.logit_bias)
    if entries is not None:
        numbers, ids, values = entries
        scores[numbers, ids] += scores.new_tensor(values)


def _penalise_repetition(scores: Tensor, rows: Sequence[RowSampler]) -> None:
    def seen(row: RowSampler) -> Iterable[tuple[int, float]]:
        penalty = row.sampling.repetition_penalty
        if penalty == 1:
            return []
        return [(token, penalty) for token in row.seen]

    entries = _entries(rows, seen)
    if entries is not None:
        numbers, ids, values = entries
        found, penalty = scores[numbers, ids], scores.new_tensor(values)
        scores[numbers, ids] = torch.where(found < 0, found * penalty, found / penalty)


def _penalise_counts(scores: Tensor, rows: Sequence[RowSampler]) -> None:
    def price(row: RowSampler) -> Iterable[tuple[int, float]]:
        presence, frequency = row.sampling.presence_penalty, row.sampling.frequency_penalty
        if presence == frequency == 0:
            return []
        return [(token, presence + frequency * n) for token, n in row.counts.items()]

    entries = _entries(rows, price)
    if entries is not None:
        numbers, ids, values = entries
        scores[numbers, ids] -= scores.new_tensor(values)


def distribution(scores: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    """What the next tokens are drawn from, up to a factor for each row.

    Args:
        scores: [rows, vocabulary], with all that comes before the temperature applied.
        rows: each row's settings; no temperature is 0.

    Returns:
        Weights [rows, vocabulary], 0 for what cannot be drawn.
    """
    column = [[row.sampling.temperature] for row in rows]
    scores = scores / scores.new_tensor(column)
    _keep_top_k(scores, rows)
    probabilities = torch.softmax(scores, dim=-1)
    _keep_top_p(probabilities, rows)
    _keep_min_p(probabilities, rows)
    return probabilities


def _draw(scores: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """Draws a token from each row of [rows, vocabulary] scores, each with its own generator."""
    # One number of chance a row, looked up in the running sum. In float64, since float32 would
    # lose the rare tokens at the end of a large vocabulary.
    sums = distribution(scores, rows).cumsum(dim=-1, dtype=torch.float64)
    totals = sums[:, -1:]
    chance = torch.stack(
        [torch.rand(1, generator=row.generator, dtype=torch.float64) for row in rows]
    )
    # Below the total, or rounding could point past the last token.
    wanted = torch.minimum(
        chance.to(sums.device) * totals, torch.nextafter(totals, torch.zeros_like(totals))
    )
    return [int(token) for token in torch.searchsorted(sums, wanted, right=True)[:, 0].tolist()]


def _keep_top_k(scores: Tensor, rows: Sequence[RowSampler]) -> None:
    size = scores.shape[-1]
    limited = [n for n, row in enumerate(rows) if 0 < row.sampling.top_k < size]
    if not limited:
        return
    counts = [rows[n].sampling.top_k for n in limited]
    largest = scores[limited].topk(max(counts), dim=-1).values
    smallest_kept = largest.gather(1, torch.tensor(counts, device=scores.device)[:, None] - 1)
    mine = scores[limited]
    scores[limited] = mine.masked_fill(mine < smallest_kept, float("-inf"))


def _keep_top_p(probabilities: Tensor, rows: Sequence[RowSampler]) -> None:
    limited = [n for n, row in enumerate(rows) if row.sampling.top_p < 1]
    if not limited:
        return
    share = probabilities.new_tensor([[rows[n].sampling.top_p] for n in limited])
    ordered, order = probabilities[limited].sort(dim=-1, descending=True, stable=True)
    # A token stays when the sum before it has not reached top_p. The first always stays, also where
    # top_p is too small for float32.
    is_out = ordered.cumsum(dim=-1) - ordered >= share
    is_out[:, 0] = False
    ordered.masked_fill_(is_out, 0.0)
    probabilities[limited] = torch.zeros_like(ordered).scatter(1, order, ordered)


def _keep_min_p(probabilities: Tensor, rows: Sequence[RowSampler]) -> None:
    limited = [n for n, row in enumerate(rows) if row.sampling.min_p > 0]
    if not limited:
        return
    share = probabilities.new_tensor([[rows[n].sampling.min_p] for n in limited])
    mine = probabilities[limited]
    least = share * mine.max(dim=-1, keepdim=True).values
    probabilities[limited] = mine.masked_fill(mine < least, 0.0)


def _record_logprobs(
    scores: Tensor, rows: Sequence[RowSampler], tokens: Sequence[int | None]
) -> None:
    asking = [
        n
        for n, row in enumerate(rows)
        if row.sampling.logprobs is not None and tokens[n] is not None
    ]
    if not asking:
        return
    logprobs = torch.log_softmax(scores[asking], dim=-1)
    most = max(rows[n].sampling.logprobs or 0 for n in asking)
    values, ids = logprobs.topk(min(most, scores.shape[-1]), dim=-1)
    chosen = torch.tensor([[tokens[n]] for n in asking], device=scores.device)
    own = logprobs.gather(1, chosen)[:, 0].tolist()
    lists = zip(asking, own, ids.tolist(), values.tolist(), strict=True)
    for number, logprob, top_ids, top_values in lists:
        token, count = tokens[number], rows[number].sampling.logprobs
        assert token is not None
        top = tuple(zip(top_ids[:count], top_values[:count], strict=True))
        rows[number].logprobs = TokenLogprobs(token, logprob, top)
