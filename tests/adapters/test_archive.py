"""Archives from anywhere: unpacked whole, or refused with nothing written outside."""

import io
import os
import stat
import tarfile
import zipfile

import pytest

from qlora_serve.adapters import archive as archives
from qlora_serve.adapters.archive import unpack
from qlora_serve.adapters.sources import find_source
from qlora_serve.adapters.store import AdapterStore
from qlora_serve.errors import AdapterError
from tests.bare_adapters import content, write_bare_adapter

LIMIT = 1_000_000


@pytest.fixture
def into(tmp_path):
    folder = tmp_path / "outer" / "into"
    folder.mkdir(parents=True)
    return folder


def write_zip(path, *members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data, *mode in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if mode:
                info.external_attr = mode[0] << 16
            opened.writestr(info, data)
    return path


def write_tar(path, *members):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as opened:
        for name, data, *changes in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in (changes[0] if changes else {}).items():
                setattr(info, key, value)
            opened.addfile(info, io.BytesIO(data))
    return path


def refuse(archive, into, words, limit=LIMIT):
    outside = sorted(into.parent.parent.rglob("*"))
    with pytest.raises(AdapterError, match=words) as caught:
        unpack(archive, into, limit)
    assert "\n" not in str(caught.value)
    assert str(archive) in str(caught.value)
    after = [p for p in sorted(into.parent.parent.rglob("*")) if not p.is_relative_to(into)]
    assert after == [p for p in outside if not p.is_relative_to(into)]


@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz", "tgz"])
@pytest.mark.parametrize(
    "name", ["/etc/evil", "../evil", "a/../../evil", "..", "a\\..\\evil", "C:/evil"]
)
def test_paths_that_lead_out(tmp_path, into, ending, name):
    write = write_zip if ending == "zip" else write_tar
    archive = write(tmp_path / f"a.{ending}", ("good", b"x"), (name, b"x"))
    refuse(archive, into, "leads out of it")


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE"])
@pytest.mark.parametrize("target", ["/etc/passwd", "good"])
def test_tar_members_that_are_no_files(tmp_path, into, kind, target):
    changes = {"type": getattr(tarfile, kind), "linkname": target}
    archive = write_tar(tmp_path / "a.tar", ("good", b"x"), ("bad", b"", changes))
    refuse(archive, into, "only plain files")
    assert not os.path.lexists(into / "bad")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_zip_members_that_are_no_files(tmp_path, into, kind):
    archive = write_zip(tmp_path / "a.zip", ("bad", b"/etc/passwd", kind | 0o777))
    refuse(archive, into, "only plain files")


def test_link_and_then_a_file_through_it(tmp_path, into):
    changes = {"type": tarfile.SYMTYPE, "linkname": ".."}
    archive = write_tar(tmp_path / "a.tar", ("door", b"", changes), ("door/evil", b"x"))
    refuse(archive, into, "a link")


@pytest.mark.parametrize("ending", ["zip", "tar.gz", "tar"])
def test_more_bytes_than_allowed(tmp_path, into, ending):
    write = write_zip if ending == "zip" else write_tar
    archive = write(tmp_path / f"a.{ending}", ("one", bytes(LIMIT - 10)), ("two", bytes(11)))
    refuse(archive, into, "--max-unpacked-size")
    fine = write(tmp_path / f"b.{ending}", ("three", bytes(LIMIT - 10)), ("four", bytes(10)))
    unpack(fine, into, LIMIT)
    assert (into / "three").stat().st_size == LIMIT - 10


def test_zip_that_lies_about_its_size(tmp_path, into):
    archive = write_zip(tmp_path / "a.zip", ("bomb", bytes(5_000_000)))
    data = archive.read_bytes().replace(
        (5_000_000).to_bytes(4, "little"), (9).to_bytes(4, "little")
    )
    archive.write_bytes(data)
    assert len(data) < 20_000
    refuse(archive, into, "cannot be unpacked|--max-unpacked-size")
    assert sum(f.stat().st_size for f in into.rglob("*") if f.is_file()) <= LIMIT


def test_many_files(tmp_path, into, monkeypatch):
    monkeypatch.setattr(archives, "MAX_FILES", 20)
    for ending, write in (("zip", write_zip), ("tar", write_tar)):
        archive = write(tmp_path / f"a.{ending}", *((f"{ending}{n}", b"") for n in range(21)))
        refuse(archive, into, "more than 20 files")


def test_tar_with_an_outsized_header(tmp_path, into):
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as opened:
        info = tarfile.TarInfo("file")
        info.pax_headers = {"comment": "x" * 3_000_000}
        opened.addfile(info)
    refuse(path, into, "no honest archive")


@pytest.mark.parametrize("name", ["same", "same/below"])
def test_names_that_collide(tmp_path, into, name):
    for ending, write in (("zip", write_zip), ("tar", write_tar)):
        archive = write(tmp_path / f"a.{ending}", ("same", b"1"), (name, b"2"))
        refuse(archive, into, "twice")
        (into / "same").unlink()


@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz"])
def test_broken_archives(tmp_path, into, ending):
    archive = tmp_path / f"a.{ending}"
    archive.write_bytes(b"this is no archive at all" * 100)
    refuse(archive, into, "cannot be unpacked")
    write = write_zip if ending == "zip" else write_tar
    write(archive, ("file", os.urandom(50_000)))
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    refuse(archive, into, "cannot be unpacked")


@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz", "tgz"])
@pytest.mark.parametrize("inside", ["", "runs/mine/"])
def test_adapter_out_of_an_archive(tmp_path, ending, inside):
    source = write_bare_adapter(tmp_path / "source")
    write = write_zip if ending == "zip" else write_tar
    members = [(inside + name, data) for name, data in content(source).items()]
    archive = write(tmp_path / f"a.{ending}", *members, (inside + "optimizer.pt", b"x"))
    store = AdapterStore(tmp_path / "store")
    added = store.add("mine", find_source(str(archive)), str(archive))
    assert content(added.entry.path) == content(source)
    assert added.left_out == ("optimizer.pt",)


def test_archives_that_hold_no_one_adapter(tmp_path):
    store = AdapterStore(tmp_path / "store")
    none = write_zip(tmp_path / "none.zip", ("readme", b"x"))
    two = write_zip(
        tmp_path / "two.zip", ("a/adapter_config.json", b"{}"), ("b/adapter_config.json", b"{}")
    )
    pickled = write_zip(
        tmp_path / "p.zip", ("adapter_config.json", b"{}"), ("adapter_model.bin", b"x")
    )
    for archive, words in (
        (none, "holds no adapter_config.json"),
        (two, r"holds 2 adapters \(a, b\)"),
        (pickled, rf"adapters convert {pickled} "),
    ):
        with pytest.raises(AdapterError, match=words) as caught:
            store.add("mine", find_source(str(archive)), str(archive))
        assert ".partial" not in str(caught.value)
    assert store.list() == {}
