"""Tokenized rows on disk, found again by all that they were made from.

The name of an entry is a hash of the rows' content, the tokenizer, its chat template, the settings
and the versions of the libraries that tokenize. Nothing is ever stale: whatever changes makes
another name.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from qlora_serve.base.source import cache_folder
from qlora_serve.train.masks import TokenizedRow

_FORM = 1  # of the entries and of the masks' rules; raise it when either changes
_KEPT = 16  # entries; the ones that were used last


class TokenCache:
    """Entries in one folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or cache_folder() / "tokenized"

    def key(self, rows: Iterable[bytes], tokenizer: Any, settings: Sequence[Any]) -> str:
        """The name of an entry."""
        import tokenizers
        import transformers

        template = str(tokenizer.get_chat_template())
        # Llama 3's template writes today's date.
        today = date.today().isoformat() if "strftime" in template else ""
        versions = [_FORM, transformers.__version__, tokenizers.__version__]
        digest = hashlib.sha256()
        parts = [versions, settings, template, today, dict(tokenizer.special_tokens_map)]
        digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
        for row in rows:
            digest.update(row)
        return digest.hexdigest()

    def read(self, key: str) -> tuple[list[TokenizedRow], list[int]] | None:
        """The rows of an entry and where each came from, or None if it is not there."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        file = self._file(key)
        try:
            stored = load_file(file)
            os.utime(file)
        except (OSError, SafetensorError):
            return None
        rows, start = [], 0
        ids, trained = stored["input_ids"].tolist(), stored["trained"].tolist()
        for length, cut in zip(stored["lengths"].tolist(), stored["cut"].tolist(), strict=True):
            end = start + length
            rows.append(TokenizedRow(ids[start:end], trained[start:end], cut))
            start = end
        return rows, stored["origins"].tolist()

    def write(self, key: str, rows: Sequence[TokenizedRow], origins: Sequence[int]) -> None:
        """Keeps rows; a disk that cannot take them is no reason to stop."""
        import numpy as np
        from safetensors.numpy import save_file

        arrays = {
            "input_ids": np.array([i for row in rows for i in row.input_ids], np.int32),
            "trained": np.array([t for row in rows for t in row.trained], np.bool_),
            "lengths": np.array([len(row.input_ids) for row in rows], np.int64),
            "cut": np.array([row.truncated_tokens for row in rows], np.int64),
            "origins": np.array(origins, np.int64),
        }
        staging = self._file(f"{key}.{os.getpid()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(arrays, staging)
            staging.replace(self._file(key))
            self._forget_old()
        except Exception:  # safetensors wraps the system's errors in its own
            staging.unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _forget_old(self) -> None:
        entries = sorted(self._folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        for file in entries[:-_KEPT]:
            file.unlink(missing_ok=True)
