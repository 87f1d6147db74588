"""Files: whole or not there, one canonical form, and errors in one line."""

import errno
import json
import os

import pytest

from sbiplat import files
from sbiplat.errors import RunError, UserError


def test_an_atomic_write_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(FileNotFoundError), files.atomic_path(path) as temporary:
        os.rename(tmp_path / "nowhere", temporary)
    assert path.read_text() == "old"
    with files.atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_data_are_flushed_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def flush(handle):
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "data")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("name") or replace(*names))
    files.write_text(tmp_path / "a", "x")
    assert calls == ["data", "name", "folder"]


def test_canonical_json_has_one_form_for_one_value():
    assert files.canonical({"b": [1, 2.5], "a": None}) == b'{"a":null,"b":[1,2.5]}'
    assert files.digest_of({"a": 1, "b": 2}) == files.digest_of({"b": 2, "a": 1}) != files.digest_of({"a": 1, "b": 3})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_without_a_standard_form_is_not_written(value, tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"a": value})
    assert not list(tmp_path.iterdir())


def test_json_comes_back(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": [1, "ü"]})
    assert files.read_json(tmp_path / "a.json", "thing", RunError) == {"a": [1, "ü"]}
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, "ü"]}


@pytest.mark.parametrize(("content", "why"), [
    (None, "no thing at"), (b"{\n\n:", "not JSON at line 3"), (b"[1]", "expected a JSON object"),
    (b"\xff\xfe", "cannot be read"),
    (b"[" * 100_000, "cannot be read|not JSON"),
])
def test_json_that_cannot_be_read_is_one_line(content, why, tmp_path):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(RunError, match=why) as told:
        files.read_json(tmp_path / "a.json", "thing", RunError)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError(errno.EFBIG, "File too large"),
    RuntimeError("Can't write data (file write failed: errno = 28, error message = 'No space left on device')"),
])
def test_a_full_disk_in_any_words_is_one_line_with_the_mend(error, tmp_path):
    with pytest.raises(UserError,
                       match=r"the disk is full at .*; free some space and run the same command again; all is kept"), \
            files.disk_errors(tmp_path / "a", lambda: "; all is kept"):
        raise error


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), NotADirectoryError(20, "Not a directory")])
def test_a_place_that_cannot_be_written_is_one_line(error, tmp_path):
    with pytest.raises(UserError, match=r"cannot be written: .*; choose another place"), files.disk_errors(tmp_path / "a"):
        raise error


def test_an_error_that_is_no_disks_is_let_through(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), files.disk_errors(tmp_path / "a"):
        raise RuntimeError("a bug")


def test_a_files_digest_is_that_of_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.digest_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_pipe_has_no_digest_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no plain file"):
        files.digest_file(tmp_path / "pipe")


@pytest.mark.parametrize("text", ['{"a": 1e999}', '{"a": [1, -1e400]}'])
def test_a_number_beyond_all_is_damage(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="damaged"):
        files.read_json(tmp_path / "x.json", "x", UserError)


def test_many_names_of_which_one_is_given_twice_are_told_at_once(tmp_path):
    (tmp_path / "x.json").write_text("{" + ", ".join(f'"n{k}": 1' for k in range(100_000)) + ', "n7": 2}')
    with pytest.raises(UserError, match="'n7' twice"):
        files.read_json(tmp_path / "x.json", "x", UserError)
