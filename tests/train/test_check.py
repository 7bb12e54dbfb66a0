"""`data check`: everything that is wrong with some data, and what the model will see of it."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_serve.base.source import locate_base
from qlora_serve.base.tokenizer import load_tokenizer
from qlora_serve.train.check import DataReport, check_data, length_histogram, stop_ids_of
from qlora_serve.train.data import read_sources
from qlora_serve.train.dataset import TokenizeSettings
from qlora_serve.train.sources import Source
from tests.tiny_models import write_tiny_model
from tests.train.chats import chat, command, quiet_environment, write_chats


def _write_base(folder: Path, untaught: int | None = None) -> Path:
    """A tiny model that has learnt all of its template's tokens but one."""
    base = write_tiny_model(folder)
    tensors = load_file(base / "model.safetensors")
    embedding = next(tensor for name, tensor in tensors.items() if "embed_tokens" in name)
    # transformers starts the row of the padding token, here also the end token, with zeros.
    embedding[2] = torch.randn(embedding.shape[1]) * 0.1
    if untaught is not None:
        embedding[untaught] = 0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_base(tmp_path_factory.mktemp("base") / "tiny")


def _report(base: Path, data: Path, max_length: int = 512, **settings: Any) -> DataReport:
    source = locate_base(str(base))
    tokenizer = load_tokenizer(source)
    stops = stop_ids_of(source, tokenizer)
    tokenize = TokenizeSettings(tokenizer, max_length, stops, **settings)
    return check_data(read_sources([Source(str(data))]), source, tokenize).report


def test_sound_data_has_nothing_to_complain_of(base: Path, tmp_path: Path) -> None:
    chats = [chat("hello", f"answer {i}") for i in range(5)]
    report = _report(base, write_chats(tmp_path / "a.jsonl", chats))
    assert report.fatal == report.warnings == report.problems == report.duplicates == []
    assert report.counts.rows == 5
    assert report.counts.trained_tokens < report.counts.tokens
    assert sum(bucket.rows for bucket in report.lengths) == 5
    assert report.longest == report.lengths[-1].last
    # The tiny tokenizer pads with its end token, which stays in the loss all the same.
    ends = report.ends
    assert (ends.stop_tokens, ends.rows_with, ends.rows_without) == (["<|im_end|>"], 5, [])
    assert (ends.pad_is_stop, ends.trained_pads) == (True, 5)


def test_everything_that_is_wrong_is_listed(base: Path, tmp_path: Path) -> None:
    lines = [
        *(json.dumps({"messages": chat("a", "b")}),) * 2,
        "{",
        json.dumps({"messages": chat("a", "word " * 60)}),
        json.dumps({"messages": chat("word " * 60, "a")}),
        json.dumps({"messages": [*chat("a"), {"role": "tool", "content": "x"}, *chat("a", "b")]}),
        json.dumps({"messages": chat("a")}),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    report = _report(base, path, max_length=40)
    assert [problem.where for problem in report.problems] == [
        f"{path}, line 3", f"{path}, line 6:", f"{path}, line 7",
    ]  # fmt: skip
    assert "unknown role tool" in report.problems[1].reason
    assert report.duplicates == [(f"{path}, line 2", f"{path}, line 1")]
    counts = report.counts
    assert (counts.rows, counts.cut_rows, counts.dropped_rows) == (3, 2, 1)
    assert report.fatal == ["3 rows cannot be used"]
    found = " | ".join(report.warnings)
    assert "2 rows are longer than 40 tokens" in found
    assert "1 row is dropped" in found
    assert "1 row says the same" in found


def test_texts_that_never_end_are_warned_of(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "hello<|im_end|>"}\n{"text": "hello"}\n')
    report = _report(base, path)
    assert report.ends.rows_without == [f"{path}, line 2"]
    assert report.ends.trained_pads == 1
    assert any("does not learn to stop" in line for line in report.warnings)
    # There is no turn in a text that could be the last.
    assert "has no turns" in _report(base, path, train_on="last").problems[0].reason


def test_tokens_without_an_embedding_are_fatal(base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    other = _write_base(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens([f"<new {i}>" for i in range(100)])
    tokenizer.save_pretrained(other)
    assert len(tokenizer) > 512
    data = write_chats(tmp_path / "a.jsonl", [chat("a", "b <new 99>")])
    report = _report(other, data)
    assert report.beyond_vocabulary == ["<new 99>"]
    assert "beyond the base's embeddings" in report.fatal[0]


def test_a_base_that_never_saw_its_template(tmp_path: Path) -> None:
    base = _write_base(tmp_path / "base", untaught=1)
    report = _report(base, write_chats(tmp_path / "a.jsonl", [chat("a", "b")]))
    assert report.untrained == ["<|im_start|>"]
    assert "has never learnt <|im_start|>" in report.warnings[0]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([5], [(5, 5, 1)]),
        ([1, 2, 2, 20], [(1, 2, 3), (3, 4, 0), (5, 6, 0), (7, 8, 0), (9, 10, 0), (11, 12, 0),
                         (13, 14, 0), (15, 16, 0), (17, 18, 0), (19, 20, 1)]),
    ],
)  # fmt: skip
def test_buckets(lengths: list[int], expected: list[tuple[int, int, int]]) -> None:
    found = [(bucket.first, bucket.last, bucket.rows) for bucket in length_histogram(lengths)]
    assert found == expected


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("data", "check", *arguments),
        capture_output=True,
        text=True,
        check=False,
        env=quiet_environment(),
    )


def test_the_command_shows_rows_and_exits_by_what_it_found(base: Path, tmp_path: Path) -> None:
    data = write_chats(tmp_path / "a.jsonl", [chat("hello", "Grüße 🙂 [bold]")])
    done = _run(data, "--base", base)
    assert done.returncode == 0, done.stderr
    assert "⟦Grüße 🙂 [bold]<|im_end|>⟧" in done.stdout
    assert "nothing to complain of" in done.stdout
    assert re.search(r"\n  \d+ +█+ 1\n", done.stdout)  # lengths: a bar of one length
    assert "train_on assistant)" in done.stdout

    templated = tmp_path / "templated.jsonl"
    templated.write_text(json.dumps({"text": "hello<|im_end|>"}))
    assert "train_on assistant; of text rows every token)" in _run(templated, "--base", base).stdout

    with data.open("a") as file:
        file.write("{\n[]\n")
    done = _run(data, "--base", base, "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["ok"] is False
    assert [problem["where"] for problem in report["problems"]] == [
        f"{data}, line 2", f"{data}, line 3",
    ]  # fmt: skip
    assert done.stderr.splitlines()[-1] == (
        "error: training would stop at this data: 2 rows cannot be used"
    )
