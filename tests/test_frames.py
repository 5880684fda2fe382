"""Which image of a file is shown: the nearest to a time, in any order, in one pass."""

import io
import threading
from dataclasses import replace
from functools import partial
from itertools import count

import av
import numpy as np
import plans
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata
from PIL import Image

import annotate_pgen
from annotate_pgen import (
    DataFile,
    ImageRow,
    InputError,
    ParquetImageReader,
    VideoFrame,
    VideoReader,
)

FPS = 30
LENGTH = 200
# Frames between key frames, and B-frames between others.
CODINGS = [(250, 2), (250, 0), (2, 0), (40, 3)]


def draw_number(number):
    """An image that shows a number below 256 as black and white bars."""
    bars = [255 * (number >> bit & 1) for bit in range(8)]
    row = np.repeat(np.array(bars, np.uint8), 8)[None, :, None]
    return np.tile(row, (48, 1, 3))


def number_on(image):
    """The number that an image shows; None for no image."""
    if image is None:
        return None
    bars = np.asarray(image).reshape(48, 8, 8, 3).mean((0, 2, 3))
    return sum(1 << bit for bit, bar in enumerate(bars) if bar > 128)


def write_video(path, length=LENGTH, distance=250, between=0):
    """A video whose frames show their numbers."""
    options = {"g": str(distance), "bf": str(between), "crf": "10", "sc_threshold": "0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", FPS, options=options)
        stream.width = 64
        stream.height = 48
        stream.pix_fmt = "yuv420p"
        for number in range(length):
            frame = av.VideoFrame.from_ndarray(draw_number(number))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module", params=CODINGS, ids="every {0[0]}, {0[1]}".format)
def video(request, tmp_path_factory):
    distance, between = request.param
    path = tmp_path_factory.mktemp("videos") / "video.mp4"
    return write_video(path, LENGTH, distance, between)


def show_frames(places):
    images = annotate_pgen.read_images(places, partial(VideoReader, fps=FPS))
    return [number_on(image) for image in images]


def numbers_shown(path, times):
    return show_frames([VideoFrame(path, seconds) for seconds in times])


@pytest.mark.parametrize("early", [0.0, -0.4, 0.4])
@pytest.mark.parametrize(
    "numbers",
    [
        range(LENGTH),
        range(0, LENGTH, 30),
        range(LENGTH - 1, -1, -7),
        np.random.default_rng(0).integers(0, LENGTH, 60).tolist(),
        [5, 5, 6, 5, 199, 199, 0, 0],
    ],
    ids=["each", "each second", "backwards", "random", "again"],
)
def test_the_nearest_frame_is_shown(video, numbers, early):
    times = [max(0, number + early) / FPS for number in numbers]
    assert numbers_shown(video, times) == [round(seconds * FPS) for seconds in times]


def test_a_reader_shows_rgb_images(video):
    reader = VideoReader(video, FPS)
    image = reader.frame_at(1.0)
    assert (image.mode, image.size) == ("RGB", (64, 48))
    assert number_on(image) == 30
    with pytest.raises(ValueError):
        reader.frame_at(LENGTH / FPS + 1)
    reader.close()


def test_what_is_not_there_is_none_and_the_rest_goes_on(video, tmp_path):
    assert numbers_shown(video, [1.0, LENGTH / FPS + 1, 2.0]) == [30, None, 60]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    places = [
        VideoFrame(video, 1.0),
        VideoFrame(broken, 1.0),
        VideoFrame(tmp_path / "missing.mp4", 1.0),
        VideoFrame(video, 2.0),
    ]
    assert show_frames(places) == [30, None, None, 60]


def test_a_video_that_was_cut_off_is_none_from_there(tmp_path):
    path = write_video(tmp_path / "whole.mp4", distance=10)
    # The index of an mp4 is at its end; a transport stream can be cut anywhere.
    cut = tmp_path / "cut.ts"
    with av.open(str(path)) as source, av.open(str(cut), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None and packet.pts < 100 * packet.duration:
                packet.stream = stream
                target.mux(packet)
    with av.open(str(cut)) as container:
        start = container.streams.video[0].start_time * 1 / 90_000
    shown = numbers_shown(cut, [start + 1.0, start + 6.0, start + 2.0])
    assert shown == [30, None, 60]


@pytest.mark.parametrize("step", [30, 5, 1], ids="every {}".format)
def test_a_video_is_read_in_one_pass(video, step, monkeypatch):
    """No frame is decoded twice by much, and the file is opened once."""
    decoded = count()
    opened = count()
    really_open = av.open

    class CountingContainer:
        def __init__(self, path):
            next(opened)
            self.container = really_open(path)
            self.streams = self.container.streams
            self.seek = self.container.seek

        def decode(self, stream):
            for frame in self.container.decode(stream):
                next(decoded)
                yield frame

    monkeypatch.setattr(av, "open", CountingContainer)
    wanted = list(range(0, LENGTH, step))
    assert numbers_shown(video, [number / FPS for number in wanted]) == wanted
    assert next(opened) == 1
    assert next(decoded) <= LENGTH * 1.3


@pytest.mark.parametrize("timestamp", [-0.2, 4.7, 1e9])
def test_a_time_outside_the_episodes_part_of_a_video_is_an_error(dataset, timestamp):
    """There LeRobot shows the images of another episode. The first lasts 4.5 s."""
    meta = LeRobotDatasetMetadata("a/b", root=dataset)
    camera_key = meta.video_keys[0]
    samples = [plans.make_sample(index=0), plans.make_sample(index=3)]
    places = annotate_pgen.find_video_frames(meta, samples, camera_key)
    assert [place.seconds for place in places] == [0.0, 3.0]
    samples[1] = replace(samples[1], timestamp=timestamp)
    with pytest.raises(InputError, match="episode 0, frame 3"):
        annotate_pgen.find_video_frames(meta, samples, camera_key)


def encode_png(number):
    buffer = io.BytesIO()
    Image.fromarray(draw_number(number)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def image_files(tmp_path_factory):
    """Two parquet files with images 0 to 19 and 20 to 34, in row groups of 6."""
    folder = tmp_path_factory.mktemp("images")
    data_files = []
    for first, end in ((0, 20), (20, 35)):
        cells = []
        for number in range(first, end):
            cells.append({"bytes": encode_png(number), "path": f"{number}.png"})
        path = folder / f"file-{first:03}.parquet"
        table = pa.table({"index": range(first, end), "top": cells})
        pq.write_table(table, path, row_group_size=6)
        data_files.append(DataFile(path, first, end - first))
    return data_files


def show_rows(places):
    open_reader = partial(ParquetImageReader, camera_key="top")
    return [
        number_on(image) for image in annotate_pgen.read_images(places, open_reader)
    ]


@pytest.mark.parametrize(
    "indices",
    [range(35), [0, 5, 6, 19, 20, 34], [7, 7, 8], [34]],
    ids=["each", "at the edges", "again", "the last"],
)
def test_stored_images_are_those_of_the_samples(image_files, indices):
    samples = [plans.make_sample(index=index) for index in indices]
    rows = annotate_pgen.find_image_rows(samples, image_files)
    assert show_rows(rows) == list(indices)


def test_a_row_group_is_read_once(image_files, monkeypatch):
    groups = []
    read_row_group = pq.ParquetFile.read_row_group

    def spy(self, group, columns):
        groups.append(group)
        assert columns == ["top"]
        return read_row_group(self, group, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    path = image_files[0].path
    reader = ParquetImageReader(path, "top")
    for row in [*range(20), 3]:
        assert number_on(reader.image_at(ImageRow(path, row))) == row
    assert groups == [0, 1, 2, 3, 0]
    reader.close()


def test_a_stored_image_that_is_broken_is_none_and_the_rest_goes_on(
    image_files, tmp_path
):
    cells = [{"bytes": encode_png(number), "path": None} for number in range(4)]
    cells[1] = {"bytes": b"no image", "path": None}
    cells[2] = {"bytes": None, "path": "2.png"}
    path = tmp_path / "file.parquet"
    pq.write_table(pa.table({"top": cells}), path)
    rows = [ImageRow(path, row) for row in range(4)]
    rows.append(ImageRow(tmp_path / "missing.parquet", 0))
    rows.append(ImageRow(image_files[0].path, 9))
    assert show_rows(rows) == [0, None, None, 3, None, 9]


@given(items=st.lists(st.integers(), max_size=40), size=st.integers(1, 9))
@settings(deadline=None)
def test_reading_ahead_keeps_order_and_bound(items, size):
    made = []

    def source():
        for item in items:
            made.append(item)
            yield item

    for number, item in enumerate(annotate_pgen.read_ahead(source(), size)):
        assert item == items[number]
        assert len(made) <= number + size + 1
    assert made == items


def test_reading_ahead_is_ahead():
    """The next items are made while the first is still in use."""
    third_is_made = threading.Event()

    def source():
        yield from (1, 2)
        third_is_made.set()
        yield 3

    reader = annotate_pgen.read_ahead(source(), 2)
    assert next(reader) == 1
    assert third_is_made.wait(30)
    assert list(reader) == [2, 3]


def test_reading_ahead_passes_errors_on():
    def source():
        yield 1
        raise OSError("gone")

    reader = annotate_pgen.read_ahead(source(), 4)
    assert next(reader) == 1
    with pytest.raises(OSError, match="gone"):
        next(reader)


def test_reading_ahead_ends_its_thread():
    reader = annotate_pgen.read_ahead(iter(range(100)), 4)
    assert next(reader) == 0
    reader.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("reader")]
