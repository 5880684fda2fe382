"""What a run costs, side by side with doing it the obvious way, in the same run.

    python tests/benchmark.py                     # all parts that can run here
    python tests/benchmark.py --parts around      # LeRobot, with an instant model
    python tests/benchmark.py --parts memory      # of large datasets
    python tests/benchmark.py --parts model verify --json outputs/gpu.json
    python tests/benchmark.py --parts client      # the client's side of --server
    python tests/benchmark.py --server http://localhost:8000/v1 --model PATH
    python tests/benchmark.py --small             # only to see that it runs through

It prints tables and writes JSON, and needs no network: datasets are drawn and weights
are random. On a GPU the model has the real shape of Qwen2-VL-7B, in bfloat16. Without
one it is a small model on the CPU, to show that everything works: its figures say
nothing about a GPU. Only the parts around and memory need LeRobot.

The obvious way is to walk every frame through LeRobotDataset, call `generate` for one
sample at a time with the picture as it is, and write with LeRobot's `add_features`.

With --server, both engines generate with the same model: the server that runs there,
and this process with the weights in PATH.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import make_demo  # noqa: E402

import annotate_pgen  # noqa: E402

Row = dict[str, Any]

FPS = 30
INTERVAL = 1.0  # seconds, the default of --sample-interval
PACKAGES = (
    "torch",
    "transformers",
    "lerobot",
    "av",
    "pyarrow",
    "pandas",
    "qwen-vl-utils",
    "httpx",
)
# The skills of an episode, where eight of them are wanted.
STEPS = tuple(f"step {number}: move the arm to place {number}" for number in range(8))


@dataclass(frozen=True)
class Sizes:
    """How much is measured, for all parts."""

    # around: episodes of 200 frames, and runs of the command.
    drawn_episodes: int = 20
    command_runs: int = 3
    # memory: episodes of 400 frames, and samples that are still to be generated.
    copied_episodes: int = 5000
    missing_samples: int = 1000
    # memory: episodes of 500 frames, with and without language columns.
    language_episodes: int = 1000
    # model, verify and --server: samples, in batches.
    batches: int = 4
    cpu_batch_sizes: tuple[int, ...] = (1, 8, 32)
    gpu_batch_sizes: tuple[int, ...] = (1, 8, 32, 64, 128)
    # client: samples, and requests under way.
    requests: int = 2000
    requests_at_once: int = 64


SMALL = Sizes(
    drawn_episodes=2,
    command_runs=1,
    copied_episodes=10,
    missing_samples=10,
    language_episodes=10,
    batches=1,
    cpu_batch_sizes=(1, 4),
    gpu_batch_sizes=(1, 8),
    requests=200,
)


@dataclass(frozen=True)
class Settings:
    """What a part is given: a folder of its own, and what the flags say."""

    folder: Path
    sizes: Sizes
    server: str
    model: str


class InstantPgen(annotate_pgen.QwenPgen):
    """Answers at once and never twice the same: what a run takes is not the model's."""

    def __init__(self, *ignored: Any):
        self.temperature = 0.7
        self.batch_limit = sys.maxsize
        self.numbers = itertools.count()

    def prepare(self, images: Any, prompt: str) -> str:
        return prompt

    def answer(self, batch: Sequence, tries: int = 0) -> list[dict[str, str]]:
        return [dialogue_of(next(self.numbers)) for _ in batch]


def dialogue_of(number: int) -> dict[str, str]:
    return {
        "user_prompt": f"Now do step {number}.",
        "robot_utterance": f"I do step {number}.",
    }


def apart(work: Callable, *args: Any) -> Any:
    """Do the work in a fresh process, whose peak memory begins with a small one's."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=begin) as fresh:
        return fresh.submit(work, *args).result()


def begin() -> None:
    """Set up a fresh process."""
    import torch

    # LeRobot 0.4.4 starts two processes for each episode.
    multiprocessing.set_start_method(None, force=True)
    if not torch.cuda.is_available():
        # Several threads wait for each other when anything else runs here.
        torch.set_num_threads(1)


def seconds_of(work: Callable, *args: Any) -> float:
    started = time.perf_counter()
    work(*args)
    return time.perf_counter() - started


def peak_memory() -> int:
    """Bytes, which getrusage counts only on macOS."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_memory() -> int:
    """Bytes held now, which are less than the peak; the peak where it is not known."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return peak_memory()
    pages = int(statm.read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


# ------------------------------------------------------------------------------ around


def around(settings: Settings) -> list[Row]:
    """4,000 drawn frames (96x128, av1) of two cameras, both shown to an instant model.

    The seconds of single steps are those of the same functions, called one by one.
    """
    make_demo.quiet_libraries()
    # All else is imported when the dataset is drawn.
    import lerobot.datasets.dataset_tools  # noqa: F401

    source = settings.folder / "source"
    lengths = [200] * settings.sizes.drawn_episodes
    make_demo.make_dataset(source, lengths, fps=FPS)
    # LeRobot shows progress bars.
    with contextlib.redirect_stderr(io.StringIO()):
        obvious = obvious_way(source)
    times = []
    for number in range(settings.sizes.command_runs):
        times.append(seconds_of(run_command, source, f"run_{number}"))
    times.sort()
    command = {
        "way": f"annotate_pgen.py, the command, median of {len(times)}",
        "total s": times[len(times) // 2],
    }
    steps = {"way": "(its steps, called one by one)", "total s": 0.0}
    for name, taken, _ in watch(run_by_steps(source)):
        steps["total s"] += taken
        steps[f"{name} s"] = taken
    rows = [obvious, command, steps]
    for row in rows:
        row["share"] = row["total s"] / obvious["total s"]
    return rows


def obvious_way(source: Path) -> Row:
    """The yardstick."""
    import numpy as np
    import pandas as pd
    from lerobot.datasets.dataset_tools import add_features
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from torchvision.transforms.functional import to_pil_image

    started = time.perf_counter()
    target = source.with_name("obvious")
    pgen = InstantPgen()
    dataset = LeRobotDataset("local/x", source, video_backend="pyav")
    episodes = json.loads((source / "meta" / "skills.json").read_text())["episodes"]
    rows = []
    indices = []
    for position in range(len(dataset)):
        item = dataset[position]
        if item["frame_index"] % round(INTERVAL * FPS) == 0:
            episode = episodes[str(item["episode_index"].item())]
            names = []
            for skill in episode["skills"]:
                if skill["start"] <= item["timestamp"]:
                    names.append(skill["name"])
            prompt = annotate_pgen.construct_prompt(
                task=episode["description"], history=names[:-1], skill=names[-1]
            )
            images = [to_pil_image(item[key]) for key in make_demo.CAMERAS]
            rows.append(pgen.call_qwen(images, prompt))
        indices.append(len(rows) - 1)
    walked = time.perf_counter()
    feature = {"dtype": "int64", "shape": (1,), "names": None}
    column = {annotate_pgen.COLUMN: (np.array(indices), feature)}
    add_features(dataset, column, target, "local/obvious")
    pd.DataFrame(rows).to_parquet(target / "meta" / "tasks_high_level.parquet")
    ended = time.perf_counter()
    return {
        "way": "the obvious way",
        "total s": ended - started,
        "frames s": walked - started,
        "write s": ended - walked,
    }


def flags_for(source: Path, name: str) -> list[str]:
    """The flags of a run with all cameras, whose output stands beside the source."""
    cameras = [path.name for path in sorted(source.glob("videos/*"))]
    return [
        *("--data-dir", str(source)),
        *("--output-dir", str(source.with_name(name))),
        *("--camera-keys", *cameras),
    ]


def run_command(source: Path, name: str) -> None:
    """Run the command line as it is, but for the model."""
    said = io.StringIO()
    with (
        patch.object(annotate_pgen, "QwenPgen", InstantPgen),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        code = annotate_pgen.main(flags_for(source, name))
    if code:
        raise RuntimeError(said.getvalue())


def run_by_steps(source: Path, missing_samples: int | None = None) -> Iterator[str]:
    """Do the same through the script's functions.

    Args:
        source: the dataset.
        missing_samples: for a run that goes on where all but so many dialogues are
            there; None for one that begins.

    Yields:
        What was done since the step before.
    """
    args = annotate_pgen.parse_args(flags_for(source, f"{source.name}_by_steps"))
    job = annotate_pgen.prepare_job(args, quiet=True)
    yield "plan"
    samples = job.plan.samples
    count = len(samples) if missing_samples is None else missing_samples
    annotator = annotate_pgen.Annotator(InstantPgen(), args.batch_size)
    dialogues = {}
    for sample in samples[: len(samples) - count]:
        (dialogue,) = annotator.pgen.answer([sample])
        dialogues[sample.index] = dialogue
        annotator.remember(sample, dialogue)
    missing = samples[len(samples) - count :]
    job.work_dir.mkdir()
    launch = annotate_pgen.Launch()
    for finished in annotate_pgen.generate_part(job, launch, missing, annotator):
        dialogues.update(finished)
    yield "generate"
    results = annotate_pgen.build_results(job.plan, dialogues)
    annotate_pgen.write_dataset(job, results, job.output)
    yield "write"


def watch(steps: Iterator[str]) -> Iterator[tuple[str, float, int]]:
    """Each step, its seconds, and the peak memory by its end in bytes."""
    started = time.perf_counter()
    for step in steps:
        yield step, time.perf_counter() - started, peak_memory()
        started = time.perf_counter()


# ------------------------------------------------------------------------------ memory

LENGTH = 400  # frames of an episode
LANGUAGE_LENGTH = 500  # frames of an episode with language columns
EPISODES_IN_A_FILE = 1250


def memory(settings: Settings) -> list[Row]:
    """A run over 2,000,000 frames, and plans of 500,000 with language columns.

    The run is over 5,000 episodes with a sample a second, all but the last 1,000 of
    the 70,000 answered before. The plans are of 1,000 episodes with eight skills each,
    once from meta/skills.json and once from language columns, whose 17 rows stand on
    every frame. Growth is the peak over what the same on two episodes leaves, in a
    fresh process. All episodes show the same drawn video: reading more pictures takes
    longer, not more memory.
    """
    folder = settings.folder
    sizes = settings.sizes
    drawn = apart(draw_datasets, folder, sizes)
    rows = []

    frames = sizes.copied_episodes * LENGTH
    missing = sizes.missing_samples
    for row in apart(watch_run, folder / "two", folder / "many", missing):
        rows.append(with_frames(row, frames))
    row = {
        "step": "(for comparison: one row group)",
        "growth MB": drawn["bytes of a row group"] / 1e6,
    }
    rows.append(with_frames(row, frames))

    frames = sizes.language_episodes * LANGUAGE_LENGTH
    two = folder / "two_language"
    for name in ("plain", "language"):
        row = apart(watch_plan, two, folder / name)
        rows.append(with_frames(row, frames))
    row = {
        "step": "(for comparison: the language rows, decoded)",
        "growth MB": drawn["bytes of language rows"] / 1e6,
    }
    rows.append(with_frames(row, frames))
    return rows


def draw_datasets(folder: Path, sizes: Sizes) -> dict[str, int]:
    """Write the datasets of this part, and say how large parts of them are."""
    make_demo.quiet_libraries()
    draw_episodes(folder / "two", 2, LENGTH)
    group_size = draw_episodes(folder / "many", sizes.copied_episodes, LENGTH)
    count = sizes.language_episodes
    for name in ("plain", "language"):
        draw_episodes(folder / name, count, LANGUAGE_LENGTH)
    draw_episodes(folder / "two_language", 2, LANGUAGE_LENGTH)
    write_eight_skills(folder / "plain", count)
    add_language(folder / "two_language", 2)
    return {
        "bytes of a row group": group_size,
        "bytes of language rows": add_language(folder / "language", count),
    }


def with_frames(row: Row, frames: int) -> Row:
    """The row, with what its memory comes down to for a frame."""
    return {
        "step": row["step"],
        "frames": frames,
        "seconds": row.get("seconds", ""),
        "growth MB": row["growth MB"],
        "bytes a frame": row["growth MB"] * 1e6 / frames,
    }


def watch_run(two: Path, many: Path, missing_samples: int) -> list[Row]:
    """The steps of a run over many episodes."""
    make_demo.quiet_libraries()
    # Every library is loaded after this.
    run_command(two, "first")
    before = held_memory()
    rows = []
    for step, taken, peak in watch(run_by_steps(many, missing_samples)):
        growth = (peak - before) / 1e6
        rows.append({"step": step, "seconds": taken, "growth MB": growth})
    return rows


def watch_plan(two: Path, root: Path) -> Row:
    """The plan of a dataset."""
    make_demo.quiet_libraries()
    # Every library is loaded after this.
    annotate_pgen.make_plan(annotate_pgen.open_dataset(two))
    before = held_memory()
    meta = annotate_pgen.open_dataset(root)
    started = time.perf_counter()
    plan = annotate_pgen.make_plan(meta)
    return {
        "step": f"plan, skills from {plan.skill_source.name}",
        "seconds": time.perf_counter() - started,
        "growth MB": (peak_memory() - before) / 1e6,
    }


def draw_episodes(root: Path, count: int, length: int) -> int:
    """Record an episode, and write it `count` times, a row group each as LeRobot does.

    All episodes show its video.

    Args:
        root: of the new dataset.
        count: of the episodes.
        length: of an episode, in frames.

    Returns:
        The bytes of a row group.
    """
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    key = next(iter(make_demo.CAMERAS))
    camera = {key: make_demo.CAMERAS[key]}
    make_demo.make_dataset(root, [length], fps=FPS, cameras=camera, size=(64, 64))

    recorded = next(root.glob("data/*/*.parquet"))
    one = pq.read_table(recorded)
    for first in range(0, count, EPISODES_IN_A_FILE):
        numbers = np.arange(first, min(first + EPISODES_IN_A_FILE, count))
        table = pa.concat_tables([one] * len(numbers))
        columns = {
            "episode_index": numbers.repeat(length),
            "index": first * length + np.arange(len(table)),
        }
        for name, values in columns.items():
            place = one.schema.get_field_index(name)
            table = table.set_column(place, one.schema.field(name), pa.array(values))
        path = recorded.with_name(f"file-{first // EPISODES_IN_A_FILE:03}.parquet")
        pq.write_table(table, path, row_group_size=length)

    path = next(root.glob("meta/episodes/*/*.parquet"))
    numbers = np.arange(count)
    episodes = pd.concat([pd.read_parquet(path)] * count, ignore_index=True)
    episodes["episode_index"] = numbers
    episodes["data/file_index"] = numbers // EPISODES_IN_A_FILE
    episodes["dataset_from_index"] = numbers * length
    episodes["dataset_to_index"] = (numbers + 1) * length
    episodes.to_parquet(path)

    path = root / "meta" / "info.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    info["total_episodes"] = count
    info["total_frames"] = count * length
    path.write_text(json.dumps(info), encoding="utf-8")
    make_demo.write_skills(root, make_demo.skills_of([length] * count, fps=FPS))
    return one.nbytes


def eight_skills() -> list[tuple[str, float, float]]:
    """Name, start and end in seconds of each skill of an episode."""
    duration = LANGUAGE_LENGTH / FPS / len(STEPS)
    skills = []
    for number, name in enumerate(STEPS):
        skills.append((name, number * duration, (number + 1) * duration))
    return skills


def write_eight_skills(root: Path, count: int) -> None:
    """Write the skills of all episodes to meta/skills.json."""
    import skill_datasets

    skills = eight_skills()
    skill_datasets.write_skills_file(root, dict.fromkeys(range(count), skills))


def add_language(root: Path, count: int) -> int:
    """Give all episodes their skills in language columns, in place of skills.json.

    Each frame has all rows of its episode, as LeRobot writes them. The columns of one
    episode are built and written for all, since their skills are the same.

    Args:
        root: of the dataset.
        count: of its episodes.

    Returns:
        About how many bytes the rows of the whole dataset are when decoded.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import skill_datasets

    rows = pa.array([skill_datasets.language_rows(eight_skills())])
    persistent = rows.take(pa.array(np.zeros(LANGUAGE_LENGTH, int)))
    event = pa.array([[skill_datasets.SAY]]).type
    events = pa.array([[]] * LANGUAGE_LENGTH, event)
    for path in skill_datasets.data_files(root):
        with pq.ParquetFile(path) as parquet:
            groups = [
                parquet.read_row_group(number)
                for number in range(parquet.num_row_groups)
            ]
        writer = None
        for group in groups:
            group = group.append_column("language_persistent", persistent)
            group = group.append_column("language_events", events)
            if writer is None:
                writer = pq.ParquetWriter(path, group.schema)
            writer.write_table(group)
        writer.close()
    feature = {"dtype": "language", "shape": [1], "names": None}
    skill_datasets.declare(root, language_persistent=feature, language_events=feature)
    (root / "meta" / "skills.json").unlink()
    return persistent.nbytes * count


# ------------------------------------------------------------------------------- model

ANSWER_LENGTH = 40  # tokens, of every answer
STATIC_BATCH_SIZES = (8, 64)
TEXT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
VISION_FIELDS = ("hidden_size", "depth", "embed_dim", "num_heads")
# Those of Qwen2-VL-7B.
GPU_TEXT = (3584, 18944, 28, 28, 4, 152064)
GPU_VISION = (3584, 32, 1280, 16)
GPU_SECTIONS = (16, 24, 24)
CPU_TEXT = (128, 512, 4, 2, 1, 2048)
CPU_VISION = (128, 2, 80, 1)
CPU_SECTIONS = (8, 12, 12)
DIALOGUE = {
    "user_prompt": "Please drop the pink brick into the clear box.",
    "robot_utterance": "Sure, I'll take care of the pink brick.",
}


@dataclass
class Rig:
    """What the model is measured with."""

    device: str
    pgen: annotate_pgen.QwenPgen
    generate: FixedLength
    matrix_rate: float  # FLOP/s
    bandwidth: float  # bytes/s, read and written
    image: Any
    prompt: str


class FixedLength:
    """`generate` of a model, with answers that all have ANSWER_LENGTH tokens.

    It remembers the sizes of its last call: of a sample `prompt_tokens`, with those of
    its pictures, and `patches`, four of which make a token.
    """

    def __init__(self, generate: Callable):
        self.generate = generate
        self.prompt_tokens = 0
        self.new_tokens = 0
        self.patches = 0

    def __call__(self, **inputs: Any) -> Any:
        samples, self.prompt_tokens = inputs["input_ids"].shape
        self.patches = len(inputs["pixel_values"]) // samples
        inputs["min_new_tokens"] = ANSWER_LENGTH
        inputs["max_new_tokens"] = ANSWER_LENGTH
        tokens = self.generate(**inputs)
        self.new_tokens = tokens.shape[1] - self.prompt_tokens
        return tokens


def model(settings: Settings) -> list[Row]:
    """One 640x480 picture a sample, in memory; answers of 40 tokens; random weights."""
    sizes = settings.sizes
    rig = make_rig()
    on_gpu = rig.device == "cuda"
    batch_sizes = sizes.gpu_batch_sizes if on_gpu else sizes.cpu_batch_sizes
    rows = [measure(rig, "the obvious way", 1, sizes.batches, one_at_a_time)]
    for batch_size in batch_sizes:
        row = measure(rig, "annotate_pgen.py", batch_size, sizes.batches, stream)
        rows.append(row)
    if on_gpu:
        rows += measure_static_cache(rig, sizes.batches)
    for row in rows:
        row["times"] = row.get("samples/s", 0.0) / rows[0]["samples/s"]
    if not on_gpu:
        # On the CPU it would not be compiled.
        rows.append({"way": "(a static KV cache: only on a GPU)"})
    roofline = {
        "way": "(the roofline)",
        "TFLOP/s": rig.matrix_rate / 1e12,
        "GB/s": rig.bandwidth / 1e9,
    }
    return [*rows, roofline]


def measure_static_cache(rig: Rig, batches: int) -> list[Row]:
    """The same with a cache that torch compiles the model for."""
    rows = []
    rig.pgen.model.generation_config.cache_implementation = "static"
    for batch_size in STATIC_BATCH_SIZES:
        # To compile takes more than torch, and fails in many ways.
        try:
            row = measure(rig, "with a static KV cache", batch_size, batches, stream)
        except Exception as error:
            row = {"way": f"static KV cache failed: {error!r:.60}", "batch": batch_size}
        rows.append(row)
    return rows


def make_rig() -> Rig:
    """Make a QwenPgen with random weights.

    It is made by its own constructor, of which only loading is replaced.
    """
    import torch
    import transformers
    from PIL import Image

    device = "cpu"
    dtype = torch.float32
    if torch.cuda.is_available():
        device = "cuda"
        dtype = torch.bfloat16
    prompt = construct_prompt()
    question = annotate_pgen.construct_verify_prompt(DIALOGUE["user_prompt"], STEPS)
    # A token for each word, so that there are about as many as with Qwen's tokenizer.
    words = set(re.findall(" ?[A-Za-z]+", f"{prompt}\n{question}"))
    tokenizer = make_demo.make_tokenizer(sorted(words))
    config = make_config(tokenizer, device)
    model_class = transformers.AutoModelForImageTextToText
    with torch.device(device):
        weights = model_class.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    weights.eval()
    processor = make_demo.make_processor(tokenizer)
    loaded = {
        transformers.AutoConfig: config,
        transformers.AutoProcessor: processor,
        model_class: (weights, {"missing_keys": []}),
    }
    with contextlib.ExitStack() as stack:
        for part, value in loaded.items():
            stack.enter_context(
                patch.object(part, "from_pretrained", return_value=value)
            )
        dtype_name = str(dtype).removeprefix("torch.")
        pgen = annotate_pgen.QwenPgen("random", device, dtype_name)
    generate = FixedLength(weights.generate)
    weights.generate = generate
    return Rig(
        device=device,
        pgen=pgen,
        generate=generate,
        matrix_rate=measure_matrix_rate(device, dtype),
        bandwidth=measure_bandwidth(device, dtype),
        image=Image.fromarray(make_demo.draw_frame(0, 0, 0, (480, 640))),
        prompt=prompt,
    )


def construct_prompt() -> str:
    """What is asked about every sample: one length, so that tokens can be counted."""
    names = [name for name, _, _ in make_demo.PICK_AND_PLACE]
    return annotate_pgen.construct_prompt(
        task=make_demo.TASK,
        history=names[:2],
        skill=names[2],
        scenario_type="constraint_based",
        response_type="constraint_acknowledgment",
    )


def make_config(tokenizer: Any, device: str) -> Any:
    """The configuration of the model: Qwen2-VL-7B's, or something small on a CPU."""
    import transformers

    on_gpu = device == "cuda"
    text_sizes = GPU_TEXT if on_gpu else CPU_TEXT
    vision_sizes = GPU_VISION if on_gpu else CPU_VISION
    sections = GPU_SECTIONS if on_gpu else CPU_SECTIONS
    text = dict(zip(TEXT_FIELDS, text_sizes, strict=True))
    text["rope_scaling"] = {
        "type": "mrope",
        "rope_type": "default",
        "mrope_section": list(sections),
    }
    text["bos_token_id"] = tokenizer.pad_token_id
    text["eos_token_id"] = tokenizer.eos_token_id
    text["tie_word_embeddings"] = False
    token = tokenizer.convert_tokens_to_ids
    return transformers.Qwen2VLConfig(
        text_config=text,
        vision_config=dict(zip(VISION_FIELDS, vision_sizes, strict=True)),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def measure_matrix_rate(device: str, dtype: Any) -> float:
    """FLOP/s of a large matrix product."""
    import torch

    size = 8192 if device == "cuda" else 2048
    first, second = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / best_seconds(device, torch.matmul, first, second)


def measure_bandwidth(device: str, dtype: Any) -> float:
    """bytes/s of a large copy, read and written."""
    import torch

    size = 2**30 if device == "cuda" else 2**24
    source, target = torch.ones(2, size, device=device, dtype=dtype)
    return 2 * source.nbytes / best_seconds(device, target.copy_, source)


def best_seconds(device: str, work: Callable, *args: Any) -> float:
    """The fastest of ten calls, until the device has done it."""
    import torch

    times = []
    for _ in range(10):
        started = time.perf_counter()
        work(*args)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def measure(
    rig: Rig,
    way: str,
    batch_size: int,
    batches: int,
    work: Callable[[Rig, int, int], None],
) -> Row:
    """Measure a way to generate: a batch to warm up, then all, eight samples at least.

    Args:
        rig: what it is measured with.
        way: its name.
        batch_size: samples in a batch.
        batches: how many of them.
        work: takes the rig, the number of samples and the batch size.
    """
    import torch

    count = max(8, batches * batch_size)
    on_gpu = rig.device == "cuda"
    warm_up = seconds_of(work, rig, batch_size, batch_size)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    taken = seconds_of(work, rig, count, batch_size)
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
    image_tokens = rig.generate.patches // 4
    return {
        "way": way + note_halving(rig.pgen, batch_size),
        "batch": batch_size,
        "samples/s": count / taken,
        "times": 0.0,
        "of roofline": count * least_seconds(rig, batch_size) / taken,
        "peak GB": peak / 1e9,
        "text tokens": rig.generate.prompt_tokens - image_tokens,
        "image tokens": image_tokens,
        "samples": count,
        "warm-up s": warm_up,
    }


def note_halving(pgen: annotate_pgen.QwenPgen, batch_size: int) -> str:
    """Say whether batches were halved, and have the next ones tried whole again."""
    limit = pgen.batch_limit
    pgen.batch_limit = sys.maxsize
    return f", out of memory: halved to {limit}" if limit < batch_size else ""


def least_seconds(rig: Rig, batch_size: int) -> float:
    """The roofline: the seconds that a sample takes at least.

    For the prompt, two FLOPs for each weight and token at the rate of matrix products.
    For each further token of the answer, all weights and the cache are read once.
    """
    tokens = rig.generate.prompt_tokens
    patches = rig.generate.patches
    sizes = count_weights(rig.pgen.model)
    flops = 2 * (sizes["layers"] * tokens + sizes["head"])
    flops += 2 * (sizes["tower"] * patches + sizes["merger"] * patches // 4)
    text = rig.pgen.model.config.get_text_config()
    head_size = text.hidden_size // text.num_attention_heads
    cached_per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size
    weights_read = (sizes["layers"] + sizes["head"]) / batch_size
    cache_read = cached_per_token * (tokens + ANSWER_LENGTH / 2)
    bytes_read = (weights_read + cache_read) * rig.pgen.model.dtype.itemsize
    # The prompt gives the first token.
    steps = ANSWER_LENGTH - 1
    return flops / rig.matrix_rate + steps * bytes_read / rig.bandwidth


def count_weights(model: Any) -> dict[str, int]:
    """The number of weights of each part that is multiplied with."""
    sizes = {"head": 0, "tower": 0, "merger": 0, "layers": 0}
    for name, parameter in model.named_parameters():
        if "lm_head" in name:
            sizes["head"] += parameter.numel()
        elif "embed_tokens" in name:
            # Embeddings are looked up.
            continue
        elif "merger" in name:
            sizes["merger"] += parameter.numel()
        elif "visual" in name:
            sizes["tower"] += parameter.numel()
        else:
            sizes["layers"] += parameter.numel()
    return sizes


def one_at_a_time(rig: Rig, count: int, batch_size: int) -> None:
    """The yardstick: the picture as it is, the plain chat template, a call for each."""
    processor = rig.pgen.processor
    content = [
        {"type": "image", "image": rig.image},
        {"type": "text", "text": rig.prompt},
    ]
    chat = [{"role": "user", "content": content}]
    for _ in range(count):
        text = processor.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        inputs = processor(text=[text], images=[rig.image], return_tensors="pt")
        tokens = rig.pgen.model.generate(
            **inputs.to(rig.device), do_sample=True, temperature=0.7, top_k=0, top_p=1.0
        )
        new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
        processor.batch_decode(new_tokens)


def stream(rig: Rig, count: int, batch_size: int) -> None:
    """The script's own path, with its reading ahead."""
    pictures = itertools.repeat(rig.image, count)
    annotate(rig.pgen, pictures, count, batch_size, rig.prompt)


def annotate(
    pgen: Any,
    pictures: Iterator[Any],
    count: int,
    batch_size: int,
    prompt: str,
    verify: bool = False,
) -> None:
    """Go the script's own path from pictures in memory to dialogues.

    Random weights write no valid answer, so any answer is taken for the same dialogue,
    and is not asked for again.

    Args:
        pgen: the model.
        pictures: one for each sample.
        count: of the samples.
        batch_size: samples in a call, or requests under way.
        prompt: what is asked about all of them.
        verify: whether it is asked which skill each dialogue leads to.
    """
    annotator = annotate_pgen.Annotator(pgen, batch_size, verify)
    samples = make_samples(count)
    replaced = {
        "read_views": lambda *_: ([picture] for picture in pictures),
        "construct_prompt": lambda *_, **__: prompt,
        "parse_answer": lambda text: dict(DIALOGUE),
    }
    with (
        patch.multiple(annotate_pgen, **replaced),
        patch.object(annotate_pgen.Annotator, "leads_to_its_skill", return_value=True),
    ):
        for _ in annotate_pgen.generate_dialogues(None, None, samples, annotator):
            pass
    if annotator.progress.generated != count:
        raise RuntimeError(f"{annotator.progress} of {count} samples")


def make_samples(count: int) -> list[annotate_pgen.Sample]:
    """Samples of an episode with eight skills."""
    samples = []
    for number in range(count):
        sample = annotate_pgen.Sample(
            episode_id=0,
            frame_index=number,
            timestamp=number / FPS,
            skill_current=STEPS[0],
            skill_history=(),
            task_description=make_demo.TASK,
            index=number,
            episode_skills=STEPS,
        )
        samples.append(sample)
    return samples


# ------------------------------------------------------------------------------ verify


class Timed:
    """A function, with the seconds that all its calls have taken."""

    def __init__(self, function: Callable):
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args: Any, **arguments: Any) -> Any:
        started = time.perf_counter()
        result = self.function(*args, **arguments)
        self.seconds += time.perf_counter() - started
        return result


def verify(settings: Settings) -> list[Row]:
    """What --verify adds, with the model of the part before and eight skills.

    It is asked once about each answer, and no answer is asked for again. How often a
    real model has to write another is not measured here.
    """
    sizes = settings.sizes
    rig = make_rig()
    on_gpu = rig.device == "cuda"
    batch_sizes = sizes.gpu_batch_sizes if on_gpu else sizes.cpu_batch_sizes
    rows = []
    for batch_size in batch_sizes:
        count = max(8, sizes.batches * batch_size)
        measure_verify(rig, batch_size, batch_size, verify=True)
        without = measure_verify(rig, count, batch_size, verify=False)
        rows.append(without)
        checked = measure_verify(rig, count, batch_size, verify=True)
        checked["more time"] = checked["s a sample"] / without["s a sample"] - 1
        rows.append(checked)
    return rows


def measure_verify(rig: Rig, count: int, batch_size: int, verify: bool) -> Row:
    """Time the calls of the model in a run of the annotation loop."""
    generate = Timed(rig.pgen.generate)
    choose = Timed(rig.pgen.choose)
    pictures = itertools.repeat(rig.image, count)
    with (
        patch.object(rig.pgen, "generate", generate),
        patch.object(rig.pgen, "choose", choose),
    ):
        taken = seconds_of(
            annotate, rig.pgen, pictures, count, batch_size, rig.prompt, verify
        )
    way = "with --verify" if verify else "without"
    return {
        "way": way + note_halving(rig.pgen, batch_size),
        "batch": batch_size,
        "samples": count,
        "s a sample": taken / count,
        "generation s a sample": generate.seconds / count,
        "choose s a sample": choose.seconds / count,
        "choose / generation": choose.seconds / generate.seconds,
    }


# ------------------------------------------------------------------------------ client

PICTURES = 50  # that are drawn; the others differ from them in a corner


def client(settings: Settings) -> list[Row]:
    """How many samples a second one process can feed to a server.

    A server on this machine answers at once, with 64 requests under way. Pictures of
    640x480 that all differ become JPEG data URLs. Decoding of videos is not in it. The
    CPU time is the client's own; the server shares the cores with it.
    """
    program = [sys.executable, str(TESTS / "chat_server.py")]
    server = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().strip()
        return measure_client(url, settings.sizes)
    finally:
        server.kill()
        server.wait()


def measure_client(url: str, sizes: Sizes) -> list[Row]:
    """Each step by itself, and all together as in a run."""
    prompt = construct_prompt()
    drawn = draw_pictures()
    count = sizes.requests
    at_once = sizes.requests_at_once
    pgen = annotate_pgen.ServerPgen([url], requests_at_once=at_once)
    rows = []

    clock = Clock()
    prepared = []
    for picture in vary(drawn, 4 * at_once):
        prepared.append(pgen.prepare([picture], prompt))
    row = clock.row("encode the pictures", len(prepared))
    row["kB a sample"] = len(json.dumps(prepared)) / len(prepared) / 1000
    rows.append(row)

    executor = pgen.executor(at_once)
    clock = Clock()
    futures = []
    for number in range(count):
        content = prepared[number % len(prepared)]
        futures.append(executor.submit(pgen.answer, [content]))
    answers = [future.result() for future in futures]
    rows.append(clock.row("ask the server", count))
    executor.shutdown()
    if [None] in answers:
        raise RuntimeError("an answer of the server is not valid")

    clock = Clock()
    annotate(pgen, vary(drawn, count), count, at_once, prompt)
    rows.append(clock.row("both, as in a run", count))
    return rows


class Clock:
    """Time that has passed since it was made, and CPU time of this process."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.cpu_started = time.process_time()

    def row(self, step: str, samples: int) -> Row:
        """What a step comes down to."""
        taken = time.perf_counter() - self.started
        cpu = time.process_time() - self.cpu_started
        return {
            "step": step,
            "samples": samples,
            "samples/s": samples / taken,
            "CPU ms a sample": 1000 * cpu / samples,
        }


def draw_pictures() -> list[Any]:
    """Pictures with large shapes and fine grain, about as hard to encode as photos."""
    import numpy as np
    from PIL import Image

    drawer = np.random.default_rng(0)
    pictures = []
    for _ in range(PICTURES):
        coarse = drawer.integers(0, 256, (12, 16, 3), np.uint8)
        shapes = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
        grain = drawer.normal(0, 4, (480, 640, 3))
        values = np.clip(np.asarray(shapes) + grain, 0, 255)
        pictures.append(Image.fromarray(values.astype(np.uint8)))
    return pictures


def vary(pictures: Sequence[Any], count: int, first: int = 0) -> Iterator[Any]:
    """Make pictures that all differ, since servers remember those they have seen.

    Args:
        pictures: to go round in.
        count: how many are wanted.
        first: number of the first; another number makes another picture.

    Yields:
        A picture, with a corner of a colour of its own.
    """
    for number in range(first, first + count):
        picture = pictures[number % len(pictures)].copy()
        picture.paste((number % 256, number // 256 % 256, 128), (0, 0, 40, 40))
        yield picture


# ----------------------------------------------------------------------------- engines


class FixedLengthServer(annotate_pgen.ServerPgen):
    """A ServerPgen whose answers all have ANSWER_LENGTH tokens, if vLLM is the server.

    There is no JSON schema, since it could end an answer earlier. `lengths` are those
    of all answers in tokens, where the server tells them.
    """

    def __init__(self, url: str, requests_at_once: int):
        super().__init__([url], requests_at_once=requests_at_once)
        self.lengths: list[int] = []

    def dialogue_fields(self, content: Any, tries: int) -> dict[str, Any]:
        fields = super().dialogue_fields(content, tries)
        del fields["response_format"]
        fields["max_tokens"] = ANSWER_LENGTH
        fields["min_tokens"] = ANSWER_LENGTH
        fields["ignore_eos"] = True
        return fields

    def post(self, *args: Any) -> Any:
        reply = super().post(*args)
        if reply.status == 200:
            usage = reply.body.get("usage") or {}
            length = usage.get("completion_tokens")
            if length is not None:
                self.lengths.append(length)
        return reply


def engines(settings: Settings) -> list[Row]:
    """Both engines with one model: in this process, and behind a server.

    Both are asked the same about 640x480 pictures that all differ, and answer with 40
    tokens. The server is told so with min_tokens and ignore_eos, which vLLM knows. The
    two take turns, so that the GPU may be the same if it holds both.
    """
    rows = measure_this_process(settings)
    rows += measure_server(settings)
    for row in rows:
        row["times"] = row["samples/s"] / rows[0]["samples/s"]
    return rows


def measure_this_process(settings: Settings) -> list[Row]:
    """QwenPgen, with batches of several sizes."""
    import torch

    sizes = settings.sizes
    drawn = draw_pictures()
    prompt = construct_prompt()
    device = "cpu"
    dtype = "float32"
    batch_sizes = sizes.cpu_batch_sizes
    if torch.cuda.is_available():
        device = "cuda"
        dtype = "bfloat16"
        batch_sizes = sizes.gpu_batch_sizes
    pgen = annotate_pgen.QwenPgen(settings.model, device, dtype)
    generate = FixedLength(pgen.model.generate)
    pgen.model.generate = generate
    rows = []
    for batch_size in batch_sizes:
        count = max(8, sizes.batches * batch_size)
        warm_up = vary(drawn, batch_size, first=count)
        annotate(pgen, warm_up, batch_size, batch_size, prompt)
        pictures = vary(drawn, count)
        taken = seconds_of(annotate, pgen, pictures, count, batch_size, prompt)
        rows.append(
            {
                "engine": "in this process" + note_halving(pgen, batch_size),
                "at once": batch_size,
                "samples": count,
                "samples/s": count / taken,
                "tokens an answer": float(generate.new_tokens),
            }
        )
    return rows


def measure_server(settings: Settings) -> list[Row]:
    """ServerPgen, with the number of requests under way that is its default."""
    sizes = settings.sizes
    drawn = draw_pictures()
    prompt = construct_prompt()
    at_once = sizes.requests_at_once
    count = max(8, sizes.batches * at_once)
    pgen = FixedLengthServer(settings.server, at_once)
    annotate(pgen, vary(drawn, at_once, first=count), at_once, at_once, prompt)
    pgen.lengths.clear()
    taken = seconds_of(annotate, pgen, vary(drawn, count), count, at_once, prompt)
    way = f"behind {settings.server}"
    refused = sorted(pgen.servers[0].refused)
    if refused:
        way += f", which refuses {', '.join(refused)}"
    length = "not told"
    if pgen.lengths:
        length = sum(pgen.lengths) / len(pgen.lengths)
    return [
        {
            "engine": way,
            "at once": at_once,
            "samples": count,
            "samples/s": count / taken,
            "tokens an answer": length,
        }
    ]


# ------------------------------------------------------------------------ command line


def machine() -> Row:
    """What is measured on."""
    import torch

    gpu = "none, so the model is a small one on the CPU"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    found = {
        "date": datetime.date.today().isoformat(),
        "processor": name_processor(),
        "cores": os.cpu_count(),
        "GPU": gpu,
        # Other work on the machine blurs what follows.
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def name_processor() -> str:
    """As Linux names it, else its kind."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        names = re.findall("model name.*: (.*)", path.read_text())
        if names:
            return names[0]
    return platform.machine()


def table(rows: Sequence[Row]) -> str:
    """Rows as text, with a column for each name that any of them has."""
    names = list(dict.fromkeys(itertools.chain(*rows)))
    lines = [names]
    for row in rows:
        lines.append([as_text(row.get(name, "")) for name in names])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def as_text(value: Any) -> str:
    """A value with three digits, if it is not a whole number."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


PARTS = {
    "around": around,
    "memory": memory,
    "model": model,
    "verify": verify,
    "client": client,
    "engines": engines,
}
NEED_LEROBOT = ("around", "memory")


def choose_parts(args: argparse.Namespace) -> list[str]:
    """The parts that are named, else all that can run here."""
    if args.parts:
        return args.parts
    if args.server:
        return ["engines"]
    has_lerobot = importlib.util.find_spec("lerobot") is not None
    chosen = []
    for part in PARTS:
        if part != "engines" and (has_lerobot or part not in NEED_LEROBOT):
            chosen.append(part)
    return chosen


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        help="what to measure (default: all that can run here, or with --server only "
        "engines)",
    )
    parser.add_argument(
        "--server",
        metavar="URL",
        default="",
        help="compare the engines: a vLLM server, such as http://localhost:8000/v1",
    )
    parser.add_argument(
        "--model",
        metavar="PATH",
        default="",
        help="with --server: the model that it serves, to load it here as well",
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="measure little, to see that everything runs through",
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("outputs/benchmark.json"),
        help="file for the figures (default: %(default)s)",
    )
    args = parser.parse_args()
    if bool(args.server) != bool(args.model):
        parser.error("--server and --model belong together; give both")
    if args.parts and "engines" in args.parts and not args.server:
        parser.error("the part engines needs --server and --model; give both")
    return args


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    report = {"machine": apart(machine)}
    facts = [f"{name} {as_text(value)}" for name, value in report["machine"].items()]
    print(", ".join(facts), flush=True)
    report["small"] = args.small
    if args.small:
        print("--small: all is less than it says, and the figures mean nothing")
    with tempfile.TemporaryDirectory(prefix="benchmark_") as home:
        # Read by the libraries when they are imported.
        os.environ["HF_HOME"] = f"{home}/hf"
        os.environ["HF_LEROBOT_HOME"] = f"{home}/lerobot"
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["SVT_LOG"] = "1"
        for part in choose_parts(args):
            settings = Settings(
                folder=Path(home, part),
                sizes=SMALL if args.small else Sizes(),
                server=args.server,
                model=args.model,
            )
            report[part] = apart(PARTS[part], settings)
            explanation = " ".join(PARTS[part].__doc__.split())
            print(f"\n{part}: {explanation}\n\n{table(report[part])}", flush=True)
    report["seconds"] = time.perf_counter() - started
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\n{report['seconds']:.0f} s in all; written to {args.json}")


if __name__ == "__main__":
    main()
