"""Giving memory back to the system."""

import sys
from pathlib import Path

import pytest
import torch

from qlora_serve.base import memory


def _resident() -> int:
    found = memory._resident()
    assert found is not None
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc's heap")
def test_blocks_between_those_in_use_are_given_back() -> None:
    # From its first free on, glibc takes blocks of this size from its heap.
    del (block := [torch.empty(2**20, dtype=torch.uint8)])[0]
    del block
    before = _resident()
    blocks = [torch.ones(2**20, dtype=torch.uint8) for _ in range(200)]
    kept = blocks[::20]  # nothing above them could be given back otherwise
    del blocks
    memory.give_back()
    assert _resident() - before < 60 * 2**20
    assert all(bool(block.all()) for block in kept)


def test_a_heap_is_trimmed_when_it_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([100, 104, 109, 110, 103])
    trimmed: list[int] = []
    monkeypatch.setattr(memory, "_resident", lambda: next(held))
    monkeypatch.setattr(memory, "_trim", lambda: trimmed.append(1))
    limit = memory.HeapLimit()
    seen = []
    for _ in range(5):
        limit.after_step()
        seen.append(len(trimmed))
    assert seen == [0, 0, 0, 1, 1]


def test_where_nothing_is_known_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(_: Path) -> str:
        raise FileNotFoundError

    trimmed: list[int] = []
    monkeypatch.setattr(Path, "read_text", unreadable)
    monkeypatch.setattr(memory, "_trim", lambda: trimmed.append(1))
    memory.HeapLimit().after_step()
    assert trimmed == []
