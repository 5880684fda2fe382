"""What a run costs, measured against doing it the obvious way, side by side in the same run.

    python tests/benchmark.py                      # all that can run here, under five minutes
    python tests/benchmark.py --parts around       # LeRobot's part of the work, with an instant
                                                   #   generator: plan, frames, writing
    python tests/benchmark.py --parts memory       # peak memory over 2,000,000 frames
    python tests/benchmark.py --parts model        # the model's part; needs no LeRobot, only torch,
                                                   #   torchvision, transformers, qwen-vl-utils

prints a table and writes outputs/benchmark.json (--json). No network, no weights: the datasets are
drawn and the model is randomly initialised, on a GPU with the real shape of Qwen2-VL-7B, on the CPU
a small one, which shows that the benchmark works and says nothing about a GPU.

The obvious way: walk every frame through LeRobotDataset, one `generate` for each sample with the
picture as it is, write with LeRobot's `add_features`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import make_demo

import annotate_pgen

Row = dict[str, Any]
FPS, INTERVAL = 30, 1.0  # of the datasets; --sample-interval's default
PACKAGES = ("torch", "transformers", "lerobot", "av", "pyarrow", "pandas", "qwen-vl-utils")


class InstantPgen(annotate_pgen.QwenPgen):
    """Answers at once, each time something else: a run with it takes what is not the model's."""

    def __init__(self, *how: Any):
        self.temperature, self.batch_limit, self.count = 0.7, sys.maxsize, itertools.count()

    def prepare(self, images: Any, prompt: str) -> dict[str, str]:
        return {"prompt": prompt}

    def answer(self, batch: Sequence, tries: int = 0) -> list[dict[str, str]]:
        return [dialogue_of(next(self.count)) for _ in batch]


def apart(work: Callable, *args: Any) -> Any:
    """Do the work in a fresh process: this one stays small, as a child's peak memory begins with its
    parent's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(work, *args).result()


def dialogue_of(number: int) -> dict[str, str]:
    return {"user_prompt": f"Now do step {number}.", "robot_utterance": f"I do step {number}."}


# ------------------------------------------------------------------------------ around the model
def around(folder: Path) -> list[Row]:
    """4,000 drawn frames of two cameras, both shown to an instant generator."""
    return apart(both_ways, folder)


def both_ways(folder: Path) -> list[Row]:
    make_demo.quiet_libraries()
    source = make_demo.make_dataset(folder / "source", [200] * 20, fps=FPS)
    keys = list(make_demo.CAMERAS)
    # what both need is imported by now, but for this
    import lerobot.datasets.dataset_tools  # noqa: F401

    obvious = obvious_way(source, folder / "obvious", keys)
    script = script_way(source, folder / "script", keys)
    rows = [{"way": "the obvious way"} | obvious, {"way": "annotate_pgen.py"} | script]
    share = {name: script[name] / obvious[name] for name in ("total s", "plan+frames s", "write s")}
    return [*rows, {"way": "share of the obvious way's time"} | share]


def obvious_way(source: Path, target: Path, keys: list[str]) -> Row:
    """The yardstick, in a few lines; seconds by phase."""
    import numpy as np
    import pandas as pd
    from lerobot.datasets.dataset_tools import add_features
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from torchvision.transforms.functional import to_pil_image

    start, pgen, rows, indices = time.perf_counter(), InstantPgen(), [], []
    dataset = LeRobotDataset("local/source", root=source, video_backend="pyav")
    episodes = json.loads((source / "meta" / "skills.json").read_text())["episodes"]
    for item in (dataset[i] for i in range(len(dataset))):
        if item["frame_index"] % round(INTERVAL * FPS) == 0:
            episode = episodes[str(item["episode_index"].item())]
            names = [s["name"] for s in episode["skills"] if s["start"] <= item["timestamp"]]
            asked = episode["description"], names[:-1], names[-1]
            images = [to_pil_image(item[key]) for key in keys]
            rows.append(pgen.call_qwen(images, annotate_pgen.construct_prompt(*asked)))
        indices.append(len(rows) - 1)
    walked = time.perf_counter()
    column = np.array(indices), {"dtype": "int64", "shape": (1,), "names": None}
    add_features(dataset, {annotate_pgen.COLUMN: column}, target, "local/obvious")
    pd.DataFrame(rows).to_parquet(target / "meta" / "tasks_high_level.parquet")
    end = time.perf_counter()
    seconds = {"total s": end - start, "plan+frames s": walked - start, "write s": end - walked}
    return seconds | {"frames": len(indices), "samples": len(rows)}


def script_way(source: Path, target: Path, keys: list[str]) -> Row:
    """The whole command line as it is, but for the model; seconds by phase."""
    seconds, output = {}, StringIO()
    flags = ["--data-dir", str(source), "--output-dir", str(target), "--camera-keys", *keys]
    with ExitStack() as stack:
        for name in ("make_plan", "generate_synthetic_data", "write_dataset"):
            timed = timing(getattr(annotate_pgen, name), name, seconds)
            stack.enter_context(patch.object(annotate_pgen, name, timed))
        stack.enter_context(patch.object(annotate_pgen, "QwenPgen", InstantPgen))
        stack.enter_context(redirect_stdout(output))
        stack.enter_context(redirect_stderr(output))
        code = timing(annotate_pgen.main, "total", seconds)(flags)
    assert code == 0, output.getvalue()
    plan, frames = seconds["make_plan"], seconds["generate_synthetic_data"]
    rows = (target / "meta" / "syn_annotations.jsonl").read_text().count("\n")
    shown = {"total s": seconds["total"], "plan+frames s": plan + frames}
    shown |= {"write s": seconds["write_dataset"], "plan s": plan, "frames s": frames}
    return shown | {"samples": rows}


def timing(function: Callable, name: str, seconds: dict[str, float]) -> Callable:
    """The function, which adds its seconds under the name."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[name] = seconds.get(name, 0) + time.perf_counter() - start
        return result

    return timed


# ---------------------------------------------------------------------------------------- memory
LENGTH, EPISODES, READ = 400, 5000, 1000  # frames of an episode, episodes, samples not yet there


def memory(folder: Path) -> list[Row]:
    """2,000,000 frames at 30 fps, a sample a second, the last 1,000 of which are still to generate.

    The episodes share one drawn video, as reading pictures takes time and no more memory the more
    there are. Growth is that of the peak over a run on two such episodes, by the end of the phase.
    """
    few, many = folder / "few", folder / "many"
    apart(draw_rows, few, 2)
    group = apart(draw_rows, many, EPISODES)
    rows = apart(watched_run, few, many)
    for row in rows:
        row["bytes a frame"] = row["growth MB"] * 1e6 / (LENGTH * EPISODES)
    return [*rows, {"phase": "(one row group)", "growth MB": group / 1e6}]


def draw_rows(root: Path, count: int, in_a_file: int = 1250) -> int:
    """Record an episode and write it `count` times, a row group each as LeRobot does, all of which
    show its video. Returns the bytes of a row group in memory."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    make_demo.quiet_libraries()
    camera = {"observation.images.front": "video"}
    make_demo.make_dataset(root, [LENGTH], FPS, camera, size=(64, 64))
    data = next(root.glob("data/*/*.parquet"))
    table, schema = pq.read_table(data), pq.read_schema(data)
    for first in range(0, count, in_a_file):
        path = data.with_name(f"file-{first // in_a_file:03}.parquet")
        with pq.ParquetWriter(path, schema) as writer:
            for episode in range(first, min(first + in_a_file, count)):
                index = pa.array(range(episode * len(table), (episode + 1) * len(table)))
                shown = {"episode_index": pa.array([episode] * len(table)), "index": index}
                for name, values in shown.items():
                    table = table.set_column(table.schema.get_field_index(name), name, values)
                writer.write_table(table.cast(schema), row_group_size=len(table))
    path, numbers = next(root.glob("meta/episodes/*/*.parquet")), pd.RangeIndex(count)
    episodes = pd.concat([pd.read_parquet(path)] * count, ignore_index=True)
    episodes["episode_index"], episodes["data/file_index"] = numbers, numbers // in_a_file
    episodes["dataset_from_index"] = numbers * len(table)
    episodes["dataset_to_index"] = (numbers + 1) * len(table)
    episodes.to_parquet(path)
    info = json.loads((root / "meta" / "info.json").read_text())
    info |= {"total_episodes": count, "total_frames": count * len(table)}
    (root / "meta" / "info.json").write_text(json.dumps(info))
    make_demo.write_skills(root, make_demo.skills_of([len(table)] * count))
    return table.nbytes


def watched_run(few: Path, many: Path) -> list[Row]:
    """Seconds and growth of the peak memory by phase, in a process of its own."""
    make_demo.quiet_libraries()
    for _ in run_by_phases(few):
        pass  # loads every library
    before, start, rows = peak_memory(), time.perf_counter(), []
    for phase in run_by_phases(many):
        grown, seconds = peak_memory() - before, time.perf_counter() - start
        rows.append({"phase": phase, "seconds": seconds, "growth MB": grown / 1e6})
        start = time.perf_counter()
    return rows


def run_by_phases(root: Path) -> Iterator[str]:
    """A run that goes on where all but the last samples have been generated before."""
    meta = annotate_pgen.open_dataset(root)
    plan = annotate_pgen.make_plan(meta, INTERVAL, 1, None, 0)
    yield "plan"
    known = {sample.index: dialogue_of(sample.index) for sample in plan.samples[:-READ]}
    yield "(the dialogues known before)"
    with redirect_stderr(StringIO()):
        progress = annotate_pgen.Progress(dialogues=known)
        results = annotate_pgen.generate_synthetic_data(meta, InstantPgen(), plan, 16, progress)
    yield "frames"
    annotate_pgen.write_dataset(root, root.with_name(f"{root.name}_target"), results, {})
    yield "write"


def peak_memory() -> int:
    """Bytes; getrusage counts in KiB, on macOS in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ------------------------------------------------------------------------------------- the model
ANSWER = 40  # tokens, of every answer
SIZE = (480, 640)  # height, width of the pictures
LAYERS = ("hidden_size", "intermediate_size", "num_hidden_layers")
HEADS = ("num_attention_heads", "num_key_value_heads", "vocab_size")
TOWER = ("hidden_size", "depth", "embed_dim", "num_heads")
SHAPES = {  # Qwen2-VL-7B's own; on the CPU something small with the same parts
    "cuda": ((3584, 18944, 28), (28, 4, 152064), (3584, 32, 1280, 16), [16, 24, 24]),
    "cpu": ((256, 1024, 4), (4, 2, 4096), (256, 2, 160, 2), [8, 12, 12]),
}
BATCHES = {"cuda": (1, 8, 32, 64, 128), "cpu": (1, 8, 32)}
STATIC = {"cuda": (8, 64), "cpu": ()}  # on the CPU nothing would be compiled


@dataclass
class Rig:
    """What the model part measures with, and what it has measured."""

    device: str
    pgen: annotate_pgen.QwenPgen
    matrix_rate: float  # FLOP/s
    bandwidth: float  # bytes/s
    image: Any
    prompt: str
    shapes: tuple[int, int, int] = (0, 0, 0)  # rows, tokens, patches of the last `generate`
    rows: list[Row] = field(default_factory=list)


def model(folder: Path) -> list[Row]:
    """Samples a second with one 640x480 picture in memory, answers of 40 tokens, random weights."""
    return apart(measure_model)


def measure_model() -> list[Row]:
    import torch

    rig = make_rig("cuda" if torch.cuda.is_available() else "cpu")
    measure(rig, "the obvious way", 1, one_at_a_time)
    for batch in BATCHES[rig.device]:
        measure(rig, "annotate_pgen.py", batch, stream)
    for batch in STATIC[rig.device]:
        rig.pgen.model.generation_config.cache_implementation = "static"
        try:
            measure(rig, "with a static KV cache", batch, stream)
        except Exception as error:  # it compiles, which may lack a C compiler
            rig.rows.append({"way": f"static KV cache failed: {error!r:.60}", "batch": batch})
    for row in rig.rows:
        row["times"] = row.get("samples/s", 0) / rig.rows[0]["samples/s"]
    rates = f"{rig.matrix_rate / 1e12:.3g} TFLOP/s, {rig.bandwidth / 1e9:.3g} GB/s"
    return [*rig.rows, {"way": f"(roofline: {rates})"}]


def make_rig(device: str) -> Rig:
    """A QwenPgen with random weights, made on the device by its own constructor."""
    import torch
    import transformers as tf
    from PIL import Image

    torch.manual_seed(0)
    names = [name for name, _, _ in make_demo.PICK_AND_PLACE]
    types = "constraint_based", "constraint_acknowledgment"
    prompt = annotate_pgen.construct_prompt(make_demo.TASK, names[:2], names[2], *types)
    # a token for each word, so that there are about as many as with Qwen's own tokenizer
    tokenizer = make_demo.make_tokenizer(sorted(set(re.findall(" ?[A-Za-z]+", prompt))))
    small = make_demo.make_config(tokenizer, "qwen2_vl", 64, 512, 1)
    ids = {name: value for name, value in small.to_dict().items() if name.endswith("_token_id")}
    layers, heads, tower, sections = SHAPES[device]
    text = dict(zip(LAYERS + HEADS, layers + heads, strict=True))
    text["rope_scaling"] = {"type": "mrope", "rope_type": "default", "mrope_section": sections}
    vision = dict(zip(TOWER, tower, strict=True))
    config = tf.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    kind = tf.AutoModelForImageTextToText
    with torch.device(device):
        weights = kind.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    parts = {tf.AutoConfig: config, tf.AutoProcessor: make_demo.make_processor(tokenizer)}
    parts[kind] = weights, {"missing_keys": []}
    with ExitStack() as stack:  # only loading is replaced, so that the constructor may change
        for part, loaded in parts.items():
            stack.enter_context(patch.object(part, "from_pretrained", return_value=loaded))
        pgen = annotate_pgen.QwenPgen("random", device, str(dtype).removeprefix("torch."))
    image = Image.fromarray(make_demo.draw_frame(0, 0, 0, SIZE))
    rig = Rig(device, pgen, *machine_rates(device, dtype), image, prompt)
    generate = weights.generate

    def generate_fixed_length(**inputs: Any) -> Any:
        rows, tokens = inputs["input_ids"].shape
        rig.shapes = rows, tokens, len(inputs["pixel_values"]) // rows
        length = {"min_new_tokens": ANSWER, "max_new_tokens": ANSWER}
        return generate(**(inputs | length))

    weights.generate = generate_fixed_length
    return rig


def machine_rates(device: str, dtype: Any) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s (read and written) of a large copy."""
    import torch

    n, size = (8192, 2**31) if device == "cuda" else (2048, 2**28)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    source, target = torch.zeros(2, size, device=device, dtype=torch.uint8)
    product, copy = (lambda: a @ b), (lambda: target.copy_(source))
    return 2 * n**3 / best_time(product), 2 * size / best_time(copy)


def best_time(work: Callable[[], Any], repeats: int = 10) -> float:
    seconds = {}
    for turn in range(repeats):
        timing(lambda: (work(), synchronize()), str(turn), seconds)()
    return min(seconds.values())


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(rig: Rig, way: str, batch: int, work: Callable[[Rig, int, int], None]) -> None:
    """Add a row: a warm-up of one batch, then four batches, eight samples at least."""
    import torch

    seconds, count, on_gpu = {}, max(8, 4 * batch), rig.device == "cuda"
    timing(work, "warm-up", seconds)(rig, batch, batch)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    timing(work, "run", seconds)(rig, count, batch)
    _, tokens, patches = rig.shapes
    row = {"way": way, "batch": batch, "samples/s": count / seconds["run"], "times": 0.0}
    row["share of roofline"] = count * least_seconds(rig, batch) / seconds["run"]
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
    row |= {"peak GB": peak / 1e9, "text tokens": tokens - patches // 4}
    row |= {"image tokens": patches // 4, "samples": count, "warm-up s": seconds["warm-up"]}
    if rig.pgen.batch_limit < batch:
        row["way"] += f" (out of memory, halved to {rig.pgen.batch_limit})"
        rig.pgen.batch_limit = sys.maxsize
    rig.rows.append(row)


def least_seconds(rig: Rig, batch: int) -> float:
    """The roofline, for a sample: 2 FLOPs a weight and token of the prompt at the matrix rate, then
    for each further token of the answer all weights and the cached keys and values once."""
    size, (_, tokens, patches) = {"head": 0, "tower": 0, "merger": 0, "layers": 0}, rig.shapes
    for name, parameter in rig.pgen.model.named_parameters():
        marks = {"lm_head": "head", "embed_tokens": "", "merger": "merger", "visual": "tower"}
        part = next((part for mark, part in marks.items() if mark in name), "layers")
        if part:  # of the embeddings, only a row a token is read
            size[part] += parameter.numel()
    flops = 2 * (size["layers"] * tokens + size["head"])
    flops += 2 * (size["tower"] * patches + size["merger"] * patches // 4)
    text, width = rig.pgen.model.config.get_text_config(), parameter.element_size()
    head_size = text.hidden_size // text.num_attention_heads
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size  # of a token
    steps = ANSWER - 1  # the first token comes with the prompt
    weights, context = size["layers"] + size["head"], tokens + ANSWER / 2
    moved = steps * width * (weights / batch + cached * context)
    return flops / rig.matrix_rate + moved / rig.bandwidth


def one_at_a_time(rig: Rig, count: int, batch: int) -> None:
    """The yardstick: the picture as it is, the model's plain chat template, one call a sample."""
    processor, model = rig.pgen.processor, rig.pgen.model
    parts = [{"type": "image", "image": rig.image}, {"type": "text", "text": rig.prompt}]
    for _ in range(count):
        turns = [{"role": "user", "content": parts}]
        text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=[rig.image], return_tensors="pt").to(rig.device)
        how = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0}
        tokens = model.generate(**inputs, **how)
        processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :])


def stream(rig: Rig, count: int, batch: int) -> None:
    """The script's own path, from pictures in memory to dialogues, with its reading ahead."""
    sample = annotate_pgen.Sample(0, 0, 0.0, "", (), "")
    samples = [replace(sample, frame_index=i, index=i) for i in range(count)]
    replaced = {
        "read_samples": lambda *_: ([rig.image] for _ in samples),
        "construct_prompt": lambda *_: rig.prompt,  # one length, so that the tokens can be counted
        "parse_answer": lambda text: dialogue_of(0),  # random weights write nothing that is valid
        "tabulate": lambda plan, progress: None,  # needs pandas
    }
    plan = annotate_pgen.Plan(samples, None, ["camera"])
    with patch.multiple(annotate_pgen, **replaced), redirect_stderr(StringIO()):
        annotate_pgen.generate_synthetic_data(None, rig.pgen, plan, batch)


# ---------------------------------------------------------------------------------- command line
def machine() -> Row:
    import torch

    found = {"date": datetime.date.today().isoformat(), "processor": platform.machine()}
    with suppress(OSError, IndexError):
        cpus = Path("/proc/cpuinfo").read_text()
        found["processor"] = re.findall("model name.*: (.*)", cpus)[0]
    found |= {"cores": os.cpu_count(), "GPU": "none (so the model is a small one, on the CPU)"}
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    found["python"] = platform.python_version()
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def table(rows: list[Row]) -> str:
    """Rows of equal keys as lines of aligned columns."""
    names = list(dict.fromkeys(itertools.chain(*rows)))
    cells = [names, *([show(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def show(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


PARTS = {"around": around, "memory": memory, "model": model}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all that can run")
    parser.add_argument("--json", type=Path, default=Path("outputs/benchmark.json"))
    args = parser.parse_args()
    possible = list(PARTS) if importlib.util.find_spec("lerobot") else ["model"]
    started, report = time.perf_counter(), {"machine": apart(machine)}
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="benchmark_") as home:
        os.environ |= {"HF_HOME": f"{home}/hf", "HF_LEROBOT_HOME": f"{home}/lerobot"}
        os.environ |= {"HF_HUB_OFFLINE": "1", "SVT_LOG": "1", "TQDM_DISABLE": "1"}
        for part in args.parts or possible:
            rows = report[part] = PARTS[part](Path(home, part))
            print(f"\n{part}: {PARTS[part].__doc__}\n{table(rows)}", flush=True)
    report["seconds"] = time.perf_counter() - started
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\n{report['seconds']:.0f} s in all; written to {args.json}")


if __name__ == "__main__":
    main()
