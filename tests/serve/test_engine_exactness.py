"""A row of a mixed batch gives what that adapter alone gives in PEFT: logits and greedy text."""

import queue
from pathlib import Path

import pytest
import torch
from mixed_batch import check_against_peft, mixed_rows, reference
from tiny_models import CONFIGS, write_random_adapter, write_tiny_model

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.weights import load_weights
from qlora_serve.base.load import load_base
from qlora_serve.serve.engine import runner as runner_module
from qlora_serve.serve.engine.engine import Engine
from qlora_serve.serve.engine.kernels.native import load_kernels
from qlora_serve.serve.engine.linear import NativeLinear
from qlora_serve.serve.engine.request import (
    Delta,
    Event,
    Finished,
    GenerationRequest,
    Sampling,
)
from qlora_serve.serve.engine.runner import Runner
from qlora_serve.serve.engine.scheduler import Limits

TOLERANCE = 1e-4  # float32, on logits of magnitude about 10

ADAPTERS = {
    "plain": {},
    "rs": {"use_rslora": True, "r": 8, "lora_alpha": 4},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"down_proj": 2, "fc2": 2, "layers.1.self_attn.q_proj": 7},
        "alpha_pattern": {"o_proj": 3, "dense": 3},
    },
    "dora": {"use_dora": True, "use_rslora": True},
    "few": {"target_modules": r".*layers\.[02]\.(self_attn\.(q|qkv|k)_proj|mlp\.(up_proj|fc1))"},
}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def family(request, tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp(request.param)
    base = write_tiny_model(folder / "base", request.param)
    adapters = {
        name: write_random_adapter(folder / name, base, seed=number, **settings)
        for number, (name, settings) in enumerate(ADAPTERS.items())
    }
    return base, adapters


@pytest.mark.parametrize("by", ["kernels", "torch"])
@torch.inference_mode()
def test_mixed_batch_matches_each_adapter_alone(family, by, monkeypatch) -> None:
    """Prefill in chunks, then decode, base and five adapters in every step."""
    base, paths = family
    if by == "torch":  # what every other device and dtype computes with
        monkeypatch.setattr(runner_module, "load_kernels", lambda: None)
    runner = Runner(load_base(str(base), dtype="float32"))
    fit = FitChecker(runner.base.source)
    residents = {
        name: runner.resident(name, load_weights(read_adapter(path), fit))
        for name, path in paths.items()
    }
    # Longer than the sliding window of the windowed families (24).
    lengths = {"base": 33, "plain": 5, "rs": 41, "patterns": 12, "few": 30, "dora": 26}
    is_native = any(isinstance(m, NativeLinear) for m in runner.base.model.modules())
    assert is_native == (by == "kernels" and load_kernels() is not None)
    found = mixed_rows(runner, residents, lengths)
    # The comparison could not fail if the adapters did nothing.
    check_against_peft(base, paths, found, TOLERANCE, differs_by=0.1)


def _collect(events: "queue.Queue[Event]") -> tuple[list[int], str, Event]:
    tokens: list[int] = []
    text = ""
    while True:
        event = events.get(timeout=60)
        if not isinstance(event, Delta):
            return tokens, text, event
        tokens += event.token_ids
        text += event.text


def test_greedy_text_equals_peft_generate_while_others_come_and_go(family) -> None:
    """Requests join and leave at every step; each gets the text of `generate` alone."""
    base, paths = family
    runner = Runner(load_base(str(base), dtype="float32"))
    fit = FitChecker(runner.base.source)
    residents: dict[str | None, object] = {None: None}
    for name in ("plain", "rs"):
        residents[name] = runner.resident(name, load_weights(read_adapter(paths[name]), fit))
    engine = Engine(runner, Limits(3, 600, 16, 400))  # fewer places than requests, small chunks
    engine.start()
    generator = torch.Generator().manual_seed(3)
    wanted = []
    for number in range(9):
        name = [None, "plain", "rs"][number % 3]
        prompt = torch.randint(3, 400, (4 + 5 * number,), generator=generator).tolist()
        events: queue.Queue[Event] = queue.Queue()
        sampling = Sampling(max_tokens=3 + number % 4, temperature=0.0)
        request = GenerationRequest(f"r{number}", tuple(prompt), sampling, residents[name])
        engine.submit(request, events.put)
        wanted.append((name, prompt, sampling.max_tokens, events))
    collected = [_collect(events) for *_, events in wanted]
    engine.stop()

    models = {name: reference(base, paths.get(name or "")) for name in (None, "plain", "rs")}
    tokenizer = runner.base.tokenizer
    for (name, prompt, limit, _), (_, text, ending) in zip(wanted, collected, strict=True):
        out = models[name].generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=limit, do_sample=False
        )
        new = out[0, len(prompt) :].tolist()
        assert isinstance(ending, Finished)
        stopped = new[-1] in runner.base.stop_token_ids
        assert ending.reason == ("stop" if stopped else "length")
        assert ending.usage.completion_tokens == len(new)
        assert text == tokenizer.decode(new, skip_special_tokens=True)
