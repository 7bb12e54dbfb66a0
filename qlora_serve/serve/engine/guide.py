"""Guides: grammars that an answer must follow, token by token, through llguidance."""

import json
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qlora_serve.base.load import LoadedBase
from qlora_serve.errors import ConfigError, RequestError
from qlora_serve.serve.engine.embedding import tokens_of

GuideKind = Literal["json_schema", "regex", "grammar", "choice", "lark"]

# Unbounded white space between JSON's parts is where small models get lost for ever.
JSON_SPACE = r"[\x20\x0A\x0D\x09]{1,40}"
_LONGEST_REASON = 500


class Guide:
    """A compiled grammar, from which every answer starts anew."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def start(self) -> "GuideState":
        """A state at the grammar's beginning."""
        return GuideState(self._matcher.deep_copy())


class GuideState:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def fault(self) -> str | None:
        """Why the grammar can no longer be followed, such as that it became too complex."""
        if not self._matcher.is_error():
            return None
        return f"the grammar cannot be followed: {_reason(self._matcher)}"

    def mask(self, size: int) -> Tensor:
        """Which tokens may come next, [size] bool; nothing after a fault.

        End tokens are among them where the answer may end.
        """
        allowed = np.zeros(size, dtype=bool)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if not self._matcher.is_error():
            known = np.unpackbits(bits, bitorder="little")[:size]
            allowed[: len(known)] = known
        return torch.from_numpy(allowed)

    def take(self, token: int) -> None:
        """Moves on by one token."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class GuideCompiler:
    """Compiles grammars for one base.

    Args:
        base: whose tokens and end tokens count.

    Raises:
        ConfigError: llguidance is not installed, or cannot read this tokenizer.
    """

    def __init__(self, base: LoadedBase) -> None:
        try:
            import llguidance
            import llguidance.hf
        except ImportError:
            raise ConfigError(
                "structured output needs llguidance: pip install 'qlora-serve[structured]'"
            ) from None
        self._library = llguidance
        size = max(len(base.tokenizer), tokens_of(base.model.get_output_embeddings()))
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(
                base.tokenizer, n_vocab=size, eos_token=sorted(base.stop_token_ids)
            )
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"structured output is not possible with this tokenizer: {reason}"
            ) from None

    def compile(self, kind: GuideKind, text: str) -> Guide:
        """Compiles a grammar; it may take a second, so keep it off the event loop.

        Args:
            kind: what `text` is: a JSON schema, a regular expression, a Lark or GBNF grammar, or
                a JSON list of texts to choose from.
            text: the grammar.

        Raises:
            RequestError: it is wrong, or too large; with llguidance's reason.
        """
        limits = self._library.LLParserLimits(verbose_errors=False)
        try:
            grammar = self._grammar(kind, text)
            matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        except (ValueError, TypeError) as error:
            raise RequestError(" ".join(str(error).split())[:_LONGEST_REASON]) from None
        if matcher.is_error():
            raise RequestError(_reason(matcher))
        return Guide(matcher)

    def _grammar(self, kind: GuideKind, text: str) -> str:
        if kind == "json_schema":
            return str(
                self._library.LLMatcher.grammar_from_json_schema(
                    text, overrides={"whitespace_pattern": JSON_SPACE}
                )
            )
        if kind == "choice":
            # As JSON schema's enum would quote them, the choices are written as Lark's literals.
            return str(
                self._library.LLMatcher.grammar_from_lark(
                    "start: " + " | ".join(json.dumps(item) for item in json.loads(text))
                )
            )
        return str(self._library.grammar_from(kind, text))


def _reason(matcher: Any) -> str:
    return " ".join(str(matcher.get_error()).split())[:_LONGEST_REASON]
