"""Whole files in a folder, here and at a URL."""

import fcntl
import os
from contextlib import ExitStack

import pytest

from dlops_dist import files
from dlops_dist.errors import UserError
from dlops_dist.files import Folder, locked, write_file


@pytest.fixture(params=["path", "file", "memory"])
def folder(request, tmp_path):
    place = {"path": tmp_path / "f", "file": f"file://{tmp_path}/f", "memory": f"memory://{tmp_path.name}/f"}
    return Folder(place[request.param])


def put(folder, name, content):
    folder.write(name, lambda file: file.write(content))


def get(folder, name):
    with folder.open(name) as file:
        return file.read()


def test_what_is_written_is_read_listed_replaced_and_deleted(folder):
    assert folder.names() == []
    put(folder, "b", b"one")
    put(folder, "a", b"two")
    put(folder / "below", "c", b"three")
    assert folder.names() == ["a", "b"]
    assert get(folder / "below", "c") == b"three"
    put(folder, "b", b"four")
    assert get(folder, "b") == b"four"
    folder.delete("a")
    assert folder.names() == ["b"]
    with pytest.raises(FileNotFoundError):
        folder.open("a")


def test_what_is_appended_comes_after_what_is_there(folder):
    put(folder, "a", b"one\n")
    folder.append("a", "two\n")
    folder.append("b", "three\n")
    assert (get(folder, "a"), get(folder, "b")) == (b"one\ntwo\n", b"three\n")


def test_a_write_that_fails_leaves_the_file_that_was_there(folder):
    put(folder, "a", b"whole")

    def half(file):
        file.write(b"ha")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        folder.write("a", half)
    assert (folder.names(), get(folder, "a")) == (["a"], b"whole")
    put(folder, "a", b"new")
    assert folder.local is None or [path.name for path in folder.local.iterdir()] == ["a"]


def test_a_full_disk_names_the_file(tmp_path):
    def full(_):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"):
        Folder(tmp_path).write("a", full)


def test_a_folder_that_is_none_names_the_file_that_was_to_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'.*/nowhere/a'"):
        write_file(tmp_path / "nowhere/a", lambda file: file.write(b""))


def test_files_are_written_into_one_folder_at_the_same_time(folder):
    """As rows of metrics are, while the process that owns the run renews its lease."""

    def slowly(file):
        file.write(b"rows")
        put(folder, "lease", b"of mine")

    folder.write("metrics", slowly)
    assert {name: get(folder, name) for name in folder.names()} == {"metrics": b"rows", "lease": b"of mine"}


# locks


@pytest.mark.parametrize("name", ["", "file"])
def test_what_is_locked_is_refused_by_name_until_it_is_let_go(name, tmp_path, user_error):
    path = tmp_path / name
    with locked(path, "packed"), user_error(path, "is being packed by another process"), locked(path, "packed"):
        pass
    with locked(path, "packed"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ([name] if name else [])


def test_who_waits_is_told_and_comes_next(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "TELL_EVERY_S", 0.0)
    told, holder = [], ExitStack()
    holder.enter_context(locked(tmp_path, "packed"))

    def tell():
        told.append(1)
        holder.close()

    with locked(tmp_path, "packed", tell):
        assert told == [1]
        other = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)


def test_files_made_by_path_arrive(folder):
    with folder.as_path() as path:
        (path / "x.png").write_bytes(b"picture")
    assert get(folder, "x.png") == b"picture"


def test_a_url_that_nothing_knows_is_one_line():
    with pytest.raises(UserError, match=r"^nowhere://x: .*nowhere"):
        Folder("nowhere://x")
