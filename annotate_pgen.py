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
import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from tqdm import tqdm

if TYPE_CHECKING:  # heavy libraries are imported where they are used: --help takes 0.1 s
    import numpy as np
    import pandas as pd
    from PIL.Image import Image

COLUMN, SUFFIX = "task_index_high_level", "_with_high_level_tasks"


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
        raise kind(f"{culprit}: {str(error) or type(error).__name__:.500}; {remedy}") from error


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
        coarse, episodes = utf8(content.get("coarse_description")), content["episodes"]
        lacking = [i for i in episode_indices if not (episodes.get(str(i)) or {}).get("skills")]
    require(not lacking, f"{path}: no skills for episode {lacking}; run annotate.py for these")
    for index in episode_indices:
        episode, where = episodes[str(index)], f'{path}: episode "{index}"'
        with blaming(f"{where} has the wrong form", again):
            skills, description = list(episode["skills"]), utf8(episode.get("description"))
        for n, entry in enumerate(skills):
            with blaming(f"{where}: skill {n} lacks name, start or end, or has a wrong one", again):
                name, start, end = utf8(entry["name"]), entry["start"], entry["end"]
                valid = name and -math.inf < start <= end < math.inf
                problem = f"{where}: skill {n} ({name!r:.50}) runs from {start!r:.9} to {end!r:.9}"
                require(valid, f"{problem}, but needs a name and finite start <= end; {again}")
                skills[n] = Skill(name, float(start), float(end))
        skills.sort(key=lambda skill: skill.start)
        loaded[index] = EpisodeSkills(description, tuple(skills), coarse)
    return loaded


def utf8(text: str | None) -> str:
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
    skill_rank: int = 0  # of the skill in its episode, by start

    @property
    def prompt(self) -> str:
        asked = self.task_description, self.skill_history, self.skill_current
        return construct_prompt(*asked, self.scenario_type, self.response_type)

    def annotated(self, dialogue: dict[str, str]) -> dict[str, Any]:
        """Its line of syn_annotations.jsonl, but for the task index, which is not known yet."""
        return {k: v for k, v in vars(self).items() if k not in ("index", "skill_rank")} | dialogue


@dataclass(frozen=True)
class Plan:
    """The whole job, in dataset order, decided before anything is generated."""

    samples: list[Sample]
    skill_ranks: np.ndarray  # int64 (frames,): rank of each frame's own skill
    camera_keys: list[str]


def sampled_frames(seconds: np.ndarray, sample_interval: float, fps: float) -> list[int]:
    """Positions of the first frame at or after each multiple of `sample_interval` in `seconds`,
    float64 (frames,) from the first. Up to a tenth of a frame early is on time: stored float32."""
    step = max(sample_interval, 0.5 / fps)  # shorter ones sample every frame too
    passed = (seconds + 0.1 / fps) // step
    return [0, *((passed[1:] > passed[:-1]).nonzero()[0] + 1).tolist()]


def plan_samples(
    frames: pd.DataFrame, skills: dict, tasks: dict, fps: float, sample_interval: float, seed: int
) -> tuple[list[Sample], np.ndarray]:
    """The frames to sample with what is asked about each, and every frame's skill rank (int64).
    `frames`: episode_index, frame_index, timestamp (seconds), task_index. A frame's skill is the
    last that has started, before any the first; `tasks` serve episodes without description."""
    samples, ranks = [], frames["frame_index"].to_numpy(dtype="int64", copy=True)
    for episode_index, episode in frames.groupby("episode_index", sort=False):
        known, timestamps = skills[episode_index], episode["timestamp"].to_numpy()
        seconds = timestamps.astype("float64") - float(timestamps[0])
        usable = (seconds[1:] >= seconds[:-1]).all() and seconds[-1] < math.inf
        where = f"episode {episode_index}: its timestamps in data/"
        require(usable, f"{where} run backwards or are not finite; correct them")
        names = tuple(skill.name for skill in known.skills)
        started = sum(seconds + 0.1 / fps >= skill.start for skill in known.skills)
        ranks[episode.index] = (started - 1).clip(0)
        positions = sampled_frames(seconds, sample_interval, fps)
        for i, row in zip(positions, episode.iloc[positions].itertuples(), strict=True):
            rank, own_task = int(ranks[row.Index]), tasks.get(row.task_index, "")
            task = known.description or own_task or known.coarse_description
            stored = float(str(timestamps[i]))  # 0.1, not the float64 nearest to its float32
            sample = Sample(episode_index, row.frame_index, stored, names[rank], names[:rank], task)
            samples.append(replace(sample, index=row.Index, skill_rank=rank))
    return deal_types(samples, seed), ranks


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
        echo = said.casefold() in asked or any(mark in said for mark in markup)
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
        import torch
        import transformers as tf

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
        tokenizer.padding_side = "left"
        # A skill's name must not end a turn or call for a picture: such tokens are broken up.
        markers = [token for token in tokenizer.get_added_vocab() if re.fullmatch("<.+>", token)]
        self.markers = re.compile("|".join(map(re.escape, markers)) or "(?!)")
        # A checkpoint's settings would hold wherever ours are silent (Qwen2-VL's has top_k=1).
        ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        ours = {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
        self.model.generation_config = tf.GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, **ours)

    def call_qwen(self, images: Sequence[Image], prompt: str) -> dict[str, str]:
        """A valid dialogue (user_prompt, robot_utterance) about RGB images. Raises RunError."""
        answers = (self.call_qwen_batch([images], [prompt], n)[0] for n in range(MAX_TRIES))
        if dialogue := next(filter(None, answers), None):
            return dialogue
        raise RunError(f"none of {MAX_TRIES} answers of the model was a valid dialogue")

    def call_qwen_batch(
        self, images: Sequence[Sequence[Image]], prompts: Sequence[str], tries: int = 0
    ) -> list[dict[str, str] | None]:
        """One answer to each prompt about its images, after `tries` earlier ones; None: invalid.
        Out of GPU memory, batches are halved from here on; at one, RunError is raised."""
        import torch

        sampling, tokens = {"do_sample": False}, None
        if temperature := self.temperature or (tries and 0.7):  # greedy would only repeat itself
            temperature = max(temperature, 0.01)  # logits over less overflow
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        with suppress(torch.OutOfMemoryError), torch.inference_mode():
            inputs = self.prepare(images, prompts).to(self.model.device)
            tokens = self.model.generate(**inputs, **sampling)
        if tokens is None:  # and what failed no longer holds its memory
            torch.cuda.empty_cache()
            half = self.batch_limit = len(prompts) // 2
            require(half, "out of GPU memory; use fewer views or a smaller --model", RunError)
            first = self.call_qwen_batch(images[:half], prompts[:half], tries)
            return first + self.call_qwen_batch(images[half:], prompts[half:], tries)
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
        answers = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [parse_answer(PREFILL + answer) for answer in answers]

    def prepare(self, images: Sequence[Sequence[Image]], prompts: Sequence[str]) -> Any:
        """The model's inputs for a batch, on the CPU, padded on the left."""
        from qwen_vl_utils import process_vision_info

        texts, pictures, patch = [], [], self.processor.image_processor.patch_size
        for views, prompt in zip(images, prompts, strict=True):
            shown = [{"type": "image", "image": v, "max_pixels": MAX_PIXELS} for v in views]
            text = self.markers.sub(lambda marker: "< " + marker[0][1:], prompt)
            turns = [
                {"role": "user", "content": [*shown, {"type": "text", "text": text}]},
                {"role": "assistant", "content": [{"type": "text", "text": PREFILL}]},
            ]
            template = self.processor.apply_chat_template
            texts.append(template(turns, tokenize=False, continue_final_message=True))
            pictures.append(process_vision_info(turns, image_patch_size=patch)[0])
        how = {"padding": True, "do_resize": False, "return_tensors": "pt"}
        return self.processor(text=texts, images=pictures, **how)


# ---------------------------------------------------------------------------------------- frames
def picture_places(meta: Any, samples: Sequence[Sample], key: str) -> list[tuple]:
    """Each sample's (video, seconds in it, as in LeRobotDataset) or (parquet, row group, row)."""
    import pyarrow.parquet as pq

    if key in meta.video_keys:
        videos = episode_files(meta, f"videos/{key}")
        starts = episode_table(meta)[f"videos/{key}/from_timestamp"].to_dict()
        return [(videos[s.episode_id], starts[s.episode_id] + s.timestamp) for s in samples]
    files = [(p, pq.read_metadata(p)) for p in sorted(meta.root.glob("data/*/*.parquet"))]
    groups = [(path, number) for path, about in files for number in range(about.num_row_groups)]
    sizes = [about.row_group(n).num_rows for _, about in files for n in range(about.num_row_groups)]
    firsts = [0, *accumulate(sizes)]
    holding = [bisect_right(firsts, sample.index) - 1 for sample in samples]
    return [(*groups[g], s.index - firsts[g]) for s, g in zip(samples, holding, strict=True)]


def read_picture(meta: Any, place: tuple, key: str) -> Image | None:
    """A camera's RGB picture at a place, a video's nearest frame within half a frame; None if it
    cannot be decoded. Not with torchcodec, LeRobot's default: it fails where FFmpeg is missing."""
    import pyarrow.parquet as pq
    from lerobot.datasets.video_utils import decode_video_frames
    from PIL import Image

    for _ in range(2):
        try:
            if key in meta.video_keys:
                pixels = decode_video_frames(*place[:1], place[1:], 0.5 / meta.fps + 1e-4, "pyav")
                return Image.fromarray((pixels[0] * 255).round().byte().permute(1, 2, 0).numpy())
            group = pq.ParquetFile(place[0]).read_row_group(place[1], columns=[key])
            content = group[key][place[2]].as_py()["bytes"]
            return Image.open(io.BytesIO(content)).convert("RGB")
        except Exception:  # every decoder has errors of its own
            time.sleep(0.1)
    return None


def read_samples(meta: Any, samples: Sequence[Sample], camera_keys: Sequence[str]) -> Iterator:
    """Each sample's views, one per camera key; None where one cannot be decoded."""
    for places in zip(*(picture_places(meta, samples, key) for key in camera_keys), strict=True):
        views = [read_picture(meta, p, key) for p, key in zip(places, camera_keys, strict=True)]
        yield None if any(view is None for view in views) else views


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
    given_up: dict[Sample, str] = field(default_factory=dict)  # and why
    asked_again: int = 0
    late_share: float = 0.0  # of frames that carry the dialogue of an earlier skill than their own
    save: Callable[[Dialogues], None] = lambda finished: None  # gets the dialogues of each batch


def annotate_sample(pgen: QwenPgen, images: Sequence[Image], sample: Sample) -> dict[str, Any]:
    """Generate a sample's line of syn_annotations.jsonl from its RGB views, or raise RunError."""
    return sample.annotated(pgen.call_qwen(images, sample.prompt))


def annotate_samples(pgen: QwenPgen, pairs: Iterable, limit: int, progress: Progress) -> Iterator:
    """Generate the dialogues of pairs (sample, views or None), `limit` at a time; counts them."""
    given_up = progress.given_up  # whose update() returns None, which leaves the sample out
    fresh, again = ((s, v, 0) for s, v in pairs if v or given_up.update({s: "broken picture"})), []
    while True:
        size = min(limit, pgen.batch_limit)
        # at temperature 0 a batch is all first tries, greedy, or all repeats, sampled
        room = 0 if again and not pgen.temperature else max(0, size - len(again))
        batch, again = again[:size] + list(islice(fresh, room)), again[size:]
        if not batch:
            return
        views, prompts = [v for _, v, _ in batch], [sample.prompt for sample, _, _ in batch]
        answers, finished = pgen.call_qwen_batch(views, prompts, tries=batch[0][2]), {}
        for (sample, views, tries), answer in zip(batch, answers, strict=True):
            if answer:
                finished[sample.index] = answer
            elif tries + 1 < MAX_TRIES:
                again.append((sample, views, tries + 1))
                progress.asked_again += 1
            else:
                given_up[sample] = f"none of {MAX_TRIES} answers was valid"
        progress.dialogues |= finished
        progress.save(finished)
        yield len(finished)


@contextmanager
def open_journal(folder: Path, settings: dict, fresh: bool) -> Iterator[tuple]:
    """The dialogues in a journal (but for a line torn by a crash), a function that puts more on the
    disk, and how often it was opened before. Raises InputError if another run has it, or if it has
    other settings and is not to be `fresh`."""
    path, lock, known = folder / "dialogues.jsonl", FileLock(folder / "lock", timeout=0), {}
    foreign = {file.name for file in folder.glob("*")} - {"lock"}
    require(not foreign or path.name in foreign, f"{folder}: is no journal; move it away")
    with blaming(f"{folder}: cannot be locked", "wait for the other run or name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    with path.open("a+b", buffering=0) as journal:

        def append(dialogues: Dialogues, header: str = "") -> None:
            lines = (json_line({"index": i} | dialogue) for i, dialogue in dialogues.items())
            with blaming(f"{path}: cannot be written", "see to the disk and run again", RunError):
                written = (header + "".join(lines)).encode()
                require(journal.write(written) == len(written), "the disk is full", OSError)
                os.fsync(journal.fileno())
            known.update(dialogues)

        header = json_line({"settings": settings, "overwrite": fresh})
        if fresh and not path.read_bytes().startswith(header.encode()):
            journal.truncate(0)  # but an interrupted --overwrite goes on, as any run
        content = path.read_bytes()
        try:
            for line in content.split(b"\n"):
                with suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    if "settings" in entry:
                        compare_settings(path, entry["settings"], settings)
                    elif dialogue := parse_answer(json.dumps(entry)):
                        known.setdefault(entry["index"], dialogue)
            append({}, "\n" * (content[-1:] not in b"\n") + header)
            yield known, append, content.count(b'{"settings"')
        except InputError:  # of other settings, or of a model that cannot be loaded
            if not content:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            lock.release()


def compare_settings(path: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises InputError that names the first setting that `found`, read from `path`, has not."""
    for name, value in settings.items():
        was = f"{path}: made with {name} = {found.get(name)!r}, but this run has {value!r}"
        require(found.get(name) == value, f"{was}; undo it, change --output-dir or add --overwrite")


def json_line(entry: dict[str, Any]) -> str:
    """`entry` on a line, also for readers that take U+2028 and the like for a line's end."""
    text = json.dumps(entry, ensure_ascii=False)
    return CONTROL.sub(lambda c: f"\\u{ord(c[0]):04x}", text) + "\n"


# --------------------------------------------------------------------------------------- dataset
def find_dataset(repo_id: str | None, data_dir: Path | None) -> Path:
    """The folder: `data_dir`, LeRobot's local copy of `repo_id`, or a download to its cache."""
    if data_dir:
        require(data_dir.is_dir(), f"--data-dir {data_dir}: no such folder; check the path")
        return data_dir.resolve()
    from huggingface_hub import snapshot_download
    from lerobot.datasets.utils import get_safe_version
    from lerobot.utils.constants import HF_LEROBOT_HOME

    local, hub = HF_LEROBOT_HOME / repo_id, HF_LEROBOT_HOME / "hub"
    if (local / "meta" / "skills.json").is_file():
        return local
    problem = blaming(f"--repo-id {repo_id}: no download", "check name, network and login")
    with suppress(Exception) if (local / "meta" / "info.json").is_file() else problem:
        what = {"repo_type": "dataset", "revision": get_safe_version(repo_id, "v3.0")}
        return Path(snapshot_download(repo_id, cache_dir=hub, **what))
    return local  # recorded here and never uploaded


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
    from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata

    with blaming(f"{info}: LeRobot cannot open the dataset", "repair its meta folder"):
        meta = LeRobotDatasetMetadata(repo_id or f"local/{root.name}", root=root)
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
    import pyarrow as pa
    import pyarrow.parquet as pq

    with blaming(f"{path}: cannot be read", "restore the file"), pq.ParquetFile(path) as parquet:
        names = [f.name for f in parquet.schema_arrow if not pa.types.is_struct(f.type)]
        require(COLUMN not in names, f"{path}: has {COLUMN} already; annotate its source")
        groups = (parquet.read_row_group(i, names) for i in range(parquet.num_row_groups))
        return pa.concat_tables([group.select(columns) for group in groups]).to_pandas()


def read_frames(meta: Any) -> pd.DataFrame:
    """The frames for plan_samples, checked against the episode table. Raises InputError."""
    import pandas as pd

    names = ["episode_index", "frame_index", "timestamp", "task_index"]
    files = sorted(meta.root.glob("data/*/*.parquet"))  # LeRobot concatenates them in this order
    frames = pd.concat([read_parquet(path, names) for path in files], ignore_index=True)
    require(
        frames.notna().all(axis=None), f"{meta.root}/data: {names} hold nulls; restore the files"
    )
    found = Counter((e, len(list(run))) for e, run in groupby(frames["episode_index"]))
    promised = Counter(episode_table(meta)["length"].items())
    wrong = sorted(int(episode) for episode, _ in (found - promised) + (promised - found))
    problem = f"{meta.root}/data: does not hold the frames of meta/episodes for episode"
    require(not wrong, f"{problem} {sorted(set(wrong))}; restore the files")
    return frames


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
    frames = read_frames(meta)
    samples, ranks = plan_samples(frames, skills, tasks, meta.fps, sample_interval, seed)
    for key in dict.fromkeys([*cameras, *meta.video_keys]):  # a file that is cut off still opens
        for path, group in groupby(sorted(picture_places(meta, samples, key)), lambda p: p[0]):
            problem = f"{path}: the last picture needed of {key} cannot be decoded"
            require(read_picture(meta, max(group), key), f"{problem}; restore the file")
    return Plan(samples, ranks, cameras)


def generate_synthetic_data(
    dataset: Any, pgen: QwenPgen, plan: Plan, batch_size: int = 16, progress: Progress | None = None
) -> Results:
    """Generate a LeRobotDataset's dialogues, but for those in `progress`. Returns the task table,
    each frame's row in it (int64 (frames,)), and syn_annotations.jsonl's lines, or RunError."""
    meta, progress = getattr(dataset, "meta", dataset), progress or Progress()
    todo = [sample for sample in plan.samples if sample.index not in progress.dialogues]
    bar = tqdm(total=len(plan.samples), initial=len(plan.samples) - len(todo), unit="sample")
    pairs = zip(todo, read_samples(meta, todo, plan.camera_keys), strict=True)
    with closing(read_ahead(pairs, 2 * min(batch_size, len(todo)))) as pairs, bar:
        for number in annotate_samples(pgen, pairs, batch_size, progress) if todo else ():
            bar.set_postfix(batch=min(batch_size, pgen.batch_limit), again=progress.asked_again)
            bar.update(number)
    return tabulate(plan, progress)


def tabulate(plan: Plan, progress: Progress) -> Results:
    """The results of generate_synthetic_data from the dialogues there are. Here each frame gets its
    row: from a sample to the next, that of the dialogue which assign_dialogues has chosen."""
    import pandas as pd

    samples, dialogues = plan.samples, progress.dialogues
    answered = [position for position, s in enumerate(samples) if s.index in dialogues]
    carried, late = assign_dialogues(samples, answered), 0
    lines = [samples[i].annotated(dialogues[samples[i].index]) for i in answered]
    table = pd.DataFrame(lines).rename(columns={"skill_current": "skill"})
    table = table[["user_prompt", "robot_utterance", "skill", "scenario_type", "response_type"]]
    rows = table.groupby(list(table), sort=False).ngroup().tolist()  # counted as first seen
    tasks = table.drop_duplicates(ignore_index=True)
    tasks.insert(0, "task_index", range(len(tasks)))
    row_of, task_indices = dict(zip(answered, rows, strict=True)), plan.skill_ranks.copy()
    ends = [*(sample.index for sample in samples[1:]), len(task_indices)]
    for sample, end, c in zip(samples, ends, carried, strict=True):
        span = slice(sample.index, end)
        shown = samples[c] if samples[c].episode_id == sample.episode_id else sample
        late += int((plan.skill_ranks[span] > shown.skill_rank).sum())
        task_indices[span] = row_of[c]
    progress.late_share = late / len(task_indices)
    return tasks, task_indices, [ln | {COLUMN: row} for ln, row in zip(lines, rows, strict=True)]


def assign_dialogues(samples: Sequence[Sample], answered: Sequence[int]) -> list[int]:
    """For each sample, the position of the one in `answered` whose dialogue its frames carry: it,
    else the nearest earlier one of the episode (with its skill before any other), else the nearest
    later one, else one elsewhere with its skill and task. Raises RunError if there is none."""

    def purpose(i: int) -> tuple[str, str]:
        return samples[i].skill_current, samples[i].task_description

    lenders, carried, own = {}, [], set(answered)
    for i in answered:
        lenders.setdefault(purpose(i), []).append(i)
    for _, group in groupby(range(len(samples)), lambda i: samples[i].episode_id):
        positions = list(group)
        source = {i: i for i in positions if i in own}
        if not source:
            fitting = {i: lenders.get(purpose(i)) for i in positions}
            source = {i: found[i % len(found)] for i, found in fitting.items() if found}
        for i in positions:
            near = [i] if i in source else source
            order = [(j > i, j < i and purpose(j) != purpose(i), abs(j - i), j) for j in near]
            carried.append(source[min(order)[-1]] if order else -1)
    hopeless = sorted({s.episode_id for s, c in zip(samples, carried, strict=True) if c < 0})
    problem = f"no valid dialogue for episode {hopeless}, nor elsewhere for its skills and task"
    require(not hopeless, f"{problem}; run again, or --overwrite with another --model", RunError)
    return carried


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
    """Write the dataset in `root` plus the new column to `target`, and read every file back.
    Raises RunError that names the file at fault."""
    import av
    from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata

    (tasks, task_indices, annotations), data = results, set(root.glob("data/*/*.parquet"))
    for file in source_files(root):
        old, new = root / file, target / file
        with blaming(f"{new}: cannot be written", "see to the disk and run again", RunError):
            new.parent.mkdir(parents=True, exist_ok=True)
            if old in data:  # in the order of read_frames
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
        (meta / "syn_annotations.jsonl").write_bytes("".join(map(json_line, annotations)).encode())
        (meta / "annotate_pgen.json").write_text(json.dumps(settings, indent=4), encoding="utf-8")
        written = LeRobotDatasetMetadata(f"local/{root.name}", root=target)
        for path in (file for file in needed_files(written) if file.suffix == ".mp4"):
            next(av.open(str(path)).decode(video=0))


def add_column(source: Path, target: Path, values: np.ndarray) -> int:
    """Copy a parquet file as it is but for the new column, the first of `values` (int64), and its
    description in the metadata that `datasets` keeps. Returns the number of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

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
    add("--push-to-hub", f"not built yet: push the result to <repo-id>{SUFFIX}", **switch)
    add("--dry-run", "print the plan and a prompt; load no model, write nothing", **switch)
    add("--debug", "show the traceback of an error", **switch)
    args = parser.parse_args(argv)
    repo_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", args.repo_id or "a/b", re.ASCII)
    for valid, problem in (
        (args.repo_id or args.data_dir, "neither --repo-id nor --data-dir: name a dataset"),
        (repo_id, f"--repo-id {args.repo_id}: is not of the form user/name; correct it"),
        (args.num_image_views_per_sample > 0, "--num-image-views-per-sample must be 1 or more"),
        (0 < args.sample_interval < math.inf, "--sample-interval must be positive and finite"),
        (0 <= args.temperature < math.inf, "--temperature must be 0 or positive and finite"),
        (args.batch_size > 0, "--batch-size must be 1 or more"),
        (args.repo_id or not args.push_to_hub, "--push-to-hub: names no target; add --repo-id"),
        (not args.push_to_hub, "--push-to-hub: not built yet; leave it out, then use `hf upload`"),
    ):
        require(valid, problem)
    return args


def annotate_dataset(args: argparse.Namespace) -> None:
    """The whole job, from the source dataset to the new one. Raises InputError and RunError."""
    import av
    import torch
    from lerobot.utils.constants import HF_LEROBOT_HOME

    started = time.monotonic()
    with blaming(f"{args.data_dir or args.repo_id}: cannot be annotated", "repair the dataset"):
        root = find_dataset(args.repo_id, args.data_dir).resolve()
        base = HF_LEROBOT_HOME / args.repo_id if args.repo_id else root
        output = (args.output_dir or base.with_name(base.name + SUFFIX)).resolve()
        unfinished = output.with_name(output.name + ".partial")
        overlap = any(
            p.is_relative_to(root) or root.is_relative_to(p) for p in (output, unfinished)
        )
        require(not overlap, f"--output-dir {output}: overlaps the source; name another folder")
        occupied = output.exists() and any(output.iterdir() if output.is_dir() else [output])
        meta = open_dataset(root, args.repo_id)
        av.logging.set_level(av.logging.PANIC)  # set by others so far; what is broken we report
        views, keys = args.num_image_views_per_sample, args.camera_keys
        plan = make_plan(meta, args.sample_interval, views, keys, args.seed)
        needed = sum((root / file).stat().st_size for file in source_files(root)) * 1.02 + 16e6
        sizes = [(str(path.relative_to(root)), path.stat().st_size) for path in needed_files(meta)]
        tables = [root / "meta" / name for name in ("info.json", "skills.json", "tasks.parquet")]
        tables += sorted((root / "meta" / "episodes").glob("*/*.parquet"))
        state = [hashlib.sha256(table.read_bytes()).hexdigest() for table in tables], sizes
    if args.dry_run:
        print(f"episodes       {meta.total_episodes}\ncameras        {', '.join(plan.camera_keys)}")
        print_counts(plan, map(vars, plan.samples), output)
        for s in {sample.scenario_type: sample for sample in reversed(plan.samples)}.values():
            print(f"\nprompt for episode {s.episode_id}, frame {s.frame_index}:\n\n{s.prompt}")
        print(f"\nThe answer begins with: {PREFILL}")
        return
    prompt = (PROMPT, PREFILL, SCENARIO_TYPES, RESPONSE_TYPES, SUITABLE_RESPONSES, HISTORY_LENGTH)
    names = ("model", "sample_interval", "temperature", "seed")
    settings = {name: getattr(args, name) for name in names} | {"camera_keys": plan.camera_keys}
    local = Path(args.model)
    settings["model"] = str(local.resolve()) if local.is_dir() else args.model
    settings["prompt"] = hashlib.sha256(repr(prompt).encode()).hexdigest()
    settings["dataset"] = hashlib.sha256(repr(state).encode()).hexdigest()
    if occupied:
        record = output / "meta" / "annotate_pgen.json"
        require(record.is_file(), f"--output-dir {output}: is not empty; name another folder")
        if not args.overwrite:
            compare_settings(record, read_json(record), settings)
            print(f"finished already, with the same settings: {output}")
            return
    lack = needed - shutil.disk_usage(next(path for path in output.parents if path.exists())).free
    require(lack < 0, f"--output-dir {output}: lacks {lack / 1e9:.2f} GB; free some on the disk")
    progress = Progress()
    with open_journal(unfinished, settings, args.overwrite) as opened:
        progress.dialogues, progress.save, attempts = opened
        known = len(progress.dialogues)
        tqdm.write(f"loading {args.model}; {known} dialogues are there already", file=sys.stderr)
        torch.manual_seed((args.seed + attempts) % 2**63)  # what has failed must not be repeated
        how = args.model, args.device, args.dtype, args.temperature
        pgen = QwenPgen(*how) if known < len(plan.samples) else None
        seconds = -time.monotonic()
        results = generate_synthetic_data(meta, pgen, plan, args.batch_size, progress)
        seconds += time.monotonic()
        tqdm.write(f"writing {output}", file=sys.stderr)
        shutil.rmtree(unfinished / "dataset", ignore_errors=True)
        write_dataset(root, unfinished / "dataset", results, settings)
        with blaming(f"{output}: cannot be renamed into", "see to it and run again", RunError):
            os.sync()
            if occupied and output.exists():  # else it is empty, or not ours to replace
                output.rename(unfinished / f"replaced-{time.time_ns()}")
            (unfinished / "dataset").rename(output)
            shutil.rmtree(unfinished)
    for s, why in progress.given_up.items():
        sys.stderr.write(f"given up: episode {s.episode_id}, frame {s.frame_index}: {why}\n")
    rate = (len(progress.dialogues) - known) / seconds
    print_counts(plan, results[2], output)
    print(f"""\
dialogues      {len(results[2])}, of which {len(results[2]) - known} generated in this run
unique tasks   {len(results[0])}
asked again    {progress.asked_again}, given up {len(progress.given_up)}
late frames    {progress.late_share:.1%} carry the dialogue of an earlier skill than their own
time           {time.monotonic() - started:.1f} s, {rate:.2f} samples/s while generating

from lerobot.datasets.lerobot_dataset import LeRobotDataset
import pandas as pd

name, root = "{args.repo_id or "local/" + root.name}{SUFFIX}", "{output}"
dataset = LeRobotDataset(name, root=root, video_backend="pyav")
tasks = pd.read_parquet(dataset.root / "meta" / "tasks_high_level.parquet")
print(tasks.iloc[dataset[0]["{COLUMN}"].item()])""")


def print_counts(plan: Plan, annotations: Iterable[dict[str, Any]], output: Path) -> None:
    print(f"new dataset    {output}\nframes         {len(plan.skill_ranks)}")
    print(f"samples        {len(plan.samples)}")
    types = [(entry["scenario_type"], entry["response_type"]) for entry in annotations]
    for name, column in zip(("scenarios", "responses"), zip(*types, strict=True), strict=True):
        print(f"{name:14}", ", ".join(f"{key} {n}" for key, n in sorted(Counter(column).items())))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 done, 2 bad input, 1 failed with the work kept, 130, 143."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)  # the second time ends the process
        raise KeyboardInterrupt(number)

    try:
        args = parse_args(argv)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        logging.captureWarnings(True)
        logging.disable(logging.CRITICAL)
        annotate_dataset(args)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        code, message = 2 if isinstance(error, InputError) else 1, str(error)
        if isinstance(error, KeyboardInterrupt):
            code, message = 128 + error.args[0], "interrupted; the same command goes on from here"
        elif "--debug" in (argv or sys.argv) or not isinstance(error, (InputError, RunError)):
            sys.excepthook(type(error), error, error.__traceback__)
        tqdm.write(f"error: {one_line(message or repr(error))}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
