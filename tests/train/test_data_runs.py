"""Whole runs over every way to give rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_serve.base.load import load_base
from qlora_serve.errors import ConfigError, DataError
from qlora_serve.train import dataset as dataset_module
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.dataset import LazyDataset, TokenizeSettings, tokenize_data
from qlora_serve.train.prepare import prepare_data, read_run_data
from qlora_serve.train.run import train
from qlora_serve.train.token_cache import TokenCache
from tests.tiny_models import write_tiny_model
from tests.train.chats import SOME_CHATS, chat, write_chats


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", SOME_CHATS)


def _settings(base: Path, data: Any, output: Path, **settings: Any) -> TrainSettings:
    chosen = {"learning_rate": 1e-2, "rank": 4, "alpha": 8, "device": "cpu", "max_steps": 2}
    return TrainSettings(base=str(base), data=data, output=output, **(chosen | settings))


def _train(*arguments: Any, **settings: Any) -> tuple[Any, list[str]]:
    lines: list[str] = []
    return train(_settings(*arguments, **settings), lines.append), lines


def test_packing_trains_the_same_step(base: Path, data: Path, tmp_path: Path) -> None:
    # All rows in one step: whatever line they lie in, its loss is the same.
    plain, _ = _train(base, data, tmp_path / "a", micro_batch=16)
    packed, _ = _train(base, data, tmp_path / "b", micro_batch=16, packing=True, max_length=128)
    for key in ("first_loss", "last_loss"):
        assert packed.metrics[key] == pytest.approx(plain.metrics[key], rel=1e-4)
    assert packed.manifest.data["rows"] == plain.manifest.data["rows"] == 16


def test_lazy_rows_train_the_same_steps(base: Path, data: Path, tmp_path: Path) -> None:
    options = {"group_by_length": False, "max_steps": 4}
    eager, _ = _train(base, data, tmp_path / "a", **options)
    lazy, _ = _train(base, data, tmp_path / "b", tokenization="lazy", **options)
    for key in ("first_loss", "last_loss", "mean_loss"):
        assert lazy.metrics[key] == pytest.approx(eager.metrics[key], rel=1e-5)
    assert lazy.manifest.data["trained_tokens"] == eager.manifest.data["trained_tokens"]
    with pytest.raises(ConfigError, match="use --tokenization eager"):
        _train(base, data, tmp_path / "c", tokenization="lazy", packing=True)


def test_a_lazy_row_that_is_bad_is_named_when_its_turn_comes(base: Path, tmp_path: Path) -> None:
    bad = [{"role": "tool", "content": "x"}, *chat("a", "b")]
    path = write_chats(tmp_path / "a.jsonl", [chat("a", "b"), bad])
    settings = _settings(base, path, tmp_path / "out")
    loaded = load_base(str(base), device="cpu")
    tokenize = TokenizeSettings(loaded.tokenizer, 64, loaded.stop_token_ids)
    lazy = LazyDataset(read_run_data(settings, 0).train.rows, tokenize)
    assert len(lazy[0]) == 1
    with pytest.raises(DataError, match="line 2: the chat template refuses"):
        lazy[1]
    assert lazy.counts().rows == 1


def test_files_of_several_formats_mix_and_are_named(base: Path, data: Path, tmp_path: Path) -> None:
    table = tmp_path / "b.csv"
    table.write_text("question,answer\nhello,world\nmoney,dog\n")
    texts = tmp_path / "c.jsonl"
    texts.write_text('{"text": "hello world<|im_end|>"}\n{"text": "hello"}\n')
    sources = [str(data), f"{table}:2", str(texts)]
    result, lines = _train(base, sources, tmp_path / "out", rows=4)
    assert f"data: {data} is chatml, 4 rows" in lines
    assert f"data: {table} is question/answer, 2 rows, weight 2" in lines
    assert f"data: {texts} is text, 2 rows" in lines
    assert result.manifest.data["rows"] == 4 + 4 + 2
    assert [source["name"] for source in result.manifest.data["sources"]] == [
        str(data), str(table), str(texts),
    ]  # fmt: skip
    assert result.manifest.recipe["data"] == sources
    assert any("warning: 1 row holds no end token" in line for line in lines)


def test_rows_are_held_out(base: Path, data: Path, tmp_path: Path) -> None:
    settings = _settings(base, data, tmp_path / "out", eval_split=0.25)
    loaded = load_base(str(base), device="cpu")
    read = read_run_data(settings, settings.seed)
    prepared = prepare_data(settings, read, loaded, 512)
    assert read.evaluation is not None
    assert len(prepared.evaluation) == len(read.evaluation.rows)
    assert len(prepared.dataset) + len(prepared.evaluation) == 16

    settings = _settings(base, data, tmp_path / "out", eval_data=data)
    prepared = prepare_data(settings, read_run_data(settings, 0), loaded, 512)
    assert any("rows to evaluate on are trained on too" in line for line in prepared.warnings)
    both = _settings(base, data, tmp_path / "out", eval_data=data, eval_split=2)
    with pytest.raises(ConfigError, match="either eval_data or eval_split"):
        read_run_data(both, 0)


def test_tokens_are_remembered_by_their_content(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_base(str(base), device="cpu")
    rows = read_run_data(_settings(base, data, tmp_path / "out"), 0).train.rows
    settings = TokenizeSettings(loaded.tokenizer, 64, loaded.stop_token_ids)
    cache = TokenCache(tmp_path / "cache")
    made = tokenize_data(rows, settings, cache)
    (entry,) = (tmp_path / "cache").iterdir()

    def never(*_: Any) -> Any:
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "tokenize_chat", never)
        assert tokenize_data(rows, settings, cache) == made
        changed = [
            (rows[:-1], settings),
            (rows, TokenizeSettings(loaded.tokenizer, 63, loaded.stop_token_ids)),
            (rows, TokenizeSettings(loaded.tokenizer, 64, loaded.stop_token_ids, "last")),
        ]
        for other_rows, other in changed:
            with pytest.raises(AssertionError, match="tokenized again"):
                tokenize_data(other_rows, other, cache)
        loaded.tokenizer.chat_template += "{# other #}"
        with pytest.raises(AssertionError, match="tokenized again"):
            tokenize_data(rows, settings, cache)
        loaded.tokenizer.chat_template = loaded.tokenizer.chat_template[: -len("{# other #}")]
    entry.write_bytes(entry.read_bytes()[:50])
    assert tokenize_data(rows, settings, cache) == made


def test_bad_rows_stop_a_run_before_torch_is_needed(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": chat("a", "b")}) + "\n{\n[]\n")
    with pytest.raises(DataError, match=r"line 2 is not JSON.*\(1 more row"):
        _train(base, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("train_on", ["last", "prompt", "all"])
def test_what_counts_is_a_setting(base: Path, data: Path, tmp_path: Path, train_on: str) -> None:
    result, _ = _train(base, data, tmp_path / "out", train_on=train_on, max_steps=1)
    counts = result.manifest.data
    assistant = 16 * 2 * 3  # two short answers with their ends, at least
    if train_on == "all":
        assert counts["trained_tokens"] == counts["tokens"] - counts["rows"]
    elif train_on == "last":
        assert counts["trained_tokens"] < assistant
    else:
        assert counts["trained_tokens"] > counts["tokens"] / 2
    assert torch.isfinite(torch.tensor(result.metrics["first_loss"]))
