#!/usr/bin/env python
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "lerobot>=0.4.4,<0.5; python_version < '3.12'",
#   "lerobot[dataset]>=0.6.1,<0.7; python_version >= '3.12'",
#   "transformers[torch]>=4.57.1,<5; python_version < '3.12'",
#   "transformers[torch]>=5.4,<6; python_version >= '3.12'",
#   "torch>=2.7,<2.11; python_version < '3.12'", "torch>=2.7; python_version >= '3.12'",
#   "qwen-vl-utils>=0.0.14", "huggingface_hub>=0.34.2,<2", "pandas>=2.2", "pyarrow>=17",
#   "pillow>=10.3", "tqdm>=4.66",
# ]
# ///
"""Write a LeRobot dataset in which every frame has a dialogue: what a person might have said to
bring about the robot's skill, and what the robot answers (p_gen of Hi Robot, arXiv 2502.19417).

A Qwen vision-language model writes them for sampled frames of a dataset with meta/skills.json. To
change what it is asked, edit the tables of types and PROMPT, and look at it with --dry-run.

examples:
  python annotate_pgen.py --data-dir outputs/demo/dataset --dry-run
  python annotate_pgen.py --repo-id lerobot/svla_so101_pickplace --output-dir outputs/pgen
  python annotate_pgen.py --repo-id lerobot/svla_so101_pickplace --sample-interval 0.5 \\
      --num-image-views-per-sample 2 --model Qwen/Qwen3-VL-30B-A3B-Instruct --device auto
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import uuid
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache, partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm


class Lazy:
    """A library that is imported when it is first used: with all of them --help takes 10 s."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self.name), attribute)


av, np, pa, pd, pq = map(Lazy, ("av", "numpy", "pyarrow", "pandas", "pyarrow.parquet"))
tf, torch, vl_utils = map(Lazy, ("transformers", "torch", "qwen_vl_utils"))
hub, hub_errors = Lazy("huggingface_hub"), Lazy("huggingface_hub.errors")
Image, lerobot_home = Lazy("PIL.Image"), Lazy("lerobot.utils.constants")
lerobot_dataset = Lazy("lerobot.datasets.lerobot_dataset")
lerobot_utils = Lazy("lerobot.datasets.utils")

COLUMN, SUFFIX = "task_index_high_level", "_with_high_level_tasks"
RECORD = Path("meta", "annotate_pgen.json")  # of the settings that a dataset was made with


class InputError(Exception):
    """What the user gave cannot be used (exit code 2). The message says where and what to do."""


class RunError(Exception):
    """The run cannot go on; the dialogues generated so far are kept (exit code 1)."""


def require(condition: Any, message: str, kind: type[Exception] = InputError) -> None:
    """Raises an error of the kind, with the message, unless the condition holds."""
    if not condition:
        raise kind(message)


@contextmanager
def blaming(culprit: str, remedy: str, kind: type[Exception] = InputError) -> Iterator[None]:
    """Within, any error becomes one of `kind` that names the culprit and the remedy."""
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:
        why = str(error).rstrip(".") or type(error).__name__
        raise kind(f"{culprit}: {why:.500}; {remedy}") from error


# ------------------------------------------------------------------------------------ vocabulary
SCENARIO_TYPES = {
    "specific_object": "The person names the object or the action plainly.",
    "negative_task": "The person says what NOT to do or touch, which leaves this skill.",
    "situated_correction": "The person corrects or adjusts what the robot has just been doing.",
    "implicit_request": "The person only hints at a need or wish, without any command.",
    "constraint_based": "The person adds a condition: how, where, how carefully, in which order.",
}
RESPONSE_TYPES = {
    "confirmation": "It simply agrees and says what it will do.",
    "clarification": "It asks back to make sure what is meant.",
    "acknowledgment": "It acknowledges the words and says what it is doing now.",
    "constraint_acknowledgment": "It agrees and repeats the condition it will respect.",
}
SUITABLE_RESPONSES = {
    "specific_object": ("confirmation", "clarification", "acknowledgment"),
    "negative_task": ("confirmation", "acknowledgment", "constraint_acknowledgment"),
    "situated_correction": ("confirmation", "clarification", "acknowledgment"),
    "implicit_request": ("confirmation", "clarification", "acknowledgment"),
    "constraint_based": ("clarification", "constraint_acknowledgment"),
}


# ---------------------------------------------------------------------------------------- skills
@dataclass(frozen=True)
class Skill:
    """What the robot does from `start` to `end`, in seconds from the episode's first frame."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class EpisodeSkills:
    """An episode's skills, sorted by start, and the texts of skills.json ("" where absent)."""

    description: str
    skills: tuple[Skill, ...]
    coarse_description: str = ""


def load_skills(root: Path, episode_indices: Sequence[int]) -> dict[int, EpisodeSkills]:
    """The episodes' skills from meta/skills.json. Raises InputError, also if one lacks any."""
    path, loaded = Path(root, "meta", "skills.json"), {}
    require(path.is_file(), f"{path}: not found; run annotate.py first to annotate the skills")
    content, again = read_json(path), "correct it or run annotate.py again"
    with blaming(f"{path} has the wrong form", again):
        coarse, episodes = text_or_empty(content.get("coarse_description")), content["episodes"]
        lacking = [i for i in episode_indices if not (episodes.get(str(i)) or {}).get("skills")]
    require(not lacking, f"{path}: no skills for episode {lacking}; run annotate.py for these")
    for index in episode_indices:
        episode, where = episodes[str(index)], f'{path}: episode "{index}"'
        with blaming(f"{where} has the wrong form", again):
            skills, description = list(episode["skills"]), text_or_empty(episode.get("description"))
        for n, entry in enumerate(skills):
            with blaming(f"{where}: skill {n} lacks name, start or end, or has a wrong one", again):
                name, start, end = text_or_empty(entry["name"]), entry["start"], entry["end"]
                valid = name and -math.inf < start <= end < math.inf
                problem = f"{where}: skill {n} ({name!r:.50}) runs from {start!r:.9} to {end!r:.9}"
                require(valid, f"{problem}, but needs a name and finite start <= end; {again}")
                skills[n] = Skill(name, float(start), float(end))
        skills.sort(key=lambda skill: skill.start)
        loaded[index] = EpisodeSkills(description, tuple(skills), coarse)
    return loaded


def text_or_empty(text: str | None) -> str:
    """The text, "" for None or a blank one. Raises ValueError for a lone surrogate."""
    return text if text and text.encode("utf-8").strip() else ""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError."""
    with blaming(f"{path} is no valid JSON", "restore it or write it again"):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    require(isinstance(content, dict), f"{path}: holds no JSON object; write it again")
    return content


# -------------------------------------------------------------------------------------- sampling
@dataclass(frozen=True)
class Sample:
    """A frame to generate a dialogue for, in the words and order of syn_annotations.jsonl."""

    episode_id: int
    frame_index: int  # in the episode
    timestamp: float  # seconds, as stored
    skill_current: str
    skill_history: tuple[str, ...]
    task_description: str
    scenario_type: str = ""
    response_type: str = ""
    index: int = 0  # of the frame in the dataset
    skill_rank = property(lambda self: len(self.skill_history))  # of the skill in its episode

    @property
    def prompt(self) -> str:
        asked = self.task_description, self.skill_history, self.skill_current
        return construct_prompt(*asked, self.scenario_type, self.response_type)

    @property
    def place(self) -> str:
        return f"episode {self.episode_id}, frame {self.frame_index}"

    def annotated(self, dialogue: dict[str, str]) -> dict[str, Any]:
        """Its line of syn_annotations.jsonl, but for the task index, which is not known yet."""
        return {k: v for k, v in vars(self).items() if k != "index"} | dialogue


@dataclass(frozen=True)
class Plan:
    """The whole job, in dataset order, decided before anything is generated."""

    samples: list[Sample]
    skill_ranks: np.ndarray  # int32 (frames,): rank of each frame's own skill
    camera_keys: list[str]


def sampled_frames(seconds: np.ndarray, sample_interval: float, fps: float) -> list[int]:
    """Positions of the first frame at or after each multiple of `sample_interval` in `seconds`,
    float64 (frames,) from the first. Up to a tenth of a frame early is on time: stored float32."""
    step = max(sample_interval, 0.5 / fps)  # shorter ones sample every frame too
    return np.unique((seconds + 0.1 / fps) // step, return_index=True)[1].tolist()


def plan_samples(
    episodes: Iterable, skills: dict, tasks: dict, fps: float, sample_interval: float, seed: int
) -> tuple[list[Sample], np.ndarray]:
    """The frames to sample with what is asked about each, and every frame's skill rank (int32).
    `episodes`: of each the index and the frames with frame_index, timestamp (seconds), task_index.
    A frame's skill is the last that has started, before any the first; `tasks` serve episodes
    without description."""
    samples, ranks, first = [], [], 0
    for episode_index, frames in episodes:
        known, timestamps = skills[episode_index], frames["timestamp"].to_numpy()
        seconds = timestamps.astype("float64") - float(timestamps[0])
        usable = (seconds[1:] >= seconds[:-1]).all() and seconds[-1] < math.inf
        where = f"episode {episode_index}: its timestamps in data/"
        require(usable, f"{where} run backwards or are not finite; correct them")
        names = tuple(skill.name for skill in known.skills)
        started = sum(seconds + 0.1 / fps >= skill.start for skill in known.skills)
        ranks.append((started - 1).clip(0).astype("int32"))
        positions = sampled_frames(seconds, sample_interval, fps)
        for i, row in zip(positions, frames.iloc[positions].itertuples(), strict=True):
            rank, own_task = int(ranks[-1][i]), tasks.get(row.task_index, "")
            task = known.description or own_task or known.coarse_description
            stored = float(str(timestamps[i]))  # 0.1, not the float64 nearest to its float32
            sample = Sample(episode_index, row.frame_index, stored, names[rank], names[:rank], task)
            samples.append(replace(sample, index=first + i))
        first += len(frames)
    with blaming("PROMPT or a table of types", "correct it; a brace in PROMPT is doubled"):
        named = {name for row in SUITABLE_RESPONSES.items() for name in (row[0], *row[1])}
        unknown = sorted(named - {*SCENARIO_TYPES, *RESPONSE_TYPES})
        require(not unknown, f"no type is called {unknown}, as in SUITABLE_RESPONSES", ValueError)
        dealt = deal_types(samples, seed)
        sum(len(sample.prompt) for sample in dealt)  # that can be filled in
    return dealt, np.concatenate(ranks)


def deal_types(samples: Iterable[Sample], seed: int) -> list[Sample]:
    """The samples with types, dealt like cards: left to itself, a model picks mostly one."""
    shuffler, decks, dealt = random.Random(seed), {}, []

    def draw(deck_of: tuple, types: Sequence[str]) -> str:
        decks[deck_of] = decks.get(deck_of) or shuffler.sample(types, len(types))
        return decks[deck_of].pop()

    for sample in samples:
        skill, first = sample.skill_current, not dealt or dealt[-1].episode_id != sample.episode_id
        suitable = [s for s in SCENARIO_TYPES if not (first and s == "situated_correction")]
        scenario = draw((skill, first), suitable)
        response = draw((skill, scenario), SUITABLE_RESPONSES.get(scenario, list(RESPONSE_TYPES)))
        dealt.append(replace(sample, scenario_type=scenario, response_type=response))
    return dealt


# ---------------------------------------------------------------------------------------- prompt
PROMPT = """\
You write training data for a robot that people talk to while it works.
Task: {task}
Done so far: {history}
The robot's skill at this moment: {skill}
What the robot sees is shown above.

Invent what is said at this moment:
- user_prompt: what a person says that makes this skill the right thing to do now. {scenario}
- robot_utterance: what the robot answers. {response}
One short everyday sentence each, true to what is seen.
Answer in JSON: {{"user_prompt": "...", "robot_utterance": "..."}}"""
PREFILL = '{"user_prompt": "'  # the model goes on from here: no preamble, no code fence
HISTORY_LENGTH = 5
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def construct_prompt(
    task: str, history: Sequence[str], skill: str, scenario_type: str = "", response_type: str = ""
) -> str:
    """What the model is asked about one frame; without types it may choose them itself."""
    return PROMPT.format(
        task=one_line(task) or "not described",
        history="; ".join(map(one_line, history[-HISTORY_LENGTH:])) or "nothing yet",
        skill=one_line(skill),
        scenario=SCENARIO_TYPES[scenario_type] if scenario_type else "",
        response=RESPONSE_TYPES[response_type] if response_type else "",
    )


def one_line(text: str) -> str:
    """`text` on one line, without control characters, which act on prompts and terminals."""
    return " ".join(CONTROL.sub(" ", text).split())


# ------------------------------------------------------------------------------------- generator
MAX_NEW_TOKENS = 128  # two sentences in JSON take 30 to 60
MAX_TRIES = 4
MAX_PIXELS = 448 * 448  # of a picture: 256 tokens for Qwen2-VL, 196 for Qwen3-VL


def parse_answer(text: str) -> dict[str, str] | None:
    """The dialogue in an answer, stripped; None if it is not one that somebody could say."""
    try:
        answer, _ = json.JSONDecoder().raw_decode(text.strip())
        dialogue = {key: answer[key].strip() for key in ("user_prompt", "robot_utterance")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    asked = "\n".join((PROMPT, *SCENARIO_TYPES.values(), *RESPONSE_TYPES.values())).casefold()
    markup = ("user_prompt", "robot_utterance", "<|", "|>", "{", "}", "\N{REPLACEMENT CHARACTER}")
    for said in dialogue.values():
        sane = 2 <= len(said) <= 300 and any(map(str.isalpha, said))
        echo = (len(said) > 15 and said.casefold() in asked) or any(m in said for m in markup)
        if not sane or echo or CONTROL.search(said):
            return None
    return dialogue if len({said.casefold() for said in dialogue.values()}) == 2 else None


class QwenPgen:
    """A Qwen vision-language model that writes dialogues (p_gen). `model`: Hub id or folder of a
    Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5; `device`: of torch, or "auto" for all GPUs; `dtype`:
    of torch, by name; `temperature`: 0 takes the likeliest token. Raises InputError."""

    def __init__(
        self, model: str, device: str = "cuda", dtype: str = "bfloat16", temperature: float = 0.7
    ):
        tf.utils.logging.disable_progress_bar()
        self.temperature, self.batch_limit = temperature, sys.maxsize
        with blaming(f"--device {device}", "try --device cpu"):
            torch.empty(1, device="cpu" if device == "auto" else device).tolist()
        wanted = f"--model {model}: cannot be loaded by transformers {tf.__version__}"
        with blaming(wanted, "check the name, the network, and that it is a Qwen VL model"):
            kind = tf.AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
            require(kind.startswith("qwen"), f"{wanted} as Qwen, it is {kind}; name another")
            self.processor = tf.AutoProcessor.from_pretrained(model, trust_remote_code=False)
            how = {"dtype": getattr(torch, dtype), "device_map": device, "trust_remote_code": False}
            how |= {"attn_implementation": "sdpa", "use_safetensors": True}
            load = tf.AutoModelForImageTextToText.from_pretrained
            self.model, loading = load(model, output_loading_info=True, **how)
            lacking = sorted(loading["missing_keys"])[:3]
            require(not lacking, f"{wanted}: its files lack the weights {lacking}; restore them")
        tokenizer = self.processor.tokenizer
        # A skill's name must not end a turn or call for a picture: such tokens are broken up.
        markers = [token for token in tokenizer.get_added_vocab() if re.fullmatch("<.+>", token)]
        self.markers = re.compile("|".join(map(re.escape, markers)) or "(?!)")
        # A checkpoint's settings would hold wherever ours are silent (Qwen2-VL's has top_k=1).
        ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        ours = {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
        self.model.generation_config = tf.GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, **ours)

    def call_qwen(self, images: Sequence[Image.Image], prompt: str) -> dict[str, str]:
        """A valid dialogue (user_prompt, robot_utterance) about RGB images. Raises RunError."""
        for tries in range(MAX_TRIES):
            if dialogue := self.call_qwen_batch([images], [prompt], tries)[0]:
                return dialogue
        raise RunError(f"none of {MAX_TRIES} answers of the model was a valid dialogue")

    def call_qwen_batch(
        self, images: Sequence[Sequence[Image.Image]], prompts: Sequence[str], tries: int = 0
    ) -> list[dict[str, str] | None]:
        """One answer to each prompt about its images, after `tries` earlier ones; None: invalid."""
        pairs = zip(images, prompts, strict=True)
        return self.answer([self.prepare(*pair) for pair in pairs], tries)

    def prepare(self, images: Sequence[Image.Image], prompt: str) -> dict[str, torch.Tensor]:
        """What the model is given for one sample, on the CPU: tokens (1, length) and pixels."""
        patch = self.processor.image_processor.patch_size
        shown = [{"type": "image", "image": view, "max_pixels": MAX_PIXELS} for view in images]
        asked = self.markers.sub(lambda marker: "< " + marker[0][1:], prompt)
        chat = [
            {"role": "user", "content": [*shown, {"type": "text", "text": asked}]},
            {"role": "assistant", "content": [{"type": "text", "text": PREFILL}]},
        ]
        text = self.processor.apply_chat_template(chat, tokenize=False, continue_final_message=True)
        pictures = vl_utils.process_vision_info(chat, image_patch_size=patch)[0]
        inputs = self.processor(text=[text], images=pictures, do_resize=False, return_tensors="pt")
        return dict(inputs)

    def answer(self, batch: Sequence[dict], tries: int = 0) -> list[dict[str, str] | None]:
        """One answer to each prepared sample, after `tries` earlier ones; None: invalid. Out of GPU
        memory, batches are halved from here on; at one, RunError is raised."""
        sampling, tokens = {"do_sample": False}, None
        if temperature := self.temperature or (tries and 0.7):  # greedy would only repeat itself
            temperature = max(temperature, 0.01)  # logits over less overflow
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        with suppress(torch.OutOfMemoryError), torch.inference_mode():
            inputs = self.collate(batch)
            tokens = self.model.generate(**inputs, **sampling)
        if tokens is None:  # and what failed no longer holds its memory
            torch.cuda.empty_cache()
            half = self.batch_limit = len(batch) // 2
            require(half, "out of GPU memory; use fewer views or a smaller --model", RunError)
            return self.answer(batch[:half], tries) + self.answer(batch[half:], tries)
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
        answers = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [parse_answer(PREFILL + answer) for answer in answers]

    def collate(self, batch: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Prepared samples as one batch on the model's device, tokens padded on the left."""
        inputs, pad = {}, torch.nn.utils.rnn.pad_sequence
        for name, value in batch[0].items():
            parts = [sample[name] for sample in batch]
            if value.shape == batch[0]["input_ids"].shape:  # a number for each token
                filler = self.model.generation_config.pad_token_id if name == "input_ids" else 0
                parts = [pad([part[0] for part in parts], True, filler, "left")]
            inputs[name] = torch.cat(parts).to(self.model.device)
        return inputs


# ---------------------------------------------------------------------------------------- frames
def picture_places(meta: Any, samples: Sequence[Sample], key: str) -> list[tuple]:
    """Each sample's (video, seconds in it, as in LeRobotDataset) or (parquet, row group, row).
    Raises InputError for seconds in another episode's part of the video."""
    if key in meta.video_keys:
        videos, table = episode_files(meta, f"videos/{key}"), episode_table(meta)
        start, slack = table[f"videos/{key}/from_timestamp"], 1 / meta.fps
        length = table.get(f"videos/{key}/to_timestamp", math.inf) - start + slack
        starts, lengths = start.to_dict(), length.to_dict()
        outside = [s.place for s in samples if not -slack <= s.timestamp <= lengths[s.episode_id]]
        problem = f"{meta.root}: outside the episode's part of {key} lie {outside[:3]}"
        require(not outside, f"{problem}; correct the timestamps in data/ or in meta/episodes")
        return [(videos[s.episode_id], starts[s.episode_id] + s.timestamp) for s in samples]
    files = [(p, pq.read_metadata(p)) for p in sorted(meta.root.glob("data/*/*.parquet"))]
    groups = [(path, number) for path, about in files for number in range(about.num_row_groups)]
    sizes = (about.row_group(n).num_rows for _, about in files for n in range(about.num_row_groups))
    firsts = [0, *accumulate(sizes)]
    holding = [bisect_right(firsts, sample.index) - 1 for sample in samples]
    return [(*groups[g], s.index - firsts[g]) for s, g in zip(samples, holding, strict=True)]


def read_pictures(meta: Any, places: Iterable[tuple], key: str) -> Iterator[Image.Image | None]:
    """A camera's RGB picture at each place; None where it cannot be decoded."""
    how = partial(open_table, key=key)
    if key in meta.video_keys:
        how = partial(open_video, tolerance=0.5 / meta.fps + 1e-4)
    opened = lru_cache(1)(how)
    for path, *where in places:
        picture = None
        for _ in range(2):  # a network drive may fail for a moment
            try:
                picture = opened(path)(*where)
                break
            except Exception:  # every decoder has errors of its own
                opened.cache_clear()
        yield picture


def open_video(path: Path, tolerance: float) -> Callable[[float], Image.Image]:
    """A function that gives a video's RGB picture within `tolerance` of a time, both in seconds. It
    decodes on from the last one, and seeks only if that takes fewer frames. Raises anything."""
    container, frames, frame, reach = av.open(str(path)), iter(()), None, 0.0
    stream = container.streams.video[0]

    def look(seconds: float) -> Image.Image:
        nonlocal frames, frame, reach
        if frame is None or not -tolerance <= seconds - frame.time <= reach:
            container.seek(max(0, int(seconds / stream.time_base)), stream=stream)
            frames = container.decode(stream)
            frame = next(frames)
            reach = max(reach, seconds - frame.time)  # what a seek has to decode at most, so far
        while frame.time < seconds - tolerance:
            frame = next(frames)
        require(frame.time <= seconds + tolerance, "no frame there", ValueError)
        return frame.to_image()

    return look


def open_table(path: Path, key: str) -> Callable[[int, int], Image.Image]:
    """A function that gives the RGB picture in a row of a row group. Raises anything."""
    parquet = pq.ParquetFile(path)
    read_group = lru_cache(1)(lambda group: parquet.read_row_group(group, [key])[key])

    def look(group: int, row: int) -> Image.Image:
        return Image.open(io.BytesIO(read_group(group)[row].as_py()["bytes"])).convert("RGB")

    return look


def read_samples(meta: Any, samples: Sequence[Sample], camera_keys: Sequence[str]) -> Iterator:
    """Each sample's views, one per camera key; None where one cannot be decoded."""
    views = (read_pictures(meta, picture_places(meta, samples, k), k) for k in camera_keys)
    return (None if None in shown else shown for shown in zip(*views, strict=True))


def read_ahead(items: Iterable[Any], size: int) -> Iterator[Any]:
    """The same items, up to `size` of them ahead. By one thread: video decoders are not safe."""
    items, end, reader = iter(items), object(), ThreadPoolExecutor(1, "reader")
    try:
        ready = deque(reader.submit(next, items, end) for _ in range(size))
        while (item := ready.popleft().result()) is not end:
            ready.append(reader.submit(next, items, end))
            yield item
    finally:
        reader.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------ annotation
Dialogues = dict[int, dict[str, str]]  # user_prompt and robot_utterance, by index of the frame
Results = tuple["pd.DataFrame", "np.ndarray", list[dict[str, Any]]]  # tasks, frames' rows, lines


@dataclass
class Progress:
    """What has become of the samples so far."""

    dialogues: Dialogues = field(default_factory=dict)
    given_up: dict[str, str] = field(default_factory=dict)  # why, by episode and frame
    asked_again: int = 0
    late_share: float = 0.0  # of frames that carry the dialogue of an earlier skill than their own
    save: Callable[[Dialogues], None] = lambda finished: None  # gets the dialogues of each batch
    count: Callable[[Dialogues], int] = len  # of the finished ones, other ranks' included
    bar: tqdm = field(default_factory=lambda: tqdm(disable=True))

    def show(self, **state: int) -> None:
        """Bring the progress bar up to date."""
        if state:
            self.bar.set_postfix(state, refresh=False)
        self.bar.update(self.count(self.dialogues) - self.bar.n)


def annotate_sample(pgen: QwenPgen, images: Sequence[Image.Image], sample: Sample) -> dict:
    """Generate a sample's line of syn_annotations.jsonl from its RGB views, or raise RunError."""
    return sample.annotated(pgen.call_qwen(images, sample.prompt))


def annotate_samples(pgen: QwenPgen, pairs: Iterable, limit: int, progress: Progress) -> None:
    """Generate the dialogues of pairs (sample, what prepare() made of it or None), `limit` at once;
    those without a valid answer are asked again."""

    def give_up(sample: Sample, why: str) -> None:
        progress.given_up[sample.place] = why

    fresh, again = ((s, p, 0) for s, p in pairs if p or give_up(s, "broken picture")), []
    while True:
        size = min(limit, pgen.batch_limit)
        # at temperature 0 a batch is all first tries, greedy, or all repeats, sampled
        room = 0 if again and not pgen.temperature else max(0, size - len(again))
        batch, again = again[:size] + list(islice(fresh, room)), again[size:]
        if not batch:
            return
        answers = pgen.answer([prepared for _, prepared, _ in batch], tries=batch[0][2])
        finished = {}
        for (sample, prepared, tries), answer in zip(batch, answers, strict=True):
            if answer:
                finished[sample.index] = answer
            elif tries + 1 < MAX_TRIES:
                again.append((sample, prepared, tries + 1))
                progress.asked_again += 1
            else:
                give_up(sample, f"none of {MAX_TRIES} answers was valid")
        progress.save(finished)
        progress.dialogues |= finished
        progress.show(batch=min(limit, pgen.batch_limit), again=progress.asked_again)


def journal_name(rank: int | str, settings: dict[str, Any]) -> str:
    """A rank that outlives its run must not write among dialogues with other settings."""
    return f"dialogues-{rank}-{hashed(settings)}.jsonl"


def read_journals(folder: Path, names: str = "dialogues-*.jsonl") -> Dialogues:
    """The dialogues in the journals of these names, but for lines torn by a crash."""
    dialogues = {}
    for journal in sorted(folder.glob(names)):
        for line in journal.read_bytes().split(b"\n"):
            with suppress(ValueError, KeyError, TypeError):
                if dialogue := parse_answer(line.decode()):
                    dialogues.setdefault(json.loads(line)["index"], dialogue)
    return dialogues


def count_dialogues(folder: Path) -> int:
    """About how many dialogues are in a run's journals, without reading them closely."""
    journals = folder.glob("dialogues-*.jsonl")
    return sum(journal.read_bytes().count(b'{"index"') for journal in journals)


@contextmanager
def open_journal(path: Path) -> Iterator[Callable[[Dialogues], None]]:
    """A function that puts dialogues on the disk, a line each. Raises RunError."""
    trouble = f"{path}: cannot be written", "see to the disk and run again", RunError
    with blaming(*trouble):
        journal = path.open("ab", buffering=0)

    def save(dialogues: Dialogues) -> None:
        lines = (json_line({"index": i} | dialogue) for i, dialogue in dialogues.items())
        with blaming(*trouble):
            written = ("\n" + "".join(lines)).encode()  # a crash may have torn the last line
            require(journal.write(written) == len(written), "the disk is full", OSError)
            os.fsync(journal.fileno())

    with journal:
        yield save


def hashed(what: Any) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def compare_settings(path: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises InputError that names the first setting that `found`, read from `path`, has not."""
    for name, value in settings.items():
        was = f"{path}: made with {name} = {found.get(name)!r}, but this run has {value!r}"
        require(found.get(name) == value, f"{was}; undo it, change --output-dir or add --overwrite")


def json_line(entry: dict[str, Any]) -> str:
    """`entry` on a line, also for readers that take U+2028 and the like for a line's end."""
    text = json.dumps(entry, ensure_ascii=False)
    return CONTROL.sub(lambda c: f"\\u{ord(c[0]):04x}", text) + "\n"


# ----------------------------------------------------------------------------------------- ranks
SILENCE = 600.0  # seconds without a sign of life after which a rank is taken for dead


def launched() -> tuple[int, int, int]:
    """This process' rank, the number of ranks, and its rank on this machine: from torchrun, else
    from srun, whose variables count only inside a step; (0, 1, 0) on its own. Raises InputError."""
    env, torchrun = os.environ, ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    for names in (torchrun, ("SLURM_PROCID", tasks, "SLURM_LOCALID", "SLURM_STEP_ID")):
        if all(name in env for name in names):
            with blaming(f"{names[:3]} in the environment", "correct or unset them"):
                rank, world, local_rank = (int(env[name]) for name in names[:3])
                require(0 <= rank < world, f"rank {rank} of {world}", ValueError)
            return rank, world, local_rank
    return 0, 1, 0


def share(items: Sequence[Any], rank: int, world: int) -> Sequence[Any]:
    """A rank's share of the items, a stretch of them: ranks do not read the same files."""
    return items[len(items) * rank // world : len(items) * (rank + 1) // world]


@contextmanager
def lead(folder: Path, settings: dict, fresh: bool, samples: Sequence[Sample]) -> Iterator[tuple]:
    """As rank 0: lock a run's folder, take over the dialogues in its journals, and deal the other
    samples to the ranks in equal parts, once all are there. Yields run.json's content and the
    dialogues. Raises InputError if another run is at it, or had other settings and is not to be
    discarded for a `fresh` one; RunError that names ranks that do not come."""
    record, lock, world = folder / "run.json", FileLock(folder / "lock", timeout=0), launched()[1]
    ours = r"\..*|lock|rank-.*|replaced-\d+"  # what may be left of a finished run
    ours += r"|run\.json|dialogues-.*|dataset" if record.is_file() else ""
    foreign = any(not re.fullmatch(ours, path.name) for path in folder.glob("*"))
    require(not foreign, f"{folder}: is no journal; move it away")
    with blaming(f"{folder}: cannot be locked", "wait for the other run or name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        run = read_json(record) if record.is_file() else {}
        goes_on = run.get("settings") == settings and run.get("overwrite")
        if fresh and not goes_on:
            for path in folder.glob("dialogues-*"):
                path.unlink()
        if read_journals(folder):
            compare_settings(record, run.get("settings", {}), settings)
        known = read_journals(folder, journal_name("*", settings))
        launches = run.get("launches", 0) + 1
        run = {"settings": settings, "overwrite": fresh, "launches": launches, "parts": {}}
        with blaming(f"{record}: cannot be written", "see to the disk and run again", RunError):
            write_json(record, run)
            names = muster(folder, world, settings)
            todo = [sample.index for sample in samples if sample.index not in known]
            run["parts"] = {name: share(todo, rank, world) for rank, name in enumerate(names)}
            write_json(record, run)
        yield run | {"part": names[0]}, known
    except InputError:  # of other settings, or of a model that cannot be loaded
        if world == 1 and not read_journals(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        lock.release()


def status_name(rank: int | str, settings: dict[str, Any], which: str) -> str:
    """Of a rank's status file: only the ranks of one launch with one job find each other."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    launch = [os.environ.get(name) for name in names]
    return f"rank-{rank}-{hashed((settings, launch))}-{which}"


def muster(folder: Path, world: int, settings: dict[str, Any]) -> list[str]:
    """The names of the status files of all ranks with these settings, by rank, once they are there.
    Raises RunError that names those who do not come."""
    for stale in folder.glob("rank-*"):  # a rank that waits makes its own again
        stale.unlink(missing_ok=True)
    present, patience = {0: "rank-0"}, time.monotonic() + SILENCE
    while lacking := [rank for rank in range(world) if rank not in present]:
        problem = f"rank {lacking}: not there after {SILENCE:.0f} s, with the same settings"
        require(time.monotonic() < patience, f"{problem}; run the same command again", RunError)
        time.sleep(0.1)
        for path in folder.glob(status_name("*", settings, "*")):
            present[int(path.name.split("-")[1])] = path.name
    return [present[rank] for rank in range(world)]


@contextmanager
def follow(folder: Path, settings: dict, progress: Progress) -> Iterator[dict[str, Any]]:
    """As another rank: wait until rank 0 has dealt, and yield run.json's content. Until the end, a
    thread touches a status file as a sign of life, which then gets the report. Raises RunError."""
    status = folder / status_name(launched()[0], settings, uuid.uuid4().hex)
    joined, ended = threading.Event(), threading.Event()

    def show_life() -> None:
        while not ended.wait(0.5):
            with suppress(OSError):  # who is at work does not come back for another launch
                os.utime(status) if joined.is_set() else status.touch()

    run, patience = {}, time.monotonic() + SILENCE
    thread = threading.Thread(target=show_life, daemon=True)
    thread.start()
    try:
        while status.name not in run.get("parts", ()):  # else it is of an earlier launch
            problem = f"rank 0 has not begun with the same settings within {SILENCE:.0f} s"
            require(time.monotonic() < patience, f"{problem}; see what it said", RunError)
            time.sleep(0.2)
            with suppress(OSError, ValueError):
                run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        joined.set()
        yield run | {"part": status.name}
    finally:
        ended.set()
        thread.join()
    if status.exists():  # else rank 0 has gone, or begun anew
        write_json(status, {"given_up": progress.given_up, "again": progress.asked_again})


def wait_for_ranks(statuses: Sequence[Path], progress: Progress) -> None:
    """Wait for the other ranks and add their reports to `progress`. Raises RunError that names
    those who are silent for too long."""
    waiting = {status: (0.0, time.monotonic()) for status in statuses}  # touched, seen
    while waiting:
        for status, (touched, _) in list(waiting.items()):
            with suppress(OSError, ValueError):
                if status.stat().st_mtime != touched:
                    waiting[status] = status.stat().st_mtime, time.monotonic()
                report = json.loads(status.read_text(encoding="utf-8"))
                progress.given_up |= report["given_up"]
                progress.asked_again += report["again"]
                del waiting[status]
        silent = [s for s, (_, seen) in waiting.items() if time.monotonic() - seen > SILENCE]
        who = ", ".join(status.name.split("-")[1] for status in silent)
        problem = f"rank {who}: no sign of life for {SILENCE:.0f} s"
        require(not silent, f"{problem}; the same command goes on from here", RunError)
        progress.show()
        time.sleep(0.5)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file at once, so that no other rank, and no crash, sees half of it."""
    fresh = path.with_name(f".{path.name}")
    with fresh.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


# --------------------------------------------------------------------------------------- dataset
def find_dataset(repo_id: str | None, data_dir: Path | None, revision: str | None = None) -> Path:
    """The folder: `data_dir`, LeRobot's local copy of `repo_id`, or a download to its cache, of the
    `revision`, else of LeRobot's version, or of main if only that has skills. Raises InputError."""
    if data_dir:
        require(data_dir.is_dir(), f"--data-dir {data_dir}: no such folder; check the path")
        return data_dir
    home, skills = lerobot_home.HF_LEROBOT_HOME, Path("meta", "skills.json")
    local, what = home / repo_id, {"repo_id": repo_id, "repo_type": "dataset"}
    fetch = partial(ask_hub, hub.snapshot_download, cache_dir=home / "hub", **what)
    has_copy = not revision and (local / "data").is_dir()
    if has_copy and (local / skills).is_file():
        return local
    problem = blaming(f"--repo-id {repo_id}: no download", "check name, network and login")
    with suppress(Exception) if has_copy else problem:  # recorded here, it need not be on the Hub
        for version in [revision] if revision else ["v3.0", "main"]:
            with suppress(hub_errors.RevisionNotFoundError):
                meta = Path(fetch(revision=version, allow_patterns="meta/*"))
                if (meta / skills).is_file():
                    if not has_copy:  # else it is older than the skills
                        return Path(fetch(revision=version))
                    fresh = Path(shutil.copyfile(meta / skills, local / f"{skills}.{os.getpid()}"))
                    return fresh.replace(local / skills).parents[1]
        at = f" at --revision {revision}; correct it or" if revision else ";"
        raise InputError(f"--repo-id {repo_id}: has no {skills}{at} run annotate.py first")
    return local


def open_dataset(root: Path, repo_id: str | None = None) -> Any:
    """A folder's LeRobotDatasetMetadata, every file there, lest LeRobot asks the Hub for one."""
    info, tables = root / "meta" / "info.json", root / "meta" / "episodes"
    require(info.is_file(), f"{info}: not found, so this is no LeRobot dataset; check the path")
    version = read_json(info).get("codebase_version")
    remedy = "convert it with LeRobot's convert_dataset_v21_to_v30"
    require(str(version)[:3] == "v3.", f"{info}: has format {version}, not v3.0; {remedy}")
    tables = sorted(tables.glob("*/*.parquet")) or [tables]
    for table in (root / "meta" / "tasks.parquet", *tables):
        read_parquet(table, [])
    with blaming(
        f"{info}: LeRobot cannot open the dataset", "repair its meta folder (or the disk is full)"
    ):
        meta = lerobot_dataset.LeRobotDatasetMetadata(repo_id or f"local/{root.name}", root=root)
        require(meta.fps > 0, f"{info}: fps is {meta.fps}; correct it")
        needed = needed_files(meta)
    require(needed, f"{root}: has no episodes; record some first")
    for path in needed:
        inside = Path(os.path.normpath(path)).is_relative_to(root)
        require(inside, f"{info}: a path leads out of the folder, to {path}; correct it")
        require(path.is_file(), f"{path}: is missing; restore it or download the dataset again")
    return meta


def episode_table(meta: Any) -> pd.DataFrame:
    return meta.episodes.to_pandas().set_index("episode_index")


def episode_files(meta: Any, kind: str) -> dict[int, Path]:
    """The file that holds each episode, by its index; `kind` is "data" or "videos/<camera key>"."""
    template = meta.data_path if kind == "data" else meta.video_path
    template = template.replace("{video_key}", kind.removeprefix("videos/"))
    columns = [f"{kind}/chunk_index", f"{kind}/file_index"]
    places = episode_table(meta)[columns].itertuples(name=None)
    return {i: meta.root / template.format(chunk_index=c, file_index=f) for i, c, f in places}


def needed_files(meta: Any) -> list[Path]:
    kinds = ["data", *(f"videos/{key}" for key in meta.video_keys)]
    return sorted({path for kind in kinds for path in episode_files(meta, kind).values()})


def read_parquet(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Columns of a parquet file, all of which is decoded but pictures, to find damage in time."""
    with blaming(f"{path}: cannot be read", "restore the file"), pq.ParquetFile(path) as parquet:
        names = [f.name for f in parquet.schema_arrow if not pa.types.is_struct(f.type)]
        require(COLUMN not in names, f"{path}: has {COLUMN} already; annotate its source")
        groups = (parquet.read_row_group(i, names) for i in range(parquet.num_row_groups))
        table = pa.concat_tables([group.select(columns) for group in groups])
        return table.to_pandas(ignore_metadata=True)  # with an index from 0


def read_episodes(meta: Any) -> Iterator[tuple[int, pd.DataFrame]]:
    """Each episode's index and frames for plan_samples, from one data file after the other, checked
    against the episode table. Raises InputError."""
    promised, again = episode_table(meta)["length"].to_dict(), "restore the files"
    names = ["episode_index", "frame_index", "timestamp", "task_index"]
    for path in sorted(meta.root.glob("data/*/*.parquet")):  # LeRobot's order
        table, extra = read_parquet(path, names), {*pq.read_schema(path).names} - {*meta.features}
        undescribed = f"{path}: has {sorted(extra)}, which meta/info.json does not describe"
        require(not extra, f"{undescribed}, so LeRobot cannot read it; add or remove them")
        holes = table.columns[table.isna().any()].tolist()
        require(not holes, f"{path}: {holes} hold nulls; {again}")
        episodes, wrong = table.groupby("episode_index", sort=False), []
        for index, rows in episodes.indices.items():
            if not promised.pop(index, None) == len(rows) == rows[-1] - rows[0] + 1:
                wrong.append(int(index))
        problem = f"{path}: does not hold the frames of meta/episodes for episode"
        require(not wrong, f"{problem} {sorted(wrong)}; {again}")
        yield from episodes
    require(not promised, f"{meta.root}/data: lacks episode {sorted(promised)}; {again}")


def make_plan(
    dataset: Any,
    sample_interval: float = 1.0,
    num_image_views_per_sample: int = 1,
    camera_keys: Sequence[str] | None = None,
    seed: int = 0,
) -> Plan:
    """All that is decided about a LeRobotDataset (or its metadata) before generation. Shown are
    `camera_keys` or the first colour cameras; depth maps are no pictures. Raises InputError."""
    meta, colour = getattr(dataset, "meta", dataset), []
    for key, feature in meta.features.items():
        details = (feature.get("video_info") or {}) | (feature.get("info") or {})
        depth = details.get("is_depth_map") or details.get("video.is_depth_map")
        if feature["dtype"] in ("video", "image") and 3 in feature["shape"] and not depth:
            colour.append(key)
    there_are = f"choose from the colour cameras: {', '.join(colour) or 'there are none'}"
    unknown, views = set(camera_keys or ()) - set(colour), num_image_views_per_sample
    require(not unknown, f"--camera-keys {sorted(unknown)}: no such camera; {there_are}")
    require(0 < views <= len(colour), f"--num-image-views-per-sample {views}: {there_are}")
    cameras = list(camera_keys or colour[:views])
    skills = load_skills(meta.root, list(meta.episodes["episode_index"]))
    tasks = {int(index): str(text) for text, index in meta.tasks["task_index"].items()}
    episodes = read_episodes(meta)
    samples, ranks = plan_samples(episodes, skills, tasks, meta.fps, sample_interval, seed)
    for key in dict.fromkeys([*cameras, *meta.video_keys]):  # a file that is cut off still opens
        last = {place[0]: place for place in sorted(picture_places(meta, samples, key))}
        for path, picture in zip(last, read_pictures(meta, last.values(), key), strict=True):
            problem = f"{path}: the last picture needed of {key} cannot be decoded"
            require(picture, f"{problem}; restore the file")
    return Plan(samples, ranks, cameras)


def generate_synthetic_data(
    dataset: Any, pgen: QwenPgen, plan: Plan, batch_size: int = 16, progress: Progress | None = None
) -> Results:
    """Generate a LeRobotDataset's dialogues, but for those in `progress`. Returns the task table,
    each frame's row in it (int64 (frames,)), and syn_annotations.jsonl's lines, or RunError."""
    meta, progress = getattr(dataset, "meta", dataset), progress or Progress()
    todo = [sample for sample in plan.samples if sample.index not in progress.dialogues]
    with tqdm(total=len(plan.samples), unit="sample") as progress.bar:
        generate_dialogues(meta, pgen, plan.camera_keys, todo, batch_size, progress)
    return tabulate(plan, progress)


def generate_dialogues(
    meta: Any, pgen: QwenPgen, keys: list[str], todo: list, limit: int, progress: Progress
) -> None:
    """Generate the dialogues of the samples `todo`, `limit` at a time, from the cameras `keys`.
    While the model is at work, a thread decodes and prepares the next two batches."""
    seen = zip(todo, read_samples(meta, todo, keys), strict=True)
    pairs = ((sample, views and pgen.prepare(views, sample.prompt)) for sample, views in seen)
    with closing(read_ahead(pairs, 2 * min(limit, len(todo)) or 1)) as ready:
        annotate_samples(pgen, ready, limit, progress)


def tabulate(plan: Plan, progress: Progress) -> Results:
    """The results of generate_synthetic_data from the dialogues there are. Here each frame gets its
    row: from a sample to the next, that of the dialogue which assign_dialogues has chosen."""
    samples, dialogues = plan.samples, progress.dialogues
    answered = [position for position, s in enumerate(samples) if s.index in dialogues]
    carried = assign_dialogues(samples, answered)
    lines = [samples[i].annotated(dialogues[samples[i].index]) for i in answered]
    table = pd.DataFrame(lines, answered).rename(columns={"skill_current": "skill"})
    table = table[["user_prompt", "robot_utterance", "skill", "scenario_type", "response_type"]]
    rows = table.groupby(list(table), sort=False).ngroup()  # counted as first seen
    tasks = table.drop_duplicates(ignore_index=True)
    tasks.insert(0, "task_index", range(len(tasks)))
    starts = [sample.index for sample in samples]
    spans = np.diff([*starts, len(plan.skill_ranks)])  # how many frames carry the same
    task_indices = rows[carried].repeat(spans).to_numpy()
    episode, rank = np.array([(s.episode_id, s.skill_rank) for s in samples]).T
    shown = np.where(episode[carried] == episode, rank[carried], rank)
    progress.late_share = float((plan.skill_ranks > shown.repeat(spans)).mean())
    return tasks, task_indices, [ln | {COLUMN: row} for ln, row in zip(lines, rows, strict=True)]


def assign_dialogues(samples: Sequence[Sample], answered: Sequence[int]) -> list[int]:
    """For each sample, the position of the one in `answered` whose dialogue its frames carry: it,
    else the nearest earlier one of the episode (with its skill before any other), else the nearest
    later one, else one elsewhere with its skill and task. Raises RunError if there is none."""
    about = [(s.episode_id, s.skill_current, s.task_description) for s in samples]
    about = pd.DataFrame(about, columns=["episode", "skill", "task"])
    about["own"] = pd.Series(answered, answered, dtype="float64")
    lenders = dict(list(about.dropna().groupby(["skill", "task"])["own"]))
    failed = about.groupby("episode")["own"].transform("count") == 0
    for i, sample in about[failed].iterrows():
        if (found := lenders.get((sample["skill"], sample["task"]))) is not None:
            about.loc[i, "own"] = found.iloc[i % len(found)]
    carried = about["own"]
    for shared in (["episode", "skill", "task"], ["episode"]):
        carried = carried.fillna(about.groupby(shared)["own"].ffill())
    carried = carried.fillna(about.groupby("episode")["own"].bfill())
    hopeless = about["episode"][carried.isna()].unique().tolist()
    problem = f"no valid dialogue for episode {hopeless}, nor elsewhere for its skills and task"
    require(not hopeless, f"{problem}; run again, or --overwrite with another --model", RunError)
    return carried.astype(int).tolist()


# ---------------------------------------------------------------------------------------- output
def source_files(root: Path) -> list[Path]:
    """Every file of a dataset, relative to `root`, through links, but for .cache and .git."""
    found = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(set(subfolders) - {".cache", ".git"})
        for path in (Path(folder, name) for name in sorted(names)):
            require(path.is_file(), f"{path}: is no file to be read; restore or remove it")
            found.append(path.relative_to(root))
    return found


def write_dataset(root: Path, target: Path, results: Results, settings: dict[str, Any]) -> None:
    """Write the dataset in `root` plus the new column to `target`, and check what was written.
    Raises RunError that names the file at fault."""
    (tasks, task_indices, annotations), data = results, set(root.glob("data/*/*.parquet"))
    for file in source_files(root):
        old, new = root / file, target / file
        with blaming(f"{new}: cannot be written", "see to the disk and run again", RunError):
            new.parent.mkdir(parents=True, exist_ok=True)
            if old in data:  # in the order of read_episodes
                task_indices = task_indices[add_column(old, new, task_indices) :]
            elif file == Path("meta", "info.json"):
                info = read_json(old)
                info["features"][COLUMN] = {"dtype": "int64", "shape": [1], "names": None}
                new.write_text(json.dumps(info, indent=4, ensure_ascii=False), encoding="utf-8")
            else:
                shutil.copyfile(old, new)
                require(new.stat().st_size == old.stat().st_size, "it is cut off", OSError)
    meta = target / "meta"
    with blaming(f"{meta}: cannot be written", "see to the disk and run again", RunError):
        tasks.to_parquet(meta / "tasks_high_level.parquet")
        with (meta / "syn_annotations.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(map(json_line, annotations))
        (target / RECORD).write_text(json.dumps(settings, indent=4), encoding="utf-8")
        written = lerobot_dataset.LeRobotDatasetMetadata(settings["name"], root=target)
        write_card(root, written, results, settings)
        for path in (file for file in needed_files(written) if file.suffix == ".mp4"):
            next(av.open(str(path)).decode(video=0))


def add_column(source: Path, target: Path, values: np.ndarray) -> int:
    """Copy a parquet file as it is but for the new column, the first of `values` (int64), and its
    description in the metadata that `datasets` keeps. Returns the number of rows."""
    with pq.ParquetFile(source) as parquet:
        about, row = parquet.metadata, 0
        schema = parquet.schema_arrow.append(pa.field(COLUMN, pa.int64()))
        metadata = dict(schema.metadata or {})
        with suppress(KeyError, ValueError, TypeError):  # not there, or nothing to describe columns
            described = json.loads(metadata[b"huggingface"])
            described["info"]["features"][COLUMN] = {"dtype": "int64", "_type": "Value"}
            metadata[b"huggingface"] = json.dumps(described).encode()
        first = [about.row_group(0).column(i) for i in range(about.num_columns)]
        codecs = {c.path_in_schema: c.compression.replace("UNCOMPRESSED", "NONE") for c in first}
        codecs[COLUMN] = codecs.get("index", "SNAPPY")
        coded = [COLUMN, *(c.path_in_schema for c in first if c.has_dictionary_page)]
        how = {"version": about.format_version, "compression": codecs, "use_dictionary": coded}
        with pq.ParquetWriter(target, schema.with_metadata(metadata), **how) as writer:
            for group in range(about.num_row_groups):
                table = parquet.read_row_group(group)
                column = pa.array(values[row : row + len(table)], pa.int64())
                table = table.append_column(schema.field(COLUMN), column)
                writer.write_table(table, row_group_size=max(1, len(table)))
                row += len(table)
    written = pq.read_table(target, columns=[COLUMN])[COLUMN].to_numpy()
    require((written == values[:row]).all(), "it reads back wrong", OSError)
    return row


# ------------------------------------------------------------------------------------------- Hub
READING = f"""\
from lerobot.datasets.lerobot_dataset import LeRobotDataset
import pandas as pd

dataset = LeRobotDataset("%s"%s)
tasks = pd.read_parquet(dataset.root / "meta" / "tasks_high_level.parquet")
print(tasks.iloc[dataset[0]["{COLUMN}"].item()])"""
PAPER, PAGES = "https://arxiv.org/abs/2502.19417", "https://huggingface.co/datasets"
PAIRED = ["scenario_type", "response_type"]
CARD = f"""\
Each frame has a dialogue that goes with what the robot is doing: what a person might have said to
bring it about, and what the robot would answer. **The dialogues are synthetic**: a vision-language
model wrote them, after [Hi Robot]({PAPER}). Nobody said them, and nobody has checked them.

{{source}}

{{tables}}

`{COLUMN}` of a frame is the row of its dialogue in `meta/tasks_high_level.parquet`, with skill and
types; `meta/syn_annotations.jsonl` has all dialogues, with what the model was told.

```python
{{reading}}
```

LeRobot's tools that write a new dataset (`delete_episodes`, `split_dataset`, `merge_datasets`,
`remove_feature`) leave that table behind: copy it to the new `meta/`. Merge before annotating, as
the rows of two tables collide."""
RETRY_AFTER = (1, 5, 20, 60, 120)  # seconds


def write_card(source: Path, meta: Any, results: Results, settings: dict[str, Any]) -> None:
    """Write README.md in the new dataset, opened as `meta`: LeRobot's card, what was added, and the
    text and metadata (licence, tags, ...) of the one in `source`."""
    (tasks, task_indices, annotations), name = results, settings["name"]
    model, origin = settings["model"], settings["source"]
    data, text = {}, ""
    with suppress(Exception):  # no card, or one whose metadata cannot be read
        text = (source / "README.md").read_text(encoding="utf-8-sig", errors="replace")
        old = hub.DatasetCard(text, ignore_metadata_errors=True)
        data, text = old.data.to_dict(), old.text
    lines, spoken = pd.DataFrame(annotations), ["skill_current", "user_prompt", "robot_utterance"]
    about = {"generating model": Path(model).name if Path(model).is_absolute() else model}
    about |= {"date": date.today(), "frames": len(task_indices), "dialogues": len(lines)}
    about |= {"unique dialogues": len(tasks), "camera_keys": settings["camera_keys"]}
    about |= {key: settings[key] for key in ("sample_interval", "temperature", "seed")}
    about |= {"frames with the dialogue of an earlier skill": f"{settings['late']:.1%}"}
    tables = [pd.DataFrame(about.items(), columns=["", ""])]
    tables += [lines[kind].value_counts().reset_index() for kind in PAIRED]
    tables += [lines.loc[:: -(-len(lines) // 3), [*PAIRED, *spoken]]]
    added = CARD.format(
        source=f"It was made from [{origin}]({PAGES}/{origin})." if origin else "",
        tables="\n\n".join(map(markdown, tables)),
        reading=READING % (name, ', video_backend="pyav"'),
    )
    data.pop("dataset_info", None)  # describes the columns that were
    fill = {"dataset_description": added, "paper": PAPER, "license": data.get("license")}
    card = lerobot_utils.create_lerobot_dataset_card(dataset_info=meta.info, repo_id=name, **fill)
    given = data.get("tags")
    given = given if isinstance(given, list) else [given]
    tags = [*card.data.tags, "synthetic", *(tag for tag in given if isinstance(tag, str))]
    data["tags"] = list(dict.fromkeys(tags))
    data |= {"source_datasets": [origin]} if origin else {}
    card.data = hub.DatasetCardData(**(card.data.to_dict() | data))
    card.text += f"\n\n---\n\n{text.strip()}\n" if text.strip() else ""
    (meta.root / "README.md").write_text(str(card), encoding="utf-8")


def markdown(table: pd.DataFrame) -> str:
    """A table for README.md."""
    rows = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    cells = ([one_line(str(cell)).replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def rename_dataset(folder: Path, record: dict[str, Any], name: str) -> None:
    """Call a finished dataset `name`, in its card, where somebody may have changed other things."""
    card, known = folder / "README.md", record["name"]
    if known != name and card.is_file():
        whole = rf"(?<![\w./-]){re.escape(known)}(?![\w.-])"
        how = {"encoding": "utf-8", "errors": "surrogateescape"}
        card.write_text(re.sub(whole, name, card.read_text(**how)), **how)
        write_json(folder / RECORD, record | {"name": name})


def ask_hub(call: Callable, **how: Any) -> Any:
    """A call to the Hub, made again when it is busy (429, 5xx) or the connection breaks."""
    for wait in (*RETRY_AFTER, None):
        try:
            return call(**how)
        except Exception as error:
            answers = [getattr(e, "response", None) for e in (error, error.__cause__)]
            answer = next((a for a in answers if a is not None), None)  # a bad one is not true
            broken = isinstance(error, (ConnectionError, TimeoutError, RuntimeError))
            broken |= type(error).__module__.partition(".")[0] in ("httpx", "requests")
            code = 503 if answer is None and broken else getattr(answer, "status_code", 400)
            if not wait or (code < 500 and code != 429):
                raise
            tqdm.write(f"the Hub: {one_line(str(error)):.99}; again in {wait} s", file=sys.stderr)
            time.sleep(wait)


def open_target(target: str, source: str | None, private: bool) -> None:
    """Make the repository on the Hub if it is not there, private if the source is. Raises
    InputError unless this user may write to it."""
    api, what = hub.HfApi(), {"repo_type": "dataset"}
    rights = "log in with `hf auth login` as one who may, or name another with --new-repo-id"
    with blaming(f"--push-to-hub: cannot write to {target}", rights):
        ask_hub(api.whoami)
        try:
            known = ask_hub(api.repo_info, repo_id=source, **what) if source else None
            hidden = bool(known and (known.private or known.gated))
        except hub_errors.RepositoryNotFoundError:
            hidden = True
        why = "--private is given" if private else f"{source} is private or not shown to this user"
        private = private or hidden
        ask_hub(api.create_repo, repo_id=target, private=private or None, exist_ok=True, **what)
        shown = private and not ask_hub(api.repo_info, repo_id=target, **what).private
        require(not shown, f"it is public, but {why}; make it private", ValueError)
        # an upload's first step, which changes nothing: to make what is there already is no test
        probe = [hub.CommitOperationAdd("README.md", b"-")]
        ask_hub(api.preupload_lfs_files, repo_id=target, additions=probe, **what)
    tqdm.write(f"the result will be pushed to {target}", file=sys.stderr)


def push(folder: Path, target: str) -> None:
    """Upload a dataset to the Hub and tag it with its version, as LeRobot asks. Raises RunError."""
    api, where = hub.HfApi(), {"repo_id": target, "repo_type": "dataset"}
    tag = read_json(folder / "meta" / "info.json")["codebase_version"]
    what = {"delete_patterns": "*", "ignore_patterns": [".cache/*", ".gitignore"]} | where
    safe = f"it is safe in {folder}, and the same command, without --overwrite, only uploads"
    with blaming(f"--push-to-hub: {target}", safe, RunError):
        ask_hub(api.upload_folder, folder_path=folder, commit_message="Add dialogues", **what)
        missing = {str(file) for file in source_files(folder) if file.name != ".gitignore"}
        missing -= set(ask_hub(api.list_repo_files, **where))
        require(not missing, f"{sorted(missing)[:3]} did not arrive", OSError)
        with suppress(hub_errors.RevisionNotFoundError):
            ask_hub(api.delete_tag, tag=tag, **where)
        ask_hub(api.create_tag, tag=tag, exist_ok=True, **where)
    print(f"pushed to      {api.endpoint}/datasets/{target}")


# ---------------------------------------------------------------------------------- command line
def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags. Raises InputError for those that no dataset or machine could make usable."""
    about, _, examples = __doc__.partition("examples:")
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=about, epilog=f"examples:{examples}", formatter_class=as_is, allow_abbrev=False
    )
    parser.error = lambda message: require(False, f"{message}; see --help")

    def group(title: str) -> Callable[..., None]:
        flags = parser.add_argument_group(title)
        return lambda name, text, default=None, **how: flags.add_argument(
            name, help=f"{text} (default: {default})", default=default, **how
        )

    switch = {"default": False, "action": "store_true"}
    add = group("data")
    add("--repo-id", "dataset on the Hugging Face Hub", metavar="USER/NAME")
    add("--data-dir", "dataset in a local folder, which a repo id then only names", type=Path)
    add("--num-image-views-per-sample", "number of cameras shown to the model", 1, type=int)
    add("--camera-keys", "cameras shown, by name instead of number", nargs="+", metavar="KEY")
    add("--revision", "branch, tag or commit of the dataset on the Hub")
    add("--sample-interval", "generate a dialogue every so many seconds", 1.0, type=float)
    add = group("model")
    add("--model", "Qwen vision-language model, Hub id or folder", "Qwen/Qwen2-VL-7B-Instruct")
    add("--device", "cuda, cuda:1, cpu, ..., or auto to spread it over all GPUs", "cuda")
    add("--dtype", "precision", "bfloat16", choices=("bfloat16", "float16", "float32"))
    add = group("generation")
    add("--temperature", "higher is more diverse; 0 takes the likeliest words", 0.7, type=float)
    add("--batch-size", "samples at once; halved when GPU memory runs out", 16, type=int)
    add("--seed", "of all random choices", 0, type=int)
    add = group("output")
    add("--output-dir", f"folder of the new dataset, else <source>{SUFFIX}", type=Path)
    add("--overwrite", "discard what an earlier run left at the output", **switch)
    add("--push-to-hub", "upload the result to the Hugging Face Hub", **switch)
    add("--new-repo-id", f"where to, else <repo-id>{SUFFIX}", metavar="USER/NAME")
    add("--private", "make the repository there private, as a private source does", **switch)
    add("--dry-run", "print the plan and some prompts; load no model, write nothing", **switch)
    add("--debug", "show the traceback of an error", **switch)
    args = parser.parse_args(argv)

    named = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII).fullmatch
    form = "is not of the form user/name; correct it"
    source, target = args.repo_id, args.new_repo_id
    same = source and target and source.lower() == target.lower()
    for problem, valid in {
        "neither --repo-id nor --data-dir: name a dataset": source or args.data_dir,
        f"--repo-id {source}: {form}": source is None or named(source),
        f"--new-repo-id {target}: {form}": target is None or named(target),
        f"--new-repo-id {target}: is the source; change it": not same,
        "--push-to-hub: no target; add --new-repo-id": source or target or not args.push_to_hub,
        "--num-image-views-per-sample must be 1 or more": args.num_image_views_per_sample > 0,
        "--sample-interval must be positive and finite": 0 < args.sample_interval < math.inf,
        "--temperature must be 0 or positive and finite": 0 <= args.temperature < math.inf,
        "--batch-size must be 1 or more": args.batch_size > 0,
    }.items():
        require(valid, problem)
    return args


@dataclass(frozen=True)
class Job:
    """What a command line comes down to, decided before anything is generated or written."""

    args: argparse.Namespace
    meta: Any  # LeRobotDatasetMetadata of the source
    plan: Plan
    settings: dict[str, Any]  # all that the dialogues depend on
    output: Path
    name: str  # of the new dataset, on the Hub

    @property
    def unfinished(self) -> Path:
        """The folder of the work, until the output appears whole."""
        return self.output.with_name(self.output.name + ".partial")


def annotate_dataset(args: argparse.Namespace) -> None:
    """The whole job, from the source dataset to the new one. Raises InputError and RunError."""
    rank = launched()[0]
    with blaming(f"{args.data_dir or args.repo_id}: cannot be annotated", "repair the dataset"):
        job = prepare_job(args)
        output, unfinished, record = job.output, job.unfinished, job.output / RECORD
        made = read_json(record) if record.is_file() else {}
        occupied = output.exists() and any(output.iterdir() if output.is_dir() else [output])
    if args.dry_run:
        if not rank:
            print_plan(job)
        return
    require(made or not occupied, f"--output-dir {output}: is not empty; name another folder")
    replaced = [*unfinished.glob("replaced-*")]  # by a run that was killed before it cleaned up
    overwritten = replaced and made.items() >= job.settings.items()
    if finished := made and (overwritten or not args.overwrite):
        compare_settings(record, made, job.settings)
    if rank and not finished:
        with follow(unfinished, job.settings, progress := Progress()) as run:
            generate_part(job, run, progress)
    if rank:
        return
    if args.push_to_hub:
        open_target(job.name, args.repo_id, args.private)
    if finished:
        print(f"finished already, with the same settings: {output}")
        for old in replaced:
            shutil.rmtree(old, ignore_errors=True)
        rename_dataset(output, made, job.name)
    else:
        make_dataset(job)
    if args.push_to_hub:
        push(output, job.name)


def prepare_job(args: argparse.Namespace) -> Job:
    """Find the source, check it, and plan. Raises InputError."""
    root = find_dataset(args.repo_id, args.data_dir, args.revision).resolve()
    base = lerobot_home.HF_LEROBOT_HOME / args.repo_id if args.repo_id else root
    output = (args.output_dir or base.with_name(base.name + SUFFIX)).resolve()
    name = args.new_repo_id or (args.repo_id or f"local/{root.name}") + SUFFIX
    meta = open_dataset(root, args.repo_id)
    av.logging.set_level(av.logging.PANIC)  # set by others so far; what is broken we report
    views, keys = args.num_image_views_per_sample, args.camera_keys
    plan = make_plan(meta, args.sample_interval, views, keys, args.seed)
    job = Job(args, meta, plan, job_settings(args, meta, plan), output, name)
    for folder in (output, job.unfinished):
        overlap = folder.is_relative_to(root) or root.is_relative_to(folder)
        require(not overlap, f"--output-dir {output}: overlaps the source; name another folder")
    return job


def job_settings(args: argparse.Namespace, meta: Any, plan: Plan) -> dict[str, Any]:
    """All that the dialogues depend on, prompt and dataset as hashes."""
    root = meta.root
    sizes = [(str(path.relative_to(root)), path.stat().st_size) for path in needed_files(meta)]
    tables = [root / "meta" / name for name in ("info.json", "skills.json", "tasks.parquet")]
    tables += sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    state = [hashlib.sha256(table.read_bytes()).hexdigest() for table in tables], sizes
    prompt = (PROMPT, PREFILL, SCENARIO_TYPES, RESPONSE_TYPES, SUITABLE_RESPONSES, HISTORY_LENGTH)
    names = ("model", "sample_interval", "temperature", "seed")
    settings = {name: getattr(args, name) for name in names} | {"camera_keys": plan.camera_keys}
    if Path(args.model).is_dir():
        settings["model"] = str(Path(args.model).resolve())
    return settings | {"prompt": hashed(prompt), "dataset": hashed(state)}


def generate_part(job: Job, run: dict[str, Any], progress: Progress) -> None:
    """Load the model and generate this rank's part of the plan into a journal of its own."""
    (rank, world, local_rank), part = launched(), set(run["parts"][run["part"]])
    todo = [sample for sample in job.plan.samples if sample.index in part]
    if not todo:
        return
    args, device = job.args, job.args.device
    if device == "cuda" and world > 1:
        device = f"cuda:{local_rank % max(1, torch.cuda.device_count())}"
    # what has failed before must not be repeated, nor what other ranks draw
    torch.manual_seed(random.Random(f"{args.seed} {run['launches']} {rank}").getrandbits(63))
    pgen = QwenPgen(args.model, device, args.dtype, args.temperature)
    with open_journal(job.unfinished / journal_name(rank, job.settings)) as progress.save:
        generate_dialogues(job.meta, pgen, job.plan.camera_keys, todo, args.batch_size, progress)


def make_dataset(job: Job) -> None:
    """Generate what is missing, write the new dataset, and put it in its place as the last act."""
    started, progress, root, output = time.monotonic(), Progress(), job.meta.root, job.output
    needed = sum((root / file).stat().st_size for file in source_files(root)) * 1.02 + 16e6
    lack = needed - shutil.disk_usage(next(path for path in output.parents if path.exists())).free
    require(lack < 0, f"--output-dir {output}: lacks {lack / 1e9:.2f} GB; free some on the disk")
    unfinished, overwrite = job.unfinished, job.args.overwrite
    with lead(unfinished, job.settings, overwrite, job.plan.samples) as (run, progress.dialogues):
        done = (output / RECORD).is_file() and not overwrite
        require(not done, f"{output}: another run has just finished it; run the same command again")
        known = len(progress.dialogues)
        seconds = generate_missing(job, run, progress)
        tasks, _, annotations = results = tabulate(job.plan, progress)
        tqdm.write(f"writing {output}", file=sys.stderr)
        shutil.rmtree(unfinished / "dataset", ignore_errors=True)
        about = {"name": job.name, "source": job.args.repo_id, "late": progress.late_share}
        write_dataset(root, unfinished / "dataset", results, job.settings | about)
        with blaming(f"{output}: cannot be renamed into", "see to it and run again", RunError):
            os.sync()
            if overwrite and (output / RECORD).is_file():
                output.rename(unfinished / f"replaced-{time.time_ns()}")
            (unfinished / "dataset").rename(output)
        for file in [*unfinished.glob("dialogues-*"), unfinished / "run.json"]:
            file.unlink(missing_ok=True)  # first, lest a kill leaves what looks like a journal
        shutil.rmtree(unfinished, ignore_errors=True)
    for sample, why in progress.given_up.items():
        sys.stderr.write(f"given up: {sample}: {why}\n")
    print_counts(job, annotations)
    made, where = len(progress.dialogues) - known, f', root="{output}", video_backend="pyav"'
    print(f"""\
dialogues      {len(annotations)}, of which {made} generated in this run
unique tasks   {len(tasks)}
asked again    {progress.asked_again}, given up {len(progress.given_up)}
late frames    {progress.late_share:.1%} carry the dialogue of an earlier skill than their own
time           {time.monotonic() - started:.1f} s, {made / seconds:.2f} samples/s while generating

{READING % (job.name, where)}""")


def generate_missing(job: Job, run: dict[str, Any], progress: Progress) -> float:
    """As rank 0: generate a part of the missing dialogues, wait for those of the other ranks, and
    collect all. Returns the seconds. Raises RunError."""
    samples, unfinished, start = job.plan.samples, job.unfinished, time.monotonic()
    known = len(progress.dialogues)
    tqdm.write(f"loading {job.args.model}; {known} dialogues are there already", file=sys.stderr)
    if others := [unfinished / part for part in run["parts"] if part != run["part"]]:
        progress.count = lambda own: count_dialogues(unfinished)
    bar = {"initial": known, "unit": "sample", "delay": 1e-3}  # none before the model is there
    with tqdm(total=len(samples), **bar) as progress.bar:
        generate_part(job, run, progress)
        wait_for_ranks(others, progress)
    seconds = time.monotonic() - start
    progress.dialogues |= read_journals(unfinished, journal_name("*", job.settings))
    answered = {s.place for s in samples if s.index in progress.dialogues}
    for place in answered & {*progress.given_up}:  # a rank of an earlier launch had more luck
        del progress.given_up[place]
    lost = len(samples) - len(answered) - len(progress.given_up)
    require(not lost, f"{lost} samples were lost; the same command goes on from here", RunError)
    return seconds


def print_plan(job: Job) -> None:
    print(f"episodes       {job.meta.total_episodes}")
    print(f"cameras        {', '.join(job.plan.camera_keys)}")
    print_counts(job, [vars(sample) for sample in job.plan.samples])
    for s in {sample.scenario_type: sample for sample in reversed(job.plan.samples)}.values():
        print(f"\nprompt for {s.place}:\n\n{s.prompt}")
    print(f"\nThe answer begins with: {PREFILL}")


def print_counts(job: Job, annotations: list[dict[str, Any]]) -> None:
    print(f"new dataset    {job.output}\nframes         {len(job.plan.skill_ranks)}")
    print(f"samples        {len(job.plan.samples)}")
    for kind in PAIRED:
        counts = sorted(Counter(entry[kind] for entry in annotations).items())
        print(f"{kind.replace('_type', 's'):14}", ", ".join(f"{k} {n}" for k, n in counts))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 done, 2 bad input, 1 failed with the work kept, 130, 143."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)  # the second time ends the process
        raise KeyboardInterrupt(number)

    rank = 0
    try:
        args, rank = parse_args(argv), launched()[0]
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        logging.captureWarnings(True)
        logging.disable(logging.CRITICAL)
        annotate_dataset(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as error:
        code, message = 2 if isinstance(error, InputError) else 1, str(error)
        if rank and isinstance(error, InputError):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)  # most likely rank 0 says the same, and the launcher ends this one
        if isinstance(error, KeyboardInterrupt):
            code = 128 + next(iter(error.args), signal.SIGINT)  # none before ours is set
            message = "interrupted; the same command goes on from here"
            if rank:
                return code
        elif "--debug" in (argv or sys.argv) or not isinstance(error, (InputError, RunError)):
            sys.excepthook(type(error), error, error.__traceback__)
        where = f"rank {rank}: " if rank else ""
        tqdm.write(f"error: {where}{one_line(message or repr(error))}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
