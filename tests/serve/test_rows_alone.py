"""With the kernels, a row's numbers are the same to the last bit in any company.

Whoever else is in the step, however the prompt was cut into chunks, and whatever else was computed
before: on a CPU in float32 the logits are equal, not close.
"""

import gc
import random
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_kinds import adapter_kinds
from gptq_models import random_gptq_linear, write_gptq_model
from mixed_batch import give_blocks, load_residents, new_sequence
from tiny_models import write_random_adapter, write_tiny_model
from torch import Tensor, nn

from qlora_serve.base.load import load_base
from qlora_serve.serve.engine.coded import code_gptq
from qlora_serve.serve.engine.kernels.native import load_kernels
from qlora_serve.serve.engine.linear import CodedLinear, FastLinear, NativeUpdates, PanelLinear
from qlora_serve.serve.engine.lora import (
    ResidentAdapter,
    ResidentPair,
    for_kernels,
    rows_by_adapter,
)
from qlora_serve.serve.engine.runner import Runner
from qlora_serve.serve.engine.scheduler import Chunk
from qlora_serve.serve.engine.slots import ScaledAdapter
from qlora_serve.serve.engine.updates import UpdatesInTurn, native_updates

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch computes without a compiler"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),
]


def _layer(kind: str, inside: int, outside: int) -> Any:
    kernels = load_kernels()
    assert kernels is not None
    torch.manual_seed(inside + outside)
    if kind == "shared":
        return FastLinear(nn.Linear(inside, outside), kernels)
    if kind == "panels":
        return PanelLinear(nn.Linear(inside, outside), kernels)
    pytest.importorskip("gptqmodel")
    linear = random_gptq_linear(inside, outside, int(kind[-1]), 32, by_activity=False)
    coded = code_gptq(linear)
    assert coded is not None
    return CodedLinear(coded, linear.bias, kernels)


@pytest.mark.parametrize("rank", [0, 4, 16, 23])
@pytest.mark.parametrize("kind", ["shared", "panels", "gptq4", "gptq8"])
@torch.inference_mode()
def test_a_layers_row_does_not_depend_on_the_others(kind: str, rank: int) -> None:
    layer = _layer(kind, 672, 96)  # more inputs than are summed in one go
    hidden = torch.randn(1, 192, 672)
    adapter = None
    if rank:
        pair = for_kernels(ResidentPair(torch.randn(rank, 672), torch.randn(rank, 96)))
        adapter = ResidentAdapter("it", "it", (pair,), 0)

    def compute(rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        assert layer.takes(rows)
        updates = native_updates(rows_by_adapter([(rows.shape[1], adapter)]))
        return layer.updated(rows, updates, 0)

    alone = torch.cat([compute(hidden[:, row : row + 1]) for row in range(192)], dim=1)
    for rows in (*range(2, 65), 191, 192):  # around the edges of every tile
        assert compute(hidden[:, :rows]).equal(alone[:, :rows]), rows


def test_updates_are_made_again_when_the_rows_are_others() -> None:
    """And keep no adapter in memory."""
    pair = for_kernels(ResidentPair(torch.randn(2, 32), torch.randn(2, 32)))
    first, second = (ResidentAdapter(name, name, (pair,), 0) for name in ("first", "second"))
    updates = UpdatesInTurn()

    def of(*rows: tuple[int, ResidentAdapter, float]) -> NativeUpdates | None:
        return updates.of([(n, n + 1, ScaledAdapter(one, scale)) for n, one, scale in rows])

    assert of() is None
    made = of((0, first, 1.0), (1, second, 1.0))
    assert made is not None
    assert of((0, first, 1.0), (1, second, 1.0)) is made
    for rows in (
        [(0, second, 1.0), (1, first, 1.0)],
        [(0, first, 1.0), (1, second, 0.5)],
        [(0, first, 1.0), (2, second, 1.0)],
        [(0, first, 1.0)],
    ):
        other = of(*rows)
        assert other is not None
        assert other is not made
        assert other.count == len(rows)
        made = other
    assert of() is None
    gone = weakref.ref(second)
    of((0, second, 1.0))
    del second, rows, other, made
    gc.collect()
    assert gone() is None
    assert of((0, first, 1.0)) is not None


def _write(folder: Path, family: str, base_kind: str) -> tuple[Runner, dict[str, Any]]:
    base = write_tiny_model(folder / "base", family)
    kinds = {n: s for n, s in adapter_kinds(family).items() if "vocabulary" not in s}
    if base_kind != "none":
        del kinds["saved-linear"]
    paths = {
        name: write_random_adapter(folder / name, base, seed=number, **settings)
        for number, (name, settings) in enumerate(kinds.items())
    }
    served = write_gptq_model(folder / "gptq", base) if base_kind == "gptq" else base
    how: Any = "none" if base_kind == "gptq" else base_kind
    runner = Runner(load_base(str(served), quantization=how, dtype="float32"))
    return runner, load_residents(runner, paths)


def _answer(
    runner: Runner, sequences: list[Any], cuts: list[list[int]], steps: int
) -> list[Tensor]:
    """Logits [steps + 1, vocabulary] of each sequence; prompts in chunks that begin at the cuts."""
    give_blocks(runner, sequences, steps)
    found: list[list[Tensor]] = [[] for _ in sequences]
    begun, grown = [0] * len(sequences), [0] * len(sequences)
    while any(len(rows) <= steps for rows in found):
        chunks, owners = [], []
        for number, sequence in enumerate(sequences):
            ends = cuts[number]
            if begun[number] < len(ends):
                start = ends[begun[number] - 1] if begun[number] else 0
                chunks.append(Chunk(sequence, start, ends[begun[number]] - start))
                begun[number] += 1
                owners.append(number)
            elif len(found[number]) <= steps:
                sequence.generated.append(10 + grown[number])
                grown[number] += 1
                chunks.append(Chunk(sequence, sequence.length - 1, 1))
                owners.append(number)
        order = sorted(range(len(chunks)), key=lambda n: str(chunks[n].sequence.request.adapter))
        logits = iter(runner.forward([chunks[n] for n in order]))
        for n in order:
            if chunks[n].samples:
                found[owners[n]].append(next(logits))
    return [torch.stack(rows) for rows in found]


@pytest.mark.parametrize(
    ("family", "base_kind"),
    [
        ("llama", "none"),
        ("gemma2", "nf4"),  # windows, softcap
        pytest.param("mistral", "int8", marks=pytest.mark.slow),
        pytest.param("qwen3", "gptq", marks=pytest.mark.slow),
        pytest.param("phi3", "nf4", marks=pytest.mark.slow),
        pytest.param("phi", "none", marks=pytest.mark.slow),
        pytest.param("gemma3", "none", marks=pytest.mark.slow),
        pytest.param("llama-untied", "int8", marks=pytest.mark.slow),
    ],
)
@torch.inference_mode()
def test_logits_are_the_same_bits_in_any_company(
    family: str, base_kind: str, tmp_path: Path
) -> None:
    runner, residents = _write(tmp_path, family, base_kind)
    choices = random.Random(3)
    names = [None, *residents]
    prompts = [[choices.randrange(3, 400) for _ in range(choices.randrange(2, 70))] for _ in names]

    def sequences(which: list[int]) -> list[Any]:
        return [new_sequence(prompts[n], residents.get(names[n])) for n in which]

    alone = [_answer(runner, sequences([n]), [[len(prompts[n])]], 3)[0] for n in range(len(names))]
    for _ in range(3):
        which = choices.sample(range(len(names)), choices.randrange(2, len(names)))
        cuts = []
        for n in which:
            length = len(prompts[n])
            inner = choices.sample(range(1, length), min(length - 1, choices.randrange(0, 4)))
            cuts.append([*sorted(inner), length])
        together = _answer(runner, sequences(which), cuts, 3)
        wrong = [
            (names[n], float((one - alone[n]).abs().max()))
            for n, one in zip(which, together, strict=True)
            if not one.equal(alone[n])
        ]
        assert not wrong
