"""The cache folder: where it is, how a file or folder enters it whole, and how processes take turns."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchive.data.faults import DataError


def cache_dir() -> Path:
    """``$TORCHIVE_CACHE``, else the platform's cache folder for the user. It need not exist yet."""
    chosen = os.environ.get("TORCHIVE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "torchive"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "torchive"
    return Path(os.environ.get("XDG_CACHE_HOME", home / ".cache")) / "torchive"


def ensure_folder(path: Path) -> Path:
    """Make a folder of the cache; DataError where the disk refuses."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot make the cache folder ({error.strerror}); set TORCHIVE_CACHE") from error
    return path


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``: one process at a time, released by the system if the process dies."""
    ensure_folder(path.parent)
    try:
        handle = path.open("a+b")
    except OSError as error:
        raise DataError(f"{path}: the cache cannot be written ({error.strerror}); set TORCHIVE_CACHE") from error
    with handle:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle.fileno(), msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined, unused-ignore]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its name only when the block ends without an error."""
    ensure_folder(target.parent)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)  # a temporary folder is its owner's alone; a cache may be shared
        scratch.rename(target)
    except OSError as error:
        raise DataError(f"{target}: cannot write the cache ({error.strerror or error})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_atomic(target: Path, content: bytes) -> None:
    """Write a small file under a temporary name, then rename it."""
    ensure_folder(target.parent)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)
