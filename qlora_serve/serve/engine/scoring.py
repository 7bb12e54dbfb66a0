"""Looking at the distributions of known tokens, a few positions at a time.

Log-probabilities are read from one pass; comparing an adapter with the base takes two.

The model's own forward is asked, head and all that some families do behind it included. Between
the layers and the head stands a hook: it keeps the hidden states of a first pass, and puts those of
a finished first pass (the guests) behind the rows of a second one, so that one call of the head
gives both distributions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_serve.serve.engine import request
from qlora_serve.serve.engine.request import Score, TokenLogprobs
from qlora_serve.serve.engine.scheduler import Chunk


class Scoring:
    """A step's part of it: `begin`, the model's forward, `finish`.

    Args:
        decoder: the model without its head.
    """

    def __init__(self, decoder: Any) -> None:
        self.faulty: set[request.Sequence] = set()
        """Whose numbers of this step were not finite."""
        self.is_needed = False
        """Whether the step has anything to keep or to compare."""
        self._keeping: list[tuple[Score, int, int, int]] = []
        self._guests: list[Tensor] = []
        decoder.register_forward_hook(self._between)

    def begin(self, chunks: Sequence[Chunk], ends: Sequence[int]) -> int:
        """Prepares a step; returns how many guests there will be.

        Args:
            chunks: of the step.
            ends: for each chunk, the flat row behind its last one.
        """
        self.faulty.clear()
        self._keeping, self._guests = [], []
        reports = False
        for chunk, end in zip(chunks, ends, strict=True):
            score, count = chunk.sequence.request.score, chunk.scored
            if score is None or not count:
                continue
            offset = chunk.start + chunk.count - count - score.first
            if score.top is not None:
                reports = True
            elif score.against is None:
                self._keeping.append((score, offset, end - count, count))
            else:
                self._guests.append(score.against.hidden[offset : offset + count])
        self.is_needed = bool(reports or self._keeping or self._guests)
        return sum(len(rows) for rows in self._guests)

    def _between(self, module: Any, inputs: Any, output: Any) -> Any:
        hidden: Tensor = output.last_hidden_state  # [1, tokens, width]
        for score, offset, first, count in self._keeping:
            if score.hidden is None:
                score.hidden = hidden.new_zeros(len(score.targets), hidden.shape[-1])
            score.hidden[offset : offset + count] = hidden[0, first : first + count]
        if self._guests:
            output.last_hidden_state = torch.cat([hidden, torch.cat(self._guests)[None]], dim=1)
        return output

    def finish(self, chunks: Sequence[Chunk], logits: Tensor, vocabulary: int) -> Tensor:
        """Compares what was scored; returns the logits of the chunks that sample.

        Args:
            chunks: of the step.
            logits: [outputs of all chunks, then guests, vocabulary or more]
            vocabulary: tokens that the base knows.
        """
        guest = logits.shape[0] - sum(len(rows) for rows in self._guests)
        row, sampled = 0, []
        for chunk in chunks:
            score, count = chunk.sequence.request.score, chunk.outputs
            if chunk.samples:
                sampled.append(row)
            elif score is not None and count and score.top is not None:
                adapter = chunk.sequence.request.adapter
                known = (adapter and adapter.vocabulary) or vocabulary
                offset = chunk.start + chunk.count - count - score.first
                if not _report(score, offset, logits[row : row + count, :known]):
                    self.faulty.add(chunk.sequence)
            elif score is not None and count:
                own, base = logits[row : row + count], logits[guest : guest + count]
                offset = chunk.start + chunk.count - count - score.first
                if not _compare(score, offset, own[:, :vocabulary], base[:, :vocabulary]):
                    self.faulty.add(chunk.sequence)
                guest += count
            row += count
        self._keeping, self._guests = [], []
        return logits[sampled]


def _report(score: Score, offset: int, logits: Tensor) -> bool:
    """Records one chunk's log-probabilities; whether all of the targets' are finite.

    Args:
        score: with `top`.
        offset: which target the first row is about.
        logits: [rows, vocabulary]
    """
    assert score.top is not None
    logprobs = logits.float().log_softmax(-1)
    ids = score.targets[offset : offset + len(logits)]
    targets = torch.tensor(ids, device=logits.device)[:, None]
    own = logprobs.gather(1, targets)[:, 0]
    values, likeliest = logprobs.topk(min(score.top, logprobs.shape[-1]), dim=-1)
    found = zip(ids, own.tolist(), likeliest.tolist(), values.tolist(), strict=True)
    score.reports[offset : offset + len(logits)] = [
        TokenLogprobs(token, logprob, tuple(zip(top_ids, top, strict=True)))
        for token, logprob, top_ids, top in found
    ]
    return bool(own.isfinite().all())


def _compare(score: Score, offset: int, own: Tensor, base: Tensor) -> bool:
    """Records one chunk's log-probabilities and divergences; whether all of them are finite.

    Args:
        score: of the second pass.
        offset: which target the first row is about.
        own: the adapter's logits [rows, vocabulary].
        base: the base's, of the same shape.
    """
    own, base = own.float().log_softmax(-1), base.float().log_softmax(-1)
    divergences = (own.exp() * (own - base)).sum(-1, dtype=torch.float64)
    targets = torch.tensor(score.targets[offset : offset + len(own)], device=own.device)[:, None]
    # A sequence that lost its place begins again, so a position may be written twice.
    found = {
        "logprobs": own.gather(1, targets)[:, 0],
        "base_logprobs": base.gather(1, targets)[:, 0],
        "divergences": divergences.clamp(min=0),  # below only by rounding
    }
    for name, values in found.items():
        getattr(score, name)[offset : offset + len(own)] = values.tolist()
    return all(bool(values.isfinite().all()) for values in found.values())
