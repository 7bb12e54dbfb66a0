"""The keys file and `qlora-serve keys`."""

import hashlib
import json
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qlora_serve.cli.main import main
from qlora_serve.errors import ConfigError
from qlora_serve.serve.api.access import KeyRing
from qlora_serve.serve.keys import KeyRecord, add_key, read_keys, revoke_key


def _run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["qlora-serve", "keys", *arguments])
    with pytest.raises(SystemExit) as leaving:
        main()
    said = capsys.readouterr()
    return int(leaving.value.code or 0), said.out, said.err


def test_a_key_is_shown_once_and_the_file_holds_its_hash(tmp_path, monkeypatch, capsys) -> None:
    file = tmp_path / "keys.json"
    flags = ["--keys", str(file), "--adapter", "support-*", "--requests-per-minute", "60"]
    code, out, err = _run(monkeypatch, capsys, "add", "alice", *flags)
    key = out.strip()
    assert (code, len(key)) == (0, 47)
    assert "not shown again" in err
    assert key not in err
    content = file.read_text()
    assert key not in content
    assert hashlib.sha256(key.encode()).hexdigest() in content
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    code, out, _ = _run(monkeypatch, capsys, "list", "--keys", str(file), "--json")
    [shown] = json.loads(out)
    assert "sha256" not in shown
    assert shown["adapters"] == ["support-*"]
    assert shown["requests_per_minute"] == 60
    assert shown["scopes"] == ["infer"]
    monkeypatch.setenv("COLUMNS", "70")
    code, out, _ = _run(monkeypatch, capsys, "list", "--keys", str(file))
    assert "alice" in out
    assert shown["id"] in out, "whole, also in a narrow terminal"


def test_a_revoked_key_stays_listed_and_its_name_is_free(tmp_path, monkeypatch, capsys) -> None:
    file = str(tmp_path / "keys.json")
    code, out, _ = _run(monkeypatch, capsys, "add", "a", "--keys", file, "--json")
    made = json.loads(out)
    code, _, err = _run(monkeypatch, capsys, "add", "a", "--keys", file)
    assert code == 1
    assert "already has a key called 'a'" in err
    code, out, _ = _run(monkeypatch, capsys, "revoke", made["id"], "--keys", file, "--json")
    assert code == 0
    assert json.loads(out)["revoked"]
    code, _, err = _run(monkeypatch, capsys, "revoke", "a", "--keys", file)
    assert code == 1
    assert "no key in force is called 'a'" in err
    assert _run(monkeypatch, capsys, "add", "a", "--keys", file)[0] == 0
    assert [record.revoked is None for record in read_keys(Path(file))] == [False, True]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["list"], 1, "no keys file at"),
        (["revoke", "x"], 1, "no keys file at"),
        (["add", "x", "--scope", "root"], 2, "--scope root: expected infer or admin"),
        (["add", ""], 1, "name: String should have at least 1 character"),
        (["add", "x", "--adapter", "a", "--no-adapters"], 2, "not both"),
        (["add", "x", "--tokens-per-minute", "0"], 2, ""),
    ],
)
def test_what_cannot_be_done_is_one_line(
    tmp_path, monkeypatch, capsys, arguments, code, said
) -> None:
    file = tmp_path / "keys.json"
    found, _, err = _run(monkeypatch, capsys, *arguments, "--keys", str(file))
    assert found == code
    assert said in err
    assert not file.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not a keys file: Expecting"),
        ("[]", "is not a keys file"),
        ('{"keys": [{"id": "x"}]}', "keys.0."),
        ('{"version": 2}', "version"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, said) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_keys(file)
    with pytest.raises(ConfigError, match=said):
        add_key(file, name="x")
    assert file.read_text() == content


def test_changes_at_once_lose_none(tmp_path) -> None:
    file = tmp_path / "keys.json"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: add_key(file, name=f"n{n}")[1].id, range(24)))
    assert sorted(record.id for record in read_keys(file)) == sorted(made)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".keys.json.lock", "keys.json"]


def test_patterns_match_names_exactly() -> None:
    fields = {"id": "key_" + "0" * 12, "name": "x", "sha256": "0" * 64, "created": ""}
    key = KeyRecord(adapters=("support-*", "x?"), **fields)
    assert [key.allows(n) for n in ("support-a", "Support-a", "x1", "x12", "a")] == [
        True, False, True, False, False,
    ]  # fmt: skip
    assert not key.sees_all
    assert not KeyRecord(adapters=(), **fields).allows("a")


def test_a_ring_follows_its_file_and_survives_a_broken_one(tmp_path) -> None:
    file = tmp_path / "keys.json"
    first, record = add_key(file, name="first", requests_per_minute=2)
    ring = KeyRing(file)
    caller = ring.caller(first)
    assert caller is not None
    assert caller.id == record.id
    assert ring.caller("") is None
    assert ring.caller(first[:-1]) is None
    assert ring.caller(record.sha256) is None
    second, _ = add_key(file, name="second")
    assert ring.caller(second) is not None
    assert ring.caller(first).quota is caller.quota, "what was used stays used"
    good = file.read_text()
    file.write_text("broken")
    assert ring.caller(second) is not None
    file.unlink()
    assert ring.caller(second) is not None
    file.write_text(good)
    revoke_key(file, "second")
    assert ring.caller(second) is None
    assert len(ring) == 1
