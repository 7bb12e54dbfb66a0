"""Runs a base and many adapters in the same steps, and compares each with PEFT alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.weights import load_weights
from qlora_serve.serve.engine.blocks import BlockManager
from qlora_serve.serve.engine.request import GenerationRequest, Sampling, Sequence
from qlora_serve.serve.engine.runner import Runner
from qlora_serve.serve.engine.scheduler import Chunk, Limits


@dataclass
class Found:
    """What the engine computed for one sequence."""

    tokens: list[int]
    first: int
    """The position of the first of the logits."""
    logits: torch.Tensor
    """[rows, vocabulary]"""


def load_residents(runner: Runner, paths: Mapping[str, Path]) -> dict[str, Any]:
    fit = FitChecker(runner.base.source)
    return {
        name: runner.resident(name, load_weights(read_adapter(path), fit))
        for name, path in paths.items()
    }


def new_sequence(prompt: list[int], adapter: Any) -> Sequence:
    settings = Sampling(max_tokens=8, temperature=0.0)
    request = GenerationRequest(f"r{id(prompt)}", tuple(prompt), settings, adapter)
    return Sequence(request, deliver=lambda event: None)


def give_blocks(runner: Runner, sequences: list[Sequence], more: int) -> None:
    """Gives each sequence blocks for its prompt and `more` tokens; nothing is shared."""
    limits = runner.allocate(Limits(len(sequences), 512 * len(sequences), 64, 400))
    blocks = BlockManager(limits.groups, limits.block_tokens)
    for number, sequence in enumerate(sequences):
        prompt = sequence.request.prompt
        start = blocks.begin(number, prompt, [0] * len(limits.windows), 64)
        assert start is not None
        sequence.blocks = start.table
        assert blocks.extend(sequence.blocks, sequence.length + more)


def mixed_rows(
    runner: Runner,
    residents: Mapping[str, Any],
    lengths: Mapping[str, int],
    decode: int = 4,
    prompts: Mapping[str, list[int]] | None = None,
) -> dict[str, Found]:
    """Prefill of every prompt in two chunks, then decode, all sequences in every step.

    Args:
        runner: of the base.
        residents: name → adapter; any other name of `lengths` is the base.
        lengths: name → tokens of its random prompt.
        decode: steps after the prompt.
        prompts: name → tokens that its prompt begins with.
    """
    generator = torch.Generator().manual_seed(7)
    sequences = {
        name: new_sequence(
            (prompts or {}).get(name, [])
            + torch.randint(3, 400, (length,), generator=generator).tolist(),
            residents.get(name),
        )
        for name, length in lengths.items()
    }
    give_blocks(runner, list(sequences.values()), decode)
    first = [Chunk(s, 0, len(s.request.prompt) // 2) for s in sequences.values()]
    runner.forward(first)
    second = []
    for chunk in first:
        start = chunk.count
        second.append(Chunk(chunk.sequence, start, len(chunk.sequence.request.prompt) - start))
    rows = [runner.forward(second)]
    for step in range(decode):
        for sequence in sequences.values():
            sequence.generated.append(10 + step)
        rows.append(runner.forward([Chunk(s, s.length - 1, 1) for s in sequences.values()]))
    logits = torch.stack(rows, dim=1)  # [sequences, steps, vocabulary]
    return {
        name: Found([*s.request.prompt, *s.generated], len(s.request.prompt) - 1, logits[number])
        for number, (name, s) in enumerate(sequences.items())
    }


def reference(base: Path, adapter: Path | None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model.eval() if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


@torch.inference_mode()
def check_against_peft(
    base: Path,
    paths: Mapping[str, Path],
    found: Mapping[str, Found],
    tolerance: float,
    differs_by: float,
    load: Callable[[Path, Path | None], Any] = reference,
) -> None:
    """Every row is what PEFT gives alone, and each adapter's differ clearly from the base's."""
    plain = load(base, None)
    for name, one in found.items():
        tokens = torch.tensor([one.tokens])
        from_base = plain(tokens).logits[0, one.first :].float()
        expected = from_base
        if name in paths:
            expected = load(base, paths[name])(tokens).logits[0, one.first :].float()
        error = (one.logits.float() - expected).abs().max().item()
        assert error < tolerance, f"{name}: {error}"
        if name in paths:
            difference = (expected - from_base).abs().max().item()
            assert difference > differs_by, f"{name} differs from the base by {difference} only"
