"""Files that are whole or not there: atomic writes, canonical JSON, content hashes, and errors in one line."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sbiplat.errors import UserError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; on success it is flushed to disk and renamed to `path`, on failure removed."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(_ordinary_mode())  # some libraries make files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def _ordinary_mode() -> int:
    """What a new file may do here: all that the umask leaves."""
    mask = os.umask(0o022)
    os.umask(mask)
    return 0o666 & ~mask


def sync_directory(path: Path) -> None:
    """Flush a directory's entries, so that a rename in it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


LOCK_SECONDS = 3.0
_locks: set[int] = set()


@contextmanager
def locked(folder: Path, busy: UserError) -> Iterator[None]:
    """Make a directory and hold its lock, so that one process at a time writes in it; raises `busy` where another does.

    A job that was just killed may take a moment to let go of it. Where the file system has no locks, there is none.
    """
    with disk_errors(folder / "lock"):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    _locks.add(handle)
    try:
        end = time.monotonic() + LOCK_SECONDS
        while not _try_lock(handle):
            if time.monotonic() > end:
                raise busy
            time.sleep(0.05)
        yield
    finally:
        _locks.discard(handle)
        os.close(handle)


def let_go_of_locks() -> None:
    """In a forked process: what it leaves running shall not hold its parent's locks."""
    for handle in _locks:
        os.close(handle)
    _locks.clear()


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks: the user answers for running one job a directory
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; a full disk or a folder that cannot be written is one clear line."""
    with disk_errors(path), atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, what: str, error: type[UserError]) -> dict[str, Any]:
    """The JSON object in `path`; `what` names it in the error where it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_each_once)
    except FileNotFoundError:
        raise error(f"no {what} at {path}") from None
    except (OSError, UnicodeDecodeError, RecursionError) as problem:
        raise error(f"{path} cannot be read: {problem}") from None
    except json.JSONDecodeError as problem:
        raise error(f"{path} is damaged: not JSON at line {problem.lineno}") from None
    except ValueError as problem:
        raise error(f"{path} is damaged: {problem}") from None
    if not isinstance(value, dict):
        raise error(f"{path} is damaged: expected a JSON object")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, which is no JSON")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names all differ: of a name given twice, programs differ in which they read."""
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"it has {name[:80]!r} twice")
        made[name] = value
    return made


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {text[:40]}, which no number here can be")
    return value


def canonical(value: Any) -> bytes:
    """JSON in one fixed form: sorted keys, no spaces, no NaN. What hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def digest_bytes(data: bytes) -> str:
    """SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes; raises OSError for what is no plain file, which might have no end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, HDF5's included, says that the disk is full or a quota reached."""
    full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    text = str(error)
    return getattr(error, "errno", None) in full or any(f"errno = {code}" in text for code in full) or "No space left" in text


@contextmanager
def disk_errors(path: Path, kept: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turn a failed write to `path` into one line: what, where, and the mend."""
    try:
        yield
    except Exception as error:  # libraries have disk errors of their own kinds
        if is_disk_full(error):
            raise UserError(f"the disk is full at {path.parent}; free some space and run the same command again{kept()}") from None
        if isinstance(error, FileNotFoundError) and not path.parent.is_dir():
            raise UserError(f"{path} cannot be written: there is no folder {path.parent}") from None
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError | IsADirectoryError | FileNotFoundError):
            raise UserError(f"{path} cannot be written: {error.strerror or error}; choose another place") from None
        raise
