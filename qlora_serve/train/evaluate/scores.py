"""What an answer is worth beside its reference."""

import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from qlora_serve.errors import ConfigError

# rouge-score's own tokenizer drops all that is not a-z; words of other scripts must count too, and
# where words are not spaced each character is one.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


class Scorer:
    """Scores answers: exact match, ROUGE-L (rouge-score), chrF (sacrebleu), JSON.

    Raises:
        ConfigError: the extra `eval` is not installed.
    """

    def __init__(self, json_keys: Sequence[str], looks_at_json: bool) -> None:
        for module in ("rouge_score", "sacrebleu"):
            if find_spec(module) is None:
                raise ConfigError(
                    f"scoring answers needs {module}: pip install 'qlora-serve[eval]', or give "
                    "--no-answers for the loss alone"
                )
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.chrf import CHRF

        self._rouge = RougeScorer(["rougeL"], tokenizer=_Words())
        self._chrf = CHRF()
        self._json_keys = tuple(json_keys)
        self._looks_at_json = looks_at_json

    def score(self, answer: str, reference: str) -> dict[str, float]:
        """Each metric from 0 to 1."""
        scores = {
            "exact": float(answer.strip() == reference.strip()),
            "rouge_l": float(self._rouge.score(reference, answer)["rougeL"].fmeasure),
            "chrf": float(self._chrf.sentence_score(answer, [reference]).score) / 100,
        }
        if self._looks_at_json:
            scores["json"] = float(is_json_object(answer, self._json_keys))
        return scores


class _Words:
    def tokenize(self, text: str) -> list[str]:
        """Words in lower case; characters where a script has no spaces."""
        return _WORD.findall(text.lower())


def is_json_object(text: str, keys: Sequence[str] = ()) -> bool:
    """Whether a text is a JSON object, all of it, with these keys."""
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and all(key in found for key in keys)
