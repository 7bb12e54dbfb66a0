"""`compare` and `chat` against a real server."""

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest
from rich.console import Console
from server_process import running_server
from tiny_models import write_random_adapter, write_tiny_model

from qlora_serve.cli.columns import Columns


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("talking")
    base = write_tiny_model(folder / "tiny")
    one = write_random_adapter(folder / "one", base, seed=1)
    two = write_random_adapter(folder / "two", base, seed=2)
    with running_server(base, "--adapter", f"one={one}", "--adapter", f"two={two}") as url:
        yield url


def _run(*arguments: str, said: str | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "qlora_serve.cli", *arguments]
    return subprocess.run(command, input=said, capture_output=True, text=True, check=False)


def _answer(url: str, who: str, messages: list[dict], max_tokens: int) -> str:
    body = {"model": who, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body).json()
    return answer["choices"][0]["message"]["content"]


def test_compare_shows_each_variants_own_answer(url) -> None:
    done = _run("compare", "hello fox", "--url", url, "--max-tokens", "12", "--json")
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)["answers"]
    assert [answer["variant"] for answer in answers] == ["base", "one", "two"]
    messages = [{"role": "user", "content": "hello fox"}]
    for answer in answers:
        assert answer["text"] == _answer(url, answer["variant"], messages, 12)
    assert len({answer["text"] for answer in answers}) == 3


def test_compare_prints_columns_and_refuses_unknown_names(url) -> None:
    done = _run("compare", "hello", "--url", f"{url}/v1", "--variants", "base,two")
    assert "base" in done.stdout
    assert "two" in done.stdout
    assert "ended by" in done.stdout
    done = _run("compare", "hello", "--url", url, "--variants", "base,three")
    assert done.returncode == 1
    assert "'three'; known here: one, tiny, two" in done.stderr
    done = _run("compare", "hello", "--url", url, "--variants", "one,one")
    assert "given twice" in done.stderr


def test_compare_takes_scales_and_measures_divergence(url) -> None:
    arguments = ("--variants", "base,one,one@0.25,one@0", "--max-tokens", "8", "--json")
    done = _run("compare", "hello fox", "--url", url, *arguments)
    assert done.returncode == 0, done.stderr
    answers = {answer["variant"]: answer for answer in json.loads(done.stdout)["answers"]}
    assert answers["base"]["divergence"] is None
    assert answers["one"]["divergence"]["mean"] > 0.01
    assert answers["one@0"]["divergence"]["mean"] < 1e-6
    assert answers["one@0"]["text"] == answers["base"]["text"]
    done = _run("compare", "hello", "--url", url, "--variants", "one@much")
    assert done.returncode == 1
    assert "expected NAME or NAME@SCALE" in done.stderr


def test_compare_streams_shaded_columns_on_a_terminal(url) -> None:
    """In a real pseudo-terminal: the last frame has both columns and colours."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "qlora_serve.cli", "compare", "hello fox", "--url", url]
    command += ["--variants", "base,one", "--max-tokens", "12"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # Linux: the last writer has closed it
            break
        if not piece:
            break
        shown += piece
    os.close(leader)
    assert process.wait(60) == 0, shown.decode()
    text = shown.decode()
    assert "from the base:" in text
    last = text[text.rindex("from the base:") - 4000 :]
    assert "nats a token" in last
    assert "48;5;" in last, "something is shaded"


def _column_events(answers: list[dict]) -> list[dict]:
    tags = [{key: one[key] for key in ("index", "variant", "repeat")} for one in answers]
    events: list[dict] = [{"type": "start", "answers": tags}]
    for tag, one in zip(tags, answers, strict=True):
        events.append({"type": "delta", **tag, "text": one["text"], "tokens": one["tokens"]})
        events.append({"type": "answer", **one})
        if one["divergence"]:
            events.append({"type": "divergence", **tag, **one["divergence"]})
    return events


def test_streamed_columns_end_as_whole_ones(url) -> None:
    body = {
        "messages": [{"role": "user", "content": "hello fox"}],
        "variants": ["base", "one"], "temperature": 0, "max_tokens": 12,
    }  # fmt: skip
    answers = httpx.post(f"{url}/v1/compare", json=body, timeout=60).json()["answers"]
    streamed = Columns()
    for event in _column_events(answers):
        streamed.take(event)

    def rendered(columns: Columns) -> str:
        console = Console(width=100, record=True, file=io.StringIO(), force_terminal=True)
        console.print(columns.table())
        return console.export_text(styles=True)

    assert rendered(streamed) == rendered(Columns.of_whole(answers))


def test_chat_keeps_the_conversation_and_changes_the_adapter(url) -> None:
    lines = ["hello", "/adapter one", "and you", "/adapter nobody", "/clear", "hello", "/exit", "x"]
    arguments = ("--temperature", "0", "--max-tokens", "8")
    done = _run("chat", "--url", url, *arguments, said="\n".join(lines))
    assert done.returncode == 0, done.stderr
    first = _answer(url, "tiny", [{"role": "user", "content": "hello"}], 8)
    talk = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "and you"},
    ]
    second = _answer(url, "one", talk, 8)
    third = _answer(url, "one", [{"role": "user", "content": "hello"}], 8)
    assert done.stdout == f"{first}\n{second}\n{third}\n"
    assert "no adapter is called 'nobody'; known here: tiny, one, two" in done.stderr


def test_chat_begins_with_an_adapter_that_must_exist(url) -> None:
    done = _run("chat", "--url", url, "--adapter", "nobody", said="hi\n")
    assert done.returncode == 1
    assert "no adapter is called 'nobody'" in done.stderr
