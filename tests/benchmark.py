"""What a run costs, side by side with doing it the obvious way, in the same run.

    python tests/benchmark.py                  # all parts
    python tests/benchmark.py --parts around   # LeRobot, with an instant model
    python tests/benchmark.py --batch-sizes 1 8 64 --json outputs/gpu.json

It prints tables and writes JSON, and needs no network: datasets are drawn and weights
are random. On a GPU the model has the shape of Qwen2-VL-7B, in bfloat16. Without one it
is a small model on the CPU, whose figures say nothing about a GPU.

The obvious way is to walk every frame through LeRobotDataset, call `generate` for one
sample at a time with the picture as it is, and write with LeRobot's `add_features`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import itertools
import json
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import make_demo

sys.path.append(str(Path(__file__).parents[1]))

import annotate_pgen as ap

# Those of Qwen2-VL-7B.
GPU_TEXT = {"hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064}
GPU_TEXT |= {"num_hidden_layers": 28, "layer_types": ["full_attention"] * 28}
GPU_TEXT |= {"num_attention_heads": 28, "num_key_value_heads": 4}
GPU_VISION = {"hidden_size": 3584, "depth": 32, "embed_dim": 1280, "num_heads": 16}
STEPS = tuple(f"step {number}: move the arm to place {number}" for number in range(8))


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    episodes: int = 20  # Of 200 frames.
    runs: int = 3  # Of the command; the median counts.
    samples: int = 128  # At least, and twice the largest batch.
    batch_sizes: tuple[int, ...] = (1, 8, 32)


SMALL = Sizes(episodes=2, runs=1, samples=8, batch_sizes=(4,))


def seconds_of(work, *args):
    """How long a call takes."""
    started = time.perf_counter()
    work(*args)
    return time.perf_counter() - started


def write_answer(number):
    """An answer that counts, and no other like it."""
    reply = f"Yes, step n{number} it is."
    return json.dumps({"user_prompt": f"Do step n{number}.", "robot_utterance": reply})


# ------------------------------------------------------------------------------- around


class InstantPgen(ap.QwenPgen):
    """Answers at once: what a run takes is not the model's."""

    def __init__(self, *ignored):
        self.temperature = 0.7
        self.batch_limit = sys.maxsize
        self.numbers = itertools.count()

    def prepare(self, images, prompt, examples=()):
        """Take the sample as it is."""
        return prompt

    def answer(self, batch, tries=0):
        """Answer each sample with a new dialogue."""
        return [write_answer(next(self.numbers)) for _ in batch]


def around(folder, sizes):
    """Drawn frames (96x128, av1) of two cameras, both shown to an instant model."""
    import lerobot.datasets.dataset_tools  # noqa: F401 (it takes long)

    source = folder / "source"
    make_demo.make_dataset(source, [200] * sizes.episodes, fps=30)
    save_model(folder / "model")
    outputs = [folder / f"run_{number}" for number in range(sizes.runs)]
    times = [seconds_of(run_command, source, folder / "model", x) for x in outputs]
    obvious = seconds_of(obvious_way, source, folder / "obvious")
    command = sorted(times)[len(times) // 2]
    return [
        {"way": "the obvious way", "s": obvious, "share": 1.0},
        {"way": "annotate_pgen.py", "s": command, "share": command / obvious},
    ]


def run_command(source, model, output):
    """Run the command line as it is, but for the model."""
    flags = ["--data-dir", source, "--model", model, "--output-dir", output]
    said = io.StringIO()
    with (
        patch.object(ap, "QwenPgen", InstantPgen),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        code = ap.main(list(map(str, [*flags, "--num-image-views-per-sample", 2])))
    if code:
        raise RuntimeError(said.getvalue())


def obvious_way(source, target):
    """The yardstick: every frame is decoded, and all is written anew."""
    import numpy as np
    import pandas as pd
    from lerobot.datasets.dataset_tools import add_features
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from torchvision.transforms.functional import to_pil_image

    pgen = InstantPgen()
    dataset = LeRobotDataset("local/x", source, video_backend="pyav")
    episodes = json.loads((source / "meta" / "skills.json").read_text())["episodes"]
    rows = []
    indices = []
    for item in dataset:
        if item["frame_index"] % 30 == 0:
            episode = episodes[str(item["episode_index"].item())]
            begun = [x for x in episode["skills"] if x["start"] <= item["timestamp"]]
            names = [skill["name"] for skill in begun]
            prompt = ap.construct_prompt(episode["description"], names[:-1], names[-1])
            images = [to_pil_image(item[key]) for key in make_demo.CAMERAS]
            rows.append(pgen.call_qwen(images, prompt))
        indices.append(len(rows) - 1)
    feature = {"dtype": "int64", "shape": (1,), "names": None}
    columns = {ap.COLUMN: (np.array(indices), feature)}
    # LeRobot shows progress bars.
    with contextlib.redirect_stderr(io.StringIO()):
        add_features(dataset, columns, target, "local/obvious")
    pd.DataFrame(rows).to_parquet(target / "meta" / "tasks_high_level.parquet")


# -------------------------------------------------------------------------------- model


class FixedLengthPgen(ap.QwenPgen):
    """Answers of 40 tokens are generated, and others that count are given."""

    numbers = itertools.count()

    def generate(self, batch, tries, limit):
        """Generate as always, but for the length, and give other words."""
        self.model.generation_config.min_new_tokens = 40
        super().generate(batch, tries, limit=40)
        answers = [write_answer(next(self.numbers)) for _ in batch]
        return ['as told", ' + answer.removeprefix("{") for answer in answers]


def save_model(folder):
    """Write a checkpoint without weights, and return its configuration."""
    import torch

    # A token for each word, so that there are about as many as with Qwen's tokenizer.
    texts = [json.dumps(ap.prompt_settings()), *STEPS, make_demo.TASK]
    words = set(re.findall(" ?[A-Za-z]+", " ".join(texts)))
    tokenizer = make_demo.make_tokenizer(sorted(words))
    sizes = {"hidden": 128, "vocab": len(tokenizer), "layers": 4}
    config = make_demo.make_config(tokenizer, "qwen2_vl", **sizes)
    if torch.cuda.is_available():
        config.text_config.update(GPU_TEXT)
        config.text_config.rope_scaling["mrope_section"] = [16, 24, 24]
        config.vision_config.update(GPU_VISION)
    make_demo.make_processor(tokenizer).save_pretrained(folder)
    config.save_pretrained(folder)
    return config


def make_pgen(folder):
    """A QwenPgen with random weights; of its constructor, only loading is replaced."""
    import torch
    from transformers import AutoModelForImageTextToText as Model

    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", "bfloat16") if on_gpu else ("cpu", "float32")
    config = save_model(folder)
    form = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
    with torch.device(device):
        loaded = (Model.from_config(config, **form).eval(), {"missing_keys": []})
    with patch.object(Model, "from_pretrained", return_value=loaded):
        return FixedLengthPgen(str(folder), device, dtype)


def make_plan(folder, sizes):
    """Samples of an episode with eight skills, each a 640x480 picture."""
    count = max(sizes.samples, 2 * max(sizes.batch_sizes))
    named = [(name, count / 80 * i, 60.0) for i, name in enumerate(STEPS)]
    skills = make_demo.skills_of([count], skills=named)
    given = {"cameras": {"front": "image"}, "size": (480, 640), "skills": skills}
    make_demo.make_dataset(folder, [count], **given)
    return ap.make_plan(ap.open_dataset(folder), sample_interval=0.1)


def annotate(pgen, plan, batch_size, verify=False):
    """The script's own path from pictures to dialogues, each asked for once."""
    annotator = ap.Annotator(pgen, batch_size, verify)
    with patch.object(ap, "MAX_TRIES", 1):
        list(annotator.annotate(plan, plan.samples))
    if annotator.progress.generated != len(plan.samples):
        raise RuntimeError(annotator.progress)


def one_at_a_time(pgen, plan, count):
    """The yardstick: the picture as it is, the plain chat template, a call for each."""
    samples = plan.samples[:count]
    for sample, images in zip(samples, ap.read_views(plan, samples), strict=True):
        content = [{"type": "image"}, {"type": "text", "text": sample.prompt}]
        chat = ap.make_messages(sample.examples(), content)
        text = pgen.processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = pgen.processor(text=[text], images=images, return_tensors="pt")
        inputs = inputs.to(pgen.model.device)
        tokens = pgen.model.generate(**inputs, do_sample=True, max_new_tokens=40)
        pgen.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :])


def model(folder, sizes):
    """One 640x480 picture a sample, answers of 40 tokens, random weights."""
    pgen = make_pgen(folder / "model")
    plan = make_plan(folder / "source", sizes)
    one_at_a_time(pgen, plan, 1)
    speed = 8 / seconds_of(one_at_a_time, pgen, plan, 8)
    rows = [{"way": "obvious", "batch": 1, "samples/s": speed, "times": 1.0}]
    for size in sizes.batch_sizes:
        mine = len(plan.samples) / seconds_of(annotate, pgen, plan, size)
        ratio = mine / speed
        rows.append({"way": "ours", "batch": size, "samples/s": mine, "times": ratio})
    return rows


def verify(folder, sizes):
    """What the questions of --verify add, with the same model and eight skills."""
    pgen = make_pgen(folder / "model")
    plan = make_plan(folder / "source", sizes)
    annotate(pgen, plan, sizes.batch_sizes[-1], verify=True)
    rows = []
    for size in sizes.batch_sizes:
        plain = seconds_of(annotate, pgen, plan, size)
        checked = seconds_of(annotate, pgen, plan, size, True)
        row = {"batch": size, "samples/s": len(plan.samples) / plain}
        rows.append({**row, "more time with --verify": checked / plain - 1})
    return rows


# ------------------------------------------------------------------------- command line

PARTS = {"around": around, "model": model, "verify": verify}


def print_table(rows):
    """Print rows, with a column for each name."""
    for row in [list(rows[0]), *(row.values() for row in rows)]:
        texts = [f"{x:.3g}" if isinstance(x, float) else str(x) for x in row]
        print("  ".join(text.ljust(24) for text in texts).rstrip())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=(1, 8, 32))
    parser.add_argument("--json", type=Path, default=Path("outputs/benchmark.json"))
    args = parser.parse_args()
    sizes = Sizes(batch_sizes=tuple(args.batch_sizes))
    os.environ.update(HF_HUB_OFFLINE="1", SVT_LOG="1")
    make_demo.quiet_libraries()
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    report = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "GPU": gpu}
    report |= {x: importlib.metadata.version(x) for x in ("torch", "lerobot", "av")}
    print(report)
    for part in args.parts:
        with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
            report[part] = PARTS[part](Path(folder), sizes)
        print(f"\n{part}: {PARTS[part].__doc__}\n")
        print_table(report[part])
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
