"""flash-attn's paged path, with its function's reference in its place, against PEFT and our own."""

import queue
from pathlib import Path

import pytest
import torch
from mixed_batch import check_against_peft, load_residents, mixed_rows
from tiny_models import write_random_adapter, write_tiny_model

from qlora_serve.base.load import load_base
from qlora_serve.errors import ConfigError
from qlora_serve.serve.engine.attention import LayerShape, attend
from qlora_serve.serve.engine.engine import Engine
from qlora_serve.serve.engine.flash import PAGE_TOKENS, load_flash
from qlora_serve.serve.engine.flash_reference import REFERENCE, varlen
from qlora_serve.serve.engine.request import Delta, GenerationRequest, Sampling
from qlora_serve.serve.engine.runner import Runner
from qlora_serve.serve.engine.scheduler import Limits


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_reference_is_our_attention(window: int | None, softcap: float | None) -> None:
    """A decoding sequence, a chunk and a whole prompt, whose pages lie anywhere."""
    torch.manual_seed(0)
    starts, counts, table = [700, 130, 0], [1, 200, 40], [[4, 1, 6], [2, 0, 0], [5, 0, 0]]
    keys, values = torch.randn(2, 7, PAGE_TOKENS, 2, 16)
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    query = torch.randn(sum(counts), 4, 16)

    def sums(numbers: list[int]) -> torch.Tensor:
        return torch.tensor([0, *numbers]).cumsum(0).int()

    found = varlen(
        query, keys, values, sums(counts), sums(ends), max(counts), max(ends),
        softmax_scale=0.3, causal=True, softcap=softcap or 0.0,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        block_table=torch.tensor(table, dtype=torch.int32),
    )  # fmt: skip
    first = 0
    for start, count, end, blocks in zip(starts, counts, ends, table, strict=True):
        own_keys, own_values = (
            store[blocks].flatten(0, 1)[:end].transpose(0, 1) for store in (keys, values)
        )
        own = query[first : first + count].transpose(0, 1)
        expected = attend(own, own_keys, own_values, start, 0.3, window, softcap).transpose(0, 1)
        assert (found[first : first + count] - expected).abs().max() < 1e-5
        first += count


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "gemma2", pytest.param("phi3", marks=pytest.mark.slow)]
)
@torch.inference_mode()
def test_a_mixed_batch_matches_peft(family: str, tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", family)
    paths = {
        "lora": write_random_adapter(tmp_path / "lora", base, seed=1),
        "dora": write_random_adapter(tmp_path / "dora", base, seed=2, use_dora=True),
    }
    runner = Runner(load_base(str(base), dtype="float32"), flash=REFERENCE)
    # Over the edges of pages, and much longer than the windows (24).
    lengths = {"base": 300, "lora": 7, "dora": 255}
    found = mixed_rows(runner, load_residents(runner, paths), lengths)
    check_against_peft(base, paths, found, 1e-4, differs_by=0.1)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_answers_are_those_of_our_own_attention(family: str, tmp_path: Path) -> None:
    """Through the scheduler: shared beginnings, copied blocks, preemption, windows that move on."""
    base = str(write_tiny_model(tmp_path / "base", family))
    generator = torch.Generator().manual_seed(5)
    beginning = torch.randint(3, 400, (280,), generator=generator).tolist()
    prompts = [
        beginning[:shared] + torch.randint(3, 400, (own,), generator=generator).tolist()
        for shared, own in ((280, 9), (280, 3), (270, 30), (0, 200), (200, 1), (280, 9))
    ]

    def answers(runner: Runner, limits: Limits) -> list[str]:
        engine = Engine(runner, limits)
        events: list[queue.Queue] = [queue.Queue() for _ in prompts]
        engine.start()
        try:
            for number, prompt in enumerate(prompts):
                sampling = Sampling(max_tokens=20, temperature=0.0, ignore_eos=True)
                request = GenerationRequest(str(number), tuple(prompt), sampling, None)
                engine.submit(request, events[number].put)
            texts = []
            for one in events:
                texts.append("")
                while isinstance(event := one.get(timeout=60), Delta):
                    texts[-1] += event.text
        finally:
            engine.stop()
        assert engine.scheduler.blocks.used == 0
        return texts

    plain = answers(Runner(load_base(base, dtype="float32")), Limits(6, 4096, 64, 400))
    paged = Runner(load_base(base, dtype="float32"), flash=REFERENCE)
    assert paged.block_tokens == PAGE_TOKENS
    assert answers(paged, Limits(6, 8192, 64, 400)) == plain
    assert answers(paged, Limits(3, 1024, 64, 400)) == plain  # four pages for all


def test_what_flash_attn_is_not_for_is_said(tmp_path: Path) -> None:
    base = load_base(str(write_tiny_model(tmp_path / "base", "llama")))
    with pytest.raises(ConfigError, match="--cuda-paths on: flash-attn cannot be used: the model"):
        Runner(base, "on")
    for settings, words in (
        ({"device": torch.device("cpu")}, "on cpu, not on a GPU"),
        ({"dtype": torch.float32}, r"computes in torch\.float32"),
        ({"head_dim": 512}, "heads of 512"),
        ({"head_dim": 20}, "heads of 20"),
    ):
        usual = {
            "kv_heads": 2, "head_dim": 64, "dtype": torch.bfloat16,
            "device": torch.device("cuda"), "window": None,
        }  # fmt: skip
        found, reason = load_flash({0: LayerShape(**(usual | settings))})
        assert found is None
        assert words.replace("\\", "") in reason
