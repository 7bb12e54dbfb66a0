"""Calls are found in text however it is cut, and text that is no call stays text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_serve.serve.api.tool_format import _HERMES, _LLAMA, _MISTRAL, _MISTRAL_NAMED
from qlora_serve.serve.api.tool_parser import ToolParser, whole_calls

F = '{"name": "f", "arguments": {"a": [1, {"b": "} \\" {"}]}}'
G = '{"name": "g", "arguments": {}}'
P = F.replace("arguments", "parameters")
FA = '{"a": [1, {"b": "} \\" {"}]}'
CASES = [
    # format, text, content, [(name, arguments)]
    (_HERMES, "Hello world", "Hello world", []),
    (_HERMES, f"<tool_call>\n{F}\n</tool_call>", "", [("f", FA)]),
    (_HERMES, f"Let me see.\n<tool_call>\n{F}\n</tool_call>\n<tool_call>{G}</tool_call>\n",
     "Let me see.", [("f", FA), ("g", "{}")]),
    (_HERMES, f"<tool_call>{G}</tool_call> and text", " and text", [("g", "{}")]),
    (_HERMES, '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', "",
     [("f", '{"x": 1}')]),
    (_HERMES, '<tool_call>{"name": "f", "arguments": "{\\"x\\": 2}"}</tool_call>', "",
     [("f", '{"x": 2}')]),
    (_HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    (_HERMES, '<tool_call>\n{"no": "call"}\n</tool_call>',
     '<tool_call>\n{"no": "call"}\n</tool_call>', []),
    (_HERMES, "a <tool_call> b <tool_ call> < c", "a <tool_call> b <tool_ call> < c", []),
    (_HERMES, "cut <tool_call>", "cut <tool_call>", []),
    (_HERMES, "<tool_call>\n</tool_call> x", "<tool_call>\n</tool_call> x", []),
    (_HERMES, 'cut <tool_call>{"name": "f', 'cut <tool_call>{"name": "f', []),
    (_HERMES, '<tool_call>{"name": "f", "arguments": {"a": ', "", [("f", '{"a": ')]),
    (_HERMES, '<tool_call>{"name": "\\x", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "\\x", "arguments": {}}</tool_call>', []),
    (_HERMES, "  spaces around  ", "  spaces around  ", []),
    (_MISTRAL, f"[TOOL_CALLS][{F}, {G}]", "", [("f", FA), ("g", "{}")]),
    (_MISTRAL, f"Well [TOOL_CALLS] [{G}]", "Well", [("g", "{}")]),
    (_MISTRAL, "[TOOL_CALLS] [1]", "[TOOL_CALLS] [1]", []),
    (_MISTRAL, '[TOOL_CALLS][{"a": 1}]', '[TOOL_CALLS][{"a": 1}]', []),
    (_MISTRAL, "plain [TOOL", "plain [TOOL", []),
    (_MISTRAL_NAMED, f"[TOOL_CALLS]f[ARGS]{FA}", "", [("f", FA)]),
    (_MISTRAL_NAMED, f"So [TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{FA}[TOOL_CALLS]g[ARGS] {{}}\n",
     "So", [("f", FA), ("g", "{}")]),
    (_MISTRAL_NAMED, f"[TOOL_CALLS]g[ARGS]{{}} and {FA}", f" and {FA}", [("g", "{}")]),
    (_MISTRAL_NAMED, "[TOOL_CALLS]f{}", "[TOOL_CALLS]f{}", []),
    (_MISTRAL_NAMED, "[TOOL_CALLS]f g[ARGS]{}", "[TOOL_CALLS]f g[ARGS]{}", []),
    (_MISTRAL_NAMED, "[TOOL_CALLS]f[ARGS]", "[TOOL_CALLS]f[ARGS]", []),
    (_MISTRAL_NAMED, "[TOOL_CALLS]? [TOOL_CALLS]g[ARGS]{}", "[TOOL_CALLS]?", [("g", "{}")]),
    (_MISTRAL_NAMED, "[TOOL_CALLS]" + "x" * 300, "[TOOL_CALLS]" + "x" * 300, []),
    (_LLAMA, P, "", [("f", FA)]),
    (_LLAMA, f"<|python_tag|>{P}; {G}", "", [("f", FA), ("g", "{}")]),
    (_LLAMA, f"\n {P}\n", "", [("f", FA)]),
    (_LLAMA, '{"answer": 42}', '{"answer": 42}', []),
    (_LLAMA, f"Text first {P}", f"Text first {P}", []),
    (_LLAMA, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    (_LLAMA, "", "", []),
]  # fmt: skip


def _read(form, pieces_of_text, only_one=False):
    parser = ToolParser(form, only_one)
    pieces = [piece for text in pieces_of_text for piece in parser.feed(text)] + parser.finish()
    content, calls = whole_calls(pieces)
    return content, [(c["function"]["name"], c["function"]["arguments"]) for c in calls], pieces


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_whole_and_letter_by_letter(form, text, content, calls) -> None:
    assert _read(form, [text])[:2] == (content, calls)
    assert _read(form, text)[:2] == (content, calls)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(CASES), st.lists(st.integers(1, 9), max_size=30))
def test_any_cut_gives_the_same(case, lengths) -> None:
    form, text, content, calls = case
    cut, start = [], 0
    for length in lengths:
        cut.append(text[start : start + length])
        start += length
    assert _read(form, [*cut, text[start:]])[:2] == (content, calls)


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([_HERMES, _MISTRAL, _MISTRAL_NAMED, _LLAMA]),
    st.lists(
        st.sampled_from(["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", F, P, "{",
                         "}", "[", '"', "f[ARGS]", "[ARGS]", "\\", " ", "x",
                         '{"name": "f", "arguments": {']),
        max_size=8,
    ).map("".join),
)  # fmt: skip
def test_no_text_breaks_it_and_only_markers_and_space_are_lost(form, text) -> None:
    whole, letters = _read(form, [text]), _read(form, text)
    assert whole[:2] == letters[:2]
    if not whole[1]:
        assert whole[0] == text


def test_arguments_stream_as_they_come() -> None:
    parser = ToolParser(_HERMES)
    texts = ("<tool_call>", '{"name": "f", ', '"arguments": {"a', '": "x', 'y"', "}}")
    seen = [[getattr(piece, "text", piece) for piece in parser.feed(text)] for text in texts]
    assert [len(pieces) for pieces in seen] == [0, 0, 2, 1, 1, 1]
    assert [pieces[-1] for pieces in seen[2:]] == ['{"a', '": "x', 'y"', "}"]


def test_only_one_call_is_kept_where_only_one_is_wanted() -> None:
    text = f"<tool_call>{F}</tool_call><tool_call>{G}</tool_call>"
    assert _read(_HERMES, [text], only_one=True)[1] == [("f", FA)]
    json.loads(FA)


def test_the_models_own_id_is_kept() -> None:
    parser = ToolParser(_MISTRAL_NAMED)
    first, *_ = parser.feed("[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}")
    assert (first.name, first.call_id) == ("f", "abcdefghi")
