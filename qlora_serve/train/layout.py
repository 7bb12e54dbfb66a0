"""How a run's rows lie in its batches, and how a batch is computed.

- `flat`: all rows of a micro-batch one after the other in one line, each attending to itself alone.
  Nothing is padded. Where the model's attention is one that `row_attention` or FlashAttention
  computes.
- `packed`: lines of rows side by side, kept apart by transformers' own mask. Only with packing.
- `padded`: a line for each row.

Which of them a model takes is found out by trying it: a line of two rows must give the logits of
the two alone. A model that lets rows see one another in some way that no mask reaches (a recurrent
state, say) is trained on padded rows, and packing is refused.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from qlora_serve.errors import ConfigError
from qlora_serve.train.batches import Collate, flat_rows, packed_lines, pad_rows
from qlora_serve.train.loss import HeadForm, find_head_form, trained_positions_loss
from qlora_serve.train.row_attention import RowAttention, row_spans

Kind = Literal["flat", "packed", "padded"]

# A CPU gains nothing from longer lines, and every token more is memory: a flat line is computed in
# pieces of about this many tokens, whose gradients add up to that of the whole.
_PIECE_TOKENS = 512
# Who quantizes a base wants less memory, even at the cost of decoding its weights more often.
_LEAN_PIECE_TOKENS = 192

_PROBE_ROWS = (5, 9)
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
_COLLATE: dict[Kind, Collate] = {"flat": flat_rows, "packed": packed_lines, "padded": pad_rows}

Batch = dict[str, Tensor]


class Layout:
    """The layout of a model's batches."""

    def __init__(
        self, model: Any, packing: bool, will_split: bool = False, lean: bool = False
    ) -> None:
        """Finds out what the model can do.

        Args:
            model: the model, before it is wrapped.
            packing: whether rows are to lie in one line.
            will_split: whether its weights are about to be split over processes, so that only the
                model's own forward pass finds the output head's whole.
            lean: whether memory matters more than time: smaller pieces.

        Raises:
            ConfigError: packing was asked for, and rows would see each other.
        """
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._head = causal.get_output_embeddings()
        self._attention: RowAttention | None = None
        self._in_pieces = causal.device.type == "cpu" and _processes() == 1
        self._lean = lean
        self.kind = self._find_kind(causal, packing)
        self.collate = _COLLATE[self.kind]
        self._form = None if will_split else self._find_form(causal)

    def loss(self, model: Any, inputs: Batch) -> Tensor:
        """The summed loss of a batch; call it, and `backward`, within `over`."""
        others = {name: value for name, value in inputs.items() if name != "labels"}
        return trained_positions_loss(model, self._head, others, inputs["labels"], self._form)

    @contextmanager
    def over(self, inputs: Batch) -> Iterator[None]:
        """Lets the model attend as the layout asks, forward and backward."""
        if self._attention is None:
            yield
            return
        with self._attention.over(inputs["position_ids"]):
            yield

    def pieces(self, inputs: Batch) -> list[Batch]:
        """A batch in parts whose losses add up to its own; most are one part."""
        if not self._in_pieces or self.kind != "flat":
            return [inputs]
        spans = row_spans(inputs["position_ids"])
        return [
            {name: value[:, first:last] for name, value in inputs.items()}
            for first, last in even_pieces(spans, piece_tokens(self._lean))
        ]

    def _find_kind(self, model: Any, packing: bool) -> Kind:
        if hasattr(model.get_input_embeddings().weight, "ds_id"):
            # ZeRO-3 has split the weights, and nothing can be tried before it runs the model.
            if packing:
                raise ConfigError("packing: not with ZeRO-3; train without it, or use zero2")
            return "padded"
        if model.device.type == "cpu":
            if self._try_rows(model):
                return "flat"
        elif _takes_flash_attention(model) and _rows_stay_apart(model, None):
            return "flat"
        if not packing:
            return "padded"
        if _rows_stay_apart(model, None):
            return "packed"
        raise ConfigError(
            f"packing: rows in one line would see each other in this model ({_type(model)}); train "
            "without packing"
        )

    def _try_rows(self, model: Any) -> bool:
        attention = RowAttention(model)
        if not _rows_stay_apart(model, attention):
            return False
        self._attention = attention
        return True

    def _find_form(self, model: Any) -> HeadForm | None:
        weight = getattr(self._head, "weight", None)
        shared = weight is not None and weight.requires_grad and _processes() > 1
        bias = getattr(self._head, "bias", None)
        # A trained bias is float32 in a base of 16 bits; the layer itself knows how to add it.
        mixed = weight is not None and bias is not None and bias.dtype != weight.dtype
        return None if shared or mixed else find_head_form(model, self._head)


def piece_tokens(lean: bool) -> int:
    """About how many tokens a CPU computes at once; see `Layout`."""
    return _LEAN_PIECE_TOKENS if lean else _PIECE_TOKENS


def even_pieces(spans: Sequence[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """Cuts a line between rows into as few pieces as `limit` tokens allow, of like size.

    Rows are never cut, so that a piece may be longer than the limit.
    """
    total = spans[-1][1]
    count = -(-total // limit)
    pieces: dict[int, tuple[int, int]] = {}
    for first, last in spans:
        # A row goes where its middle lies.
        piece = (first + last) * count // (2 * total)
        pieces[piece] = (pieces.get(piece, (first, last))[0], last)
    return list(pieces.values())


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _type(model: Any) -> str:
    return str(getattr(model.config, "model_type", type(model).__name__))


def _takes_flash_attention(model: Any) -> bool:
    """Whether FlashAttention is there for this model, which then uses it."""
    if find_spec("flash_attn") is None or model.dtype not in (torch.float16, torch.bfloat16):
        return False
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("flash_attention_2")
    except (ValueError, ImportError):
        model.set_attn_implementation(before)
        return False
    return True


@torch.no_grad()
def _rows_stay_apart(model: Any, attention: RowAttention | None) -> bool:
    """Whether a line of two rows gives the logits of each row alone."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rows = [torch.randint(vocabulary, (1, n), generator=generator) for n in _PROBE_ROWS]
    rows = [row.to(model.device) for row in rows]
    positions = torch.cat([torch.arange(n) for n in _PROBE_ROWS])[None].to(model.device)
    was_training = model.training
    model.eval()
    try:
        alone = [model(input_ids=row, use_cache=False).logits for row in rows]
        with attention.over(positions) if attention is not None else nullcontext():
            together = model(
                input_ids=torch.cat(rows, dim=1), position_ids=positions, use_cache=False
            ).logits
    except (NotImplementedError, TypeError, ValueError, RuntimeError):
        return False
    finally:
        model.train(was_training)
    expected = torch.cat(alone, dim=1).float()
    limit = _TOLERANCES.get(alone[0].dtype, 1e-1) * float(expected.abs().max())
    return float((together.float() - expected).abs().max()) <= limit
