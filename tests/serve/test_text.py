"""Text comes out in whole characters and without stop texts, whatever the tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer

from qlora_serve.serve.engine.text import TextAssembler

TOKENIZER = tiny_tokenizer()
PIECES = ["Hello", " world", "\n", "é", "你好", "🙂", "🚀", " fox", "STOP", "ST", "<", "end", ">"]


def _ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_pieces_make_the_whole_text_and_never_split_a_character(text) -> None:
    assembler = TextAssembler(TOKENIZER)
    pieces = [assembler.push(token) for token in _ids(text)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + assembler.finish() == text


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.lists(st.sampled_from(["STOP", "OP w", "<end>", "你", "🙂🚀"]), min_size=1, max_size=3),
)
def test_stop_text_ends_the_answer_and_is_never_given_out(text, stops) -> None:
    assembler = TextAssembler(TOKENIZER, stops)
    given_out = ""
    for token in _ids(text):
        given_out += assembler.push(token)
        assert not any(stop in given_out for stop in stops)
        if assembler.stopped:
            break
    given_out += assembler.finish()
    ends = [text.find(stop) for stop in stops if stop in text]
    assert assembler.stopped == bool(ends)
    if not ends:
        assert given_out == text
    else:
        # The first stop text to be complete ends the answer.
        complete = min(
            (text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text
        )
        assert given_out == text[: min(e for e in ends if e <= complete[1])]


def test_an_unfinished_character_at_the_end_is_given_out_once() -> None:
    ids = _ids("a🙂")[:-1]
    assembler = TextAssembler(TOKENIZER)
    pieces = [assembler.push(token) for token in ids]
    assert "".join(pieces) == "a"
    assert assembler.finish() == TOKENIZER.decode(ids)[1:]


@pytest.mark.parametrize("special", ["<|im_start|>", "<|im_end|>"])
def test_special_tokens_have_no_text(special) -> None:
    assembler = TextAssembler(TOKENIZER)
    ids = [*_ids("a"), TOKENIZER.convert_tokens_to_ids(special), *_ids("b")]
    text = "".join(assembler.push(token) for token in ids) + assembler.finish()
    if special in TOKENIZER.all_special_tokens:
        assert text == "ab"
    else:
        assert text == TOKENIZER.decode(ids, skip_special_tokens=True)
