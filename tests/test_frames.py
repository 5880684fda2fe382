"""Which picture of a video file is shown: the nearest, in any order of times, in one pass."""

import itertools

import av
import numpy as np
import pytest

import annotate_pgen as ap

FPS, LENGTH = 30, 200
STRETCHES = {"every second": 30, "every fifth": 5, "every": 1}


@pytest.fixture(
    scope="module", params=[("h264", 250, 2), ("h264", 250, 0), ("h264", 2, 0), ("h264", 40, 3)]
)
def video(request, tmp_path_factory):
    """A video whose frames show their number as black and white bars; key frames far or near."""
    codec, distance, between = request.param
    path = tmp_path_factory.mktemp("videos") / "video.mp4"
    options = {"g": str(distance), "bf": str(between), "crf": "10", "sc_threshold": "0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(LENGTH):
            bars = [255 * (number >> bit & 1) for bit in range(8)]
            pixels = np.tile(np.repeat(np.array(bars, np.uint8), 8)[None, :, None], (48, 1, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    return path


def number_of(picture):
    if picture is None:
        return None
    bars = np.asarray(picture).reshape(48, 8, 8, 3).mean((0, 2, 3))
    return sum(1 << bit for bit, bar in enumerate(bars) if bar > 128)


class Meta:
    video_keys, fps = ("camera",), FPS


def shown(path, times):
    return [number_of(p) for p in ap.read_pictures(Meta, [(path, t) for t in times], "camera")]


def test_the_nearest_picture(video):
    random = np.random.default_rng(0)
    for numbers in (
        range(LENGTH),
        range(0, LENGTH, 30),
        range(LENGTH - 1, -1, -7),
        random.integers(0, LENGTH, 60).tolist(),
        [5, 5, 6, 5, 199, 199, 0, 0],
    ):
        for early in (0.0, -0.4, 0.4):
            times = [max(0, n + early) / FPS for n in numbers]
            assert shown(video, times) == [round(t * FPS) for t in times]


def test_none_beyond_the_end_and_the_rest_goes_on(video):
    assert shown(video, [1.0, LENGTH / FPS + 1, 2.0]) == [30, None, 60]


@pytest.mark.parametrize("step", STRETCHES.values(), ids=STRETCHES)
def test_one_pass(video, step, monkeypatch):
    """No frame is decoded twice by much, and not all of them where key frames are near."""
    decoded, opened = itertools.count(), itertools.count()
    really_open = av.open

    class Counting:
        def __init__(self, path):
            next(opened)
            self.container = really_open(path)
            self.streams, self.seek = self.container.streams, self.container.seek

        def decode(self, stream):
            for frame in self.container.decode(stream):
                next(decoded)
                yield frame

    monkeypatch.setattr(av, "open", Counting)
    times = [n / FPS for n in range(0, LENGTH, step)]
    assert shown(video, times) == list(range(0, LENGTH, step))
    assert next(opened) == 1
    assert next(decoded) <= LENGTH * 1.3
