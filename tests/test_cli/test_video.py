"""Videos, frame by frame."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from slak_mm.cli import ConfigOverrideError
from slak_mm.cli.video import Video, writing_video
from slak_mm.engine.samples import DataError


def write_frames(path, count, size=(48, 64), fps=12.5):
    """Frames that get brighter by 10 each."""
    with writing_video(path, fps, size) as write:
        for index in range(count):
            write(np.full((*size, 3), 10 * index, np.uint8))


def test_frames_rate_and_size_come_back(tmp_path):
    write_frames(tmp_path / 'a.mp4', 15)
    video = Video(str(tmp_path / 'a.mp4'))
    assert (video.fps, video.size, len(video)) == (12.5, (48, 64), 15)
    brightness = [float(frame.mean()) for frame in video]
    assert brightness == pytest.approx([10 * index for index in range(15)], abs=5)
    assert [path.name for path in tmp_path.iterdir()] == ['a.mp4']


@pytest.mark.parametrize('error', [KeyboardInterrupt, DataError])
def test_an_interrupt_leaves_a_whole_video(tmp_path, error):
    path = tmp_path / 'a.mp4'
    with pytest.raises(error), writing_video(path, 10, (48, 64)) as write:
        for _ in range(7):
            write(np.zeros((48, 64, 3), np.uint8))
        raise error
    assert len(list(Video(str(path)))) == 7
    with pytest.raises(error), writing_video(path, 10, (48, 64)):
        raise error  # before the first frame: what was there stays
    assert [file.name for file in tmp_path.iterdir()] == ['a.mp4'] and len(Video(str(path))) == 7


def test_damaged_videos(tmp_path):
    path = tmp_path / 'a.mp4'
    write_frames(path, 10)
    path.write_bytes(path.read_bytes()[:-200])  # the index is at the end
    with pytest.raises(DataError, match='a.mp4 cannot be read'):
        Video(str(path))


def test_a_video_that_ends_early(tmp_path):
    path = tmp_path / 'a.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 10, (64, 48))
    for _ in range(50):
        writer.write(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    writer.release()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    video, count = Video(str(path)), 0
    with pytest.raises(DataError, match=r'ends early: only \d+ of 50 frames'):
        for _ in video:
            count += 1
    assert 10 < count < 40


def test_a_video_that_is_not_written_whole_is_an_error(tmp_path, monkeypatch):
    """OpenCV's writer is silent on a full disk."""
    write_frames(tmp_path / 'a.mp4', 3)
    silent = SimpleNamespace(isOpened=lambda: True, write=lambda picture: None, release=lambda: None)
    monkeypatch.setattr(cv2, 'VideoWriter', lambda *arguments: silent)
    with pytest.raises(ConfigOverrideError, match='a.mp4" cannot be written whole'):
        write_frames(tmp_path / 'a.mp4', 5)
    assert [file.name for file in tmp_path.iterdir()] == ['a.mp4'] and len(Video(str(tmp_path / 'a.mp4'))) == 3
