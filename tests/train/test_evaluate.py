"""Evaluation against what PEFT, transformers, rouge-score and plain counting say."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_serve.errors import AdapterError, ConfigError, DataError
from qlora_serve.train.evaluate.config import EvalSettings
from qlora_serve.train.evaluate.run import Evaluation, Measure, _adapted, evaluate
from qlora_serve.train.evaluate.scores import Scorer, is_json_object
from qlora_serve.train.evaluate.show import table
from qlora_serve.train.evaluate.statistics import bootstrap, holm, paired_p_value
from tests.tiny_models import tiny_tokenizer, write_random_adapter, write_tiny_model
from tests.train.chats import chat, write_chats

ROWS = [chat(f"question {i} {'dog ' * (i % 4)}", f"answer {'fox ' * (i % 3)}") for i in range(7)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "tiny", "qwen2")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    whole: dict[str, Any] = {"modules_to_save": ["embed_tokens"], "bias": "all"}
    return {
        "plain": write_random_adapter(folder / "plain", base, seed=1),
        "whole": write_random_adapter(folder / "whole", base, seed=2, **whole),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "heldout.jsonl", ROWS)


def _evaluate(base: Path, data: Path, **settings: Any) -> Evaluation:
    chosen = {"device": "cpu", "max_tokens": 8, "batch": 3, "resamples": 200} | settings
    return evaluate(EvalSettings(base=str(base), data=data, **chosen), lambda _: None)


def test_losses_and_answers_are_those_of_each_row_alone(
    base: Path, adapters: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "rows.jsonl"
    found = _evaluate(base, data, adapter=adapters, output=output)
    assert list(found.systems) == ["base", "plain", "whole"]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == found.rows == len(ROWS)
    tokenizer = tiny_tokenizer()
    for name, path in (("base", None), *adapters.items()):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = model if path is None else PeftModel.from_pretrained(model, path)
        total = count = 0.0
        for row, messages in zip(rows, ROWS, strict=True):
            prompt = tokenizer.apply_chat_template(
                messages[:1], tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            answer = tokenizer(messages[1]["content"] + "<|im_end|>", return_tensors="pt")
            whole = torch.cat([ids, answer["input_ids"]], dim=1)
            labels = whole.clone()
            labels[:, : ids.shape[1]] = -100
            with torch.no_grad():
                loss = float(model(input_ids=whole, labels=labels).loss)
            assert row["systems"][name]["loss"] == pytest.approx(loss, abs=1e-4)
            total += loss * answer["input_ids"].shape[1]
            count += answer["input_ids"].shape[1]
            text = _greedy(model, ids, 8)
            assert row["systems"][name]["answer"] == text
        measure = found.systems[name]["loss"]
        assert measure.value == pytest.approx(total / count, abs=1e-4)
        assert measure.low <= measure.value <= measure.high
        perplexity = found.systems[name]["perplexity"].value
        assert perplexity == pytest.approx(math.exp(measure.value))
    assert "plain" in _text(found)


@torch.no_grad()
def _greedy(model: Any, ids: torch.Tensor, count: int) -> str:
    """Token by token, without a cache and without `generate`."""
    made: list[int] = []
    for _ in range(count):
        token = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
        if token == 2:
            break
        made.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return str(tiny_tokenizer().decode(made, skip_special_tokens=True))


def _text(found: Evaluation) -> str:
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(found, console.width))
    return console.export_text()


@pytest.mark.parametrize(
    "metrics",
    [
        ("loss", "perplexity", "exact", "rouge_l", "chrf", "json"),
        ("loss", "perplexity", "exact", "rouge_l", "chrf"),
    ],
)
def test_a_narrow_terminal_shows_every_name_and_figure(metrics: tuple[str, ...]) -> None:
    from rich.console import Console

    measures = {m: Measure(value=0.5, low=0.25, high=0.75, p_value=0.5) for m in metrics}
    names = ["base", "rank-16.learning_rate-0_0001"]
    found = Evaluation(
        base="b", data="d.jsonl", rows=8, confidence=0.95, systems=dict.fromkeys(names, measures)
    )
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(found, console.width))
    text = console.export_text()
    assert "…" not in text
    assert text.count("75.0 %") == 2 * (len(metrics) - 2)
    cells = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert "".join(cells) == "".join(names)


def test_an_adapter_leaves_the_base_as_it_was(base: Path, adapters: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(input_ids=ids).logits
    names = [name for name, _ in model.named_modules()]
    for path in adapters.values():
        with _adapted(model, path) as adapted:
            assert not torch.allclose(adapted(input_ids=ids).logits, before, atol=0.1)
        assert torch.equal(model(input_ids=ids).logits, before)
        assert [name for name, _ in model.named_modules()] == names


def test_the_loss_alone_needs_no_answers(base: Path, data: Path) -> None:
    found = _evaluate(base, data, answers=False, rows=3)
    assert list(found.systems["base"]) == ["loss", "perplexity"]
    assert found.rows == 3


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"adapter": {"x": "none"}}, AdapterError, "no adapter at none"),
        ({"adapter": {"base": "none"}}, ConfigError, "means the base"),
        ({"adapter": {"a/b": "none"}}, ConfigError, "cannot name an adapter"),
        ({"data": Path("none.jsonl")}, DataError, "no data file"),
        ({"max_length": 3}, DataError, "raise --max-length"),
    ],
)
def test_mistakes_are_one_line(
    base: Path, data: Path, settings: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said) as caught:
        _evaluate(base, settings.pop("data", data), **settings)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_base_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", "phi")
    adapter = write_random_adapter(tmp_path / "adapter", other)
    with pytest.raises(AdapterError, match="does not fit the base"):
        _evaluate(base, data, adapter={"x": adapter})


def test_scores() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import sentence_chrf

    scorer = Scorer((), looks_at_json=True)
    answer, reference = "the quick fox jumps", "the brown fox jumped"
    found = scorer.score(answer, reference)
    theirs = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert found["rouge_l"] == pytest.approx(theirs)
    assert found["chrf"] == pytest.approx(sentence_chrf(answer, [reference]).score / 100)
    assert found["exact"] == found["json"] == 0
    assert scorer.score(" same \n", "same")["exact"] == 1
    # rouge-score's own tokenizer sees nothing in these.
    assert scorer.score("北京天安门", "北京")["rouge_l"] == pytest.approx(2 * 0.4 / 1.4)
    assert scorer.score("Grüße aus Köln", "grüße aus Bonn")["rouge_l"] == pytest.approx(2 / 3)


def test_json_objects() -> None:
    assert is_json_object('{"a": 1}', ["a"])
    assert not is_json_object('{"a": 1}', ["a", "b"])
    for text in ("[1]", '{"a": 1', '{"a": 1} and more', "", "[" * 100_000):
        assert not is_json_object(text)


def test_the_exact_test_is_that_of_counting_by_hand() -> None:
    first, second = [3.0, 5.0, 1.0, 4.0], [1.0, 2.0, 2.0, 0.5]
    observed = abs(sum(first) - sum(second))
    swaps = 0
    for signs in itertools.product((1, -1), repeat=4):
        total = sum(s * (a - b) for s, a, b in zip(signs, first, second, strict=True))
        swaps += abs(total) >= observed - 1e-12
    assert paired_p_value(first, second, 1000, 0) == swaps / 16
    assert paired_p_value(first, first, 1000, 0) == 1.0


def test_the_random_test_finds_what_is_there_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(60, generator=generator).double()
    shifted = (noise + 0.8).tolist()
    other = torch.randn(60, generator=generator).double().tolist()
    assert paired_p_value(shifted, other, 2000, 0) < 0.01
    assert paired_p_value(noise.tolist(), other, 2000, 0) > 0.05


def test_intervals_cover_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for seed in range(100):
        sample = (torch.randn(40, generator=generator) + 2).double().tolist()
        found = bootstrap(sample, [1.0] * 40, 0.9, 300, seed)
        covered += found.low <= 2 <= found.high
    assert 80 <= covered <= 97


def test_holm_corrects_for_the_number_of_comparisons() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
