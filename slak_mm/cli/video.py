"""Videos, frame by frame."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from slak_mm._files import replacing
from slak_mm.engine.samples import DataError

from .errors import ConfigOverrideError

SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg', '.wmv')


class Video:
    """A video file or address: its frame rate, its size (height, width), and how many frames it says it has.

    Raises:
        DataError: It cannot be read. While iterating: it ends before its time.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._capture = cv2.VideoCapture(path)
        is_read, self._first = self._capture.read()
        if not is_read:
            raise DataError(f'The video {path} cannot be read: damaged, empty, or in a format that OpenCV has not.')
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = rate if math.isfinite(rate) and rate > 0 else 25.0
        self.size: tuple[int, int] = self._first.shape[:2]
        self._length = max(int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[np.ndarray]:
        """The frames from the first on, once: BGR arrays (H, W, 3) of uint8."""
        frame, count = self._first, 0
        while frame is not None:
            yield frame
            count += 1
            frame = self._capture.read()[1]
        # Some formats only say how long they take, so that the number is not exact.
        if count < 0.98 * len(self) - 1:
            raise DataError(f'The video {self.path} ends early: only {count} of {len(self)} frames can be read.')


@contextlib.contextmanager
def writing_video(path: Path, fps: float, size: tuple[int, int]) -> Iterator[Callable[[np.ndarray], None]]:
    """Write an MP4 file of a size (height, width).

    However the block ends, by an error or an interrupt too, the frames written so far are a whole video.

    Yields:
        A function that writes an RGB picture (H, W, 3) of uint8.

    Raises:
        ConfigOverrideError: The file cannot be written.
    """
    count, raised = 0, None
    with replacing(path) as part:
        movie = part.with_suffix('.mp4')  # OpenCV knows formats by their suffix
        writer = cv2.VideoWriter(str(movie), cv2.VideoWriter_fourcc(*'mp4v'), fps, size[::-1])  # type: ignore[attr-defined]

        def write(picture: np.ndarray) -> None:
            nonlocal count
            writer.write(np.ascontiguousarray(picture[..., ::-1]))
            count += 1

        try:
            yield write
        except BaseException as error:
            raised = error
        writer.release()
        try:
            if raised and not count:
                raise raised
            # The writer says nothing of a full disk.
            if int(cv2.VideoCapture(str(movie)).get(cv2.CAP_PROP_FRAME_COUNT)) != count:
                raise ConfigOverrideError(f'The video "{path}" cannot be written whole. Is the disk full?')
            movie.replace(part)
        finally:
            movie.unlink(missing_ok=True)
    if raised:
        raise raised
