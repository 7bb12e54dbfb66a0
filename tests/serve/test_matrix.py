"""Adapter kinds × bases × families: in one mixed batch, every row is what PEFT gives alone.

docs/exactness.md describes the table that this is.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_kinds import adapter_kinds
from gptq_models import write_autogptq_model, write_dequantized, write_gptq_model
from int8_rows import row_by_row
from mixed_batch import Found, load_residents, mixed_rows
from peft import PeftModel
from tiny_models import CONFIGS, write_random_adapter, write_tiny_model

from qlora_serve.base.load import load_base
from qlora_serve.errors import AdapterError
from qlora_serve.serve.engine.runner import Runner

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),
]

BASE_TOKENS = 512
# The largest error of a logit, in parts of the spread (standard deviation) of the row's logits.
TOLERANCES = {
    "float32": 1e-4,
    "bfloat16": 0.25,
    "float16": 0.04,
    "nf4": 1e-4,
    "int8": 0.1,  # 1e-5, but where an input between two of 255 steps falls to the other side
    "gptq": 1e-4,
    "autogptq": 1e-4,
}
LOADED_AS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "nf4": {"dtype": "float32", "quantization": "nf4"},
    "int8": {"dtype": "float32", "quantization": "int8"},
}


class Family:
    """A tiny base of one family, with an adapter of every kind."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.base = write_tiny_model(folder / "base", name)
        self.kinds = adapter_kinds(name)
        self.paths = {
            kind: write_random_adapter(folder / kind, self.base, seed=number, **settings)
            for number, (kind, settings) in enumerate(self.kinds.items())
        }

    def vocabulary(self, kind: str) -> int | None:
        return self.kinds.get(kind, {}).get("vocabulary")

    def refused(self, base: str) -> dict[str, str]:
        """The kinds that this base cannot carry, and a word of the reason."""
        refused = {}
        if base in ("nf4", "int8", "gptq", "autogptq"):
            refused["saved-linear"] = "quantized"
        return refused


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def family(request, tmp_path_factory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("kind", TOLERANCES)
@torch.inference_mode()
def test_every_row_is_what_peft_gives_alone(family: Family, kind: str) -> None:
    served, load = _base(family, kind)
    runner = Runner(load_base(str(served), **LOADED_AS.get(kind, {})))
    refused = family.refused(kind)
    for name, words in refused.items():
        with pytest.raises(AdapterError, match=words):
            load_residents(runner, {name: family.paths[name]})
    paths = {name: path for name, path in family.paths.items() if name not in refused}
    lengths = {"base": 31} | {name: 6 + 5 * number % 31 for number, name in enumerate(paths)}
    beyond = {
        name: [vocabulary - 1, 12, BASE_TOKENS, 33]
        for name in paths
        if (vocabulary := family.vocabulary(name))
    }
    found = mixed_rows(runner, load_residents(runner, paths), lengths, prompts=beyond)

    base = load(None, None)
    worst = {}
    for name, one in found.items():
        alone = load(paths.get(name), family.vocabulary(name))
        expected = _logits(alone, one)
        spread = expected.std()
        known = expected.shape[1]
        worst[name] = float((one.logits[:, :known].float() - expected).abs().max() / spread)
        if name in paths:
            tokens = [min(token, BASE_TOKENS - 1) for token in one.tokens]
            from_base = _logits(base, Found(tokens, one.first, one.logits))
            differs = (expected[:, :BASE_TOKENS] - from_base).abs().max() / spread
            assert differs > 2 * TOLERANCES[kind], f"{name} does next to nothing"
    if os.environ.get("MATRIX"):
        print(f"MATRIX {family.name} {kind}", {n: f"{w:.1e}" for n, w in worst.items()})
    assert max(worst.values()) < TOLERANCES[kind], worst


def _base(family: Family, kind: str) -> tuple[Path, Callable[[Path | None, int | None], Any]]:
    """The base to serve, and how PEFT's model on it is made for one adapter."""
    if kind in LOADED_AS:
        return family.base, lambda adapter, size: _peft(
            family.base, adapter, size, **LOADED_AS[kind]
        )
    pytest.importorskip("gptqmodel")
    gptq = family.folder / "gptq"
    if not gptq.exists():
        write_gptq_model(gptq, family.base, symmetric=False, by_activity=family.name == "llama")
        write_dequantized(family.folder / "dense", gptq, family.base)
    served = gptq
    if kind == "autogptq":
        served = write_autogptq_model(family.folder / "older", gptq, in_config=True)
    # PEFT refuses DoRA on GPTQ layers: the dequantized base, whose weights are the same, stands in.
    dense = family.folder / "dense"
    return served, lambda adapter, size: _peft(dense, adapter, size, dtype="float32")


def _peft(base: Path, adapter: Path | None, vocabulary: int | None, **how: Any) -> Any:
    model = load_base(str(base), **how).model
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    if how.get("quantization") == "int8":
        row_by_row(model)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


def _logits(model: Any, one: Found) -> torch.Tensor:
    return model(torch.tensor([one.tokens])).logits[0, one.first :].float()
