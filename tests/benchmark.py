"""What a run costs, side by side with doing it the obvious way, in the same run.

    python tests/benchmark.py                   # all that can run here; under five minutes
    python tests/benchmark.py --parts around    # LeRobot's part, with an instant generator
    python tests/benchmark.py --parts memory    # of a run over 2,000,000 frames
    python tests/benchmark.py --parts model --json outputs/gpu.json    # needs no LeRobot

prints a table and writes JSON. Needs no network: datasets are drawn, weights random. On a GPU the
model has the real shape of Qwen2-VL-7B, in bfloat16. Without one it is a small one on the CPU, to
show that it all works; its figures say nothing about a GPU.

The obvious way is to walk every frame through LeRobotDataset, call `generate` for one sample at a
time with the picture as it is, and write with LeRobot's `add_features`.
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
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import make_demo  # noqa: E402

import annotate_pgen  # noqa: E402

Row = dict[str, Any]
FPS, INTERVAL = 30, 1.0  # of the datasets, and --sample-interval's default
PACKAGES = ("torch", "transformers", "lerobot", "av", "pyarrow", "pandas", "qwen-vl-utils")


class InstantPgen(annotate_pgen.QwenPgen):
    """Answers at once, never twice the same: what a run with it takes is not the model's."""

    def __init__(self, *how: Any):
        self.temperature, self.batch_limit, self.count = 0.7, sys.maxsize, itertools.count()

    def prepare(self, images: Any, prompt: str) -> dict[str, str]:
        return {"prompt": prompt}

    def answer(self, batch: Sequence, tries: int = 0) -> list[dict[str, str]]:
        return [dialogue_of(next(self.count)) for _ in batch]


def dialogue_of(number: int) -> dict[str, str]:
    return {"user_prompt": f"Now do step {number}.", "robot_utterance": f"I do step {number}."}


def apart(work: Callable, *args: Any) -> Any:
    """Do the work in a fresh process, whose peak memory begins with that of this small one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin) as fresh:
        return fresh.submit(work, *args).result()


def begin() -> None:
    import torch

    multiprocessing.set_start_method(None, True)  # LeRobot 0.4.4 starts two for each episode
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # several wait for each other when anything else runs here


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_memory() -> int:
    """In bytes, which getrusage counts only on macOS."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ------------------------------------------------------------------------------ around the model
def around(folder: Path) -> list[Row]:
    """4,000 drawn frames (96x128, av1) of two cameras, both shown to an instant generator."""
    make_demo.quiet_libraries()
    import lerobot.datasets.dataset_tools  # noqa: F401  (all else is imported by drawing)

    source = make_demo.make_dataset(folder / "source", [200] * 20, fps=FPS)
    with redirect_stderr(StringIO()):  # LeRobot's progress bars
        obvious = obvious_way(source)
    taken = sorted(seconds(lambda n=n: run(source, f"run_{n}")) for n in range(3))
    command = {"way": "annotate_pgen.py, the command, median of 3", "total s": taken[1]}
    settings = run(source, "settings")
    steps = list(watch(run_by_steps(source, settings)))
    phases = {"way": "(its steps, called one by one)", "total s": sum(s for _, s, _ in steps)}
    phases |= {f"{name} s": s for name, s, _ in steps}
    rows = [obvious, command, phases]
    return [row | {"share": row["total s"] / obvious["total s"]} for row in rows]


def obvious_way(source: Path) -> Row:
    """The yardstick."""
    import numpy as np
    import pandas as pd
    from lerobot.datasets.dataset_tools import add_features
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from torchvision.transforms.functional import to_pil_image

    start, target, pgen = time.perf_counter(), source.with_name("obvious"), InstantPgen()
    dataset, rows, indices = LeRobotDataset("local/x", source, video_backend="pyav"), [], []
    episodes = json.loads((source / "meta" / "skills.json").read_text())["episodes"]
    for item in (dataset[i] for i in range(len(dataset))):
        if item["frame_index"] % round(INTERVAL * FPS) == 0:
            episode = episodes[str(item["episode_index"].item())]
            names = [s["name"] for s in episode["skills"] if s["start"] <= item["timestamp"]]
            asked = episode["description"], names[:-1], names[-1]
            images = [to_pil_image(item[key]) for key in make_demo.CAMERAS]
            rows.append(pgen.call_qwen(images, annotate_pgen.construct_prompt(*asked)))
        indices.append(len(rows) - 1)
    walked = time.perf_counter()
    column = np.array(indices), {"dtype": "int64", "shape": (1,), "names": None}
    add_features(dataset, {annotate_pgen.COLUMN: column}, target, "local/obvious")
    pd.DataFrame(rows).to_parquet(target / "meta" / "tasks_high_level.parquet")
    end = time.perf_counter()
    taken = {"total s": end - start, "frames s": walked - start, "write s": end - walked}
    return {"way": "the obvious way"} | taken


def run(source: Path, name: str) -> dict[str, Any]:
    """The command line as it is, but for the model, with all cameras; returns the settings."""
    said, target = StringIO(), source.with_name(name)
    flags = ["--data-dir", str(source), "--output-dir", str(target), "--camera-keys"]
    flags += [key for key in make_demo.CAMERAS if next(source.glob(f"videos/{key}"), None)]
    instant = patch.object(annotate_pgen, "QwenPgen", InstantPgen)
    with instant, redirect_stdout(said), redirect_stderr(said):
        code = annotate_pgen.main(flags)
    if code:
        raise RuntimeError(said.getvalue())
    return json.loads((target / "meta" / "annotate_pgen.json").read_text())


def run_by_steps(source: Path, settings: dict, unknown: int | None = None) -> Iterator[str]:
    """The same through the script's functions; yields what each has done. With `unknown`, as a run
    that goes on where all but so many dialogues are there."""
    keys = settings["camera_keys"]
    meta = annotate_pgen.open_dataset(source)
    plan = annotate_pgen.make_plan(meta, INTERVAL, len(keys), keys, 0)
    yield "plan"
    progress, pgen = annotate_pgen.Progress(), InstantPgen()
    known = plan.samples[:-unknown] if unknown else []
    progress.dialogues = {sample.index: pgen.answer([sample])[0] for sample in known}
    with redirect_stderr(StringIO()):
        results = annotate_pgen.generate_synthetic_data(meta, pgen, plan, 16, progress)
    yield "frames"
    annotate_pgen.write_dataset(source, source.with_name(f"{source.name}_s"), results, settings)
    yield "write"


def watch(steps: Iterator[str]) -> Iterator[tuple[str, float, int]]:
    """Each step, its seconds, and the peak memory by its end."""
    start = time.perf_counter()
    for step in steps:
        yield step, time.perf_counter() - start, peak_memory()
        start = time.perf_counter()


# ---------------------------------------------------------------------------------------- memory
LENGTH, EPISODES, UNKNOWN = 400, 5000, 1000


def memory(folder: Path) -> list[Row]:
    """2,000,000 frames in 5,000 episodes, a sample a second, all but the last 1,000 of the 70,000
    answered by an earlier run. Growth is the peak over what a run on two episodes leaves. All show
    the same drawn video: reading more pictures takes longer, not more memory."""
    apart(draw_rows, folder / "two", 2)
    group, frames = apart(draw_rows, folder / "many", EPISODES), LENGTH * EPISODES
    rows = apart(watch_memory, folder)
    rows.append({"step": "(for comparison: one row group)", "growth MB": group / 1e6})
    return [row | {"bytes a frame": row["growth MB"] * 1e6 / frames} for row in rows]


def watch_memory(folder: Path) -> list[Row]:
    make_demo.quiet_libraries()
    settings, rows = run(folder / "two", "settings"), []  # every library is loaded by now
    before = peak_memory()
    with suppress(OSError):  # on Linux, what is held now, which is less than the peak
        held = Path("/proc/self/statm").read_text().split()[1]
        before = int(held) * os.sysconf("SC_PAGESIZE")
    for step, taken, peak in watch(run_by_steps(folder / "many", settings, UNKNOWN)):
        rows.append({"step": step, "seconds": taken, "growth MB": (peak - before) / 1e6})
    return rows


def draw_rows(root: Path, count: int, in_a_file: int = 1250) -> int:
    """Record an episode and write it `count` times, a row group each as LeRobot does, all of which
    show its video. Returns the bytes of a row group."""
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    make_demo.quiet_libraries()
    camera = dict([*make_demo.CAMERAS.items()][:1])
    make_demo.make_dataset(root, [LENGTH], FPS, camera, size=(64, 64))
    data, info = next(root.glob("data/*/*.parquet")), root / "meta" / "info.json"
    one, size = pq.read_table(data), {"row_group_size": LENGTH}
    for first in range(0, count, in_a_file):
        numbers = np.arange(first, min(first + in_a_file, count))
        table = pa.concat_tables([one] * len(numbers))
        index = first * LENGTH + np.arange(len(table))
        for name, values in ("episode_index", numbers.repeat(LENGTH)), ("index", index):
            place = one.schema.get_field_index(name)
            table = table.set_column(place, one.schema.field(name), pa.array(values))
        pq.write_table(table, data.with_name(f"file-{first // in_a_file:03}.parquet"), **size)
    path, numbers = next(root.glob("meta/episodes/*/*.parquet")), pd.RangeIndex(count)
    episodes = pd.concat([pd.read_parquet(path)] * count, ignore_index=True)
    firsts = {"dataset_from_index": numbers * LENGTH, "dataset_to_index": (numbers + 1) * LENGTH}
    where = {"episode_index": numbers, "data/file_index": numbers // in_a_file}
    episodes.assign(**firsts, **where).to_parquet(path)
    totals = {"total_episodes": count, "total_frames": count * LENGTH}
    info.write_text(json.dumps(json.loads(info.read_text()) | totals))
    make_demo.write_skills(root, make_demo.skills_of([LENGTH] * count))
    return one.nbytes


# ------------------------------------------------------------------------------------- the model
ANSWER = 40  # tokens, of every answer
TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TEXT += ("num_key_value_heads", "vocab_size")
VISION = ("hidden_size", "depth", "embed_dim", "num_heads")
SHAPES = {  # Qwen2-VL-7B's own, and something small
    "cuda": ((3584, 18944, 28, 28, 4, 152064), (3584, 32, 1280, 16), [16, 24, 24]),
    "cpu": ((128, 512, 4, 2, 1, 2048), (128, 2, 80, 1), [8, 12, 12]),
}
BATCHES = {"cuda": (1, 8, 32, 64, 128), "cpu": (1, 8, 32)}
STATIC = {"cuda": (8, 64), "cpu": ()}  # on the CPU it would not be compiled


@dataclass
class Rig:
    """What the model part measures with, and what it has measured."""

    device: str
    pgen: annotate_pgen.QwenPgen
    matrix_rate: float  # FLOP/s
    bandwidth: float  # bytes/s, read and written
    image: Any
    prompt: str
    tokens: int = 0  # of the last prompt, patches of its picture included
    patches: int = 0  # four of them make a token


def model(folder: Path) -> list[Row]:
    """One 640x480 picture a sample, in memory; answers of 40 tokens; random weights."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rig = make_rig(device)
    rows = [measure(rig, "the obvious way", 1, one_at_a_time)]
    rows += [measure(rig, "annotate_pgen.py", batch, stream) for batch in BATCHES[device]]
    rig.pgen.model.generation_config.cache_implementation = "static"
    for batch in STATIC[device]:
        try:
            rows.append(measure(rig, "with a static KV cache", batch, stream))
        except Exception as error:  # it is compiled, which takes more than torch
            rows.append({"way": f"static KV cache failed: {error!r:.60}", "batch": batch})
    for row in rows:
        row["times"] = row.get("samples/s", 0.0) / rows[0]["samples/s"]
    if not STATIC[device]:
        rows.append({"way": "(a static KV cache: only on a GPU)"})
    rates = {"TFLOP/s": rig.matrix_rate / 1e12, "GB/s": rig.bandwidth / 1e9}
    return [*rows, {"way": "(the roofline)"} | rates]


def make_rig(device: str) -> Rig:
    """A QwenPgen with random weights, by its own constructor, of which only loading is replaced."""
    import torch
    import transformers as tf
    from PIL import Image

    names = [name for name, _, _ in make_demo.PICK_AND_PLACE]
    types = "constraint_based", "constraint_acknowledgment"
    prompt = annotate_pgen.construct_prompt(make_demo.TASK, names[:2], names[2], *types)
    # a token for each word, so that there are about as many as with Qwen's own tokenizer
    tokenizer = make_demo.make_tokenizer(sorted(set(re.findall(" ?[A-Za-z]+", prompt))))
    ids = make_demo.make_config(tokenizer, "qwen2_vl", 64, 512, 1).to_dict().items()
    text, vision, sections = SHAPES[device]
    text, vision = dict(zip(TEXT, text, strict=True)), dict(zip(VISION, vision, strict=True))
    text["rope_scaling"] = {"type": "mrope", "rope_type": "default", "mrope_section": sections}
    text |= {"bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    how = {name: value for name, value in ids if name.endswith("_token_id")}
    how["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    config = tf.Qwen2VLConfig(text_config=text, vision_config=vision, **how)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    kind = tf.AutoModelForImageTextToText
    with torch.device(device):
        weights = kind.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    loaded = {kind: (weights, {"missing_keys": []}), tf.AutoConfig: config}
    loaded[tf.AutoProcessor] = make_demo.make_processor(tokenizer)
    with ExitStack() as stack:
        for part, value in loaded.items():
            stack.enter_context(patch.object(part, "from_pretrained", return_value=value))
        pgen = annotate_pgen.QwenPgen("random", device, str(dtype).removeprefix("torch."))
    image = Image.fromarray(make_demo.draw_frame(0, 0, 0, (480, 640)))
    rig = Rig(device, pgen, *machine_rates(device, dtype), image, prompt)
    generate, length = weights.generate, {"min_new_tokens": ANSWER, "max_new_tokens": ANSWER}

    def generate_fixed_length(**inputs: Any) -> Any:
        rows, rig.tokens = inputs["input_ids"].shape
        rig.patches = len(inputs["pixel_values"]) // rows
        return generate(**(inputs | length))

    weights.generate = generate_fixed_length
    return rig


def machine_rates(device: str, dtype: Any) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s (read and written) of a large copy."""
    import torch

    n, size = (8192, 2**30) if device == "cuda" else (2048, 2**24)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    source, target = torch.ones(2, size, device=device, dtype=dtype)

    def best(work: Callable[[], Any]) -> float:
        wait = torch.cuda.synchronize if device == "cuda" else int
        return min(seconds(lambda: (work(), wait())) for _ in range(10))

    return 2 * n**3 / best(lambda: a @ b), 2 * source.nbytes / best(lambda: target.copy_(source))


def measure(rig: Rig, way: str, batch: int, work: Callable[[Rig, int, int], None]) -> Row:
    """A row: one batch to warm up, then four batches, eight samples at least."""
    import torch

    count, on_gpu = max(8, 4 * batch), rig.device == "cuda"
    warm_up = seconds(lambda: work(rig, batch, batch))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    taken = seconds(lambda: work(rig, count, batch))
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
    row = {"way": way, "batch": batch, "samples/s": count / taken, "times": 0.0}
    row |= {"of roofline": count * least_seconds(rig, batch) / taken, "peak GB": peak / 1e9}
    row |= {"text tokens": rig.tokens - rig.patches // 4, "image tokens": rig.patches // 4}
    if rig.pgen.batch_limit < batch:
        row["way"] += f", out of memory: halved to {rig.pgen.batch_limit}"
        rig.pgen.batch_limit = sys.maxsize
    return row | {"samples": count, "warm-up s": warm_up}


def least_seconds(rig: Rig, batch: int) -> float:
    """The roofline, for a sample: two FLOPs for each weight and token of the prompt at the matrix
    rate; then, for each further token of the answer, all weights and the cache read once."""
    marks = {"lm_head": "head", "embed_tokens": "", "merger": "merger", "visual": "tower"}
    size = dict.fromkeys(("head", "tower", "merger", "layers"), 0)
    for name, parameter in rig.pgen.model.named_parameters():
        part = next((part for mark, part in marks.items() if mark in name), "layers")
        if part:  # embeddings are looked up
            size[part] += parameter.numel()
    flops = 2 * (size["layers"] * rig.tokens + size["head"])
    flops += 2 * (size["tower"] * rig.patches + size["merger"] * rig.patches // 4)
    text, width = rig.pgen.model.config.get_text_config(), parameter.element_size()
    head_size = text.hidden_size // text.num_attention_heads
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size  # a token
    numbers = (size["layers"] + size["head"]) / batch + cached * (rig.tokens + ANSWER / 2)
    steps = ANSWER - 1  # the prompt gives the first
    return flops / rig.matrix_rate + steps * numbers * width / rig.bandwidth


def one_at_a_time(rig: Rig, count: int, batch: int) -> None:
    """The yardstick: the picture as it is, the model's plain chat template, a call for each."""
    processor, model = rig.pgen.processor, rig.pgen.model
    parts = [{"type": "image", "image": rig.image}, {"type": "text", "text": rig.prompt}]
    turns = [{"role": "user", "content": parts}]
    for _ in range(count):
        text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=[rig.image], return_tensors="pt").to(rig.device)
        how = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0}
        tokens = model.generate(**inputs, **how)
        processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :])


def stream(rig: Rig, count: int, batch: int) -> None:
    """The script's own path from pictures in memory to dialogues, with its reading ahead."""
    sample = annotate_pgen.Sample(0, 0, 0.0, "", (), "")
    samples = [replace(sample, frame_index=i, index=i) for i in range(count)]
    replaced = {
        "read_samples": lambda *_: ([rig.image] for _ in samples),
        "construct_prompt": lambda *_: rig.prompt,  # one length, so that tokens can be counted
        "parse_answer": lambda text: dialogue_of(0),  # random weights write nothing valid
        "tabulate": lambda *_: None,  # needs pandas
    }
    plan = annotate_pgen.Plan(samples, None, ["camera"])
    with patch.multiple(annotate_pgen, **replaced), redirect_stderr(StringIO()):
        annotate_pgen.generate_synthetic_data(None, rig.pgen, plan, batch)


# ---------------------------------------------------------------------------------- command line
def machine() -> Row:
    import torch

    gpu = torch.cuda.is_available() and torch.cuda.get_device_name()
    found = {"date": datetime.date.today().isoformat(), "processor": platform.machine()}
    with suppress(OSError, IndexError):
        found["processor"] = re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    found |= {"cores": os.cpu_count(), "GPU": gpu or "none, so the model is a small one on the CPU"}
    found["load"] = os.getloadavg()[0]  # other work on the machine, which blurs what follows
    found["python"] = platform.python_version()
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(itertools.chain(*rows)))
    cells = [[shown(row.get(name, "")) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in [names, *cells])


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and value < 1000 else str(value)


PARTS = {"around": around, "memory": memory, "model": model}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all that can run here")
    parser.add_argument("--json", type=Path, default=Path("outputs/benchmark.json"))
    args = parser.parse_args()
    possible = list(PARTS) if importlib.util.find_spec("lerobot") else ["model"]
    report, start = {"machine": apart(machine)}, time.perf_counter()
    print(", ".join(f"{k} {shown(v)}" for k, v in report["machine"].items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="benchmark_") as home:
        os.environ |= {"HF_HOME": f"{home}/hf", "HF_LEROBOT_HOME": f"{home}/lerobot"}
        os.environ |= {"HF_HUB_OFFLINE": "1", "SVT_LOG": "1"}
        for part in args.parts or possible:
            report[part] = apart(PARTS[part], Path(home, part))
            print(f"\n{part}: {PARTS[part].__doc__}\n\n{table(report[part])}", flush=True)
    report["seconds"] = time.perf_counter() - start
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\n{report['seconds']:.0f} s in all; written to {args.json}")


if __name__ == "__main__":
    main()
