"""Tokenizers in GGUF: byte-level BPE (gpt2) and SentencePiece's BPE (llama)."""

import json
from dataclasses import dataclass
from typing import Any

from qlora_serve.base.tokenizer import end_of_turn_id
from qlora_serve.errors import MergeError

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is cut before merging → llama.cpp's name for it.
_SPLITS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_LETTERS + "{1,3}" + _REST,): "llama-bpe",
    (_LETTERS + _REST,): "qwen2",
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class _Vocabulary:
    model: str
    """gpt2 or llama."""
    split: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    adds_space: bool


def write_vocabulary(writer: Any, tokenizer: Any, rows: int) -> None:
    """Writes tokens, merges, special tokens and the chat template.

    Args:
        writer: gguf's writer.
        tokenizer: a fast tokenizer.
        rows: of the embeddings; tokens are added up to there.

    Raises:
        MergeError: llama.cpp has no such tokenizer.
    """
    vocabulary = read_vocabulary(tokenizer, rows)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.adds_space)
    for name in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(int(token))
    end = end_of_turn_id(tokenizer)
    if end is not None:
        writer.add_eot_token_id(end)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def read_vocabulary(tokenizer: Any, rows: int) -> _Vocabulary:
    """A tokenizer in GGUF's terms.

    Raises:
        MergeError: llama.cpp has no such tokenizer.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise _unsupported(f"its model is {model['type']}, expected BPE")
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])
    ]
    tokens, types = _tokens(model, content["added_tokens"], rows)
    if model.get("byte_fallback"):
        return _sentencepiece(content, tokens, types, merges)
    return _Vocabulary("gpt2", _split_name(content), tokens, types, merges, [], False)


def _tokens(
    model: dict[str, Any], added: list[dict[str, Any]], rows: int
) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [_UNUSED] * rows
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, _NORMAL
        if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            types[index] = _BYTE
        if token == model.get("unk_token"):
            types[index] = _UNKNOWN
    for entry in added:
        index = entry["id"]
        is_unknown = types[index] == _UNKNOWN
        tokens[index] = entry["content"]
        types[index] = _CONTROL if entry["special"] else _USER_DEFINED
        if is_unknown:
            types[index] = _UNKNOWN
    return tokens, types


def _split_name(content: dict[str, Any]) -> str:
    steps = _steps(content["pre_tokenizer"])
    kinds = tuple(step["type"] for step in steps)
    last = steps[-1] if steps else {}
    problem = ""
    if kinds[-1:] != ("ByteLevel",):
        problem = f"its pre-tokenizer is {'+'.join(kinds) or 'none'}, expected ByteLevel at the end"
    elif last.get("add_prefix_space"):
        problem = "it puts a space before the text"
    elif kinds == ("ByteLevel",) and not last.get("use_regex", True):
        problem = "it does not split text at all"
    elif kinds == ("Digits", "ByteLevel") and not steps[0].get("individual_digits"):
        problem = "it splits off whole numbers"
    if problem:
        raise _unsupported(problem)
    key = (steps[0]["pattern"].get("Regex", ""),) if kinds == ("Split", "ByteLevel") else kinds
    if key not in _SPLITS:
        raise _unsupported(f"llama.cpp has no name here for how it splits text ({'+'.join(key)})")
    return _SPLITS[key]


def _sentencepiece(
    content: dict[str, Any], tokens: list[str], types: list[int], merges: list[str]
) -> _Vocabulary:
    """SentencePiece merges the pair with the highest score first: an early merge scores high."""
    steps = _steps(content["normalizer"]) + _steps(content["pre_tokenizer"])
    adds_space = any(
        step["type"] == "Prepend"
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
    odd = [step["type"] for step in steps if step["type"] not in _SPACES]
    if odd:
        raise _unsupported(f"it also has the steps {'+'.join(odd)}")
    rank = {merge.replace(" ", "", 1): index for index, merge in reversed(list(enumerate(merges)))}
    scores = [-float(rank.get(token, len(merges) + index)) for index, token in enumerate(tokens)]
    scores = [score if kind == _NORMAL else 0.0 for score, kind in zip(scores, types, strict=True)]
    return _Vocabulary("llama", "default", tokens, types, merges, scores, adds_space)


_SPACES = ("Prepend", "Replace", "Metaspace", "Split")


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    if part["type"] == "Sequence":
        inner = part.get("pretokenizers") or part.get("normalizers") or []
        return list(inner)
    return [part]


def _unsupported(reason: str) -> MergeError:
    known = ", ".join(sorted(set(_SPLITS.values())))
    return MergeError(
        f"llama.cpp cannot run this tokenizer: {reason}; supported are byte-level BPE ({known}) "
        "and SentencePiece's BPE with byte fallback"
    )
