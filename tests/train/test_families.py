"""Trained tokens under templates of the published families, token by token."""

from collections.abc import Sequence
from typing import Any

import pytest

from qlora_serve.base.tokenizer import encode_text, render_chat, stop_token_ids
from qlora_serve.errors import DataError
from qlora_serve.train.data_settings import TrainOn
from qlora_serve.train.masks import TokenizedRow, tokenize_chat, tokenize_text
from tests.train.chats import chat
from tests.train.templates import FAMILIES, LLAMA3, MISTRAL, QWEN, QWEN3, SMOLLM2

CHAT = chat("#Be brief", "hello", "the lazy dog", "question?\n", "Grüße 🙂")


def _rows(family: str, messages: Any, train_on: TrainOn = "assistant", **more: Any) -> Any:
    tokenizer = FAMILIES[family].tokenizer()
    stops = stop_token_ids(tokenizer)
    return tokenizer, tokenize_chat(tokenizer, messages, 1024, stops, train_on, **more)


def _spans(tokenizer: Any, row: TokenizedRow) -> list[str]:
    """The text of each run of trained tokens."""
    runs: list[list[int]] = []
    before = False
    for token, trained in zip(row.input_ids, row.trained, strict=True):
        if trained and not before:
            runs.append([])
        if trained:
            runs[-1].append(token)
        before = trained
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("qwen", "<|im_end|>"), ("qwen-marked", "<|im_end|>"), ("llama3", "<|eot_id|>"),
        ("smollm2", "<|im_end|>"), ("gemma", "<end_of_turn>"),
    ],
)  # fmt: skip
def test_what_counts_in_each_family(family: str, end: str) -> None:
    answers = [f"the lazy dog{end}", f"Grüße 🙂{end}"]
    tokenizer, (row,) = _rows(family, CHAT)
    assert _spans(tokenizer, row) == answers
    assert row.input_ids == encode_text(tokenizer, render_chat(tokenizer, CHAT))
    _, (last,) = _rows(family, CHAT, "last")
    assert last.input_ids == row.input_ids
    assert _spans(tokenizer, last) == answers[1:]
    _, (everything,) = _rows(family, CHAT, "all")
    assert everything.input_ids == row.input_ids
    assert all(everything.trained)
    _, (prompt,) = _rows(family, CHAT, "prompt")
    assert prompt.trained == [not trained for trained in row.trained]


@pytest.mark.parametrize(
    ("family", "thought", "end"), [("qwen3", "<think>\n\n</think>\n\n", "<|im_end|>"),
                                   ("mistral", " ", "</s>")],
)  # fmt: skip
def test_rewriting_templates_give_a_row_for_each_answer(
    family: str, thought: str, end: str
) -> None:
    tokenizer, rows = _rows(family, CHAT)
    assert [_spans(tokenizer, row) for row in rows] == [
        [f"{thought}the lazy dog{end}"],
        [f"{thought}Grüße 🙂{end}"],
    ]
    # Before its answer each row is, token by token, what serving shows the model.
    for row, asked in zip(rows, (CHAT[:2], CHAT[:4]), strict=True):
        prompt = encode_text(tokenizer, render_chat(tokenizer, asked, add_generation_prompt=True))
        assert row.input_ids[: len(prompt)] == prompt
        assert row.trained.index(True) == len(prompt)
    _, (last,) = _rows(family, CHAT, "last")
    assert last == rows[1]
    _, (everything,) = _rows(family, CHAT, "all")
    assert everything.input_ids == encode_text(tokenizer, render_chat(tokenizer, CHAT))
    with pytest.raises(DataError, match="the chat template changes or leaves out"):
        _rows(family, CHAT, "prompt")


def test_every_thought_is_trained() -> None:
    messages = chat("a", "<think>\nwhy\n</think>\n\nb", "c", "<think>\nhm\n</think>\n\nd")
    tokenizer, rows = _rows("qwen3", messages)
    assert [_spans(tokenizer, row) for row in rows] == [
        ["<think>\nwhy\n</think>\n\nb<|im_end|>"],
        ["<think>\nhm\n</think>\n\nd<|im_end|>"],
    ]
    assert "why" not in tokenizer.decode(rows[1].input_ids)
    apart = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "why"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "reasoning_content": "hm"},
    ]
    assert _rows("qwen3", apart)[1] == rows


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
TOOL_CHAT = [
    {"role": "user", "content": "rain?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"rain": 0}'},
    {"role": "assistant", "content": "No."},
]


@pytest.mark.parametrize("family", ["qwen", "qwen-marked", "qwen3"])
def test_tool_calls_are_trained_and_results_are_not(family: str) -> None:
    tokenizer, rows = _rows(family, TOOL_CHAT, tools=TOOLS)
    spans = [span for row in rows for span in _spans(tokenizer, row)]
    assert len(spans) == 2
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}' in spans[0]
    assert spans[0].endswith("</tool_call><|im_end|>")
    assert spans[1].endswith("No.<|im_end|>")
    text = tokenizer.decode(rows[-1].input_ids)
    assert '"rain": 0' in text
    assert '"parameters"' in text
    assert not any("rain" in span for span in spans)


def test_escaped_results_and_calls_without_tools() -> None:
    tokenizer, (row,) = _rows("llama3", TOOL_CHAT)
    assert _spans(tokenizer, row) == [
        '{"name": "weather", "parameters": {"city": "Köln"}}<|eot_id|>', "No.<|eot_id|>",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "messages", "tools", "reason"),
    [
        ("smollm2", TOOL_CHAT, None, "leaves out the call of weather in message 2"),
        ("gemma", TOOL_CHAT, TOOLS, "leaves out the call of weather"),
        ("llama3", chat("a", "b"), TOOLS, r"leaves out the tools \(weather\)"),
        ("mistral", chat("a", "b")[::-1], None, "roles must alternate"),
        ("smollm2", [*chat("a"), {"role": "assistant", "content": "b", "reasoning_content": "x"}],
         None, r"leaves out what stands before or in message 2"),
        ("qwen-marked", [*chat("a"), {"role": "assistant", "content": "b",
                                      "reasoning_content": "x"}], None, r"in message 2"),
    ],
)  # fmt: skip
def test_what_a_template_drops_is_refused(
    family: str, messages: Sequence[Any], tools: Any, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        _rows(family, messages, tools=tools)


def test_every_token_of_a_llama3_chat() -> None:
    tokenizer, (row,) = _rows("llama3", chat("he", " lazy dog"))
    marked = [
        (tokenizer.decode([token]), trained)
        for token, trained in zip(row.input_ids, row.trained, strict=True)
    ]
    header = [("<|start_header_id|>", False), ("<|end_header_id|>", False)]
    assert marked == [
        ("<|begin_of_text|>", False), header[0], ("us", False), ("er", False), header[1],
        ("\n", False), ("\n", False), ("he", False), ("<|eot_id|>", False),
        header[0], ("as", False), ("s", False), ("istant", False), header[1],
        ("\n", False), ("\n", False),
        ("laz", True), ("y", True), (" dog", True), ("<|eot_id|>", True),
    ]  # fmt: skip


@pytest.mark.parametrize("family", [QWEN, QWEN3, LLAMA3, SMOLLM2, MISTRAL])
def test_a_templated_text_counts_whole(family: Any) -> None:
    tokenizer = family.tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    text = render_chat(tokenizer, chat("hello", "the lazy dog")).rstrip("\n")
    row = tokenize_text(tokenizer, text, 512)
    assert row.input_ids == encode_text(tokenizer, text)
    assert all(row.trained)
    assert row.input_ids[-1] == tokenizer.eos_token_id
    cut = tokenize_text(tokenizer, text, 4)
    assert (len(cut.input_ids), cut.truncated_tokens) == (4, len(row.input_ids) - 4)


@pytest.mark.parametrize("adds_eos", [False, True])
def test_a_text_begins_as_its_tokenizer_begins_texts(adds_eos: bool) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = MISTRAL.tokenizer()
    single = "<s> $A </s>" if adds_eos else "<s> $A"
    tokens = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=tokens
    )
    bos = tokenizer.bos_token_id
    plain = encode_text(tokenizer, "hello dog")
    assert tokenize_text(tokenizer, "hello dog", 512).input_ids == [bos, *plain]
    assert tokenize_text(tokenizer, "<s>hello dog", 512).input_ids == [bos, *plain]
