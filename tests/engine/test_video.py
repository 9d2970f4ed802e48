"""Prediction on videos: every frame in pixels of the source, odd sides, faults in one line."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from tests.engine.toys import toy_recipe, toy_samples

import torchive.engine.video as video
from torchive.engine.predict import predict
from torchive.engine.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "detection"
    train(toy_recipe("detection"), out, samples=toy_samples("detection"), progress=False)
    return out


def clip(path: Path, frames: int = 20, size: tuple[int, int] = (46, 34), rate: int = 10) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for k in range(frames):
            pixels = np.full((size[1], size[0], 3), 10 * k % 255, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_a_video_among_images_gives_a_video_and_its_frames(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    clip(folder / "street.avi")
    found = predict(run, [str(folder)], tmp_path / "out", progress=False)
    assert [path.name for path in found] == ["street.mp4"]
    assert found.exit_status == 0
    values = json.loads((tmp_path / "out" / "street.json").read_text())
    assert (values["width"], values["height"], values["frames_per_second"]) == (46, 34, 10)
    assert [frame["time"] for frame in values["frames"]] == pytest.approx([k / 10 for k in range(20)])
    boxes = np.array([thing["box"] for frame in values["frames"] for thing in frame["objects"]])
    assert len(boxes)
    assert (boxes >= 0).all()
    assert (boxes <= [46, 34, 46, 34]).all()
    with av.open(str(found[0])) as drawn:
        shapes = [frame.to_ndarray(format="rgb24").shape for frame in drawn.decode(video=0)]
    assert len(shapes) == 20
    assert len(set(shapes)) == 1
    assert shapes[0][0] >= 34, "the picture, and a line that says what is drawn"
    assert shapes[0][1:] == (46, 3)
    index = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert index["predictions"][0]["frames"] == 20


def test_odd_sides_are_written_with_one_more_pixel(tmp_path: Path) -> None:
    import torch

    with video._Writer(tmp_path / "odd.mp4") as writer:
        for _ in range(3):
            writer.add(torch.full((3, 35, 47), 128, dtype=torch.uint8), 10)
    with av.open(str(tmp_path / "odd.mp4")) as drawn:
        frames = [frame.to_ndarray(format="rgb24") for frame in drawn.decode(video=0)]
    assert [frame.shape for frame in frames] == [(36, 48, 3)] * 3
    assert abs(int(frames[0][-1, -1, 0]) - 128) < 8


def test_faults_are_one_line_each_and_leave_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = clip(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "noise.mkv").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    sources = [str(tmp_path / name) for name in ("empty.mp4", "noise.mkv", "cut.mp4", "absent.mp4")]
    found = predict(run, sources, tmp_path / "out", progress=False)
    assert found == []
    assert [line.partition(": ")[0] for line in found.errors] == sources
    assert all("\n" not in line for line in found.errors)
    assert "does not exist" in found.errors[-1]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["predictions.json"]
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    (line,) = predict(run, [str(tmp_path / "whole.mp4")], tmp_path / "out", progress=False).errors
    assert "pip install 'torchive[video]'" in line
