"""A directory appears whole or not at all."""

import errno
import threading

import pytest

from qlora_serve.errors import OutputError
from qlora_serve.files import published_directory


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_exception_leaves_nothing(tmp_path, error):
    def fail_half_way():
        with published_directory(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise error

    with pytest.raises(type(error)):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["file", "filled", "dangling link"])
def test_what_is_there_is_not_replaced(tmp_path, there):
    target = tmp_path / "out"
    if there == "file":
        target.write_text("mine")
    elif there == "filled":
        target.mkdir()
        (target / "mine").write_text("mine")
    else:
        target.symlink_to(tmp_path / "gone")
    with (
        pytest.raises(OutputError, match="already holds something"),
        published_directory(target),
    ):
        pytest.fail("the work must not begin")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_empty_directory_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b"):
        with published_directory(target) as folder:
            (folder / "file").write_text("x")
            (folder / "file").chmod(0o600)
            assert not target.is_dir() or not any(target.iterdir())
        assert [path.name for path in target.iterdir()] == ["file"]
        assert target.stat().st_mode & 0o777 == 0o755
        assert (target / "file").stat().st_mode & 0o777 == 0o644


def test_of_two_writers_one_wins(tmp_path):
    target = tmp_path / "out"
    meeting = threading.Barrier(2)
    endings = []

    def write(name):
        try:
            with published_directory(target) as folder:
                (folder / name).write_text(name)
                meeting.wait()
            endings.append(name)
        except OutputError:
            endings.append("refused")

    threads = [threading.Thread(target=write, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (ending for ending in endings if ending != "refused")
    assert len(endings) == 2
    assert [path.name for path in target.iterdir()] == [winner]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
        (Exception("Error while serializing: I/O error: x (os error 28)"), "the disk is full"),
        (Exception("I/O error: File too large (os error 27)"), "limit on file sizes"),
    ],
)
def test_disk_errors_are_the_users(tmp_path, error, words):
    with (
        pytest.raises(OutputError, match=words),
        published_directory(tmp_path / "out"),
    ):
        raise error
    assert list(tmp_path.iterdir()) == []
