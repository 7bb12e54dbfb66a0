"""A directory appears whole or not at all."""

import errno
import os
import signal
import threading

import pytest

from qlora_serve.errors import OutputError
from qlora_serve.files import exclusive_lock, held_staging, published_directory


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


def in_child(work):
    """Forks; the child does its work and is killed the hard way. Gives its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    target = tmp_path / "out"

    def fill_and_die():
        with published_directory(target) as folder:
            (folder / "half").write_text("x" * 1000)
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(fill_and_die) == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.")
    # Another output's leftovers, and hidden directories that only look alike, are not its own.
    kept = [tmp_path / ".other.00000000.partial", tmp_path / ".out.settings", tmp_path / ".out.x"]
    for folder in kept:
        folder.mkdir()
    with published_directory(target) as folder:
        assert not left.exists()
        (folder / "whole").write_text("x")
    assert sorted(tmp_path.iterdir()) == sorted([target, *kept])


def test_staging_of_a_living_process_is_left_alone(tmp_path):
    target = tmp_path / "out"
    with held_staging(tmp_path, "out") as staging:
        (staging / "mine").write_text("x")
        with published_directory(target) as folder:
            (folder / "file").write_text("x")
        assert (staging / "mine").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_lock_ends_with_its_holder(tmp_path):
    lock = tmp_path / "lock"
    held = exclusive_lock(lock)
    assert in_child(held.__enter__) == signal.SIGKILL
    with exclusive_lock(lock, wait_seconds=0):
        with (
            pytest.raises(OutputError, match="another process has held") as caught,
            exclusive_lock(lock, wait_seconds=0),
        ):
            pytest.fail("two hold it")
        assert "\n" not in str(caught.value)
