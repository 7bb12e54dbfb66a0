"""Which tokens count in the loss, token by token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_serve.base.tokenizer import encode_text, render_chat, stop_token_ids
from qlora_serve.errors import DataError
from qlora_serve.train.masks import TokenizedRow, prompt_ids, tokenize_row
from tests.tiny_models import CHATML
from tests.train.chats import (
    CHATML_DEFAULT_SYSTEM,
    CLOSED,
    ENDLESS,
    FORGETFUL,
    INST,
    MARKED,
    MARKED_WIDE,
    TURNS,
    chat,
    tokenizer_with,
)

TWO_TURNS = chat("hello", "the lazy dog", "question?\n", "Grüße 🙂")


def _row(template: str, messages: list[dict[str, str]], max_length: int = 512) -> TokenizedRow:
    tokenizer = tokenizer_with(template)
    return tokenize_row(tokenizer, messages, max_length, stop_token_ids(tokenizer))


def _spans(template: str, row: TokenizedRow) -> list[str]:
    """The text of each run of trained tokens."""
    tokenizer = tokenizer_with(template)
    spans: list[list[int]] = []
    before = False
    for token, trained in zip(row.input_ids, row.trained, strict=True):
        if trained and not before:
            spans.append([])
        if trained:
            spans[-1].append(token)
        before = trained
    return [tokenizer.decode(span) for span in spans]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["the lazy dog<|im_end|>", "Grüße 🙂<|im_end|>"]),
        (CHATML_DEFAULT_SYSTEM, ["the lazy dog<|im_end|>", "Grüße 🙂<|im_end|>"]),
        (INST, [" the lazy dog <|im_end|>", " Grüße 🙂 <|im_end|>"]),
        (TURNS, ["the lazy dog<|im_end|>", "Grüße 🙂<|im_end|>"]),
        (CLOSED, ["the lazy dog<|im_end|>", "Grüße 🙂<|im_end|>"]),
        (MARKED, ["the lazy dog<|im_end|>", "Grüße 🙂<|im_end|>"]),
        (MARKED_WIDE, ["the lazy dog<|im_end|>", "Grüße 🙂<|im_end|>"]),
    ],
    ids=["chatml", "default-system", "inst", "turns", "closed", "marked", "marked-wide"],
)
def test_only_answers_and_their_end_token_count(template: str, expected: list[str]) -> None:
    row = _row(template, TWO_TURNS)
    assert _spans(template, row) == expected
    tokenizer = tokenizer_with(template)
    assert row.input_ids == encode_text(tokenizer, render_chat(tokenizer, TWO_TURNS))


def test_every_token_of_a_small_chat() -> None:
    tokenizer = tokenizer_with(CHATML)
    row = _row(CHATML, chat("#he", "us", " lazy dog"))
    marked = [
        (tokenizer.decode([token]), trained)
        for token, trained in zip(row.input_ids, row.trained, strict=True)
    ]
    assert marked == [
        ("<|im_start|>", False), ("system", False), ("\n", False), ("he", False),
        ("<|im_end|>", False), ("\n", False),
        ("<|im_start|>", False), ("us", False), ("er", False), ("\n", False), ("us", False),
        ("<|im_end|>", False), ("\n", False),
        ("<|im_start|>", False), ("as", False), ("s", False), ("istant", False), ("\n", False),
        (" lazy", True), (" dog", True), ("<|im_end|>", True), ("\n", False),
    ]  # fmt: skip


def test_pad_token_being_the_end_token_hides_nothing() -> None:
    tokenizer = tokenizer_with(CHATML)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = _row(CHATML, TWO_TURNS)
    ends = [t for i, t in zip(row.input_ids, row.trained, strict=True) if i == 2]
    assert ends == [False, True, False, True]


def test_marks_agree_with_transformers_own_mask_of_generation_markers() -> None:
    messages = chat("hello", "the lazy dog", "question?", "world")
    template = MARKED.replace(
        "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
    )
    expected = tokenizer_with(template).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    row = _row(CHATML, messages)
    assert row.input_ids == expected["input_ids"]
    assert [int(trained) for trained in row.trained] == expected["assistant_masks"]


def test_a_token_across_the_boundary_belongs_to_the_prompt() -> None:
    # The line break that ends the prompt and the one that begins the answer make one token.
    tokenizer = tokenizer_with(CHATML)
    tokenizer.add_tokens(["\n\n"])
    messages = chat("hello", "\ndog")
    row = tokenize_row(tokenizer, messages, 512, {2})
    across = row.input_ids.index(tokenizer.convert_tokens_to_ids("\n\n"))
    assert not row.trained[across]
    assert all(row.trained[across + 1 : -1])


def test_an_end_token_written_by_the_assistant_does_not_end_the_mask() -> None:
    messages = chat("hello", "say <|im_end|> and more")
    assert _spans(CHATML, _row(CHATML, messages)) == ["say <|im_end|> and more<|im_end|>"]


def test_long_rows_are_cut_at_the_end_and_counted() -> None:
    whole = _row(CHATML, TWO_TURNS)
    cut = _row(CHATML, TWO_TURNS, max_length=len(whole.input_ids) - 4)
    assert cut.input_ids == whole.input_ids[:-4]
    assert cut.trained == whole.trained[:-4]
    assert (whole.truncated_tokens, cut.truncated_tokens) == (0, 4)


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (FORGETFUL, chat("a", "why</think>b", "c", "d"), "message 2 \\(assistant.*generation"),
        (ENDLESS, chat("a", "b"), "does not end an assistant's turn"),
        (CHATML, [{"role": "tool", "content": "x"}, *chat("a", "b")], "unknown role tool"),
        (CHATML_DEFAULT_SYSTEM, [{"role": "assistant", "content": "x"}], "begins with system or"),
    ],
    ids=["rewrites", "endless", "role", "assistant-first"],
)
def test_what_cannot_be_masked_is_refused(
    template: str, messages: list[dict[str, str]], reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        _row(template, messages)


def test_a_template_that_rewrites_is_fine_where_nothing_was_rewritten() -> None:
    assert _spans(FORGETFUL, _row(FORGETFUL, chat("a", "why</think>b"))) == [
        "why</think>b<|im_end|>"
    ]


def test_prompts_are_what_serving_would_send() -> None:
    tokenizer = tokenizer_with(CHATML)
    assert tokenizer.decode(prompt_ids(tokenizer, TWO_TURNS)) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(_TEXT, _TEXT.filter(lambda t: t.strip())), min_size=1, max_size=4))
def test_trained_text_is_what_the_assistant_said(turns: list[tuple[str, str]]) -> None:
    # `<|` could spell a special token, which would end a turn early in the check below.
    messages = chat(*[part.replace("<|", "<") for turn in turns for part in turn])
    row = _row(CHATML, messages)
    said = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    for span, answer in zip(_spans(CHATML, row), said, strict=True):
        assert answer.endswith(span)
        # At most what one token across the boundary took.
        assert len(answer) - len(span) <= 2
