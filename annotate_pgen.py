#!/usr/bin/env python
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "lerobot>=0.4.4,<0.5; python_version < '3.12'",
#   "lerobot[dataset]>=0.6.1,<0.7; python_version >= '3.12'",
#   "transformers[torch]>=4.57.1,<5; python_version < '3.12'",
#   "transformers[torch]>=5.4,<6; python_version >= '3.12'",
#   "torch>=2.7,<2.11; python_version < '3.12'",
#   "torch>=2.7; python_version >= '3.12'",
#   "qwen-vl-utils>=0.0.14",
#   "huggingface_hub>=0.34.2,<2",
#   "av>=14",
#   "filelock>=3.12",
#   "httpx>=0.27,<1",
#   "jinja2>=3.1",
#   "markupsafe>=2.1",
#   "numpy>=1.26",
#   "pandas>=2.2",
#   "pillow>=10.3",
#   "pyarrow>=17",
#   "tqdm>=4.66",
# ]
# ///
"""Write a LeRobot dataset in which every frame has a dialogue.

A Qwen vision-language model looks at sampled frames of a dataset whose episodes
carry skill annotations. For each it invents what a person might have said to bring
about the robot's skill, and what the robot answers. This is the synthetic data
generation (p_gen) of Hi Robot, arXiv 2502.19417.

To change what the model is asked, edit the first section, "prompt", and look at the
outcome with --dry-run. The whole job is the function annotate_dataset, in "job".

examples:
  python annotate_pgen.py --data-dir outputs/demo/dataset --dry-run
  python annotate_pgen.py --repo-id lerobot/svla_so101_pickplace \\
      --output-dir outputs/pgen_dataset
  python annotate_pgen.py --repo-id lerobot/svla_so101_pickplace \\
      --model Qwen/Qwen3-VL-30B-A3B-Instruct --device auto --sample-interval 0.5 \\
      --num-image-views-per-sample 2 --align-skills
"""

from __future__ import annotations

import argparse
import base64
import copy
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
import string
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ThreadPoolExecutor,
    wait,
)
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import cached_property, partial
from itertools import zip_longest
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("error: Python 3.10 to 3.13 is needed; install one of them")

if TYPE_CHECKING:
    import httpx
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    import torch
    from markupsafe import Markup
    from PIL import Image

COLUMN = "task_index_high_level"
SUFFIX = "_with_high_level_tasks"
# The settings that a dataset was made with, in the finished dataset.
RECORD = Path("meta", "annotate_pgen.json")
# Nobody is to wait longer without a sign of life.
TICK_SECONDS = 2.0


class InputError(Exception):
    """What the user gave cannot be used (exit code 2). It says where and what to do."""


class RunError(Exception):
    """The run cannot go on; what was generated so far is kept (exit code 1)."""


@contextmanager
def errors_as(
    kind: type[InputError] | type[RunError], problem: str, remedy: str
) -> Iterator[None]:
    """Report whatever a library raises inside as one line for the user.

    It surrounds single calls into libraries, whose errors are of many kinds.

    Args:
        kind: the exception to raise instead.
        problem: what failed, and where.
        remedy: what the user can do about it.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:
        reason = one_line(str(error)).rstrip(".") or type(error).__name__
        raise kind(f"{problem}: {reason[:500]}; {remedy}") from error


def say(message: str) -> None:
    """Write a line to stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(one_line(message), file=sys.stderr)


@contextmanager
def saying_how_long(message: str, quiet: bool = False) -> Iterator[None]:
    """Say on stderr what is being done, and every other second for how long.

    Args:
        message: what is being done.
        quiet: whether nothing is said, as by ranks other than 0.
    """
    from tqdm import tqdm

    done = threading.Event()
    line = "{desc} {elapsed}"
    with tqdm(desc=one_line(message), bar_format=line, disable=quiet) as clock:
        ticking = threading.Thread(target=tick, args=(clock, done), daemon=True)
        ticking.start()
        try:
            yield
        finally:
            done.set()
            ticking.join()


def tick(clock: Any, done: threading.Event) -> None:
    """Show tqdm's clock anew, until it is done."""
    while not done.wait(TICK_SECONDS):
        clock.refresh()


# ------------------------------------------------------------------------------ prompt
# What the model is asked. Each type has a rule and an example of another scene. An
# answer that repeats an example, or any other sentence from here, is refused.

SCENARIO_TYPES = {
    "specific_object": (
        "The person plainly asks for the action and names its object. "
        'Example: "Could you wipe the blue plate?"'
    ),
    "negative_task": (
        "The person says what to leave alone or not to do yet, and then asks for "
        'the action. Example: "Don\'t dry it yet, just rinse the spoon."'
    ),
    "situated_correction": (
        "The person sees where the robot is now, says that this is far enough or "
        "that it should go on, and asks for the action. "
        'Example: "That is high enough, now tip the jug over the glass."'
    ),
    "implicit_request": (
        "The person gives no command, but says what they need or would like to see "
        "(I need, I'd like, it would help), and only this action gives it. "
        'Example: "I\'d like to see that drawer open now."'
    ),
    "constraint_based": (
        "The person asks for the action and says with which hand, which one, or to "
        "what place, as the action or the picture has it. "
        'Example: "Using your left hand, hang the towel on the hook."'
    ),
}

RESPONSE_TYPES = {
    "confirmation": (
        "The robot agrees and says what it will do. "
        'Example: "Okay, I\'ll wipe the plate."'
    ),
    "clarification": (
        "The robot confirms what it understood (just to confirm, so that is, you "
        "mean) and goes on without waiting. "
        'Example: "Just to confirm, the drawer on the left. Opening it now."'
    ),
    "acknowledgment": (
        "The robot says that it heard and what it is doing. "
        'Example: "Got it, rinsing the spoon."'
    ),
    "constraint_acknowledgment": (
        "The robot repeats what the person ruled out or laid down, and says what it "
        'does. Example: "Sure, with my left hand only: hanging up the towel."'
    ),
}

# Which responses are dealt to a scenario; one that is not named here takes any. A
# clarification belongs where the person's words leave something open.
SUITABLE_RESPONSES = {
    "specific_object": ("confirmation", "acknowledgment"),
    "negative_task": ("confirmation", "acknowledgment", "constraint_acknowledgment"),
    "situated_correction": ("confirmation", "clarification", "acknowledgment"),
    "implicit_request": ("confirmation", "clarification", "acknowledgment"),
    "constraint_based": ("confirmation", "constraint_acknowledgment"),
}

PROMPT = """\
You write what is said between a person and the robot in the picture.
Task: {task}
Done so far: {history}
Action now: {skill} ({moment})
Comes later, not to be asked for yet: {next_skill}

user_prompt: what the person says so that the robot does the action now. {scenario}
robot_utterance: what the robot answers. {response}

Rules:
- Whoever hears only user_prompt must know that exactly this action is wanted: keep \
its verb or result, its object and its place, but in words that people say.
- It is a single step. Do not ask for the whole task or for what comes later.
- Say only what the picture and the lines above bear out. Make up no reason, mood, \
speed, care or condition.
- The answer promises this action and nothing else. It never just asks.
- Sound like people at home, not like a label: short, easy, warm. Do not copy the \
examples.
Answer in JSON: {{"user_prompt": "...", "robot_utterance": "..."}}"""

PROMPT_FIELDS = (
    "task",
    "history",
    "skill",
    "moment",
    "next_skill",
    "scenario",
    "response",
)

# The model goes on from here, so that it writes neither a preamble nor a code fence.
PREFILL = '{"user_prompt": "'

# How many earlier skills are told.
HISTORY_LENGTH = 5
# How far into its skill a frame is.
MOMENTS = ("just starting", "in the middle", "about to end")
# What stands where there is no task, no earlier and no later skill.
NO_TASK = "not described"
NO_HISTORY = "nothing yet"
NO_NEXT_SKILL = "nothing"
# There is nothing to correct yet on an episode's first sample.
NOT_ON_FIRST_SAMPLE = {"situated_correction"}

# What --verify asks about a user prompt, without the picture and the history.
VERIFY_PROMPT = """\
A robot can do these actions:
{options}
A person says to it: "{user_prompt}"
Which action does the person ask for? Answer with its letter only."""

VERIFY_FIELDS = ("options", "user_prompt")

CONTROL_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def construct_prompt(
    task: str,
    history: Sequence[str],
    skill: str,
    scenario_type: str = "",
    response_type: str = "",
    next_skill: str = "",
    moment: str = MOMENTS[0],
) -> str:
    """Say what the model is asked about one frame.

    Args:
        task: what the whole episode is about.
        history: the skills done before, the earliest first.
        skill: the skill that the robot performs.
        scenario_type: a key of SCENARIO_TYPES; "" leaves the choice to the model.
        response_type: a key of RESPONSE_TYPES; "" leaves the choice to the model.
        next_skill: the skill that comes after; "" if there is none.
        moment: how far into the skill the frame is, one of MOMENTS.

    Returns:
        PROMPT with its fields filled in, each on one line.
    """
    recent = [one_line(name) for name in history[-HISTORY_LENGTH:]]
    return PROMPT.format(
        task=one_line(task) or NO_TASK,
        history="; ".join(recent) or NO_HISTORY,
        skill=one_line(skill),
        moment=moment,
        next_skill=one_line(next_skill) or NO_NEXT_SKILL,
        scenario=SCENARIO_TYPES[scenario_type] if scenario_type else "",
        response=RESPONSE_TYPES[response_type] if response_type else "",
    )


def one_line(text: str) -> str:
    """Put a text on one line, without characters that act on prompts and terminals."""
    return " ".join(CONTROL_CHARACTER.sub(" ", text).split())


def check_prompt() -> None:
    """Check the prompts and the tables of types, which users edit.

    Raises:
        InputError: names the field or type that is wrong.
    """
    check_template("PROMPT", PROMPT, PROMPT_FIELDS, needed=["skill"])
    check_template("VERIFY_PROMPT", VERIFY_PROMPT, VERIFY_FIELDS, needed=VERIFY_FIELDS)
    if not set(SCENARIO_TYPES) - NOT_ON_FIRST_SAMPLE:
        raise InputError(
            "SCENARIO_TYPES: holds no type for an episode's first sample; add one "
            "beside situated_correction"
        )
    if not RESPONSE_TYPES:
        raise InputError("RESPONSE_TYPES: is empty; add a type")
    for scenario, responses in SUITABLE_RESPONSES.items():
        if scenario not in SCENARIO_TYPES:
            raise InputError(
                f"SUITABLE_RESPONSES: {scenario!r} is not in SCENARIO_TYPES; correct it"
            )
        if not responses:
            raise InputError(
                f"SUITABLE_RESPONSES: {scenario!r} has no response; name one"
            )
        for response in responses:
            if response not in RESPONSE_TYPES:
                raise InputError(
                    f"SUITABLE_RESPONSES: {response!r} is not in RESPONSE_TYPES; "
                    "correct it"
                )


def check_template(
    name: str, template: str, fields: Sequence[str], needed: Sequence[str]
) -> None:
    """Check the fields of a prompt.

    Args:
        name: what the prompt is called here.
        template: the prompt, with fields in braces.
        fields: those that it may have.
        needed: those that it must have.

    Raises:
        InputError: names the field that is wrong.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"{name}: {error}; write a brace that is not part of a field twice"
        ) from error
    found = set()
    for _, field_name, format_spec, conversion in parsed:
        if field_name is None:
            continue
        if field_name not in fields:
            raise InputError(
                f"{name}: has the unknown field {{{field_name}}}; the fields are "
                f"{', '.join(fields)}, and any other brace is written twice"
            )
        if format_spec or conversion:
            raise InputError(
                f"{name}: has more than its name in the field {{{field_name}}}; write "
                "the name alone, and any other brace twice"
            )
        found.add(field_name)
    for field_name in needed:
        if field_name not in found:
            raise InputError(f"{name}: lacks the field {{{field_name}}}; put it in")


def prompt_settings() -> dict[str, Any]:
    """All that is asked, as it is recorded in a dataset and compared on resuming."""
    suitable = {name: list(types) for name, types in SUITABLE_RESPONSES.items()}
    return {
        "PROMPT": PROMPT,
        "PREFILL": PREFILL,
        "HISTORY_LENGTH": HISTORY_LENGTH,
        "MOMENTS": list(MOMENTS),
        "NO_TASK": NO_TASK,
        "NO_HISTORY": NO_HISTORY,
        "NO_NEXT_SKILL": NO_NEXT_SKILL,
        # Types are dealt by their order, so that it counts.
        "SCENARIO_TYPES": [list(pair) for pair in SCENARIO_TYPES.items()],
        "RESPONSE_TYPES": [list(pair) for pair in RESPONSE_TYPES.items()],
        "SUITABLE_RESPONSES": suitable,
        "VERIFY_PROMPT": VERIFY_PROMPT,
    }


# ------------------------------------------------------------------------------ source
# The dataset that is annotated: found, opened with every file checked, never written.


def find_dataset(
    repo_id: str | None, data_dir: Path | None, revision: str | None = None
) -> Path:
    """Find the folder of a dataset, and download it if it is only on the Hub.

    Args:
        repo_id: the dataset's name on the Hub. LeRobot's local copy of it is used if
            there is one and no revision is named.
        data_dir: a local folder, which is taken as it is.
        revision: branch, tag or commit on the Hub. Without one, LeRobot's version tag
            is taken, or main if only main has skills.

    Returns:
        The folder with meta, data and videos.

    Raises:
        InputError: the dataset is not there or has no skills.
    """
    from lerobot.utils.constants import HF_LEROBOT_HOME

    if data_dir:
        if not data_dir.is_dir():
            raise InputError(f"--data-dir {data_dir}: no such folder; check the path")
        return data_dir
    if not repo_id:
        raise InputError("neither --repo-id nor --data-dir is given; name a dataset")
    local_copy = HF_LEROBOT_HOME / repo_id
    if not revision and (local_copy / "data").is_dir():
        return local_copy
    versions = [revision] if revision else ["v3.0", "main"]
    found = []
    for version in versions:
        say(f"asking the Hub for {repo_id} at {version}")
        meta_only = download(repo_id, version, allow_patterns=["meta/*"])
        if meta_only:
            found.append(version)
        if meta_only and promises_skills(meta_only / "meta"):
            say(f"downloading {repo_id} at {version}")
            folder = download(repo_id, version)
            if folder:
                return folder
    if not found:
        raise InputError(
            f"--repo-id {repo_id}: has no revision {' or '.join(versions)}; correct "
            "--revision"
        )
    raise InputError(
        f"--repo-id {repo_id}: has no skills at {' or '.join(found)}; "
        f"{skills_remedy(repo_id)}"
    )


def download(
    repo_id: str, version: str, allow_patterns: list[str] | None = None
) -> Path | None:
    """Download a dataset from the Hub into LeRobot's cache.

    Args:
        repo_id: the dataset's name.
        version: branch, tag or commit.
        allow_patterns: which files to download; all of them if None.

    Returns:
        The folder, or None if there is no such version.

    Raises:
        InputError: the dataset cannot be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError
    from lerobot.utils.constants import HF_LEROBOT_HOME

    with errors_as(
        InputError,
        f"--repo-id {repo_id}: cannot be downloaded",
        "check the name, the network and that you are logged in",
    ):
        try:
            folder = ask_hub(
                snapshot_download,
                repo_id=repo_id,
                repo_type="dataset",
                revision=version,
                allow_patterns=allow_patterns,
                cache_dir=HF_LEROBOT_HOME / "hub",
            )
        except RevisionNotFoundError:
            return None
    return Path(folder)


def open_dataset(root: Path, repo_id: str | None = None) -> Any:
    """Open a dataset, with every file there that it needs.

    LeRobot turns to the Hub when a file is missing, and fails there with a misleading
    error. So the folder is checked first, and the file is named.

    Args:
        root: the folder of the dataset.
        repo_id: its name on the Hub, if it has one.

    Returns:
        Its LeRobotDatasetMetadata.

    Raises:
        InputError: the dataset cannot be read, or has another format.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata

    info_file = root / "meta" / "info.json"
    if not info_file.is_file():
        raise InputError(
            f"{info_file}: not found, so this is no LeRobot dataset; check the path"
        )
    info = read_json(info_file)
    if not is_text(json.dumps(info, ensure_ascii=False)):
        raise InputError(
            f"{info_file}: holds half of a surrogate pair, which cannot be written in "
            "UTF-8; correct it"
        )
    version = str(info.get("codebase_version"))
    if not version.startswith("v3."):
        raise InputError(
            f"{info_file}: has format {version}, not v3.0; convert it with LeRobot's "
            "convert_dataset_v21_to_v30"
        )
    episode_files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not episode_files:
        raise InputError(
            f"{root / 'meta' / 'episodes'}: holds no parquet file; restore it"
        )
    for path in [root / "meta" / "tasks.parquet", *episode_files]:
        check_table(path)
    with errors_as(
        InputError,
        f"{info_file}: LeRobot cannot open the dataset",
        "repair its meta folder, or free space on the disk",
    ):
        meta = LeRobotDatasetMetadata(repo_id or f"local/{root.name}", root=root)
        meta.root = Path(meta.root)
        fps = float(meta.fps)
        needed = list_needed_files(meta)
    read_numbers(root / "meta" / "tasks.parquet", ["task_index"])
    columns = ["episode_index", "length"]
    for key in meta.video_keys:
        columns.append(f"videos/{key}/from_timestamp")
        columns.append(f"videos/{key}/to_timestamp")
    for path in episode_files:
        read_numbers(path, columns)
    if not 0 < fps < math.inf:
        raise InputError(f"{info_file}: fps is {meta.fps}; correct it")
    if not needed:
        raise InputError(f"{root}: has no episodes; record some first")
    for path in needed:
        if not Path(os.path.normpath(path)).is_relative_to(root):
            raise InputError(
                f"{info_file}: a path leads out of the folder, to {path}; correct it"
            )
        if not path.is_file():
            raise InputError(
                f"{path}: is missing; restore it or download the dataset again"
            )
    return meta


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        InputError: the file holds something else.
    """
    with errors_as(InputError, f"{path}: is not valid JSON", "restore the file"):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object; restore the file")
    return content


def read_episode_table(meta: Any) -> pd.DataFrame:
    """The rows of meta/episodes, by episode index.

    LeRobot's SARM annotator can leave rows without an index, which are no episodes.
    """
    table = meta.episodes.to_pandas().dropna(subset=["episode_index"])
    table["episode_index"] = table["episode_index"].astype("int64")
    return table.set_index("episode_index")


def find_episode_files(meta: Any, kind: str) -> dict[int, Path]:
    """Find the file that holds each episode.

    It fills in LeRobot's path template for all episodes at once: LeRobot's own
    get_data_file_path reads a row of the episode table for each.

    Args:
        meta: LeRobotDatasetMetadata.
        kind: "data" or "videos/<camera key>".

    Returns:
        The path of each episode's file, by episode index.
    """
    template = meta.data_path if kind == "data" else meta.video_path
    template = template.replace("{video_key}", kind.removeprefix("videos/"))
    table = read_episode_table(meta)
    chunks = table[f"{kind}/chunk_index"]
    files = table[f"{kind}/file_index"]
    paths = {}
    for episode_index, chunk, file in zip(table.index, chunks, files, strict=True):
        name = template.format(chunk_index=int(chunk), file_index=int(file))
        paths[episode_index] = meta.root / name
    return paths


def list_needed_files(meta: Any) -> list[Path]:
    """The data and video files of all episodes, sorted."""
    kinds = ["data"]
    kinds += [f"videos/{key}" for key in meta.video_keys]
    paths: set[Path] = set()
    for kind in kinds:
        paths.update(find_episode_files(meta, kind).values())
    return sorted(paths)


def list_colour_cameras(meta: Any) -> list[str]:
    """The camera keys of colour images, in the dataset's order, without depth maps."""
    cameras = []
    for key, feature in meta.features.items():
        details = feature.get("info") or feature.get("video_info") or {}
        is_depth = details.get("is_depth_map") or details.get("video.is_depth_map")
        is_camera = feature["dtype"] in ("video", "image") and 3 in feature["shape"]
        if is_camera and not is_depth:
            cameras.append(key)
    return cameras


def choose_cameras(
    meta: Any, view_count: int, camera_keys: Sequence[str] | None
) -> list[str]:
    """Decide which cameras the model sees.

    Args:
        meta: LeRobotDatasetMetadata.
        view_count: how many of the first colour cameras.
        camera_keys: which ones, by name, in place of the first.

    Raises:
        InputError: there are no such cameras.
    """
    cameras = list_colour_cameras(meta)
    if not cameras:
        raise InputError(f"{meta.root}: has no colour camera; name another dataset")
    choice = f"choose from the colour cameras: {', '.join(cameras)}"
    for key in camera_keys or ():
        if key not in cameras:
            raise InputError(f"--camera-keys {key}: no such camera; {choice}")
    if camera_keys:
        return list(dict.fromkeys(camera_keys))
    if not 1 <= view_count <= len(cameras):
        raise InputError(f"--num-image-views-per-sample {view_count}: {choice}")
    return cameras[:view_count]


@dataclass(frozen=True)
class DataFile:
    """A parquet file in data/ and its place among all frames."""

    path: Path
    first_index: int
    row_count: int


@dataclass(frozen=True)
class EpisodeFrames:
    """The frames of an episode, with the columns frame_index, timestamp, task_index."""

    episode_index: int
    first_index: int
    frames: pd.DataFrame


def list_data_files(root: Path) -> list[DataFile]:
    """The data files in LeRobot's order, with their places counted from their footers.

    Raises:
        InputError: a file cannot be read.
    """
    import pyarrow.parquet as pq

    data_files = []
    first_index = 0
    for path in sorted((root / "data").glob("*/*.parquet")):
        with errors_as(InputError, f"{path}: cannot be read", "restore the file"):
            row_count = pq.read_metadata(path).num_rows
        data_files.append(DataFile(path, first_index, row_count))
        first_index += row_count
    return data_files


FRAME_COLUMNS = ("episode_index", "frame_index", "timestamp", "task_index")


def read_episodes(
    meta: Any,
    data_files: Sequence[DataFile],
    episode_indices: Sequence[int],
    check_files: bool = True,
) -> Iterator[EpisodeFrames]:
    """Read the frames of episodes, one data file after the other.

    Args:
        meta: LeRobotDatasetMetadata.
        data_files: those of list_data_files.
        episode_indices: the episodes that are wanted.
        check_files: whether the other columns are decoded as well, to find damage.

    Yields:
        The frames of each, in dataset order.

    Raises:
        InputError: a file is damaged, or does not hold what meta/episodes says.
    """
    lengths = read_episode_table(meta)["length"].to_dict()
    wanted = set(episode_indices)
    missing = set(episode_indices)
    for data_file in data_files:
        path = data_file.path
        table = read_frame_columns(meta, path, check_files)
        for episode_index, frames in table.groupby("episode_index", sort=False):
            first_row = int(frames.index[0])
            is_contiguous = len(frames) == int(frames.index[-1]) - first_row + 1
            if not is_contiguous or lengths.pop(episode_index, None) != len(frames):
                raise InputError(
                    f"{path}: does not hold the frames that meta/episodes says for "
                    f"episode {episode_index}; restore the files"
                )
            if episode_index in wanted:
                first_index = data_file.first_index + first_row
                yield EpisodeFrames(int(episode_index), first_index, frames)
                missing.discard(episode_index)
    if missing:
        raise InputError(
            f"{meta.root / 'data'}: lacks episode {sorted(missing)}; restore the files"
        )


def read_frame_columns(meta: Any, path: Path, check_file: bool) -> pd.DataFrame:
    """Read what the plan needs of a data file.

    Args:
        meta: LeRobotDatasetMetadata.
        path: the file.
        check_file: whether the other columns are decoded as well, to find damage.

    Raises:
        InputError: the file is damaged, holds nulls, is annotated already, or has
            columns that LeRobot cannot read.
    """
    import pyarrow.parquet as pq

    if check_file:
        check_table(path)
    table = read_numbers(path, FRAME_COLUMNS)
    names = pq.read_schema(path).names
    unknown = sorted(set(names) - set(meta.features) - {COLUMN})
    if unknown:
        raise InputError(
            f"{path}: has {unknown}, which meta/info.json does not describe, so "
            "LeRobot cannot read it; describe or remove these columns"
        )
    if COLUMN in names and not holds_placeholder(path):
        raise InputError(f"{path}: has {COLUMN} already; annotate its source")
    return table.to_pandas(ignore_metadata=True)


def holds_placeholder(path: Path) -> bool:
    """Whether the new column is there, but with nothing but negative numbers.

    The older annotation tool of LeRobot fills it with -1.
    """
    import pyarrow.parquet as pq

    column = pq.read_table(path, columns=[COLUMN])[COLUMN]
    if not is_number(column.type) or column.null_count:
        return False
    return bool((column.to_numpy() < 0).all())


def read_numbers(path: Path, columns: Sequence[str]) -> pa.Table:
    """Read columns of a parquet file that must be there and hold numbers.

    Raises:
        InputError: names the column that does not, or the file cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with errors_as(InputError, f"{path}: cannot be read", "restore the file"):
        schema = pq.read_schema(path)
    for name in columns:
        if name not in schema.names:
            raise InputError(f"{path}: lacks the column {name}; restore the file")
        kind = schema.field(name).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise InputError(f"{path}: {name} holds no numbers; restore the file")
    with errors_as(InputError, f"{path}: cannot be read", "restore the file"):
        table = pq.read_table(path, columns=list(columns))
    for name in columns:
        if table[name].null_count:
            raise InputError(f"{path}: {name} holds nulls; restore the file")
    return table


def check_table(path: Path) -> None:
    """Decode a parquet file row group by row group, to find damage before generation.

    Raises:
        InputError: the file is damaged.
    """
    import pyarrow.parquet as pq

    with (
        errors_as(InputError, f"{path}: cannot be read", "restore the file"),
        pq.ParquetFile(path) as parquet,
    ):
        names = list_flat_columns(parquet.schema_arrow)
        for group in range(parquet.num_row_groups):
            parquet.read_row_group(group, columns=names)


def list_flat_columns(schema: pa.Schema) -> list[str]:
    """The columns that may be decoded whole: all but images and language columns.

    A list of rows that every frame repeats takes little room in the file, and
    gigabytes outside.
    """
    import pyarrow as pa

    names = []
    for column in schema:
        kind = column.type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kind = kind.value_type
        # A column whose lists are all empty has been written as lists of nulls.
        if not pa.types.is_struct(kind) and not pa.types.is_null(kind):
            names.append(column.name)
    return names


# ------------------------------------------------------------------------------ skills
# What the robot does when, in the forms that LeRobot's tools write.

SKILLS_FILE = "meta/skills.json"
LANGUAGE_ROWS = "language_persistent (subtask rows)"
SUBTASK_INDEX = "subtask_index with meta/subtasks.parquet"
DENSE_SUBTASKS = "dense_subtask columns of meta/episodes"
SPARSE_SUBTASKS = "sparse_subtask columns of meta/episodes"

LANGUAGE_COLUMN = "language_persistent"
# Times are compared with this tolerance, as a share of a frame. It absorbs what float32
# timestamps and rounded annotations are off, and never moves a skill by a frame.
TIME_TOLERANCE = 0.1


@dataclass(frozen=True)
class Skill:
    """What the robot does from `start` to `end`, in seconds from the first frame."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class EpisodeSkills:
    """An episode's skills, sorted by start and never empty, and the texts beside them.

    `description` and `coarse_description` are those of skills.json, "" where absent.
    """

    description: str
    skills: tuple[Skill, ...]
    coarse_description: str = ""


@dataclass(frozen=True)
class SkillSource:
    """The skills of the episodes, and the form in which the dataset has them.

    Attributes:
        name: the form that was read, for example "meta/skills.json".
        episodes: the skills of each episode, by its index.
        others: the names of further forms that the dataset has, which were not read.
    """

    name: str
    episodes: dict[int, EpisodeSkills]
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class FoundSkills:
    """An episode's skills as they stand in the dataset; nothing is checked yet.

    Attributes:
        place: file and episode, for errors.
        entries: name, start and end of each skill; the times in seconds.
        description: the episode's task, "" where the form has none.
        coarse_description: the dataset's task in other words, "" where there is none.
    """

    place: str
    entries: list[tuple[Any, Any, Any]]
    description: str = ""
    coarse_description: str = ""


@dataclass(frozen=True)
class SkillIrregularities:
    """How many oddities the skills have which are allowed, but worth a look.

    Attributes:
        late_starts: episodes whose first skill starts after the first frame.
        gaps: times at which no skill is under way between two skills.
        overlaps: skills that start before an earlier one has ended.
    """

    late_starts: int = 0
    gaps: int = 0
    overlaps: int = 0


def load_skills(meta: Any, episode_indices: Sequence[int]) -> SkillSource:
    """Load the skills of the episodes from the first form that the dataset has.

    Args:
        meta: the dataset's LeRobotDatasetMetadata.
        episode_indices: the episodes whose skills are needed.

    Returns:
        The skills, checked and sorted, with the name of their form.

    Raises:
        InputError: there are no skills, an episode lacks them, or they are wrong.
    """
    names = find_skill_sources(meta)
    if not names:
        remedy = skills_remedy(meta.repo_id, meta.root)
        raise InputError(f"{meta.root}: has no skills; {remedy}")
    found = read_skill_source(meta, names[0], episode_indices)
    lacking = [
        index
        for index in episode_indices
        if index not in found or not found[index].entries
    ]
    if lacking:
        raise InputError(
            f"{meta.root}: {names[0]}: no skills for episode {lacking}; annotate these"
            " episodes too, or leave them out"
        )
    episodes = {index: check_skills(found[index]) for index in episode_indices}
    check_starts(meta, found, episodes)
    return SkillSource(names[0], episodes, tuple(names[1:]))


def find_skill_sources(meta: Any) -> list[str]:
    """Name the forms in which a dataset has skills, the first to be read.

    Only what is in the files counts: meta/info.json goes on declaring columns that
    LeRobot's tools have dropped.
    """
    names = []
    if (meta.root / SKILLS_FILE).is_file():
        names.append(SKILLS_FILE)
    if has_language_rows(meta):
        names.append(LANGUAGE_ROWS)
    if has_subtask_index(meta):
        names.append(SUBTASK_INDEX)
    if has_sarm_columns(meta, "dense"):
        names.append(DENSE_SUBTASKS)
    if has_sarm_columns(meta, "sparse"):
        names.append(SPARSE_SUBTASKS)
    return names


def read_skill_source(
    meta: Any, name: str, episode_indices: Sequence[int]
) -> dict[int, FoundSkills]:
    """Read the skills of the episodes from the form with this name."""
    if name == SKILLS_FILE:
        return read_skills_file(meta, episode_indices)
    if name == LANGUAGE_ROWS:
        return read_language_rows(meta, episode_indices)
    if name == SUBTASK_INDEX:
        return read_subtask_index(meta, episode_indices)
    if name == DENSE_SUBTASKS:
        return read_sarm_columns(meta, "dense")
    return read_sarm_columns(meta, "sparse")


def skills_remedy(repo_id: str, root: Path | None = None) -> str:
    """Say which skills are looked for, and how to get some.

    Args:
        repo_id: name of the dataset.
        root: its folder, if it is a local copy.
    """
    forms = f"{SKILLS_FILE}, {LANGUAGE_ROWS}, {SUBTASK_INDEX}, {DENSE_SUBTASKS}"
    folder = f" --root={root}" if root else ""
    remedy = (
        f"looked for {forms} or sparse_subtask; make them with LeRobot 0.6, in an "
        "environment of Python 3.12 (pip install 'lerobot[annotations]'): "
        f"lerobot-annotate --repo_id={repo_id}{folder}"
        " --interjections.enabled=false --vqa.enabled=false"
    )
    if root and not repo_id.startswith("local/"):
        remedy += (
            "; or, if main on the Hub has skills that this copy lacks, add "
            "--revision main"
        )
    return remedy


def promises_skills(meta_dir: Path) -> bool:
    """Whether a meta folder alone suggests that a dataset has skills.

    It may be all that is downloaded so far.
    """
    import pyarrow.parquet as pq

    if (meta_dir / "skills.json").is_file():
        return True
    if not (meta_dir / "info.json").is_file():
        return False
    features = read_json(meta_dir / "info.json").get("features") or {}
    if LANGUAGE_COLUMN in features or "subtask_index" in features:
        return True
    for path in (meta_dir / "episodes").glob("*/*.parquet"):
        with errors_as(InputError, f"{path}: cannot be read", "download it again"):
            names = pq.read_schema(path).names
        if "dense_subtask_names" in names or "sparse_subtask_names" in names:
            return True
    return False


def read_skills_file(
    meta: Any, episode_indices: Sequence[int]
) -> dict[int, FoundSkills]:
    """Read the skills of episodes from meta/skills.json, as annotate.py writes it."""
    path = meta.root / SKILLS_FILE
    content = read_json(path)
    episodes = content.get("episodes")
    if not isinstance(episodes, dict):
        raise InputError(
            f'{path} has the wrong form: "episodes" is not an object; correct it'
        )
    coarse_description = text_or_empty(
        content.get("coarse_description"), f"{path}: coarse_description"
    )
    found = {}
    for index in episode_indices:
        episode = episodes.get(str(index))
        if not episode:
            continue
        place = f'{path}: episode "{index}"'
        if not isinstance(episode, dict):
            raise InputError(f"{place} is not an object; correct it")
        entries = skill_entries(episode.get("skills") or [], place)
        description = text_or_empty(episode.get("description"), f"{place}: description")
        found[index] = FoundSkills(place, entries, description, coarse_description)
    return found


def skill_entries(skills: Any, place: str) -> list[tuple[Any, Any, Any]]:
    """Name, start and end of each entry of a list of skills in skills.json."""
    if not isinstance(skills, list):
        raise InputError(
            f'{place} has the wrong form: "skills" is not a list; correct it'
        )
    entries = []
    for position, skill in enumerate(skills):
        if not isinstance(skill, dict) or not {"name", "start", "end"} <= skill.keys():
            raise InputError(
                f"{place}: skill {position} lacks name, start or end; correct it"
            )
        entries.append((skill["name"], skill["start"], skill["end"]))
    return entries


def text_or_empty(text: Any, place: str) -> str:
    """The text, "" for None or a blank one. Raises InputError where it is no text."""
    if text is None:
        return ""
    if not is_text(text):
        raise InputError(f"{place} is {text!r:.50}, which is not a text; correct it")
    return text if text.strip() else ""


def is_text(text: Any) -> bool:
    """Whether it is a string that UTF-8 can carry: without lone surrogates."""
    if not isinstance(text, str):
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def has_language_rows(meta: Any) -> bool:
    """Whether any episode has a row of style "subtask" in `language_persistent`."""
    for path in sorted(set(find_episode_files(meta, "data").values())):
        for _, _, rows in first_language_rows(path):
            if subtask_rows(rows):
                return True
    return False


def read_language_rows(
    meta: Any, episode_indices: Sequence[int]
) -> dict[int, FoundSkills]:
    """Read the rows of style "subtask" that stand in `language_persistent`.

    Each is a skill that starts at its timestamp and ends where the next one starts, the
    last at the episode's end. Rows of other styles are no skills.
    """
    durations = episode_durations(meta)
    files = find_episode_files(meta, "data")
    found = {}
    for path in sorted({files[index] for index in episode_indices}):
        for index, first_timestamp, rows in first_language_rows(path):
            if files.get(index) != path:
                continue
            subtasks = subtask_rows(rows)
            place = f"{path}: {LANGUAGE_COLUMN} of episode {index}"
            if any(row["timestamp"] is None for row in subtasks):
                raise InputError(f"{place}: a subtask lacks its timestamp; correct it")
            starts = [
                seconds_between(first_timestamp, row["timestamp"]) for row in subtasks
            ]
            names = [row["content"] for row in subtasks]
            entries = entries_up_to_the_next(names, starts, durations[index])
            found[index] = FoundSkills(place, entries)
    return found


def subtask_rows(rows: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """Those of an episode's language rows that are skills."""
    return [row for row in rows if row and row["style"] == "subtask"]


def entries_up_to_the_next(
    names: Sequence[Any], starts: Sequence[float], duration: float
) -> list[tuple[Any, float, float]]:
    """Give each skill the start of the next as its end, the last the episode's end.

    Args:
        names: the skills' names, in any order.
        starts: their starts, in seconds from the episode's first frame.
        duration: the episode's length in seconds.

    Returns:
        Name, start and end of each, sorted by start. A skill that starts after the
        episode's end ends where it starts, so that only its start is wrong.
    """
    order = sorted(range(len(starts)), key=starts.__getitem__)
    ends = [starts[position] for position in order[1:]]
    ends.append(duration)
    entries = []
    for position, end in zip(order, ends, strict=False):
        start = starts[position]
        entries.append((names[position], start, max(start, end)))
    return entries


def first_language_rows(path: Path) -> Iterator[tuple[int, float, list[dict]]]:
    """Read what `language_persistent` holds in the first frame of each episode.

    LeRobot repeats the whole list on every frame of the episode: a few kilobytes on the
    disk, gigabytes when decoded. So the file is read in small batches, of which only
    the first frame of an episode is kept, and no further than the last first frame of
    a row group. Only the three fields needed are read, by name: the others differ in
    type from file to file.

    Args:
        path: a data file. One without the column has no rows.

    Yields:
        Of each episode that starts in the file its index, the timestamp of its first
        frame in seconds, and the rows, dicts with content, style and timestamp.
    """
    import pyarrow.parquet as pq

    with (
        errors_as(InputError, f"{path}: cannot be read", "restore the file"),
        pq.ParquetFile(path) as parquet,
    ):
        fields = language_fields(parquet.schema)
        last_index = -1
        for group in range(parquet.num_row_groups if fields else 0):
            frames = parquet.read_row_group(group, ["episode_index", "timestamp"])
            indices = frames["episode_index"].to_numpy()
            timestamps = frames["timestamp"].to_numpy()
            firsts = first_rows(indices, last_index)
            cells = read_cells(parquet, group, fields, firsts)
            for row, cell in zip(firsts, cells, strict=True):
                yield int(indices[row]), float(timestamps[row]), cell
            if len(indices):
                last_index = indices[-1]


def first_rows(episode_indices: np.ndarray, last_index: int) -> list[int]:
    """Positions at which another episode starts.

    Args:
        episode_indices: int64 (frames,), of a row group.
        last_index: the episode of the frame before them, -1 where there is none.
    """
    import numpy as np

    before = np.concatenate(([last_index], episode_indices[:-1]))
    return np.flatnonzero(episode_indices != before).tolist()


def language_fields(schema: Any) -> list[str]:
    """Paths of the fields content, style and timestamp of `language_persistent`.

    Args:
        schema: a pyarrow.parquet.ParquetSchema.

    Returns:
        The three paths, or none where the column is missing or has no such fields, as
        where all its lists are empty.
    """
    paths = []
    for position in range(len(schema)):
        path = schema.column(position).path
        parts = path.split(".")
        if parts[0] != LANGUAGE_COLUMN or len(parts) != 4:
            continue
        if parts[-1] in ("content", "style", "timestamp"):
            paths.append(path)
    return paths if len(paths) == 3 else []


def read_cells(
    parquet: Any, group: int, columns: Sequence[str], rows: Sequence[int]
) -> Iterator[Any]:
    """Read single cells of one nested column, decoding a small batch at a time.

    Args:
        parquet: an open pyarrow.parquet.ParquetFile.
        group: the row group.
        columns: paths of the fields to read, of one column.
        rows: positions in the row group, ascending.

    Yields:
        The cell of each row as Python objects; an empty list for a null.
    """
    if not rows:
        return
    batch_size = 256
    wanted = iter(rows)
    row = next(wanted)
    first = 0
    for batch in parquet.iter_batches(batch_size, [group], columns):
        while row < first + len(batch):
            yield batch.column(0)[row - first].as_py() or []
            if row == rows[-1]:
                return
            row = next(wanted)
        first += len(batch)


def has_subtask_index(meta: Any) -> bool:
    """Whether any frame is labelled in `subtask_index`, and the labels have names."""
    import pyarrow.compute as pc

    if not (meta.root / "meta" / "subtasks.parquet").is_file():
        return False
    for path in sorted(set(find_episode_files(meta, "data").values())):
        table = read_columns(path, ["subtask_index"])
        if table is None or not is_number(table["subtask_index"].type):
            continue
        highest = pc.max(table["subtask_index"]).as_py()
        if highest is not None and highest >= 0:
            return True
    return False


def is_number(value_type: pa.DataType) -> bool:
    """Whether an arrow type is one of plain numbers."""
    import pyarrow as pa

    return pa.types.is_integer(value_type) or pa.types.is_floating(value_type)


def read_subtask_index(
    meta: Any, episode_indices: Sequence[int]
) -> dict[int, FoundSkills]:
    """Read the runs of equal values in `subtask_index`, named by meta/subtasks.parquet.

    Each run is a skill up to the next frame after it. Frames with a negative value have
    none.
    """
    import numpy as np

    names = read_subtask_names(meta.root / "meta" / "subtasks.parquet")
    files = find_episode_files(meta, "data")
    wanted = set(episode_indices)
    found = {}
    for path in sorted({files[index] for index in episode_indices}):
        table = read_columns(path, ["episode_index", "timestamp", "subtask_index"])
        if table is None:
            continue
        if table["subtask_index"].null_count:
            raise InputError(f"{path}: subtask_index holds nulls; fill them with -1")
        episodes = table["episode_index"].to_numpy()
        timestamps = table["timestamp"].to_numpy()
        subtasks = table["subtask_index"].to_numpy()
        starts = np.flatnonzero(np.diff(episodes)) + 1
        for rows in np.split(np.arange(len(episodes)), starts):
            index = int(episodes[rows[0]]) if len(rows) else None
            if index not in wanted:
                continue
            place = f"{path}: subtask_index of episode {index}"
            entries = []
            for subtask, start, end in runs_of_equal_values(
                subtasks[rows].tolist(), timestamps[rows].tolist(), meta.fps
            ):
                if subtask < 0:
                    continue
                if subtask not in names:
                    raise InputError(
                        f"{place}: holds {subtask}, which meta/subtasks.parquet does"
                        " not name; add its row there"
                    )
                entries.append((names[subtask], start, end))
            found[index] = FoundSkills(place, entries)
    return found


def read_subtask_names(path: Path) -> dict[int, Any]:
    """The subtasks' names by their index, from meta/subtasks.parquet."""
    import pandas as pd

    with errors_as(InputError, f"{path}: cannot be read", "restore the file"):
        table = pd.read_parquet(path)
    if "subtask_index" not in table:
        raise InputError(f"{path}: lacks the column subtask_index; add it")
    names = table.get("subtask", table.index)
    return dict(zip(table["subtask_index"].tolist(), names.tolist(), strict=True))


def runs_of_equal_values(
    values: Sequence[int], timestamps: Sequence[float], fps: float
) -> list[tuple[int, float, float]]:
    """Find the runs of equal values in the frames of an episode.

    Args:
        values: one value a frame.
        timestamps: of the same frames, in seconds.
        fps: frames a second, for the length of the last frame.

    Returns:
        Of each run its value, its start, and the start of the frame after it, in
        seconds from the first frame.
    """
    firsts = [
        row for row, value in enumerate(values) if row == 0 or value != values[row - 1]
    ]
    starts = [seconds_between(timestamps[0], timestamps[row]) for row in firsts]
    ends = [*starts[1:], len(values) / fps]
    return [
        (values[row], start, end)
        for row, start, end in zip(firsts, starts, ends, strict=True)
    ]


def has_sarm_columns(meta: Any, kind: str) -> bool:
    """Whether SARM's annotations of this kind, "dense" or "sparse", are there."""
    for path in episode_tables(meta):
        table = read_columns(path, [f"{kind}_subtask_names"])
        if table is None:
            continue
        if any(is_annotation(names) for names in table.column(0).to_pylist()):
            return True
    return False


def is_annotation(names: Sequence[Any] | None) -> bool:
    """Whether SARM's names of an episode are skills.

    A single "task" is what the annotator fills in where nobody has annotated.
    """
    return bool(names) and names != ["task"]


def read_sarm_columns(meta: Any, kind: str) -> dict[int, FoundSkills]:
    """Read the skills that LeRobot's SARM annotator has put into meta/episodes.

    Args:
        meta: the dataset's LeRobotDatasetMetadata.
        kind: "dense" or "sparse".

    Returns:
        The skills of all episodes that have any.

    Raises:
        InputError: the annotator has written them to the wrong episodes.
    """
    name_column = f"{kind}_subtask_names"
    start_column = f"{kind}_subtask_start_times"
    end_column = f"{kind}_subtask_end_times"
    columns = ["episode_index", name_column, start_column, end_column]
    found = {}
    for path in episode_tables(meta):
        table = read_columns(path, columns)
        if table is None:
            continue
        for row in table.to_pylist():
            names = row[name_column]
            if not is_annotation(names):
                continue
            # The annotator takes an episode's index for its row in the file. In any
            # file but the first that is the row of another episode, or a new one.
            if row["episode_index"] is None:
                raise InputError(
                    f"{path}: {name_column} in a row without episode_index: LeRobot's"
                    " annotator mixes up episodes where meta/episodes has several"
                    " files; bring them into one file and annotate again"
                )
            index = int(row["episode_index"])
            place = f"{path}: {kind}_subtask of episode {index}"
            starts = row[start_column] or []
            ends = row[end_column] or []
            if not len(names) == len(starts) == len(ends):
                raise InputError(
                    f"{place}: {len(names)} names, {len(starts)} starts and"
                    f" {len(ends)} ends; annotate the episode again"
                )
            entries = list(zip(names, starts, ends, strict=True))
            found[index] = FoundSkills(place, entries)
    return found


def episode_tables(meta: Any) -> list[Path]:
    """The parquet files of meta/episodes."""
    return sorted(meta.root.glob("meta/episodes/*/*.parquet"))


def read_columns(path: Path, columns: Sequence[str]) -> pa.Table | None:
    """Read columns of a parquet file; None where one of them is not there.

    Raises:
        InputError: the file is damaged.
    """
    import pyarrow.parquet as pq

    with (
        errors_as(InputError, f"{path}: cannot be read", "restore the file"),
        pq.ParquetFile(path) as parquet,
    ):
        if not set(columns) <= set(parquet.schema_arrow.names):
            return None
        return parquet.read(list(columns))


def episode_durations(meta: Any) -> dict[int, float]:
    """The length of each episode in seconds, by its index: its frames over `fps`."""
    lengths = read_episode_table(meta)["length"] / meta.fps
    return lengths.to_dict()


def seconds_between(first_timestamp: float, timestamp: float) -> float:
    """Seconds from the first timestamp to another, both of which are stored as float32.

    Rounded to microseconds, which turns the 1.2000000477 of a float32 into 1.2.
    """
    return round(float(timestamp) - float(first_timestamp), 6)


def check_skills(found: FoundSkills) -> EpisodeSkills:
    """Check the skills of an episode, and sort them by start.

    Raises:
        InputError: a skill has no name, or no finite times with start <= end.
    """
    skills = []
    for position, (name, start, end) in enumerate(found.entries):
        problem = (
            f"{found.place}: skill {position} ({name!r:.50}) runs from {start!r:.9} to"
            f" {end!r:.9}"
        )
        if not is_text(name) or not one_line(name):
            raise InputError(f"{problem}, but needs a name; give it one")
        if not is_seconds(start) or not is_seconds(end) or start > end:
            raise InputError(f"{problem}, but needs finite start <= end; correct them")
        skills.append(Skill(name, float(start), float(end)))
    skills.sort(key=start_of)
    return EpisodeSkills(found.description, tuple(skills), found.coarse_description)


def start_of(skill: Skill) -> float:
    return skill.start


def is_seconds(value: Any) -> bool:
    """Whether it is a finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_starts(
    meta: Any, found: Mapping[int, FoundSkills], episodes: Mapping[int, EpisodeSkills]
) -> None:
    """Check that every skill starts before its episode's end.

    A start less than a tenth of a frame before the end counts as at the end: no frame
    would ever show that skill.

    Raises:
        InputError: names the first episode in which one does not, and says what its
            times look like: frames, or seconds from the dataset's start.
    """
    durations = episode_durations(meta)
    late = {}
    for index, episode in episodes.items():
        last_start = durations[index] - TIME_TOLERANCE / meta.fps
        too_late = [skill for skill in episode.skills if skill.start >= last_start]
        if too_late:
            late[index] = too_late[0]
    if not late:
        return
    index, skill = next(iter(late.items()))
    seconds_before = sum(
        duration for other, duration in durations.items() if other < index
    )
    starts = [skill.start for skill in episodes[index].skills]
    remedy = guess_remedy(starts, durations[index], meta.fps, seconds_before)
    others = f", as in {len(late) - 1} more episodes" if len(late) > 1 else ""
    raise InputError(
        f"{found[index].place}: {skill.name!r:.50} runs from {skill.start:g} to"
        f" {skill.end:g} s, but episode {index} lasts {durations[index]:g} s{others};"
        f" {remedy}"
    )


def guess_remedy(
    starts: Sequence[float], duration: float, fps: float, seconds_before: float
) -> str:
    """Guess from an episode's skills, of which some start too late, what went wrong.

    Args:
        starts: the skills' starts, which should be seconds, ascending.
        duration: the episode's length in seconds.
        fps: frames a second.
        seconds_before: the length of all episodes before this one, in seconds.

    Returns:
        What the times look like and what to do, for an error.
    """
    tolerance = TIME_TOLERANCE / fps
    first = starts[0] - seconds_before
    last = starts[-1] - seconds_before
    if seconds_before > 0 and first >= -tolerance and last < duration:
        return (
            "they look like seconds from the dataset's start; subtract the"
            f" {seconds_before:g} s of the episodes before it"
        )
    frames = duration * fps
    # Seconds that are a little too late are also fewer than the frames. Frames are
    # whole, and the last skill seldom starts in the first quarter of an episode.
    whole = all(start == int(start) for start in starts)
    if whole and frames / 4 <= starts[-1] < frames:
        return f"they look like frames, not seconds; divide them by {fps:g} fps"
    return "correct them, in seconds from the episode's first frame"


def count_irregularities(
    episodes: Iterable[EpisodeSkills], fps: float
) -> SkillIrregularities:
    """Count late first skills, gaps and overlaps, which are allowed.

    Args:
        episodes: the skills of all episodes.
        fps: frames a second. Less than a tenth of a frame is neither gap nor overlap.
    """
    tolerance = TIME_TOLERANCE / fps
    late_starts = 0
    gaps = 0
    overlaps = 0
    for episode in episodes:
        if episode.skills[0].start > tolerance:
            late_starts += 1
        covered_until = episode.skills[0].end
        for skill in episode.skills[1:]:
            if skill.start > covered_until + tolerance:
                gaps += 1
            if skill.start < covered_until - tolerance:
                overlaps += 1
            covered_until = max(covered_until, skill.end)
    return SkillIrregularities(late_starts, gaps, overlaps)


def skills_fingerprint(source: SkillSource) -> str:
    """Return a sha256 (hex) of the source's name and all that was loaded from it."""
    content = {
        "source": source.name,
        "episodes": {
            str(index): asdict(episode) for index, episode in source.episodes.items()
        },
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# -------------------------------------------------------------------------------- plan
# Which frames are sampled, and what is asked about each: the whole job, in advance.


@dataclass(frozen=True)
class Sample:
    """A frame to generate a dialogue for, and all that is asked about it."""

    episode_id: int
    # Within the episode, as in LeRobot.
    frame_index: int
    # In seconds, as stored.
    timestamp: float
    skill_current: str
    skill_history: tuple[str, ...]
    task_description: str
    scenario_type: str = ""
    response_type: str = ""
    # Of the frame in the dataset, as in LeRobot.
    index: int = 0
    # "" in the episode's last skill.
    next_skill: str = ""
    # One of MOMENTS.
    moment: str = MOMENTS[0]
    # The episode's different skills, for --verify.
    episode_skills: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        return construct_prompt(
            task=self.task_description,
            history=self.skill_history,
            skill=self.skill_current,
            scenario_type=self.scenario_type,
            response_type=self.response_type,
            next_skill=self.next_skill,
            moment=self.moment,
        )

    @property
    def place(self) -> str:
        """Where the frame is, in words."""
        return f"episode {self.episode_id}, frame {self.frame_index}"


@dataclass(frozen=True)
class GridFigures:
    """What a sampling grid comes down to.

    `late_frames` carry the dialogue of another skill than their own, and
    `skills_without` have frames but no sample.
    """

    samples: int = 0
    frames: int = 0
    late_frames: int = 0
    skills: int = 0
    skills_without: int = 0

    def plus(self, other: GridFigures) -> GridFigures:
        """The figures of both together."""
        return GridFigures(
            samples=self.samples + other.samples,
            frames=self.frames + other.frames,
            late_frames=self.late_frames + other.late_frames,
            skills=self.skills + other.skills,
            skills_without=self.skills_without + other.skills_without,
        )

    @property
    def late_share(self) -> float:
        """The share of late frames, 0 to 1."""
        return self.late_frames / self.frames if self.frames else 0.0


@dataclass(frozen=True)
class EpisodePlan:
    """An episode's frames and samples.

    `skill_numbers`, int32 (frames,), says which of `skill_names` each frame shows. The
    figures are those of the grid in use and of the other one.
    """

    episode_index: int
    first_index: int
    skill_names: tuple[str, ...]
    skill_numbers: np.ndarray
    samples: list[Sample]
    figures: GridFigures
    figures_of_other_grid: GridFigures


@dataclass(frozen=True)
class Plan:
    """The whole job, in dataset order, decided before anything is generated."""

    episodes: list[EpisodePlan]
    camera_keys: list[str]
    data_files: list[DataFile]
    skill_source: SkillSource

    @cached_property
    def samples(self) -> list[Sample]:
        """The samples of all episodes."""
        return [sample for episode in self.episodes for sample in episode.samples]

    @property
    def frame_count(self) -> int:
        """The number of frames of all episodes."""
        return sum(len(episode.skill_numbers) for episode in self.episodes)

    def sum_figures(self) -> GridFigures:
        """The figures of the grid in use."""
        total = GridFigures()
        for episode in self.episodes:
            total = total.plus(episode.figures)
        return total

    def sum_figures_of_other_grid(self) -> GridFigures:
        """The figures of the grid that is not in use."""
        total = GridFigures()
        for episode in self.episodes:
            total = total.plus(episode.figures_of_other_grid)
        return total


class TypeDealer:
    """Deals types like cards, from shuffled decks: left to itself, a model picks one.

    Each skill name has decks of its own, so that no skill is tied to a type.
    """

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.decks: dict[tuple, list[str]] = {}

    def deal(self, skill: str, first_of_episode: bool) -> tuple[str, str]:
        """Deal a scenario type and a response type that suits it.

        Args:
            skill: the name of the sample's skill.
            first_of_episode: then there is nothing yet that could be corrected.
        """
        scenarios = list(SCENARIO_TYPES)
        if first_of_episode:
            scenarios = [s for s in scenarios if s not in NOT_ON_FIRST_SAMPLE]
        scenario = self.draw((skill, first_of_episode), scenarios)
        responses = SUITABLE_RESPONSES.get(scenario, tuple(RESPONSE_TYPES))
        response = self.draw((skill, scenario), responses)
        return scenario, response

    def draw(self, deck_name: tuple, types: Sequence[str]) -> str:
        """Draw from a deck, which is shuffled anew when it is used up."""
        deck = self.decks.setdefault(deck_name, [])
        if not deck:
            deck += self.random.sample(list(types), len(types))
        return deck.pop()


def make_plan(
    dataset: Any,
    sample_interval: float = 1.0,
    num_image_views_per_sample: int = 1,
    camera_keys: Sequence[str] | None = None,
    seed: int = 0,
    align_skills: bool = False,
    check_files: bool = True,
) -> Plan:
    """Decide the whole job, and check all that it needs of the dataset.

    Args:
        dataset: a LeRobotDataset or its metadata. If it was opened with `episodes=`,
            only these are planned.
        sample_interval: seconds between samples.
        num_image_views_per_sample: how many cameras the model sees.
        camera_keys: which cameras it sees, in place of the first ones.
        seed: of the types that are dealt.
        align_skills: whether the grid starts anew at each skill.
        check_files: whether columns and images are decoded to find damage.

    Raises:
        InputError: the dataset cannot be annotated.
    """
    check_prompt()
    meta = getattr(dataset, "meta", dataset)
    meta.root = Path(meta.root)
    cameras = choose_cameras(meta, num_image_views_per_sample, camera_keys)
    episode_indices = read_episode_table(meta).index.tolist()
    chosen = getattr(dataset, "episodes", None)
    if chosen is not None and dataset is not meta:
        wanted = set(chosen)
        episode_indices = [index for index in episode_indices if index in wanted]
    skill_source = load_skills(meta, episode_indices)
    tasks = {int(row): str(text) for text, row in meta.tasks["task_index"].items()}
    data_files = list_data_files(meta.root)
    episodes = plan_episodes(
        episodes=read_episodes(meta, data_files, episode_indices, check_files),
        skills=skill_source.episodes,
        tasks=tasks,
        fps=meta.fps,
        sample_interval=sample_interval,
        seed=seed,
        align_skills=align_skills,
    )
    plan = Plan(episodes, cameras, data_files, skill_source)
    if check_files:
        check_images(meta, plan)
    return plan


def plan_episodes(
    episodes: Iterable[EpisodeFrames],
    skills: dict[int, EpisodeSkills],
    tasks: dict[int, str],
    fps: float,
    sample_interval: float,
    seed: int,
    align_skills: bool = False,
) -> list[EpisodePlan]:
    """Decide which frames are sampled, and what is asked about each.

    A frame's skill is the last one that has started, before any the first. Its history
    is every skill before it.

    Args:
        episodes: the frames of each episode.
        skills: those of each episode, by episode index.
        tasks: LeRobot's tasks, by task index.
        fps: frames per second.
        sample_interval: seconds between samples.
        seed: of the types that are dealt.
        align_skills: whether the grid starts anew at each skill.

    Raises:
        InputError: timestamps run backwards or are not finite.
    """
    dealer = TypeDealer(seed)
    skills = put_equal_descriptions_last(skills, tasks)
    plans = []
    for episode in episodes:
        plan = plan_episode(
            episode=episode,
            known=skills[episode.episode_index],
            tasks=tasks,
            fps=fps,
            sample_interval=sample_interval,
            dealer=dealer,
            align_skills=align_skills,
        )
        plans.append(plan)
    return plans


def put_equal_descriptions_last(
    skills: Mapping[int, EpisodeSkills], tasks: Mapping[int, str]
) -> dict[int, EpisodeSkills]:
    """Let the frames' own tasks count before descriptions that are not to be trusted.

    annotate.py writes the dataset's first task into every episode, so that equal
    descriptions in a dataset of several tasks say nothing.

    Args:
        skills: those of each episode, by episode index.
        tasks: LeRobot's tasks, by task index.
    """
    descriptions = {known.description for known in skills.values()}
    if len(descriptions) > 1 or len(set(tasks.values())) < 2:
        return dict(skills)
    changed = {}
    for episode_index, known in skills.items():
        changed[episode_index] = replace(
            known,
            description="",
            coarse_description=known.description or known.coarse_description,
        )
    return changed


def plan_episode(
    episode: EpisodeFrames,
    known: EpisodeSkills,
    tasks: Mapping[int, str],
    fps: float,
    sample_interval: float,
    dealer: TypeDealer,
    align_skills: bool,
) -> EpisodePlan:
    """Decide which frames of an episode are sampled, and what is asked about each.

    Args:
        episode: its frames.
        known: its skills.
        tasks: LeRobot's tasks, by task index.
        fps: frames per second.
        sample_interval: seconds between samples.
        dealer: of the types.
        align_skills: whether the grid starts anew at each skill.

    Raises:
        InputError: timestamps run backwards or are not finite.
    """
    timestamps = episode.frames["timestamp"].to_numpy()
    frame_indices = episode.frames["frame_index"].to_numpy()
    task_indices = episode.frames["task_index"].to_numpy()
    seconds = timestamps.astype("float64") - float(timestamps[0])
    if not ((seconds[1:] >= seconds[:-1]).all() and seconds[-1] < math.inf):
        raise InputError(
            f"episode {episode.episode_index}: its timestamps in data/ run "
            "backwards or are not finite; correct them"
        )
    names = tuple(skill.name for skill in known.skills)
    starts = [skill.start for skill in known.skills]
    # The first skill also covers the frames before its start.
    starts[0] = 0.0
    ends = [*starts[1:], float(seconds[-1]) + 1 / fps]
    numbers = find_skill_numbers(seconds, starts, fps)
    regular = sample_regularly(seconds, sample_interval, fps)
    aligned = sample_each_skill(seconds, numbers, sample_interval, fps)
    used, other = (aligned, regular) if align_skills else (regular, aligned)
    samples: list[Sample] = []
    for position in used:
        number = int(numbers[position])
        time_of_frame = float(seconds[position])
        frame_task = tasks.get(int(task_indices[position]), "")
        scenario, response = dealer.deal(names[number], first_of_episode=not samples)
        sample = Sample(
            episode_id=episode.episode_index,
            frame_index=int(frame_indices[position]),
            # 0.1, not the float64 that is nearest to its float32.
            timestamp=float(str(timestamps[position])),
            skill_current=names[number],
            skill_history=names[:number],
            task_description=(
                known.description or frame_task or known.coarse_description
            ),
            scenario_type=scenario,
            response_type=response,
            index=episode.first_index + position,
            next_skill=find_next_skill(names, number),
            moment=find_moment(time_of_frame, starts[number], ends[number]),
            episode_skills=tuple(dict.fromkeys(names)),
        )
        samples.append(sample)
    return EpisodePlan(
        episode_index=episode.episode_index,
        first_index=episode.first_index,
        skill_names=names,
        skill_numbers=numbers,
        samples=samples,
        figures=measure_grid(numbers, names, used),
        figures_of_other_grid=measure_grid(numbers, names, other),
    )


def find_next_skill(names: Sequence[str], number: int) -> str:
    """The next skill of another name than the current one; "" if there is none."""
    for name in names[number + 1 :]:
        if name != names[number]:
            return name
    return ""


def find_skill_numbers(
    seconds: np.ndarray, starts: Sequence[float], fps: float
) -> np.ndarray:
    """Which skill each frame shows: the last that has started, before any the first.

    Args:
        seconds: float64 (frames,), from the episode's first frame.
        starts: of the skills, in seconds, in order.
        fps: frames per second. A tenth of a frame early is on time: timestamps are
            stored as float32.

    Returns:
        int32 (frames,), counted from 0.
    """
    import numpy as np

    early = TIME_TOLERANCE / fps
    started = np.searchsorted(np.array(starts), seconds + early, side="right")
    return (started - 1).clip(0).astype("int32")


def sample_regularly(
    seconds: np.ndarray, sample_interval: float, fps: float
) -> list[int]:
    """The plain grid of the paper: the first frame at or after each multiple.

    Args:
        seconds: float64 (frames,), from the first frame.
        sample_interval: seconds between samples.
        fps: frames per second. A tenth of a frame early is on time.

    Returns:
        Positions in `seconds`, the first one 0.
    """
    import numpy as np

    # Half a frame samples every frame already, and less would overflow the division.
    step = max(sample_interval, 0.5 / fps)
    multiples = (seconds + TIME_TOLERANCE / fps) // step
    return np.unique(multiples, return_index=True)[1].tolist()


def sample_each_skill(
    seconds: np.ndarray, skill_numbers: np.ndarray, sample_interval: float, fps: float
) -> list[int]:
    """The grid of --align-skills, which starts anew at the first frame of each skill.

    Args:
        seconds: float64 (frames,), from the first frame.
        skill_numbers: int32 (frames,), in order.
        sample_interval: seconds between samples.
        fps: frames per second.

    Returns:
        Positions in `seconds`, the first one 0.
    """
    import numpy as np

    positions = []
    firsts = np.unique(skill_numbers, return_index=True)[1].tolist()
    for first, end in zip(firsts, [*firsts[1:], len(seconds)], strict=True):
        within = seconds[first:end] - seconds[first]
        for position in sample_regularly(within, sample_interval, fps):
            positions.append(first + position)
    return positions


def find_moment(seconds: float, start: float, end: float) -> str:
    """How far into a skill a frame is, in words.

    Args:
        seconds: time of the frame.
        start: when the skill starts.
        end: when the next one starts, or the episode ends.
    """
    share = (seconds - start) / max(end - start, 1e-9)
    number = int(share * len(MOMENTS))
    return MOMENTS[min(max(number, 0), len(MOMENTS) - 1)]


def measure_grid(
    skill_numbers: np.ndarray, skill_names: Sequence[str], positions: Sequence[int]
) -> GridFigures:
    """Count what a grid does to an episode, if every sample gets its dialogue.

    Args:
        skill_numbers: int32 (frames,), which skill each frame shows.
        skill_names: the names of the skills.
        positions: the sampled frames.
    """
    shown = set(skill_numbers.tolist())
    sampled = skill_numbers[list(positions)].tolist()
    carried = [skill_names[number] for number in sampled]
    return GridFigures(
        samples=len(positions),
        frames=len(skill_numbers),
        late_frames=count_late_frames(skill_numbers, skill_names, positions, carried),
        skills=len(shown),
        skills_without=len(shown - set(sampled)),
    )


def count_late_frames(
    skill_numbers: np.ndarray,
    skill_names: Sequence[str],
    positions: Sequence[int],
    carried: Sequence[str],
) -> int:
    """Count the frames of an episode that carry the dialogue of another skill.

    Args:
        skill_numbers: int32 (frames,), which skill each frame shows.
        skill_names: the names of the skills.
        positions: the sampled frames.
        carried: of each sampled frame, the name of the skill that its dialogue is
            about, which the frames up to the next sampled one carry as well.
    """
    import numpy as np

    shown = np.array(skill_names, dtype=object)[skill_numbers]
    spans = np.diff([*positions, len(skill_numbers)])
    return int((shown != np.array(carried, dtype=object).repeat(spans)).sum())


# ------------------------------------------------------------------------------ images
# The sampled frames of the chosen cameras are decoded, and no others.


@dataclass(frozen=True)
class VideoFrame:
    """A place in a video file, in seconds from the file's start."""

    path: Path
    seconds: float


@dataclass(frozen=True)
class ImageRow:
    """A row of a parquet file."""

    path: Path
    row: int


class VideoReader:
    """A video being read, mostly forwards.

    It decodes on from the last frame, and seeks only where that takes fewer frames.

    Args:
        path: the video file.
        fps: frames per second.

    Raises:
        Exception: whatever PyAV raises.
    """

    def __init__(self, path: Path, fps: float):
        import av

        self.container = av.open(str(path))
        self.stream: Any = self.container.streams.video[0]
        # A frame is taken for the one at a time if it is nearer than any other.
        self.tolerance = 0.5 / fps + 1e-4
        self.frames: Iterator[Any] = iter(())
        self.frame: Any = None
        # Seconds that a seek has had to decode at most, so far.
        self.reach = 0.0

    def image_at(self, place: VideoFrame) -> Image.Image:
        """The RGB image at a place in this file."""
        return self.frame_at(place.seconds)

    def frame_at(self, seconds: float) -> Image.Image:
        """The RGB image at a time in the file, in seconds.

        Raises:
            Exception: whatever PyAV raises; ValueError if no frame is there.
        """
        if self.frame is None or not self.is_ahead(seconds):
            self.seek(seconds)
        while self.frame and self.frame.time < seconds - self.tolerance:
            self.frame = next(self.frames, None)
        if self.frame is None or self.frame.time > seconds + self.tolerance:
            raise ValueError(f"no frame at {seconds} s")
        return self.frame.to_image()

    def is_ahead(self, seconds: float) -> bool:
        """Whether decoding on leads to a time sooner than seeking does."""
        return -self.tolerance <= seconds - self.frame.time <= self.reach

    def seek(self, seconds: float) -> None:
        """Go to the last key frame before a time."""
        offset = max(0, int(seconds / self.stream.time_base))
        self.container.seek(offset, stream=self.stream)
        self.frames = self.container.decode(self.stream)
        self.frame = next(self.frames)
        self.reach = max(self.reach, seconds - self.frame.time)

    def close(self) -> None:
        """Close the file."""
        self.container.close()


class ParquetImageReader:
    """A parquet file with images being read, mostly forwards, a row group at a time.

    Args:
        path: the parquet file.
        camera_key: the column of the images.

    Raises:
        Exception: whatever pyarrow raises.
    """

    def __init__(self, path: Path, camera_key: str):
        import pyarrow.parquet as pq

        self.parquet = pq.ParquetFile(path)
        self.camera_key = camera_key
        self.group = -1
        # The rows of the row group that is held.
        self.first_row = 0
        self.images: Any = ()

    def image_at(self, place: ImageRow) -> Image.Image:
        """The RGB image at a place in this file.

        Raises:
            Exception: whatever pyarrow and Pillow raise.
        """
        from PIL import Image

        if not self.first_row <= place.row < self.first_row + len(self.images):
            self.read_group_of(place.row)
        stored = self.images[place.row - self.first_row].as_py()
        return Image.open(io.BytesIO(stored["bytes"])).convert("RGB")

    def read_group_of(self, row: int) -> None:
        """Hold the row group that has a row."""
        first_row = 0
        for group in range(self.parquet.num_row_groups):
            row_count = self.parquet.metadata.row_group(group).num_rows
            if row < first_row + row_count:
                break
            first_row += row_count
        table = self.parquet.read_row_group(group, [self.camera_key])
        self.images = table[self.camera_key]
        self.first_row = first_row

    def close(self) -> None:
        """Close the file."""
        self.parquet.close()


def find_video_frames(
    meta: Any, samples: Sequence[Sample], camera_key: str
) -> list[VideoFrame]:
    """Find each sample in the videos of a camera, as LeRobotDataset does.

    Raises:
        InputError: a timestamp lies outside the episode's part of the video, where
            LeRobot shows the images of another episode.
    """
    paths = find_episode_files(meta, f"videos/{camera_key}")
    table = read_episode_table(meta)
    starts = table[f"videos/{camera_key}/from_timestamp"].to_dict()
    ends = table[f"videos/{camera_key}/to_timestamp"].to_dict()
    slack = 1 / meta.fps
    places = []
    for sample in samples:
        start = starts[sample.episode_id]
        length = ends[sample.episode_id] - start
        if not -slack <= sample.timestamp <= length + slack:
            raise InputError(
                f"{meta.root}: {sample.place} at {sample.timestamp} s is outside the "
                f"episode's part of {camera_key}, which lasts {length} s; correct the "
                "timestamps in data/ or in meta/episodes"
            )
        places.append(VideoFrame(paths[sample.episode_id], start + sample.timestamp))
    return places


def find_image_rows(
    samples: Sequence[Sample], data_files: Sequence[DataFile]
) -> list[ImageRow]:
    """Find each sample in the data files; both are in dataset order."""
    places = []
    remaining = deque(data_files)
    for sample in samples:
        while sample.index >= remaining[0].first_index + remaining[0].row_count:
            remaining.popleft()
        row = sample.index - remaining[0].first_index
        places.append(ImageRow(remaining[0].path, row))
    return places


def read_images(
    places: Iterable[Any], open_reader: Callable[[Path], Any]
) -> Iterator[Image.Image | None]:
    """Read the RGB image at each place; None where it cannot be decoded.

    Args:
        places: all of a kind, VideoFrame or ImageRow.
        open_reader: opens a file of that kind, as a VideoReader or ParquetImageReader.
    """
    reader = None
    opened = None
    for place in places:
        # Every decoder has errors of its own, and one bad image must not end a run.
        try:
            if reader is None or opened != place.path:
                if reader:
                    reader.close()
                reader = None
                reader = open_reader(place.path)
                opened = place.path
            image = reader.image_at(place)
        except Exception:
            reader = None
            image = None
        yield image


def read_camera(
    meta: Any,
    samples: Sequence[Sample],
    camera_key: str,
    data_files: Sequence[DataFile],
) -> Iterator[Image.Image | None]:
    """The RGB image of a camera for each sample; None where it cannot be decoded."""
    if camera_key in meta.video_keys:
        frames = find_video_frames(meta, samples, camera_key)
        return read_images(frames, partial(VideoReader, fps=meta.fps))
    rows = find_image_rows(samples, data_files)
    return read_images(rows, partial(ParquetImageReader, camera_key=camera_key))


def read_views(
    meta: Any, samples: Sequence[Sample], plan: Plan
) -> Iterator[list[Image.Image] | None]:
    """The views of each sample, one per camera; None where one cannot be decoded."""
    cameras = [
        read_camera(meta, samples, key, plan.data_files) for key in plan.camera_keys
    ]
    for views in zip(*cameras, strict=True):
        yield None if None in views else list(views)


def check_images(meta: Any, plan: Plan) -> None:
    """Decode the last image needed of each file: a video that is cut off still opens.

    Videos of the cameras that are not shown are checked as well.

    Raises:
        InputError: an image cannot be decoded.
    """
    for camera_key in dict.fromkeys([*plan.camera_keys, *meta.video_keys]):
        last: dict[Path, Any] = {}
        if camera_key in meta.video_keys:
            frames = find_video_frames(meta, plan.samples, camera_key)
            for frame in sorted(frames, key=lambda frame: frame.seconds):
                last[frame.path] = frame
            images = read_images(last.values(), partial(VideoReader, fps=meta.fps))
        else:
            for row in find_image_rows(plan.samples, plan.data_files):
                last[row.path] = row
            images = read_images(
                last.values(), partial(ParquetImageReader, camera_key=camera_key)
            )
        for path, image in zip(last, images, strict=True):
            if image is None:
                raise InputError(
                    f"{path}: the last image needed of {camera_key} cannot be decoded; "
                    "restore the file"
                )


def read_ahead(items: Iterable[Any], size: int) -> Generator[Any, None, None]:
    """Yield the same items, while one thread makes up to `size` of them in advance.

    One thread, because several in one video decoder crash the interpreter.
    """
    iterator = iter(items)
    end = object()
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader")
    try:
        ready = deque(reader.submit(next, iterator, end) for _ in range(size))
        while True:
            item = ready.popleft().result()
            if item is end:
                return
            ready.append(reader.submit(next, iterator, end))
            yield item
    finally:
        reader.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------- generator
# The model that writes the dialogues, and the check of its answers.

MAX_NEW_TOKENS = 128  # Two sentences in JSON take 30 to 60.
MAX_TRIES = 4
MAX_PIXELS = 448 * 448  # Of an image: 256 tokens for Qwen2-VL, 196 for Qwen3-VL.
MAX_LENGTH = 300  # Characters of one side of a dialogue.
OPTION_LABELS = string.ascii_uppercase
QUESTION_MARKS = ("?", "\uff1f", "\u061f")  # Latin, Chinese and Arabic.
SENTENCE_ENDS = ".!?\u3002\uff01\uff1f\u061f\u2026"
SENTENCE = re.compile(f"[^{SENTENCE_ENDS}]+[{SENTENCE_ENDS}]*")

Dialogue = dict[str, Any]  # user_prompt, robot_utterance; with --verify skill_recovered
Dialogues = dict[int, Dialogue]  # by index of the frame


def parse_answer(text: str) -> Dialogue | None:
    """Find the dialogue in an answer of the model.

    Args:
        text: the answer; a closed thought or a code fence around it does no harm.

    Returns:
        user_prompt and robot_utterance, stripped; None if there are none that somebody
        could say.
    """
    text = text.rpartition("</think>")[2]
    try:
        answer, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
        user_prompt = answer["user_prompt"].strip()
        robot_utterance = answer["robot_utterance"].strip()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not (is_sayable(user_prompt) and is_sayable(robot_utterance)):
        return None
    # A robot that asks and then acts, unanswered, teaches nothing.
    if only_asks(robot_utterance):
        return None
    if plain_words(user_prompt) == plain_words(robot_utterance):
        return None
    return {"user_prompt": user_prompt, "robot_utterance": robot_utterance}


def is_sayable(text: str) -> bool:
    """Whether a person or a robot could say a text.

    It has letters and a sane length, no markup, and does not repeat the prompt.
    """
    markup = ("user_prompt", "robot_utterance", "<|", "|>", "</", "{", "}", "\ufffd")
    if not 2 <= len(text) <= MAX_LENGTH:
        return False
    if not any(character.isalpha() for character in text):
        return False
    if CONTROL_CHARACTER.search(text) or any(part in text for part in markup):
        return False
    words = plain_words(text)
    return len(words) <= 15 or words not in plain_words(prompt_text())


def prompt_text() -> str:
    """All that a model could repeat of the prompt: the template, rules and examples."""
    parts = [PROMPT, *SCENARIO_TYPES.values(), *RESPONSE_TYPES.values()]
    return "\n".join(parts)


def plain_words(text: str) -> str:
    """The words of a text in lower case, without punctuation, to compare sentences."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def only_asks(text: str) -> bool:
    """Whether a text is nothing but questions."""
    # A quotation mark or an ellipsis after the last question is no sentence.
    sentences = [part for part in SENTENCE.findall(text) if plain_words(part)]
    return all(sentence.rstrip().endswith(QUESTION_MARKS) for sentence in sentences)


class SameThread(Executor):
    """Runs each call at once in the calling thread, so that an interrupt reaches it."""

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """Call the function, and return a future that has its result."""
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class QwenPgen:
    """A Qwen vision-language model that writes dialogues, in this process (p_gen).

    Args:
        model: Hub id or folder of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5.
        device: a device of torch, or "auto" to spread the model over all GPUs.
        dtype: a type of torch, by name.
        temperature: of sampling; 0 takes the likeliest token.

    Raises:
        InputError: the model cannot be loaded.
    """

    # One call at a time, with a whole batch of samples.
    concurrent = False

    def __init__(
        self,
        model: str,
        device: str = "cuda",
        dtype: str = "bfloat16",
        temperature: float = 0.7,
    ):
        import torch
        import transformers
        from PIL import Image

        transformers.utils.logging.disable_progress_bar()
        self.processor: Any = None
        self.model: Any = None
        self.temperature = temperature
        # Lowered when GPU memory runs out.
        self.batch_limit = sys.maxsize
        with errors_as(InputError, f"--device {device}", "try --device cpu"):
            torch.empty(1, device="cpu" if device == "auto" else device).tolist()
        with errors_as(
            InputError,
            f"--model {model}: transformers {transformers.__version__} cannot load it",
            "check the name, the network, and that it is a Qwen VL model",
        ):
            self.load(model, device, getattr(torch, dtype))
            # A chat template that does not work is noticed before generation.
            self.prepare([Image.new("RGB", (64, 64))], "Hello.")

    def load(self, model: str, device: str, dtype: torch.dtype) -> None:
        """Load processor and weights.

        Raises:
            Exception: whatever transformers raises.
            InputError: it is no Qwen model, or its files lack weights.
        """
        import transformers

        kind = transformers.AutoConfig.from_pretrained(
            model, trust_remote_code=False
        ).model_type
        if not kind.startswith("qwen"):
            raise InputError(f"--model {model}: is a {kind}; name a Qwen VL model")
        self.processor = transformers.AutoProcessor.from_pretrained(
            model, trust_remote_code=False
        )
        loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            model,
            dtype=dtype,
            device_map=device,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        self.model, loading = loaded
        missing = sorted(loading["missing_keys"])[:3]
        if missing:
            raise InputError(
                f"--model {model}: its files lack the weights {missing}; restore them"
            )
        tokenizer: Any = self.processor.tokenizer
        ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        # A checkpoint's own settings would hold wherever ours are silent: Qwen2-VL's
        # has top_k=1.
        self.model.generation_config = transformers.GenerationConfig(
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
        )
        # The reader's thread prepares samples with the processor. All else has a
        # tokenizer of its own: one that two threads use fails now and then.
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.padding_side = "left"
        # Markers in a dataset's texts must not end a turn or call for an image.
        markers = []
        for token in tokenizer.get_added_vocab():
            if re.fullmatch("<.+>", token):
                markers.append(re.escape(token))
        self.markers = re.compile("|".join(markers) or "(?!)")

    def executor(self, calls_at_once: int) -> SameThread:
        """What runs the calls of the annotation loop."""
        return SameThread()

    def call_qwen(self, images: Sequence[Image.Image], prompt: str) -> Dialogue:
        """Ask about one frame until the answer is valid.

        Args:
            images: RGB, the views of the frame.
            prompt: from construct_prompt.

        Returns:
            user_prompt and robot_utterance.

        Raises:
            RunError: no answer was valid.
        """
        return ask_until_valid(self, images, prompt)

    def prepare(
        self, images: Sequence[Image.Image], prompt: str
    ) -> dict[str, torch.Tensor]:
        """Turn a sample into what the model is given.

        Args:
            images: RGB, the views of the frame.
            prompt: from construct_prompt.

        Returns:
            On the CPU: input_ids and attention_mask (1, tokens), pixel_values and
            image_grid_thw.
        """
        from qwen_vl_utils import process_vision_info

        content: list[dict[str, Any]] = []
        for image in images:
            content.append({"type": "image", "image": image, "max_pixels": MAX_PIXELS})
        content.append({"type": "text", "text": self.without_markers(prompt)})
        chat = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": PREFILL}]},
        ]
        text = self.processor.apply_chat_template(
            chat, tokenize=False, continue_final_message=True
        )
        # The size of a patch differs between the families of Qwen.
        patch_size = self.processor.image_processor.patch_size
        bounded, _ = process_vision_info(chat, image_patch_size=patch_size)
        inputs = self.processor(
            text=[text], images=bounded, do_resize=False, return_tensors="pt"
        )
        return dict(inputs)

    def without_markers(self, text: str) -> str:
        """Break up the model's special tokens in a text."""
        return self.markers.sub(lambda found: "< " + found[0][1:], text)

    def answer(
        self, batch: Sequence[dict[str, torch.Tensor]], tries: int = 0
    ) -> list[Dialogue | None]:
        """Generate one answer to each prepared sample.

        Args:
            batch: prepared samples. Out of GPU memory, batches are halved from here on.
            tries: how often these were asked before. At temperature 0, a repeat is
                sampled, since it would only repeat itself.

        Returns:
            The dialogues; None where an answer is not valid.

        Raises:
            RunError: not even one sample fits into the GPU's memory.
        """
        generate = partial(self.generate, tries=tries)
        try:
            answers = self.call_in_parts(generate, batch)
        except RuntimeError as error:
            # As where the logits are not finite.
            raise RunError(
                f"the model fails: {error}; try another --dtype or --device, or check "
                "its files"
            ) from error
        return [parse_answer(PREFILL + answer) for answer in answers]

    def call_in_parts(
        self, call: Callable[[Sequence[Any]], Iterable[Any]], batch: Sequence[Any]
    ) -> list[Any]:
        """Call the model with a batch, in smaller parts once GPU memory has run out.

        Args:
            call: what is done with the batch or a part of it.
            batch: what goes through the model together.

        Returns:
            What came of each, in order.

        Raises:
            RunError: not even one fits into the GPU's memory.
        """
        import torch

        results: list[Any] = []
        while len(results) < len(batch):
            part = batch[len(results) : len(results) + self.batch_limit]
            try:
                results += call(part)
                continue
            except torch.OutOfMemoryError:
                self.batch_limit = len(part) // 2
            # Only outside of `except` is the memory of the failed call free.
            torch.cuda.empty_cache()
            if not self.batch_limit:
                raise RunError(
                    "out of GPU memory; use fewer views or a smaller --model"
                )
        return results

    def generate(
        self, batch: Sequence[dict[str, torch.Tensor]], tries: int
    ) -> list[str]:
        """Generate what follows PREFILL for each prepared sample."""
        import torch

        temperature = self.temperature
        if temperature == 0 and tries:
            temperature = 0.7
        with torch.inference_mode():
            inputs = self.collate(batch)
            if temperature == 0:
                tokens = self.model.generate(**inputs, do_sample=False)
            else:
                tokens = self.model.generate(
                    **inputs,
                    do_sample=True,
                    # Lower temperatures make the logits overflow.
                    temperature=max(temperature, 0.01),
                    top_k=0,
                    top_p=1.0,
                )
        new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)

    def collate(
        self, batch: Sequence[dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Put prepared samples into one batch on the model's device.

        Values per token are padded on the left; those of images are concatenated.
        """
        import torch

        inputs = {}
        for name, first in batch[0].items():
            parts = [prepared[name] for prepared in batch]
            # One value for each token, such as attention_mask.
            if first.shape == batch[0]["input_ids"].shape:
                is_ids = name == "input_ids"
                parts = [
                    torch.nn.utils.rnn.pad_sequence(
                        [part[0] for part in parts],
                        batch_first=True,
                        padding_value=(
                            self.model.generation_config.pad_token_id if is_ids else 0
                        ),
                        padding_side="left",
                    )
                ]
            inputs[name] = torch.cat(parts).to(self.model.device)
        return inputs

    def choose(
        self, questions: Sequence[str], option_counts: Sequence[int]
    ) -> list[int]:
        """Answer questions whose options are labelled A, B, C and so on.

        Args:
            questions: text only.
            option_counts: how many options each has.

        Returns:
            The likeliest option of each, counted from 0.
        """
        texts = [self.chat_of(question) for question in questions]
        labels = self.tokenizer.convert_tokens_to_ids(list(OPTION_LABELS))
        chosen = []
        logits = self.call_in_parts(self.last_logits, texts)
        for row, count in zip(logits, option_counts, strict=True):
            chosen.append(int(row[labels[:count]].argmax()))
        return chosen

    def chat_of(self, question: str) -> str:
        """The text of a conversation in which a question is to be answered."""
        content = [{"type": "text", "text": self.without_markers(question)}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            # The first token is to be the answer, not that of a thought.
            enable_thinking=False,
        )

    def last_logits(self, texts: Sequence[str]) -> torch.Tensor:
        """The logits of what follows each text, (texts, vocabulary)."""
        import torch

        inputs = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        with torch.inference_mode():
            # The padding is on the left, so the last position is that of the answer.
            return self.model(
                input_ids=inputs["input_ids"].to(self.model.device),
                attention_mask=inputs["attention_mask"].to(self.model.device),
                logits_to_keep=1,
            ).logits[:, -1]


def ask_until_valid(
    pgen: QwenPgen | ServerPgen, images: Sequence[Image.Image], prompt: str
) -> Dialogue:
    """Ask a model about one frame until the answer is valid.

    Raises:
        RunError: none of MAX_TRIES answers was.
    """
    prepared: Any = pgen.prepare(images, prompt)
    for tries in range(MAX_TRIES):
        (dialogue,) = pgen.answer([prepared], tries)
        if dialogue:
            return dialogue
    raise RunError(f"none of {MAX_TRIES} answers of the model was a valid dialogue")


# ------------------------------------------------------------------------------ server
# A model behind a server that speaks OpenAI's chat completions, such as vLLM.

KEY_VARIABLE = "OPENAI_API_KEY"
SERVER_PATIENCE = 600.0  # Seconds that a server which does not answer is waited for.
ANSWER_TIMEOUT = 600.0  # Seconds for an answer: many requests may be before it.
LIST_TIMEOUT = 30.0  # Seconds for the list of models.
CONNECT_TIMEOUT = 10.0  # Seconds.
FIRST_PAUSE = 0.5  # Seconds before a failed request is sent again, doubled each time.
LONGEST_PAUSE = 15.0  # Seconds.
# A request that has failed so often is sent only after another one was answered. If it
# fails again, the request is to blame, not the server.
FAILURES_IN_DOUBT = 3
BUSY = (429, 503)
JPEG_QUALITY = 90

DIALOGUE_SCHEMA = {
    "type": "object",
    "properties": {
        "user_prompt": {"type": "string"},
        "robot_utterance": {"type": "string"},
    },
    "required": ["user_prompt", "robot_utterance"],
    "additionalProperties": False,
}
# Words with which servers refuse a response_format without naming it.
FORMAT_WORDS = {"json_schema", "structured_outputs", "guided_json", "grammar"}
# The special tokens of the model are not known here: <|im_end|>, </s>, <image>.
MARKER = re.compile(r"<(?=[^<>\s]+>)")

Content = list[dict[str, Any]]  # Of a message: images and text.


@dataclass
class Server:
    """A server, and what is known of it. Times are those of time.monotonic()."""

    url: str
    # Names of the fields that it does not take.
    refused: set[str] = field(default_factory=set)
    under_way: int = 0
    asked_at: float = 0.0
    answered_at: float = 0.0
    rests_until: float = 0.0


@dataclass(frozen=True)
class Reply:
    """What came back for a request.

    `status` is HTTP's, and 0 if nothing came. `body` is the JSON, or else a text.
    """

    status: int
    body: Any
    retry_after: float = 0.0


class ServerPgen:
    """A vision-language model behind a server that writes dialogues (p_gen).

    Any server that speaks OpenAI's chat completions will do: vLLM, SGLang, transformers
    serve, Hugging Face Inference Endpoints. A key is read from the environment variable
    OPENAI_API_KEY. All methods may be called from many threads at once.

    Args:
        urls: of servers of the same model, such as http://localhost:8000/v1.
        model: the name that they give it; None for the only one that they serve.
        temperature: of sampling; 0 takes the likeliest token.
        seed: of sampling, for each sample and try; 0 sends none.
        requests_at_once: number of connections.

    Raises:
        InputError: no server is there, it refuses the key, or does not serve the model.
    """

    # Many calls at a time, each with one sample.
    concurrent = True
    batch_limit = 1

    def __init__(
        self,
        urls: Sequence[str],
        model: str | None = None,
        temperature: float = 0.7,
        seed: int = 0,
        requests_at_once: int = 64,
    ):
        self.temperature = temperature
        self.seed = seed
        self.servers = [Server(url) for url in dict.fromkeys(map(check_url, urls))]
        self.key = os.environ.get(KEY_VARIABLE, "").strip()
        self.client = open_client(self.key, requests_at_once)
        # What the threads of the requests share is changed under this lock.
        self.lock = threading.Lock()
        self.said_at: dict[str, float] = {}
        # Set when the run ends: requests that wait for a server give up.
        self.stopped = threading.Event()
        for server in self.servers:
            model = self.find_model(server, model)
        self.model = model

    def check(self, view_count: int, prompt: str) -> None:
        """Send each server a first request, with drawn images.

        Args:
            view_count: number of images, as in every sample.
            prompt: the longest of the run, to see whether there is room for it.

        Raises:
            InputError: a server does not answer it.
        """
        from PIL import Image

        drawn = Image.new("RGB", (448, 448), (90, 130, 170))
        content = self.prepare([drawn] * view_count, prompt)
        asked = f"a request (images: {view_count}, characters: {len(prompt)})"
        for server in self.servers:
            reply = self.post(server, content, self.dialogue_fields(content, 0))
            if reply.status in BUSY:
                # The run waits for it.
                continue
            text = answer_text(reply)
            if text is None:
                problem = f"{asked} failed: {describe_reply(reply)}"
                remedy = (
                    "check that the URL ends in /v1, and that the model sees images "
                    "and has room for the prompt"
                )
                raise self.first_error(server, reply, problem, remedy)
            is_cut_off = reply.body["choices"][0].get("finish_reason") == "length"
            if is_cut_off and "{" not in text:
                raise InputError(
                    f"--server {server.url}: {self.model} thinks before it answers, "
                    "and cannot be told not to; serve another model"
                )

    def call_qwen(self, images: Sequence[Image.Image], prompt: str) -> Dialogue:
        """Ask about one frame until the answer is valid.

        Args:
            images: RGB, the views of the frame.
            prompt: from construct_prompt.

        Returns:
            user_prompt and robot_utterance.

        Raises:
            RunError: no answer was valid, or the server stays away.
        """
        # An earlier run may have ended, and set the event that stops its requests.
        self.stopped = threading.Event()
        return ask_until_valid(self, images, prompt)

    def executor(self, calls_at_once: int) -> DaemonExecutor:
        """What runs the calls of the annotation loop."""
        executor = DaemonExecutor(calls_at_once)
        self.stopped = executor.stopped
        return executor

    def prepare(self, images: Sequence[Image.Image], prompt: str) -> Content:
        """Turn a sample into the content of a request.

        Args:
            images: RGB, the views of the frame.
            prompt: from construct_prompt.

        Returns:
            Parts of a message: the images as JPEG data URLs, then the text.
        """
        content: Content = []
        for image in images:
            url = encode_image(image)
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": break_markers(prompt)})
        return content

    def answer(self, batch: Sequence[Content], tries: int = 0) -> list[Dialogue | None]:
        """Ask once about each prepared sample, one after the other.

        Args:
            batch: prepared samples.
            tries: how often these were asked before. At temperature 0, a repeat is
                sampled, since it would only repeat itself.

        Returns:
            The dialogues; None where an answer is not valid, or the server refuses to
            give one.

        Raises:
            RunError: the server stays away, or refuses every request.
        """
        dialogues = []
        for content in batch:
            text = self.ask(content, self.dialogue_fields(content, tries))
            dialogues.append(None if text is None else parse_answer(text))
        return dialogues

    def choose(
        self, questions: Sequence[str], option_counts: Sequence[int]
    ) -> list[int]:
        """Answer questions whose options are labelled A, B, C and so on.

        Args:
            questions: text only.
            option_counts: how many options each has.

        Returns:
            The option chosen of each, counted from 0; -1 where none is named.

        Raises:
            RunError: the server stays away, or refuses every request.
        """
        choices = []
        for question, count in zip(questions, option_counts, strict=True):
            content = self.prepare([], question)
            text = self.ask(content, request_fields(temperature=0.0, max_tokens=1))
            choices.append(-1 if text is None else parse_label(text, count))
        return choices

    def dialogue_fields(self, content: Content, tries: int) -> dict[str, Any]:
        """The settings of a request for a dialogue."""
        temperature = self.temperature
        if temperature == 0 and tries:
            temperature = 0.7
        fields = request_fields(temperature, MAX_NEW_TOKENS)
        schema = {"name": "dialogue", "strict": True, "schema": DIALOGUE_SCHEMA}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.seed:
            drawn = random.Random(f"{self.seed} {tries} {content}")
            fields["seed"] = drawn.getrandbits(31)
        return fields

    def find_model(self, server: Server, model: str | None) -> str:
        """The name of the model that a server is asked for.

        Args:
            server: which is asked what it serves.
            model: the one wanted; None for the only one.

        Raises:
            InputError: it is not served, or there are several to choose from.
        """
        reply = self.send(f"{server.url}/models", None, LIST_TIMEOUT)
        if reply.status in (404, 405, *BUSY) and model:
            # Some servers keep no list. The first request tells more.
            return model
        try:
            names = [str(entry["id"]) for entry in reply.body["data"]]
        except (KeyError, TypeError):
            problem = f"lists no models: {describe_reply(reply)}"
            remedy = "correct the URL, which most often ends in /v1, or name a --model"
            raise self.first_error(server, reply, problem, remedy) from None
        if model is None and len(names) == 1:
            return names[0]
        if model in names:
            return model
        listed = ", ".join(names)[:500] or "no model"
        wanted = f", not {model}" if model else ""
        raise InputError(
            f"--server {server.url}: serves {listed}{wanted}; name a served one with "
            "--model"
        )

    def first_error(
        self, server: Server, reply: Reply, problem: str, remedy: str
    ) -> InputError:
        """The error for a server that does not answer before the run begins."""
        if reply.status == 0:
            problem = f"no server answers there ({reply.body})"
            remedy = "start it, or correct the URL"
        elif reply.status in (401, 403):
            problem = "refuses the key" if self.key else "asks for a key"
            remedy = f"set the environment variable {KEY_VARIABLE}"
        return InputError(f"--server {server.url}: {problem}; {remedy}")

    def ask(self, content: Content, fields: dict[str, Any]) -> str | None:
        """Send a request until it is answered, to whichever server is free.

        Args:
            content: what to ask.
            fields: the settings.

        Returns:
            The answer; None if just this request is refused, or breaks the server.

        Raises:
            RunError: no request has been answered for SERVER_PATIENCE, every request
                would be refused, or the run was stopped.
        """
        stopped = self.stopped
        began = time.monotonic()
        failed_at = began
        failures = 0
        while not stopped.is_set():
            with self.least_busy_server() as server:
                in_doubt = failures >= FAILURES_IN_DOUBT
                is_up = in_doubt and self.answers_others(server, failed_at)
                reply = self.post(server, content, fields)
            text = answer_text(reply)
            if text is not None:
                server.answered_at = time.monotonic()
                return text
            is_to_blame = is_up and reply.status not in BUSY
            if is_to_blame or reply.status in (400, 413, 422):
                self.say_rarely(server, "no answer to a sample", reply)
                return None
            if not may_pass(reply):
                raise run_error(server, describe_reply(reply))
            failures += 1
            failed_at = time.monotonic()
            pause = max(pause_before(failures), reply.retry_after)
            server.rests_until = failed_at + pause
            if failures == FAILURES_IN_DOUBT:
                patience = f"waiting for it, up to {SERVER_PATIENCE / 60:.0f} minutes"
                self.say_rarely(server, patience, reply)
            if failed_at + reply.retry_after - began > SERVER_PATIENCE:
                if any(other.answered_at > began for other in self.servers):
                    return None
                waited = f"no answer for {failed_at - began:.0f} s"
                raise run_error(server, f"{waited} ({describe_reply(reply)})")
            # Another server may answer at once.
            if failures % len(self.servers) == 0:
                stopped.wait(pause)
        raise RunError("the run was stopped")

    def post(self, server: Server, content: Content, fields: dict[str, Any]) -> Reply:
        """Send a request once, or again without the fields that the server refuses."""
        refused = set(server.refused)
        while True:
            body = without_refused(fields, refused)
            names = set(body)
            body["model"] = self.model
            body["messages"] = [{"role": "user", "content": content}]
            reply = self.send(f"{server.url}/chat/completions", body, ANSWER_TIMEOUT)
            if reply.status not in (400, 422) or not named_fields(reply.body, names):
                break
            refused |= named_fields(reply.body, names)
        # An error names fields for many reasons: only an answer shows the cause.
        if reply.status == 200:
            with self.lock:
                new = refused - server.refused
                server.refused |= new
            if new:
                named = ", ".join(sorted(new))
                say(f"{server.url}: refuses {named}; left out from now on")
        return reply

    def send(self, url: str, body: dict[str, Any] | None, timeout: float) -> Reply:
        """Send one HTTP request.

        Args:
            url: where to.
            body: to post as JSON; None to get what is there.
            timeout: seconds.
        """
        import httpx

        method = "GET" if body is None else "POST"
        timeouts = httpx.Timeout(timeout, connect=CONNECT_TIMEOUT)
        try:
            response = self.client.request(method, url, json=body, timeout=timeouts)
        except httpx.TimeoutException:
            return Reply(0, "timed out")
        except (httpx.RequestError, ValueError, AssertionError) as error:
            # httpx lets errors of its parts pass where a URL or an answer is malformed.
            return Reply(0, one_line(str(error)).rstrip(".") or type(error).__name__)
        text = response.text
        if len(self.key) >= 8:
            # Some servers quote it, and what they say may be printed. A shorter one is
            # no secret, such as EMPTY, and may be a word of a dialogue.
            text = text.replace(self.key, "***")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = text or response.reason_phrase
        wait = response.headers.get("Retry-After", "")
        seconds = float(wait) if wait.isascii() and wait.isdigit() else 0.0
        return Reply(response.status_code, content, seconds)

    @contextmanager
    def least_busy_server(self) -> Iterator[Server]:
        """The server with the fewest requests under way that has not just failed."""
        with self.lock:
            now = time.monotonic()
            ready = [server for server in self.servers if server.rests_until <= now]
            # Of those that are equally busy, the one that was asked longest ago.
            server = min(ready or self.servers, key=attrgetter("under_way", "asked_at"))
            server.asked_at = now
            server.under_way += 1
        try:
            yield server
        finally:
            with self.lock:
                server.under_way -= 1

    def answers_others(self, server: Server, since: float) -> bool:
        """Whether a server has answered since a time, or answers a greeting now."""
        if server.answered_at > since:
            return True
        greeting = self.prepare([], "Say hello.")
        reply = self.post(server, greeting, request_fields(0.0, max_tokens=1))
        return answer_text(reply) is not None

    def say_rarely(self, server: Server, message: str, reply: Reply) -> None:
        """Say what many requests find out, and not again in the next ten minutes."""
        topic = f"{server.url}: {message}"
        with self.lock:
            now = time.monotonic()
            is_news = now - self.said_at.get(topic, -math.inf) > SERVER_PATIENCE
            if is_news:
                self.said_at[topic] = now
        if is_news:
            say(f"{topic} ({describe_reply(reply)})")


class DaemonExecutor(Executor):
    """Runs each call in a thread that does not hold up the end of the process.

    ThreadPoolExecutor's threads are waited for when Python ends: an interrupted run
    would hang until the server has answered.

    Args:
        calls_at_once: how many; submit waits while there are as many.
    """

    def __init__(self, calls_at_once: int):
        self.free = threading.Semaphore(calls_at_once)
        self.stopped = threading.Event()

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """Call the function in a thread, and return a future of its result."""
        self.free.acquire()
        future: Future = Future()
        call = partial(fn, *args, **kwargs)
        thread = threading.Thread(
            target=self.run, args=(future, call), name="request", daemon=True
        )
        thread.start()
        return future

    def run(self, future: Future, call: Callable) -> None:
        """Call a function for a future."""
        future.set_running_or_notify_cancel()
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)
        self.free.release()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Tell the calls under way to give up; they are not waited for."""
        self.stopped.set()


def check_url(url: str) -> str:
    """The URL of a server, without a slash at its end.

    Raises:
        InputError: it is none, or holds a password, which is not shown.
    """
    import httpx

    form = "give it as http://host:port/v1"
    with errors_as(InputError, "--server", form):
        parsed = httpx.URL(url)
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise InputError(f"--server: a URL has more than host, port and path; {form}")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"--server {url}: is no URL of a server; {form}")
    return url.rstrip("/")


def open_client(key: str, connections: int) -> httpx.Client:
    """Make what sends requests, over as many connections at a time.

    Raises:
        InputError: the key, a proxy or a certificate of the environment is none.
    """
    import httpx

    if not key.isascii() or not key.isprintable():
        raise InputError(f"{KEY_VARIABLE}: has characters of no key; set it again")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # Servers close idle connections after 5 s; ours have to be closed before.
    limits = httpx.Limits(
        max_connections=connections,
        max_keepalive_connections=connections,
        keepalive_expiry=2.0,
    )
    # A proxy would look for these names on its own machine.
    own_names = ("localhost", "127.0.0.1", "[::1]", "0.0.0.0")
    past_proxy = {f"all://{name}": None for name in own_names}
    problem = "--server: the proxy or certificates of the environment"
    with errors_as(InputError, problem, "correct them"):
        return httpx.Client(headers=headers, limits=limits, mounts=past_proxy)


def encode_image(image: Image.Image) -> str:
    """An image as a JPEG data URL, of at most MAX_PIXELS pixels."""
    from PIL import Image

    image = image.convert("RGB")
    scale = math.sqrt(MAX_PIXELS / (image.width * image.height))
    if scale < 1:
        width = max(1, int(image.width * scale))
        height = max(1, int(image.height * scale))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def break_markers(text: str) -> str:
    """Break up what may be a special token: <|im_end|> becomes < |im_end|>."""
    return MARKER.sub("< ", text)


def request_fields(temperature: float, max_tokens: int) -> dict[str, Any]:
    """All settings of a request: where it is silent, a checkpoint's own would hold."""
    return {
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": -1,
        "max_tokens": max_tokens,
        "chat_template_kwargs": {"enable_thinking": False},
    }


def without_refused(fields: dict[str, Any], refused: set[str]) -> dict[str, Any]:
    """Leave out the fields that a server has refused."""
    taken = {name: value for name, value in fields.items() if name not in refused}
    if "top_k" in refused and "generation_config" not in refused:
        # transformers serve takes the likeliest token unless it is told so.
        sampling = {"do_sample": fields["temperature"] > 0, "top_k": 0}
        taken["generation_config"] = json.dumps(sampling)
    return taken


def parse_label(text: str, option_count: int) -> int:
    """The option that an answer such as "B" or "(B" names, from 0; else -1."""
    match = re.match("[^A-Za-z]*([A-Z])(?![A-Za-z])", text)
    option = OPTION_LABELS.index(match[1]) if match else -1
    return option if option < option_count else -1


def named_fields(body: Any, names: set[str]) -> set[str]:
    """Which of these fields the body of an error names."""
    words = set(re.findall("[A-Za-z_]+", str(body)))
    if words & FORMAT_WORDS:
        words.add("response_format")
    return words & names


def error_text(body: Any) -> str:
    """What a server says about an error, on one line of at most 300 characters."""
    for name in ("error", "detail", "message", "msg"):
        if isinstance(body, list) and body:
            body = body[0]
        if isinstance(body, dict) and body.get(name):
            body = body[name]
    return one_line(str(body))[:300].rstrip(".")


def describe_reply(reply: Reply) -> str:
    """A reply that is no answer, on one line."""
    text = error_text(reply.body)
    if reply.status == 200:
        text = f"unexpected reply: {text}"
    elif reply.status:
        text = f"{reply.status} {text}"
    if reply.retry_after:
        text += f", asks to wait {reply.retry_after:.0f} s"
    return text


def run_error(server: Server, problem: str) -> RunError:
    """The error for a server that a run cannot go on with."""
    remedy = "check the server and run the same command again"
    return RunError(f"{server.url}: {problem}; {remedy}")


def answer_text(reply: Reply) -> str | None:
    """The text of an answer, "" if it is empty; None if the reply is no answer."""
    try:
        content = reply.body["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return content if isinstance(content, str) else ""


def may_pass(reply: Reply) -> bool:
    """Whether a failure may pass: busy, starting, broken down or not there."""
    return reply.status in (0, 200, 408, 425, 429) or reply.status >= 500


def pause_before(tries: int) -> float:
    """Seconds before a request is sent again, not the same for all that wait."""
    longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(tries, 16))
    return longest * random.uniform(0.5, 1.0)


# -------------------------------------------------------------------------- annotation
# Samples are asked about in batches; what is not good enough is asked again.


@dataclass(frozen=True)
class Request:
    """A sample on its way: `tries` answers were not good enough so far.

    `fallback` is the last valid one of them, taken if no better one comes.
    """

    sample: Sample
    prepared: Any
    tries: int = 0
    fallback: Dialogue | None = None


@dataclass(frozen=True)
class Answer:
    """What came back for a request; `recovered` is None unless it was verified."""

    request: Request
    dialogue: Dialogue | None
    recovered: bool | None = None


@dataclass
class Progress:
    """Counts of what this process has done. `failed` has a reason for each place."""

    generated: int = 0
    retried: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def annotate_sample(
    pgen: QwenPgen | ServerPgen, images: Sequence[Image.Image], sample: Sample
) -> dict[str, Any]:
    """Generate the dialogue of one sample.

    Args:
        pgen: the model.
        images: RGB, the views of the frame.
        sample: from a plan.

    Returns:
        Its line of syn_annotations.jsonl, without the row of the table of tasks.

    Raises:
        RunError: no answer was valid.
    """
    return annotation_line(sample, pgen.call_qwen(images, sample.prompt))


def annotation_line(sample: Sample, dialogue: Dialogue) -> dict[str, Any]:
    """A line of syn_annotations.jsonl, without the row of the table of tasks."""
    line = {
        "episode_id": sample.episode_id,
        "frame_index": sample.frame_index,
        "timestamp": sample.timestamp,
        "skill_current": sample.skill_current,
        "skill_history": list(sample.skill_history),
        "task_description": sample.task_description,
        "scenario_type": sample.scenario_type,
        "response_type": sample.response_type,
        "user_prompt": dialogue["user_prompt"],
        "robot_utterance": dialogue["robot_utterance"],
    }
    if "skill_recovered" in dialogue:
        line["skill_recovered"] = dialogue["skill_recovered"]
    return line


class Annotator:
    """Asks a model about samples, and again where an answer is not good enough.

    Args:
        pgen: the model.
        batch_size: samples in one call; requests under way for a server.
        verify: whether each user prompt is checked to lead to its skill.
        seed: of the order in which --verify lists the skills.
    """

    def __init__(
        self,
        pgen: QwenPgen | ServerPgen,
        batch_size: int,
        verify: bool = False,
        seed: int = 0,
    ):
        self.pgen = pgen
        self.batch_size = batch_size
        self.verify = verify
        self.seed = seed
        self.progress = Progress()
        self.waiting: deque[Request] = deque()
        # The skill that each user prompt of an episode stands for.
        self.skills_of_prompts: dict[tuple[int, str], str] = {}

    def remember(self, sample: Sample, dialogue: Dialogue) -> None:
        """Note which skill a user prompt stands for in its episode."""
        key = (sample.episode_id, plain_words(dialogue["user_prompt"]))
        self.skills_of_prompts.setdefault(key, sample.skill_current)

    def remember_known(self, samples: Iterable[Sample], known: Dialogues) -> None:
        """Note the user prompts of dialogues that are there already."""
        for sample in samples:
            if sample.index in known:
                self.remember(sample, known[sample.index])

    def annotate(
        self, inputs: Iterable[tuple[Sample, Any | None]]
    ) -> Iterator[Dialogues]:
        """Generate the dialogues of samples.

        Args:
            inputs: samples with what pgen.prepare made of each; None where its images
                cannot be decoded.

        Yields:
            The finished dialogues of each call, as they come.
        """
        fresh = iter(inputs)
        calls_at_once = self.batch_size if self.pgen.concurrent else 1
        executor = self.pgen.executor(calls_at_once)
        under_way: set[Future] = set()
        try:
            while True:
                # An answer that has come goes before decoding more.
                while len(under_way) < calls_at_once and not any(
                    future.done() for future in under_way
                ):
                    batch = self.next_batch(fresh)
                    if not batch:
                        break
                    under_way.add(executor.submit(self.ask, batch))
                if not under_way:
                    return
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                # What has come is not lost when another call has failed.
                finished = [future for future in done if not future.exception()]
                for future in finished:
                    yield self.sort_out(future.result())
                for future in done:
                    future.result()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)

    def next_batch(self, fresh: Iterator[tuple[Sample, Any | None]]) -> list[Request]:
        """Take the requests of the next call: those that wait, then fresh ones."""
        size = min(self.batch_size, self.pgen.batch_limit)
        batch: list[Request] = []
        while self.waiting and len(batch) < size:
            batch.append(self.waiting.popleft())
        # At temperature 0 first tries are greedy and repeats are sampled, so that one
        # call holds either.
        if batch and self.pgen.temperature == 0:
            return batch
        while len(batch) < size:
            sample, prepared = next(fresh, (None, None))
            if sample is None:
                break
            if prepared is None:
                self.progress.failed[sample.place] = "an image cannot be decoded"
                continue
            batch.append(Request(sample, prepared))
        return batch

    def ask(self, batch: Sequence[Request]) -> list[Answer]:
        """Ask the model once about each request of a call."""
        inputs = [request.prepared for request in batch]
        dialogues = self.pgen.answer(inputs, batch[0].tries)
        answers = []
        for request, dialogue in zip(batch, dialogues, strict=True):
            answers.append(Answer(request, dialogue))
        return self.verify_answers(answers) if self.verify else answers

    def verify_answers(self, answers: Sequence[Answer]) -> list[Answer]:
        """Ask the model which skill each user prompt leads to.

        Args:
            answers: of one call.

        Returns:
            The same, with `recovered` where there is a dialogue.
        """
        questions = []
        options_of_questions = []
        for answer in answers:
            if answer.dialogue:
                options = list_options(answer.request.sample, self.seed)
                prompt = answer.dialogue["user_prompt"]
                questions.append(construct_verify_prompt(prompt, options))
                options_of_questions.append(options)
        choices: list[int] = []
        if questions:
            counts = [len(options) for options in options_of_questions]
            choices = self.pgen.choose(questions, counts)
        verified = []
        remaining = deque(zip(choices, options_of_questions, strict=True))
        for answer in answers:
            recovered = None
            if answer.dialogue:
                choice, options = remaining.popleft()
                skill = answer.request.sample.skill_current
                recovered = choice >= 0 and options[choice] == skill
            verified.append(replace(answer, recovered=recovered))
        return verified

    def sort_out(self, answers: Sequence[Answer]) -> Dialogues:
        """Decide on the answers of a call: taken, asked again, or failed.

        Returns:
            The dialogues that are taken.
        """
        finished: Dialogues = {}
        for answer in answers:
            request = answer.request
            sample = request.sample
            dialogue = answer.dialogue
            if dialogue and answer.recovered is not None:
                dialogue = {
                    "user_prompt": dialogue["user_prompt"],
                    "robot_utterance": dialogue["robot_utterance"],
                    "skill_recovered": answer.recovered,
                }
            fallback = dialogue or request.fallback
            last_try = request.tries + 1 >= MAX_TRIES
            if dialogue and (last_try or self.leads_to_its_skill(answer)):
                finished[sample.index] = dialogue
            elif not last_try:
                self.progress.retried += 1
                again = replace(request, tries=request.tries + 1, fallback=fallback)
                self.waiting.append(again)
            elif fallback:
                finished[sample.index] = fallback
            else:
                reason = f"none of {MAX_TRIES} answers was valid"
                self.progress.failed[sample.place] = reason
            if sample.index in finished:
                self.remember(sample, finished[sample.index])
        self.progress.generated += len(finished)
        return finished

    def leads_to_its_skill(self, answer: Answer) -> bool:
        """Whether a user prompt leads to no other skill, as far as is known."""
        if answer.dialogue is None or answer.recovered is False:
            return False
        sample = answer.request.sample
        key = (sample.episode_id, plain_words(answer.dialogue["user_prompt"]))
        known_skill = self.skills_of_prompts.get(key, sample.skill_current)
        return known_skill == sample.skill_current


def list_options(sample: Sample, seed: int) -> list[str]:
    """The skills that --verify lets the model choose from, in shuffled order.

    Args:
        sample: whose skill is among them. Of an episode with more skills than there
            are labels, some are left out.
        seed: of the order, together with the sample.
    """
    shuffler = random.Random(f"{seed} {sample.index}")
    others = [name for name in sample.episode_skills if name != sample.skill_current]
    shuffler.shuffle(others)
    options = [sample.skill_current, *others[: len(OPTION_LABELS) - 1]]
    shuffler.shuffle(options)
    return options


def construct_verify_prompt(user_prompt: str, options: Sequence[str]) -> str:
    """Say what --verify asks about a user prompt."""
    lines = []
    for label, option in zip(OPTION_LABELS, options, strict=False):
        lines.append(f"{label}. {one_line(option)}")
    return VERIFY_PROMPT.format(options="\n".join(lines), user_prompt=user_prompt)


def generate_dialogues(
    meta: Any, plan: Plan, samples: Sequence[Sample], annotator: Annotator
) -> Iterator[Dialogues]:
    """Generate the dialogues of some of a plan's samples.

    While the model is at work, a thread decodes and prepares the next two batches.

    Args:
        meta: LeRobotDatasetMetadata.
        plan: the whole job.
        samples: those to generate, in dataset order.
        annotator: with the model.

    Yields:
        The finished dialogues of each call.
    """
    inputs = prepare_samples(meta, plan, samples, annotator.pgen)
    size = max(1, 2 * min(annotator.batch_size, len(samples)))
    with closing(read_ahead(inputs, size)) as ready:
        yield from annotator.annotate(ready)


def prepare_samples(
    meta: Any, plan: Plan, samples: Sequence[Sample], pgen: QwenPgen | ServerPgen
) -> Iterator[tuple[Sample, Any | None]]:
    """Each sample with what the model is given; None where an image is broken."""
    views_of_samples = read_views(meta, samples, plan)
    for sample, views in zip(samples, views_of_samples, strict=True):
        yield sample, pgen.prepare(views, sample.prompt) if views else None


# ----------------------------------------------------------------------------- journal
# Finished dialogues are on the disk after every call, in <output-dir>.partial.


class Journal:
    """A file that finished dialogues are appended to, a JSON line each.

    Args:
        path: the file.

    Raises:
        RunError: it cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        with self.writing():
            self.file = path.open("ab", buffering=0)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Name the file when the disk fails."""
        problem = f"{self.path}: cannot be written"
        with errors_as(RunError, problem, "free space on the disk and run again"):
            yield

    def add(self, dialogues: Dialogues) -> None:
        """Put dialogues on the disk.

        Raises:
            RunError: they cannot be written.
        """
        if not dialogues:
            return
        # Start on a new line: a crash may have torn the last one.
        text = "\n"
        for index, dialogue in dialogues.items():
            entry = {"index": index}
            entry.update(dialogue)
            text += json_line(entry)
        content = text.encode()
        with self.writing():
            if self.file.write(content) != len(content):
                raise OSError("the disk is full")
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def journal_name(settings: dict[str, Any], rank: int | str) -> str:
    """The name of a rank's journal; journals of other settings have other names."""
    return f"dialogues-{fingerprint(settings)}-{rank}.jsonl"


def read_journals(work_dir: Path, settings: dict[str, Any]) -> Dialogues:
    """Read the dialogues that were generated with these settings.

    A line that a crash has torn is left out.
    """
    dialogues: Dialogues = {}
    for path in sorted(work_dir.glob(journal_name(settings, "*"))):
        for line in path.read_bytes().split(b"\n"):
            entry = parse_journal_line(line)
            if entry:
                dialogues.setdefault(entry.pop("index"), entry)
    return dialogues


def parse_journal_line(line: bytes) -> dict[str, Any] | None:
    """A line's index and dialogue; None for one that was torn or damaged."""
    try:
        text = line.decode()
        entry = json.loads(text)
    except ValueError:
        return None
    dialogue = parse_answer(text)
    if dialogue is None or not isinstance(entry.get("index"), int):
        return None
    dialogue["index"] = entry["index"]
    if "skill_recovered" in entry:
        dialogue["skill_recovered"] = entry["skill_recovered"]
    return dialogue


@contextmanager
def lock_work_dir(work_dir: Path) -> Iterator[None]:
    """Hold the work folder, which is made if it is not there.

    It is removed in the end if it holds no dialogues: there were none, or they stand
    in the finished dataset.

    Raises:
        InputError: another run holds it, or it is somebody's own folder.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(work_dir / "lock", timeout=0)
    names = set()
    with errors_as(
        InputError, f"{work_dir}: cannot be made", "name another --output-dir"
    ):
        if work_dir.is_dir():
            names = {path.name for path in work_dir.iterdir()}
        # A run that was killed as it began may have left these.
        if names - {"lock", ".run.json"} and "run.json" not in names:
            raise InputError(
                f"{work_dir}: holds files that this script has not written; move it "
                "out of the way"
            )
        work_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise InputError(
                f"{work_dir}: another run is at work there; wait for it, or name "
                "another --output-dir"
            ) from None
    try:
        yield
    finally:
        journals = work_dir.glob("dialogues-*")
        if not any(path.stat().st_size for path in journals):
            shutil.rmtree(work_dir, ignore_errors=True)
        lock.release()


def take_up_work(
    work_dir: Path, settings: dict[str, Any], overwrite: bool
) -> Dialogues:
    """Read what an interrupted run with the same settings has left.

    Args:
        work_dir: the work folder, locked.
        settings: all that the dialogues depend on.
        overwrite: whether work with other settings is discarded.

    Returns:
        The dialogues that are there already.

    Raises:
        InputError: there is work with other settings.
        RunError: the folder cannot be written.
    """
    record = work_dir / "run.json"
    others = find_other_journals(work_dir, settings)
    if others and not overwrite:
        raise other_settings(record, settings)
    for path in others:
        path.unlink()
    with errors_as(
        RunError, f"{record}: cannot be written", "free space on the disk and run again"
    ):
        write_json(record, {"settings": settings})
    return read_journals(work_dir, settings)


def find_other_journals(work_dir: Path, settings: dict[str, Any]) -> list[Path]:
    """The journals of unfinished work with other settings.

    A process that has outlived its launch may leave one in a folder that has been
    taken over since; it does no harm there.
    """
    if read_settings(work_dir / "run.json") == settings:
        return []
    own = set(work_dir.glob(journal_name(settings, "*")))
    others = sorted(set(work_dir.glob("dialogues-*")) - own)
    return [path for path in others if path.is_file() and path.stat().st_size]


def read_settings(record: Path) -> dict[str, Any]:
    """The settings that an earlier run has kept in a file; {} if it cannot be read."""
    try:
        settings = json.loads(record.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return settings if isinstance(settings, dict) else {}


def other_settings(record: Path, settings: dict[str, Any]) -> InputError:
    """The error for results that were made with other settings.

    Args:
        record: the file that says so.
        settings: those of this run.
    """
    found = read_settings(record)
    difference = "settings that cannot be read"
    if found:
        difference = first_difference(found, settings)
    return InputError(
        f"{record}: made with {difference}; undo the change, name another "
        "--output-dir, or discard that work with --overwrite"
    )


def first_difference(found: Any, wanted: Any, name: str = "") -> str:
    """Say where two settings differ first; "" if they are equal.

    Args:
        found: a setting, or a dict of them.
        wanted: the same of this run.
        name: of the setting.
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(set(found) - set(wanted))]:
            inner = f"{name}.{key}" if name else key
            difference = first_difference(found.get(key), wanted.get(key), inner)
            if difference:
                return difference
        return ""
    if found == wanted:
        return ""
    if isinstance(found, str) and isinstance(wanted, str):
        old_lines = found.splitlines()
        new_lines = wanted.splitlines()
        if len(old_lines) > 1 or len(new_lines) > 1:
            pairs = zip_longest(old_lines, new_lines, fillvalue="")
            for number, (old_line, line) in enumerate(pairs, start=1):
                if old_line != line:
                    name = f"{name}, line {number}"
                    return f"{name} = {old_line!r}, but this run has {line!r}"
    return f"{name} = {found!r}, but this run has {wanted!r}"


def fingerprint(value: Any) -> str:
    """Sixteen hexadecimal digits that stand for a value of JSON."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def json_line(entry: dict[str, Any]) -> str:
    """An entry on one line, also for readers that end lines at U+2028 and the like."""
    text = json.dumps(entry, ensure_ascii=False)
    escaped = CONTROL_CHARACTER.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return escaped + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file at once, so that no crash leaves half of it."""
    fresh = path.with_name(f".{path.name}")
    with fresh.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=4)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


# ------------------------------------------------------------------------------- ranks
# The processes that torchrun started share the work through torchrun's own store.

POLL_SECONDS = 0.2


class Launch:
    """The processes of one launch, and the key-value store that they meet in.

    Without torchrun it is one process of rank 0, and the store is not needed. The
    store is polled: a blocking call would not answer a signal.

    Raises:
        InputError: the variables that torchrun sets make no sense.
        RunError: the store cannot be reached.
    """

    def __init__(self) -> None:
        with errors_as(
            InputError,
            "RANK, WORLD_SIZE or LOCAL_RANK in the environment",
            "start the script with torchrun, or unset them",
        ):
            self.rank = int(os.environ.get("RANK", "0"))
            self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
            self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
            if not 0 <= self.rank < self.world_size:
                raise ValueError(f"rank {self.rank} of {self.world_size}")
            if self.world_size > 1 and not os.environ.get("MASTER_ADDR"):
                raise ValueError("MASTER_ADDR is not set")
        if self.world_size > 1:
            with self.reaching():
                self.connect()

    def connect(self) -> None:
        """Open the store that torchrun runs."""
        from torch.distributed import PrefixStore, rendezvous

        store, _, _ = next(rendezvous("env://"))
        self.store = PrefixStore("annotate_pgen", store)

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Say that the launch has ended when the store does not answer."""
        problem = "the processes of this launch have lost each other"
        with errors_as(RunError, problem, "the same command goes on from here"):
            yield

    def send(self, key: str, message: dict[str, Any]) -> None:
        """Leave a message in the store."""
        with self.reaching():
            self.store.set(key, json.dumps(message))

    def has(self, key: str) -> bool:
        """Whether a message is there."""
        with self.reaching():
            return self.store.check([key])

    def receive(self, key: str) -> dict[str, Any]:
        """Wait for a message."""
        while not self.has(key):
            time.sleep(POLL_SECONDS)
        with self.reaching():
            return json.loads(self.store.get(key))

    def add_generated(self, number: int) -> int:
        """Add to the number of dialogues of all ranks, and return it."""
        with self.reaching():
            return self.store.add("generated", number)


def share(items: Sequence[Any], rank: int, world_size: int) -> Sequence[Any]:
    """A rank's share: a stretch of the items, so that ranks read different files."""
    start = len(items) * rank // world_size
    end = len(items) * (rank + 1) // world_size
    return items[start:end]


def deal_samples(
    launch: Launch,
    settings: dict[str, Any],
    samples: Sequence[Sample],
    resumed: bool = False,
) -> Sequence[Sample]:
    """As rank 0, send every other rank its part of the samples.

    Args:
        launch: the processes.
        settings: all that the dialogues depend on.
        samples: those to generate; none if there is nothing to do.
        resumed: whether an earlier run has generated others.

    Returns:
        The part of rank 0.
    """
    for rank in range(1, launch.world_size):
        part = share(samples, rank, launch.world_size)
        message = {
            "settings": settings,
            "resumed": resumed,
            "indices": [sample.index for sample in part],
        }
        launch.send(f"part-{rank}", message)
    return share(samples, 0, launch.world_size)


def dismiss_ranks(launch: Launch, settings: dict[str, Any]) -> None:
    """As rank 0, tell the other ranks that there is nothing to do."""
    deal_samples(launch, settings, samples=[])


def run_as_worker(args: argparse.Namespace, launch: Launch) -> None:
    """As another rank: wait for a part, generate it into a journal, and report.

    Rank 0 checks the dataset first, so that bad input is reported once.

    Raises:
        RunError: this process has other settings than rank 0.
    """
    part = launch.receive(f"part-{launch.rank}")
    progress = Progress()
    if part["indices"]:
        job = prepare_job(args, quiet=True)
        difference = first_difference(part["settings"], job.settings)
        if difference:
            raise RunError(f"rank 0 has {difference}; start all processes alike")
        known = read_journals(job.work_dir, job.settings)
        wanted = set(part["indices"])
        samples = [sample for sample in job.plan.samples if sample.index in wanted]
        annotator = make_annotator(job, launch, known, part["resumed"])
        progress = annotator.progress
        for finished in generate_part(job, launch, samples, annotator):
            launch.add_generated(len(finished))
    launch.send(f"report-{launch.rank}", asdict(progress))


def wait_for_ranks(
    launch: Launch, progress: Progress, bar: Any, known_count: int
) -> None:
    """As rank 0, show what the other ranks generate until all have reported.

    Args:
        launch: the processes.
        progress: of rank 0; the reports are added to it.
        bar: tqdm's.
        known_count: dialogues that were there before.
    """
    for rank in range(1, launch.world_size):
        while not launch.has(f"report-{rank}"):
            show_generated(bar, known_count + launch.add_generated(0))
            time.sleep(POLL_SECONDS)
        show_generated(bar, known_count + launch.add_generated(0))
        report = launch.receive(f"report-{rank}")
        progress.generated += report["generated"]
        progress.retried += report["retried"]
        progress.failed.update(report["failed"])


# ------------------------------------------------------------------------------ result
# Which dialogue each frame carries, and the table that its index points into.

TASK_COLUMNS = (
    "user_prompt",
    "robot_utterance",
    "skill",
    "scenario_type",
    "response_type",
)


@dataclass(frozen=True)
class Results:
    """What becomes of a plan and its dialogues.

    `tasks` is the table of different dialogues, `task_indices`, int64 (frames,), each
    frame's row in it, and `annotations` the lines of syn_annotations.jsonl.
    `late_share` of the frames carry the dialogue of another skill than their own.
    """

    tasks: pd.DataFrame
    task_indices: np.ndarray
    annotations: list[dict[str, Any]]
    late_share: float


def generate_synthetic_data(
    dataset: Any,
    pgen: QwenPgen | ServerPgen,
    plan: Plan,
    batch_size: int = 16,
    dialogues: Dialogues | None = None,
    verify: bool = False,
) -> tuple[pd.DataFrame, np.ndarray, list[dict[str, Any]]]:
    """Generate the dialogues of a dataset. Nothing is written.

    Args:
        dataset: a LeRobotDataset, or its metadata.
        pgen: the model.
        plan: from make_plan, for the same dataset.
        batch_size: samples in one call of the model.
        dialogues: those that are there already, by index of the frame.
        verify: whether each user prompt is checked to lead to its skill.

    Returns:
        The table of different dialogues, each frame's row in it as int64 (frames,),
        and the lines of syn_annotations.jsonl as dicts. If the dataset was opened with
        `episodes=`, the frames are those of these episodes, in dataset order.

    Raises:
        RunError: an episode is left without any dialogue.
    """
    meta = getattr(dataset, "meta", dataset)
    known = dict(dialogues or {})
    missing = [sample for sample in plan.samples if sample.index not in known]
    annotator = Annotator(pgen, batch_size, verify)
    annotator.remember_known(plan.samples, known)
    with progress_bar(total=len(plan.samples), initial=len(known)) as bar:
        for finished in generate_dialogues(meta, plan, missing, annotator):
            known.update(finished)
            bar.update(len(finished))
    results = build_results(plan, known)
    return results.tasks, results.task_indices, results.annotations


def assign_dialogues(plan: Plan, dialogues: Dialogues) -> dict[int, Sample]:
    """Decide whose dialogue the frames of each sample carry.

    Args:
        plan: the whole job.
        dialogues: those that are there, by index of the frame.

    Returns:
        For the index of each sample, the sample whose dialogue its frames carry.

    Raises:
        RunError: an episode has no dialogue, and none elsewhere fits.
    """
    lenders = defaultdict(list)
    for sample in plan.samples:
        if sample.index in dialogues:
            lenders[sample.skill_current, sample.task_description].append(sample)
    carried = {}
    hopeless = []
    for episode in plan.episodes:
        available = {}
        for sample in episode.samples:
            if sample.index in dialogues:
                available[sample.index] = sample
        if not available:
            # An episode in which all samples failed borrows from the others: from
            # samples with the same skill and task.
            for number, sample in enumerate(episode.samples):
                fitting = lenders[sample.skill_current, sample.task_description]
                if fitting:
                    available[sample.index] = fitting[number % len(fitting)]
        if not available:
            hopeless.append(episode.episode_index)
            continue
        first = available[min(available)]
        latest = None
        latest_of_skill = {}
        for sample in episode.samples:
            skill_and_task = (sample.skill_current, sample.task_description)
            if sample.index in available:
                # A sample that has a dialogue carries it.
                source = available[sample.index]
                latest = source
                latest_of_skill[skill_and_task] = source
            elif skill_and_task in latest_of_skill:
                # Otherwise the nearest earlier one with the same skill.
                source = latest_of_skill[skill_and_task]
            elif latest:
                # Otherwise the nearest earlier one.
                source = latest
            else:
                # Otherwise the nearest later one.
                source = first
            carried[sample.index] = source
    if hopeless:
        raise RunError(
            f"no valid dialogue for episode {hopeless}, nor elsewhere for its skills "
            "and task; run again, or with another --model and --overwrite"
        )
    return carried


def build_results(plan: Plan, dialogues: Dialogues) -> Results:
    """Build the table of dialogues and find each frame's row in it.

    Args:
        plan: the whole job.
        dialogues: by index of the frame.

    Raises:
        RunError: an episode is left without any dialogue.
    """
    import numpy as np
    import pandas as pd

    carried = assign_dialogues(plan, dialogues)
    rows: dict[tuple[str, ...], int] = {}
    row_of_sample = {}
    annotations = []
    for sample in plan.samples:
        if sample.index not in dialogues:
            continue
        line = annotation_line(sample, dialogues[sample.index])
        key = (
            line["user_prompt"],
            line["robot_utterance"],
            line["skill_current"],
            line["scenario_type"],
            line["response_type"],
        )
        # Rows are counted as they are first seen, in dataset order.
        row = rows.setdefault(key, len(rows))
        row_of_sample[sample.index] = row
        line[COLUMN] = row
        annotations.append(line)
    tasks = pd.DataFrame(list(rows), columns=list(TASK_COLUMNS))
    tasks.insert(0, "task_index", range(len(tasks)))
    parts = []
    late_frames = 0
    for episode in plan.episodes:
        sources = [carried[sample.index] for sample in episode.samples]
        frame_count = len(episode.skill_numbers)
        starts = [sample.index - episode.first_index for sample in episode.samples]
        indices = np.array([row_of_sample[source.index] for source in sources])
        parts.append(indices.repeat(np.diff([*starts, frame_count])))
        late_frames += count_late_frames(
            skill_numbers=episode.skill_numbers,
            skill_names=episode.skill_names,
            positions=starts,
            carried=[source.skill_current for source in sources],
        )
    return Results(
        tasks=tasks,
        task_indices=np.concatenate(parts).astype("int64"),
        annotations=annotations,
        late_share=late_frames / plan.frame_count,
    )


def measure_quality(annotations: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Figures that show how good and how varied dialogues are.

    Args:
        annotations: lines of syn_annotations.jsonl.

    Returns:
        Names and values, in words.
    """
    if not annotations:
        return []
    total = len(annotations)
    prompts = Counter(line["user_prompt"] for line in annotations)
    pairs = {(line["user_prompt"], line["robot_utterance"]) for line in annotations}
    sentence, count = prompts.most_common(1)[0]
    questions = 0
    for line in annotations:
        questions += line["robot_utterance"].endswith(QUESTION_MARKS)
    figures = [
        ("different pairs", f"{len(pairs)} of {total}"),
        ("different user prompts", f"{len(prompts)} of {total}"),
        ("most frequent user prompt", f'"{one_line(sentence)}", {count} of {total}'),
        ("replies that end in a question", f"{questions / total:.1%}"),
    ]
    verified = [line for line in annotations if "skill_recovered" in line]
    if verified:
        figures.append(("skill recovered", share_recovered(verified)))
        for scenario in SCENARIO_TYPES:
            lines = [line for line in verified if line["scenario_type"] == scenario]
            if lines:
                figures.append((f"skill recovered, {scenario}", share_recovered(lines)))
    return figures


def share_recovered(lines: Sequence[dict[str, Any]]) -> str:
    """The share of user prompts that lead to their skill, in words."""
    recovered = sum(line["skill_recovered"] for line in lines)
    return f"{recovered / len(lines):.1%} of {len(lines)}"


def count_types(lines: Iterable[dict[str, Any]], kind: str) -> list[tuple[str, int]]:
    """How often each "scenario_type" or "response_type" occurs, by name."""
    return sorted(Counter(line[kind] for line in lines).items())


# ------------------------------------------------------------------------------ output
# The new dataset is the old one plus a column. It appears whole or not at all.


def list_source_files(root: Path) -> list[Path]:
    """Every file of a dataset, relative to `root`, without .cache and .git.

    Raises:
        InputError: a link leads nowhere or in a circle, or a file is a pipe.
    """
    found = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(set(subfolders) - {".cache", ".git"})
        parents = [parent.resolve() for parent in Path(folder).parents]
        if Path(folder).resolve() in parents:
            raise InputError(f"{folder}: leads back to where it lies; remove the link")
        for name in sorted(names):
            path = Path(folder, name)
            if not path.is_file():
                raise InputError(
                    f"{path}: cannot be read as a file; restore or remove it"
                )
            found.append(path.relative_to(root))
    return found


def write_dataset(job: Job, results: Results, target: Path) -> None:
    """Write the source plus the new column, and check what was written.

    Args:
        job: the whole job.
        results: which dialogue each frame carries.
        target: the new folder, which must not be there.

    Raises:
        RunError: names the file that cannot be written.
    """
    root = job.meta.root
    data_files = {file.path.relative_to(root): file for file in job.plan.data_files}
    for name in list_source_files(root):
        with copying(root / name, target / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if name in data_files:
                file = data_files[name]
                end = file.first_index + file.row_count
                add_column(
                    source=root / name,
                    target=target / name,
                    values=results.task_indices[file.first_index : end],
                )
            elif name == Path("meta", "info.json"):
                write_info(root / name, target / name)
            else:
                shutil.copyfile(root / name, target / name)
    with writing(target / "meta" / "tasks_high_level.parquet") as path:
        results.tasks.to_parquet(path)
    with (
        writing(target / "meta" / "syn_annotations.jsonl") as path,
        path.open("w", encoding="utf-8", newline="\n") as lines,
    ):
        for line in results.annotations:
            lines.write(json_line(line))
    with writing(target / RECORD) as path:
        write_json(path, make_record(job, results))
    page = make_page(job, results.annotations, results.late_share)
    write_page(target / "meta" / "dialogues.html", page)
    write_card(target, job.name)
    check_written(target, job.name)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Name the file when it cannot be written.

    Raises:
        RunError: in place of any error inside.
    """
    remedy = "check the disk and run the same command again"
    with errors_as(RunError, f"{path}: cannot be written", remedy):
        yield path


@contextmanager
def copying(source: Path, target: Path) -> Iterator[None]:
    """Name both files when one cannot be copied.

    Raises:
        RunError: in place of any error inside.
    """
    problem = f"{target}: cannot be written from {source}"
    remedy = "check the disk and that file, and run the same command again"
    with errors_as(RunError, problem, remedy):
        yield


def write_info(source: Path, target: Path) -> None:
    """Copy info.json with a description of the new column."""
    info = read_json(source)
    info["features"][COLUMN] = {"dtype": "int64", "shape": [1], "names": None}
    text = json.dumps(info, indent=4, ensure_ascii=False)
    target.write_text(text, encoding="utf-8")


SPECIAL_ENCODINGS = {
    "BYTE_STREAM_SPLIT",
    "DELTA_BINARY_PACKED",
    "DELTA_BYTE_ARRAY",
    "DELTA_LENGTH_BYTE_ARRAY",
}


def add_column(source: Path, target: Path, values: np.ndarray) -> None:
    """Copy a parquet file as it is, with the new column at its end.

    Row groups, codecs and encodings stay. A placeholder of the column is replaced.

    Args:
        source: the old file.
        target: the new one.
        values: of the column, int64 (rows,).

    Raises:
        Exception: whatever pyarrow raises; OSError if it reads back wrong.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(source) as parquet:
        schema = parquet.schema_arrow
        place = schema.get_field_index(COLUMN)
        field_of_column = pa.field(COLUMN, pa.int64())
        if place < 0:
            new_schema = schema.append(field_of_column)
        else:
            new_schema = schema.set(place, field_of_column)
        new_schema = new_schema.with_metadata(describe_column(schema.metadata))
        file = parquet.metadata
        codecs = {}
        encodings = {}
        with_dictionary = [COLUMN]
        for number in range(file.num_columns if file.num_row_groups else 0):
            column = file.row_group(0).column(number)
            if column.path_in_schema == COLUMN:
                continue
            codec = column.compression.replace("UNCOMPRESSED", "NONE")
            codecs[column.path_in_schema] = codec
            if column.has_dictionary_page:
                with_dictionary.append(column.path_in_schema)
            else:
                special = set(column.encodings) & SPECIAL_ENCODINGS
                encodings[column.path_in_schema] = min(special, default="PLAIN")
        codecs[COLUMN] = codecs.get("index", "SNAPPY")
        with pq.ParquetWriter(
            target,
            new_schema,
            version=file.format_version,
            compression=codecs,
            use_dictionary=with_dictionary,
            column_encoding=encodings,
        ) as writer:
            row = 0
            for group in range(file.num_row_groups):
                table = read_whole_row_group(parquet, group)
                row_count = len(table)
                column = pa.array(values[row : row + row_count], pa.int64())
                if place < 0:
                    table = table.append_column(field_of_column, column)
                else:
                    table = table.set_column(place, field_of_column, column)
                writer.write_table(table, row_group_size=max(1, row_count))
                row += row_count
    written = pq.read_table(target, columns=[COLUMN])[COLUMN].to_numpy()
    if not (written == values).all():
        raise OSError("it reads back wrong")


def read_whole_row_group(parquet: Any, group: int) -> pa.Table:
    """Read all columns of a row group, however much they decode to.

    ParquetFile.read_row_group fails where the texts in the lists of a column decode to
    more than 2 GB, as those of a language column in a row group of many episodes.
    """
    import pyarrow as pa

    batches = list(parquet.iter_batches(batch_size=10_000, row_groups=[group]))
    return pa.Table.from_batches(batches, parquet.schema_arrow)


def describe_column(metadata: dict[bytes, bytes] | None) -> dict[bytes, bytes]:
    """Add the new column to the description that `datasets` keeps in parquet files.

    Args:
        metadata: of the schema; it has no such description where pandas wrote it.
    """
    described = dict(metadata or {})
    try:
        content = json.loads(described[b"huggingface"])
        content["info"]["features"][COLUMN] = {"dtype": "int64", "_type": "Value"}
    except (KeyError, ValueError, TypeError):
        return described
    described[b"huggingface"] = json.dumps(content).encode()
    return described


def make_record(job: Job, results: Results) -> dict[str, Any]:
    """What meta/annotate_pgen.json says: the settings, and what the card needs."""
    card_file = job.meta.root / "README.md"
    source_card = ""
    if card_file.is_file():
        source_card = card_file.read_text(encoding="utf-8-sig", errors="replace")
    return {
        "settings": job.settings,
        "name": job.name,
        "source": job.args.repo_id,
        "date": date.today().isoformat(),
        "late_share": results.late_share,
        "source_card": source_card,
    }


def check_written(folder: Path, name: str) -> None:
    """Open a new dataset with LeRobot, and decode a frame of each video.

    Raises:
        RunError: something cannot be read.
    """
    import av
    from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata

    remedy = "check the disk and run the same command again"
    with errors_as(RunError, f"{folder}: does not read back", remedy):
        meta = LeRobotDatasetMetadata(name, root=folder)
        meta.root = Path(meta.root)
        needed = list_needed_files(meta)
    for path in needed:
        if path.suffix == ".parquet":
            continue
        with (
            errors_as(RunError, f"{path}: does not read back", remedy),
            av.open(str(path)) as container,
        ):
            next(container.decode(video=0))


def read_annotations(folder: Path) -> list[dict[str, Any]]:
    """The lines of syn_annotations.jsonl of a finished dataset."""
    path = folder / "meta" / "syn_annotations.jsonl"
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def put_in_place(job: Job) -> None:
    """Move the new dataset from the work folder to its place, as the last step.

    Raises:
        RunError: something else has appeared there.
    """
    if hasattr(os, "sync"):
        os.sync()
    with writing(job.output):
        if is_finished(job.output):
            # A folder cannot be replaced by another one at once.
            replaced = job.work_dir / f"replaced-{time.time_ns()}"
            job.output.rename(replaced)
        (job.work_dir / "dataset").rename(job.output)
    for path in job.work_dir.glob("replaced-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in job.work_dir.glob("dialogues-*"):
        path.unlink()


def is_finished(output: Path) -> bool:
    """Whether a folder holds a dataset that this script has finished."""
    return (output / RECORD).is_file()


# -------------------------------------------------------------------------------- page
# One HTML file with frames beside dialogues, to judge them at a glance.

MAX_PAGE_BYTES = 6_000_000
MAX_PAGE_DIALOGUES = 200
MAX_PAGE_TIMELINES = 6
SPREAD_OVER = ("scenario_type", "response_type", "skill_current", "episode_id")
THUMBNAIL_WIDTH = 320
# Width in pixels and JPEG quality of pictures, tried in turn while a page is too large.
SMALLER_PICTURES = ((320, 65), (240, 65), (200, 50))
# A longer text than this is cut: a page is to be read.
MAX_PAGE_TEXT = 1000

PAGE = """\
{# The page: HTML, filled in by jinja2. Every value is escaped. Text from a dataset or a
   model stands in <bdi>: it keeps its own writing direction, and the search looks for
   words there and nowhere else. #}

{% macro rows(pairs, kind) %}
<dl class="{{ kind }}">
  {% for name, text in pairs %}
  <div class="{{ 'long' if text | length > 14 else '' }}">
    <dt>{{ name }}</dt>
    <dd><bdi>{{ text }}</bdi></dd>
  </div>
  {% endfor %}
</dl>
{% endmacro %}

{% macro counts(title, bars) %}
<section class="panel">
  <h3>{{ title }}</h3>
  <ul class="counts">
    {% for bar in bars %}
    <li>
      <bdi>{{ bar.name or "no type" }}</bdi>
      <small>{{ bar.note }}</small>
      <span class="count">{{ bar.count | thousands }}</span>
      <span class="track"><span style="width: {{ bar.percent }}%"></span></span>
    </li>
    {% endfor %}
  </ul>
</section>
{% endmacro %}

{% macro number(skill) %}
<span class="number color{{ skills[skill] % 10 }}">{{ skills[skill] + 1 }}</span>
{% endmacro %}

{% macro choice(id, label, options) %}
<p>
  <label for="{{ id }}">{{ label }}</label>
  <select id="{{ id }}" name="{{ id }}">
    <option value="">All</option>
    {% for value, text in options %}
    <option value="{{ value }}">{{ text | truncate(80, true) }}</option>
    {% endfor %}
  </select>
</p>
{% endmacro %}

<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src '{{ script_hash }}'; base-uri 'none';
 form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Dialogues of {{ page.dataset_name | truncate(120, true) }}</title>
<style>{{ style }}</style>
</head>
<body>

<header>
  <p class="kind">Dialogues</p>
  <h1><bdi>{{ page.dataset_name | truncate(120, true) }}</bdi></h1>
  <p class="lead">What a person might have said to make each skill the right thing to
    do, and what the robot answers, beside the frames that the model saw.</p>
  {% if page.notice %}<p class="notice"><bdi>{{ page.notice }}</bdi></p>{% endif %}
</header>

<main>
<section aria-labelledby="overview">
  <h2 id="overview">At a glance</h2>
  {{ rows(page.figures, "figures") }}
  <div class="panels">
    {{ counts("Scenario types", page.scenario_bars) }}
    {{ counts("Response types", page.response_bars) }}
    <section class="panel">
      <h3>Settings</h3>
      {{ rows(page.settings, "settings") }}
    </section>
  </div>
</section>

{% if page.timelines %}
<section aria-labelledby="episodes">
  <h2 id="episodes">Episodes, skills and samples</h2>
  <div class="panel">
    {% for timeline in page.timelines %}
    <div class="timeline">
      <h3>Episode {{ timeline.episode_id }}</h3>
      <div class="strip" role="img"
        style="width: {{ timeline.seconds / longest * 100 }}%"
        aria-label="Skills: {% for bar in timeline.bars %}{{ bar.name }}; {% endfor %}
          samples: {{ timeline.sample_count }}">
        {% for bar in timeline.bars %}
        <span class="number color{{ skills[bar.name] % 10 }}" title="{{ bar.name }}"
          style="left: {{ bar.start / 10 }}%; width: {{ bar.width / 10 }}%">
          {{- skills[bar.name] + 1 -}}
        </span>
        {% endfor %}
        <svg viewBox="0 0 1000 1" preserveAspectRatio="none" aria-hidden="true">
          <path d="{% for tick in timeline.ticks %}M{{ tick }} 0v1{% endfor %}"/>
        </svg>
      </div>
      <p>{{ "%.1f" | format(timeline.seconds) }} s</p>
    </div>
    {% endfor %}
    <details {{ "open" if timeline_skills | length <= 12 else "" }}>
      <summary>Skills ({{ timeline_skills | length }}); a tick is a sample</summary>
      <ul class="legend">
        {% for skill in timeline_skills %}
        <li>{{ number(skill) }} <bdi>{{ skill | truncate(160, true) }}</bdi></li>
        {% endfor %}
      </ul>
    </details>
  </div>
</section>
{% endif %}

<section aria-labelledby="dialogues">
  <h2 id="dialogues">Frames and dialogues</h2>
  {% if page.dialogues | length < page.total %}
  <p class="shown">
    {{ page.dialogues | length }} of {{ page.total | thousands }} dialogues are on this
    page, spread over episodes, skills and types.
  </p>
  {% endif %}

  {# The script shows the filters: without it they would do nothing. #}
  <form id="filters" role="search" hidden>
    {{ choice("episode", "Episode", options.episode) }}
    {{ choice("skill", "Skill", options.skill) }}
    {{ choice("scenario", "Scenario type", options.scenario) }}
    {{ choice("response", "Response type", options.response) }}
    {% if options.verified %}
    {{ choice("verified", "Verified", options.verified) }}
    {% endif %}
    <p class="search">
      <label for="search">Search</label>
      <input id="search" name="search" type="search" autocomplete="off"
        placeholder="Words, or press /" aria-keyshortcuts="/">
    </p>
    <p class="result">
      <output></output>
      <button type="reset">Show all</button>
    </p>
  </form>

  <div class="dialogues">
    {% for dialogue in page.dialogues %}
    {% set line = dialogue.line %}
    {% set id = "episode-%d-frame-%d" | format(line.episode_id, line.frame_index) %}
    <article id="{{ id }}" aria-labelledby="{{ id }}-title"
      data-episode="{{ line.episode_id }}" data-skill="{{ skills[line.skill_current] }}"
      data-scenario="{{ line.scenario_type }}" data-response="{{ line.response_type }}"
      data-verified="{{ line | verified }}">
      <h3 id="{{ id }}-title">
        <a href="#{{ id }}">Episode {{ line.episode_id }}</a>
        <span>frame {{ line.frame_index }},
          {{ "%.2f" | format(line.timestamp) }} s</span>
      </h3>

      {% if dialogue.views %}
      <div class="views">
        {% for camera_key, jpeg in dialogue.views %}
        <figure>
          <img src="{{ jpeg | data_url }}" decoding="async"
            alt="Episode {{ line.episode_id }}, frame {{ line.frame_index }}, camera
              {{ camera_key | short_camera }}">
          <figcaption><bdi>{{ camera_key | short_camera }}</bdi></figcaption>
        </figure>
        {% endfor %}
      </div>
      {% endif %}

      <div class="words">
        <div class="conversation">
          <p class="person" dir="auto">
            <span class="speaker" dir="ltr">Person</span>
            <bdi>{{ line.user_prompt }}</bdi>
          </p>
          <p class="robot" dir="auto">
            <span class="speaker" dir="ltr">Robot</span>
            <bdi>{{ line.robot_utterance }}</bdi>
          </p>
        </div>
        <dl class="context">
          <div>
            <dt>Skill</dt>
            <dd>
              {{ number(line.skill_current) }} <bdi>{{ line.skill_current }}</bdi>
            </dd>
          </div>
          <div>
            <dt>History</dt>
            <dd>
              {% for skill in line.skill_history[-3:] %}
              {% if loop.first and line.skill_history | length > 3 %}
              ({{ line.skill_history | length - 3 }} earlier)
              {% endif %}
              <bdi>{{ skill }}</bdi>{{ "" if loop.last else "," }}
              {% else %}
              nothing yet
              {% endfor %}
            </dd>
          </div>
          <div>
            <dt>Task</dt>
            <dd><bdi>{{ line.task_description }}</bdi></dd>
          </div>
        </dl>
        <ul class="labels">
          {% for type in (line.scenario_type, line.response_type) if type %}
          <li><bdi>{{ type }}</bdi></li>
          {% endfor %}
          {% if line | verified %}
          <li class="{{ line | verified | replace(' ', '-') }}">
            {{- "✓" if line.skill_recovered else "✗" }} skill {{ line | verified -}}
          </li>
          {% endif %}
        </ul>
      </div>
    </article>
    {% endfor %}
  </div>
</section>
</main>

<footer>
  <p>Made by <strong>annotate_pgen.py</strong>. The dialogues are synthetic: a
    vision-language model wrote them.</p>
</footer>
<script>{{ script }}</script>
</body>
</html>
"""

PAGE_STYLE = """
:root {
  --page: #f6f5f2;
  --panel: #ffffff;
  --ink: #1e2328;
  --quiet: #5b636d;
  --line: #e2e0da;
  --control: #85898f;
  --accent: #2a5db0;
  --person: #eceae5;
  --robot: #dce8fb;
  --good: #1c6b3a;
  --good-back: #e0f2e6;
  --bad: #8f4a00;
  --bad-back: #fceedb;
  --tick: #1e2328;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #15181b;
    --panel: #1d2125;
    --ink: #e7e9ec;
    --quiet: #a5adb7;
    --line: #31373e;
    --control: #7b848f;
    --accent: #8fb6f5;
    --person: #2b3036;
    --robot: #23395c;
    --good: #8ddba8;
    --good-back: #1d3527;
    --bad: #f2bd7c;
    --bad-back: #3b2c19;
    --tick: #e7e9ec;
  }
}
* { box-sizing: border-box; margin: 0; padding: 0; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body {
  background: var(--page);
  color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: anywhere;
}
header, main, footer { max-width: 82rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 2.5rem; }
ul { list-style: none; }
a {
  color: inherit; text-decoration-color: var(--control); text-decoration-thickness: 1px;
  text-underline-offset: .2em;
}
::placeholder { color: var(--quiet); opacity: 1; }
a:hover { text-decoration-color: currentColor; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
h1 { font-size: clamp(1.5rem, 5vw, 2.4rem); line-height: 1.15; letter-spacing: -.02em; }
h2 { font-size: 1.3rem; margin: 2.25rem 0 .9rem; letter-spacing: -.01em; }
h3 { font-size: 1rem; }
.kind { color: var(--accent); font-weight: 600; margin-bottom: .25rem; }
.lead { color: var(--quiet); font-size: 1.1rem; max-width: 44rem; margin-top: .75rem; }
.notice {
  background: var(--bad-back); color: var(--bad);
  border-radius: .5rem; padding: .6rem 1rem; margin-top: 1.25rem; max-width: 44rem;
}
footer { color: var(--quiet); font-size: .9rem; padding: 3rem 1.5rem; }
.panel {
  background: var(--panel); border: 1px solid var(--line); border-radius: .9rem;
  padding: 1.25rem 1.4rem; min-width: 0;
}
.panel h3 { margin-bottom: .75rem; }
.panels {
  display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr));
}

/* At a glance */
.figures {
  display: flex; flex-wrap: wrap; gap: 1px; margin-bottom: 1rem; overflow: hidden;
  background: var(--line); border: 1px solid var(--line); border-radius: .9rem;
}
.figures div {
  background: var(--panel); padding: .9rem 1.2rem; flex: 1 1 auto; min-width: 9rem;
  display: flex; flex-direction: column-reverse; justify-content: flex-end;
}
/* The figure alone makes the width, its name wraps below it. */
.figures dt {
  width: 0; min-width: 100%; color: var(--quiet); font-size: .875rem; line-height: 1.35;
}
.figures dd { font-size: 1.4rem; font-weight: 600; white-space: nowrap; }
.figures .long { flex-basis: 20rem; max-width: 100%; }
.figures .long dd { font-size: 1rem; white-space: normal; }
.counts { display: grid; gap: .8rem; }
.counts li { display: flex; flex-wrap: wrap; gap: .15rem .6rem; align-items: baseline; }
.counts bdi { flex: 1 1 auto; }
.counts .count, .timeline p { font-variant-numeric: tabular-nums; }
.counts small { color: var(--quiet); font-size: .8125rem; }
.track { flex-basis: 100%; background: var(--person); border-radius: 1rem; }
.track span {
  display: block; height: .5rem; min-width: .5rem;
  background: var(--accent); border-radius: 1rem;
}
.settings { display: grid; gap: .45rem; font-size: .95rem; }
.settings div { display: grid; grid-template-columns: 7rem 1fr; gap: 1rem; }
.settings dt { color: var(--quiet); }

/* Episodes: a strip of skills, samples as ticks below it */
.timeline {
  display: grid; grid-template-columns: 6.5rem 1fr 4rem; gap: 1rem;
  align-items: start; margin-bottom: .9rem;
}
.timeline h3, .timeline p { font-size: .9rem; font-weight: 400; margin: 0; }
.timeline p { text-align: right; color: var(--quiet); }
.strip { position: relative; height: 2.1rem; min-width: 2rem; }
.strip .number {
  position: absolute; top: 0; height: 1.4rem; min-width: 0; padding: 0;
  border-radius: .25rem; border-right: 1px solid var(--panel);
  overflow: hidden; white-space: nowrap;
}
.strip svg {
  position: absolute; bottom: 0; left: 0; width: 100%; height: .5rem; overflow: visible;
}
.strip path {
  stroke: var(--tick); stroke-width: 1.5; vector-effect: non-scaling-stroke;
}
.number {
  display: inline-block; min-width: 1.35rem; padding: 0 .25rem; border-radius: .35rem;
  color: #15181b; font-size: .8125rem; font-weight: 600; line-height: 1.4rem;
  text-align: center; print-color-adjust: exact; -webkit-print-color-adjust: exact;
}
.color0 { background: #9cc3ee; }
.color1 { background: #f3bd7f; }
.color2 { background: #9fd6a4; }
.color3 { background: #eaa5b4; }
.color4 { background: #c3b2ea; }
.color5 { background: #e6d67a; }
.color6 { background: #86d3d0; }
.color7 { background: #d9b596; }
.color8 { background: #b9c1cb; }
.color9 { background: #e3a8e0; }
.legend {
  display: flex; flex-wrap: wrap; gap: .4rem 1.1rem;
  margin-top: .6rem; font-size: .9rem;
}
summary { color: var(--quiet); font-size: .9rem; cursor: pointer; width: fit-content; }

/* Filters */
.shown { color: var(--quiet); margin-bottom: 1rem; }
#filters {
  display: flex; flex-wrap: wrap; gap: .75rem 1rem; align-items: end;
  margin: 0 -1.5rem 1rem; padding: .75rem 1.5rem;
  background: var(--page); border-bottom: 1px solid var(--line);
}
#filters[hidden] { display: none; }
#filters p { min-width: 0; flex: 1 1 8rem; }
#filters .search { flex-grow: 2; flex-basis: 11rem; }
#filters label { display: block; color: var(--quiet); font-size: .875rem; }
#filters select, #filters input, #filters button {
  width: 100%; min-height: 2.6rem; padding: .3rem .6rem; font: inherit;
  color: var(--ink); background: var(--panel);
  border: 1px solid var(--control); border-radius: .5rem;
}
#filters button {
  width: auto; padding: .3rem .9rem; cursor: pointer; white-space: nowrap;
}
#filters .result {
  display: flex; flex: 1 0 auto; gap: 1rem; align-items: center;
  justify-content: space-between; max-width: 100%; min-height: 2.6rem;
  font-variant-numeric: tabular-nums;
}

/* Frames and dialogues */
.dialogues {
  display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr));
}
article {
  background: var(--panel); border: 1px solid var(--line); border-radius: .9rem;
  padding: 1.1rem; min-width: 0; scroll-margin-top: 8rem;
  display: grid; grid-template-columns: 14rem 1fr; gap: .9rem 1.2rem;
  align-content: start;
}
article[hidden] { display: none; }
article:target { border-color: var(--accent); }
article h3 { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: 0 .6rem; }
article h3 span { color: var(--quiet); font-weight: 400; }
.views {
  display: grid; gap: .6rem; align-content: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 9rem), 1fr));
}
.views img {
  display: block; width: 100%; max-height: 20rem; object-fit: contain;
  border-radius: .5rem; background: var(--person);
}
figcaption {
  color: var(--quiet); font-size: .8125rem; line-height: 1.35; padding-top: .2rem;
}
.words { min-width: 0; grid-column: 2; }
article > .words:nth-child(2) { grid-column: 1 / -1; }
.conversation {
  display: flex; flex-direction: column; gap: .5rem; margin-bottom: 1rem;
}
.conversation p {
  max-width: min(92%, 34rem); padding: .5rem .85rem .6rem; border-radius: 1.1rem;
  line-height: 1.4;
}
.speaker { display: block; color: var(--quiet); font-size: .8125rem; }
.person {
  background: var(--person); align-self: start; border-bottom-left-radius: .25rem;
}
.robot {
  background: var(--robot); align-self: end; border-bottom-right-radius: .25rem;
}
.context { display: grid; gap: .35rem; font-size: .9rem; line-height: 1.45; }
.context div { display: grid; grid-template-columns: 3.75rem 1fr; gap: .5rem; }
.context dt { color: var(--quiet); }
.labels { display: flex; flex-wrap: wrap; gap: .4rem; margin-top: .9rem; }
.labels li {
  font-size: .8125rem; line-height: 1.3; padding: .2rem .65rem; border-radius: 1rem;
  border: 1px solid var(--line); color: var(--quiet);
}
.labels .recovered { color: var(--good); background: var(--good-back); }
.labels .not-recovered { color: var(--bad); background: var(--bad-back); }

@media (min-width: 60rem) and (min-height: 40rem) {
  #filters { position: sticky; top: 0; z-index: 1; }
}
@media (max-width: 40rem) {
  header, main, footer { padding-left: 1rem; padding-right: 1rem; }
  header { padding-top: 2rem; }
  h2 { margin-top: 2rem; }
  .settings div { grid-template-columns: 1fr; gap: 0; }
  .timeline { grid-template-columns: 1fr auto; gap: .2rem 1rem; }
  .timeline .strip { grid-row: 2; grid-column: 1 / -1; }
  #filters { margin: 0 -1rem 1rem; padding: .75rem 1rem; }
  .figures div { min-width: 8rem; padding: .8rem 1rem; }
  .figures .long, #filters .result { flex-basis: 100%; }
  article { grid-template-columns: 1fr; }
  .words { grid-column: 1; }
}
@media print {
  :root { --page: #ffffff; }
  body { font-size: 10pt; }
  #filters { display: none; }
  .panel, .figures, article { break-inside: avoid; }
  .track, .track span, .conversation p {
    print-color-adjust: exact; -webkit-print-color-adjust: exact;
  }
}
"""

PAGE_SCRIPT = """
// Shows the articles that match the filters, and keeps the filters in the address.
"use strict";
const form = document.getElementById("filters");
const selects = [...form.querySelectorAll("select")];
const search = document.getElementById("search");
const count = form.querySelector("output");
const articles = [...document.querySelectorAll("article")];
const words = new Map(articles.map((article) => [article, wordsOf(article)]));

function wordsOf(article) {
  const texts = [...article.querySelectorAll("bdi")];
  return texts.map((text) => text.textContent).join(" ").toLowerCase();
}

function matches(article) {
  const asked = search.value.toLowerCase().split(/\\s+/);
  return (
    selects.every(({ name, value }) => !value || article.dataset[name] === value) &&
    asked.every((word) => words.get(article).includes(word))
  );
}

function filter() {
  articles.forEach((article) => { article.hidden = !matches(article); });
  const shown = articles.filter((article) => !article.hidden).length;
  count.textContent = `${shown} of ${articles.length} dialogues`;
}

function remember() {
  const fields = [...selects, search].filter(({ value }) => value);
  const state = new URLSearchParams(fields.map(({ name, value }) => [name, value]));
  history.replaceState(null, "", `#${state}`);
}

// An address ends with filters ("#episode=3&search=brick"), or names an article.
function recall() {
  const hash = location.hash.slice(1);
  const state = new URLSearchParams(hash.includes("=") ? hash : "");
  for (const field of [...selects, search]) {
    const value = state.get(field.name) || "";
    field.value = value;
    // A select without that option would be left with nothing chosen.
    if (field.value !== value) field.value = "";
  }
  filter();
}

form.addEventListener("input", () => { filter(); remember(); });
form.addEventListener("submit", (event) => event.preventDefault());
// The fields are empty only after the event.
form.addEventListener("reset", () => setTimeout(() => { filter(); remember(); }));
window.addEventListener("hashchange", recall);
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, select, textarea");
  const combined = event.ctrlKey || event.metaKey || event.altKey;
  if (event.key !== "/" || typing || combined) return;
  event.preventDefault();
  search.focus();
});
form.hidden = false;
recall();
"""


@dataclass(frozen=True)
class PageDialogue:
    """A dialogue on the page.

    Attributes:
        line: its line of meta/syn_annotations.jsonl.
        views: camera key and JPEG of each view that the model saw.
    """

    line: dict[str, Any]
    views: Sequence[tuple[str, bytes]]


@dataclass(frozen=True)
class CountBar:
    """How many dialogues have a type. `percent` is the bar's width, of the largest."""

    name: str
    count: int
    percent: int
    note: str = ""


@dataclass(frozen=True)
class SkillBar:
    """A skill in a timeline; start and width in thousandths of the episode."""

    name: str
    start: int
    width: int


@dataclass(frozen=True)
class Timeline:
    """An episode's skills and samples. Ticks in thousandths of the episode."""

    episode_id: int
    seconds: float
    bars: Sequence[SkillBar]
    ticks: Sequence[int]
    sample_count: int


@dataclass(frozen=True)
class PageContent:
    """What the page shows.

    Attributes:
        dataset_name: the title.
        dialogues: those on the page, in dataset order.
        total: the number of dialogues there are, on the page or not.
        settings: name and text of each setting.
        figures: name and text of each figure of quality.
        scenario_bars: counts of all dialogues by scenario type.
        response_bars: counts of all dialogues by response type.
        timelines: those of a few episodes.
        notice: a sentence that stands out at the top, such as one on a preview.
    """

    dataset_name: str
    dialogues: Sequence[PageDialogue]
    total: int
    settings: Sequence[tuple[str, str]] = ()
    figures: Sequence[tuple[str, str]] = ()
    scenario_bars: Sequence[CountBar] = ()
    response_bars: Sequence[CountBar] = ()
    timelines: Sequence[Timeline] = ()
    notice: str = ""


def pick_for_page(
    lines: Sequence[dict[str, Any]], limit: int = MAX_PAGE_DIALOGUES
) -> list[int]:
    """Choose dialogues for the page, spread over types, skills and episodes.

    In round n, every scenario type, response type, skill and episode that has fewer
    than n dialogues on the page gets another one, as long as the page has room.

    Args:
        lines: all lines of meta/syn_annotations.jsonl, in dataset order.
        limit: the largest number of dialogues to choose.

    Returns:
        Positions in `lines`, ascending; the same for the same lines.
    """
    if len(lines) <= limit:
        return list(range(len(lines)))
    shuffled = list(range(len(lines)))
    random.Random(0).shuffle(shuffled)
    # For each value of each field, the positions of its lines.
    waiting: dict[str, dict[Any, list[int]]] = {}
    for name in SPREAD_OVER:
        waiting[name] = defaultdict(list)
        for position in shuffled:
            waiting[name][lines[position][name]].append(position)
    picked: set[int] = set()
    used: Counter[tuple[str, Any]] = Counter()
    for wanted in range(1, limit + 1):
        for name in SPREAD_OVER:
            for value, positions in waiting[name].items():
                while positions and used[name, value] < wanted:
                    position = positions.pop()
                    if position in picked:
                        continue
                    picked.add(position)
                    for other_name in SPREAD_OVER:
                        used[other_name, lines[position][other_name]] += 1
                    if len(picked) == limit:
                        return sorted(picked)
    return sorted(picked)


def thumbnail(
    image: Image.Image, width: int = THUMBNAIL_WIDTH, quality: int = 80
) -> bytes:
    """Encode a picture as a small JPEG.

    Args:
        image: a picture of any size and mode.
        width: the largest width, and the largest height, in pixels. A smaller
            picture keeps its size.
        quality: JPEG quality, 1 to 95.

    Returns:
        The JPEG file.
    """
    small = image.convert("RGB")
    small.thumbnail((width, width))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def thousandth(time: float, seconds: float) -> int:
    """Where a time lies in an episode of that length, from 0 to 1000."""
    if seconds <= 0:
        return 0
    return round(1000 * min(max(time / seconds, 0), 1))


def make_timeline(
    episode_id: int,
    skills: Sequence[Skill],
    seconds: float,
    sample_times: Sequence[float],
) -> Timeline:
    """Lay out one episode. A frame's skill is the last one that has started.

    Args:
        episode_id: the episode's index.
        skills: its skills, sorted by start, at least one.
        seconds: its length.
        sample_times: times of its samples, in seconds from its first frame.

    Returns:
        The timeline. A skill narrower than a thousandth of the episode has no bar.
    """

    starts = [0, *(thousandth(skill.start, seconds) for skill in skills[1:])]
    ends = [*starts[1:], 1000]
    bars = [
        SkillBar(name=skill.name, start=start, width=end - start)
        for skill, start, end in zip(skills, starts, ends, strict=True)
        if end > start
    ]
    ticks = sorted({thousandth(time, seconds) for time in sample_times})
    return Timeline(
        episode_id=episode_id,
        seconds=seconds,
        bars=bars,
        ticks=ticks,
        sample_count=len(sample_times),
    )


def pick_timelines(
    episode_ids: Sequence[int], limit: int = MAX_PAGE_TIMELINES
) -> list[int]:
    """Choose at most `limit` episodes, evenly from the first to the last."""
    if len(episode_ids) <= limit:
        return list(episode_ids)
    step = (len(episode_ids) - 1) / (limit - 1)
    return [episode_ids[round(step * i)] for i in range(limit)]


def count_bars(lines: Sequence[dict[str, Any]], kind: str) -> list[CountBar]:
    """Count dialogues by type, the most frequent value first.

    Args:
        lines: all lines of meta/syn_annotations.jsonl.
        kind: "scenario_type" or "response_type".

    Returns:
        A bar for each value; its note says in how many --verify recovered the skill.
    """
    counts = Counter(line[kind] for line in lines)
    verified = Counter(line[kind] for line in lines if "skill_recovered" in line)
    recovered = Counter(line[kind] for line in lines if line.get("skill_recovered"))
    bars = []
    for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        percent = round(100 * count / max(counts.values()))
        note = ""
        if verified[name]:
            note = f"{recovered[name]:,} recovered"
        bars.append(CountBar(name=name, count=count, percent=percent, note=note))
    return bars


def page_text(value: Any) -> str:
    """Make any value harmless text of readable length; HTML (Markup) stays as it is.

    Every value in the template passes through here before it is escaped.
    """
    from markupsafe import Markup

    if isinstance(value, Markup):
        return value
    text = str(value)[: 2 * MAX_PAGE_TEXT]
    # Half a surrogate pair is valid in JSON, but no file can hold it.
    text = one_line(text.encode("utf-8", "replace").decode("utf-8"))
    if len(text) <= MAX_PAGE_TEXT:
        return text
    return text[:MAX_PAGE_TEXT] + "…"


def data_url(jpeg: bytes) -> Markup:
    """A JPEG file as the address of a picture."""
    from markupsafe import Markup

    return Markup("data:image/jpeg;base64,") + base64.b64encode(jpeg).decode("ascii")


def short_camera(camera_key: str) -> str:
    """The part of a camera key that differs: "front" of observation.images.front."""
    return camera_key.removeprefix("observation.images.")[:80]


def thousands(count: int) -> str:
    """A count with commas: 12,345."""
    return f"{count:,}"


def verified_label(line: dict[str, Any]) -> str:
    """ "recovered" or "not recovered" where --verify was used, else nothing."""
    if "skill_recovered" not in line:
        return ""
    return "recovered" if line["skill_recovered"] else "not recovered"


def filter_options(
    lines: Sequence[dict[str, Any]], skills: dict[str, int]
) -> dict[str, list[tuple[str, str]]]:
    """What the filters offer: value and text of each option, by name of the filter.

    Args:
        lines: the lines on the page.
        skills: number of each skill. A filter goes by it, since names may be long.
    """
    episodes = sorted({line["episode_id"] for line in lines})
    current = {line["skill_current"] for line in lines}
    verified = sorted({verified_label(line) for line in lines} - {""})
    types = {}
    for kind in ("scenario_type", "response_type"):
        types[kind] = sorted({line[kind] for line in lines} - {""})
    return {
        "episode": [(str(episode), str(episode)) for episode in episodes],
        "skill": [
            (str(number), f"{number + 1}. {name}")
            for name, number in skills.items()
            if name in current
        ],
        "scenario": [(name, name) for name in types["scenario_type"]],
        "response": [(name, name) for name in types["response_type"]],
        "verified": [(name, name) for name in verified],
    }


def render_page(page: PageContent) -> str:
    """Fill in the template.

    Args:
        page: what to show.

    Returns:
        The HTML file's text.
    """
    import jinja2
    from markupsafe import Markup

    lines = [dialogue.line for dialogue in page.dialogues]
    timeline_skills = list(
        dict.fromkeys(bar.name for strip in page.timelines for bar in strip.bars)
    )
    current_skills = [line["skill_current"] for line in lines]
    skills: dict[str, int] = {}
    for name in timeline_skills + current_skills:
        skills.setdefault(name, len(skills))

    environment = jinja2.Environment(
        autoescape=True,
        finalize=page_text,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_url"] = data_url
    environment.filters["short_camera"] = short_camera
    environment.filters["thousands"] = thousands
    environment.filters["verified"] = verified_label
    # The browser runs the script with this hash and no other, wherever one came from.
    digest = hashlib.sha256(PAGE_SCRIPT.encode("utf-8")).digest()
    html = environment.from_string(PAGE).render(
        page=page,
        skills=skills,
        timeline_skills=timeline_skills,
        longest=max((strip.seconds for strip in page.timelines), default=0) or 1,
        options=filter_options(lines, skills),
        style=Markup(PAGE_STYLE),
        script=Markup(PAGE_SCRIPT),
        script_hash=f"sha256-{base64.b64encode(digest).decode('ascii')}",
    )
    return html.lstrip()


def with_smaller_pictures(page: PageContent, width: int, quality: int) -> PageContent:
    """The same page with pictures of that width in pixels and that JPEG quality."""
    from PIL import Image

    dialogues = []
    for dialogue in page.dialogues:
        views = []
        for camera_key, jpeg in dialogue.views:
            with Image.open(io.BytesIO(jpeg)) as image:
                views.append((camera_key, thumbnail(image, width, quality)))
        dialogues.append(replace(dialogue, views=views))
    return replace(page, dialogues=dialogues)


def with_fewer_dialogues(page: PageContent) -> PageContent:
    """The same page with half of its dialogues, spread in the same way."""
    lines = [dialogue.line for dialogue in page.dialogues]
    kept = pick_for_page(lines, limit=len(lines) // 2)
    return replace(page, dialogues=[page.dialogues[position] for position in kept])


def write_page(path: Path, page: PageContent) -> None:
    """Write the page, in at most MAX_PAGE_BYTES.

    While it is too large, pictures get smaller; then dialogues are left out. The page
    says how many of all dialogues it shows.

    Args:
        path: the HTML file to write.
        page: what to show.
    """
    html = render_page(page).encode("utf-8")
    for width, quality in SMALLER_PICTURES:
        if len(html) <= MAX_PAGE_BYTES:
            break
        page = with_smaller_pictures(page, width=width, quality=quality)
        html = render_page(page).encode("utf-8")
    while len(html) > MAX_PAGE_BYTES and page.dialogues:
        page = with_fewer_dialogues(page)
        html = render_page(page).encode("utf-8")
    with writing(path):
        path.write_bytes(html)


def make_page(
    job: Job, annotations: Sequence[dict[str, Any]], late_share: float, notice: str = ""
) -> PageContent:
    """Collect what the page shows: dialogues with their frames, counts and timelines.

    Args:
        job: the whole job.
        annotations: lines of syn_annotations.jsonl, in dataset order.
        late_share: of the frames, that carry another skill's dialogue.
        notice: a sentence that stands out at the top.
    """
    figures = [
        ("dialogues", str(len(annotations))),
        ("frames", str(job.plan.frame_count)),
        ("frames with another skill's dialogue", f"{late_share:.1%}"),
    ]
    figures += measure_quality(annotations)
    samples = {}
    for sample in job.plan.samples:
        samples[sample.episode_id, sample.frame_index] = sample
    lines = [annotations[position] for position in pick_for_page(annotations)]
    shown = [samples[line["episode_id"], line["frame_index"]] for line in lines]
    dialogues = []
    for line, views in zip(lines, read_views(job.meta, shown, job.plan), strict=True):
        images = []
        for camera_key, view in zip(job.plan.camera_keys, views or (), strict=False):
            images.append((camera_key, thumbnail(view)))
        dialogues.append(PageDialogue(line, images))
    episodes = {episode.episode_index: episode for episode in job.plan.episodes}
    timelines = []
    for episode_index in pick_timelines(list(episodes)):
        episode = episodes[episode_index]
        frames = [sample.index - episode.first_index for sample in episode.samples]
        timelines.append(
            make_timeline(
                episode_id=episode_index,
                skills=job.plan.skill_source.episodes[episode_index].skills,
                seconds=len(episode.skill_numbers) / job.meta.fps,
                sample_times=[frame / job.meta.fps for frame in frames],
            )
        )
    return PageContent(
        dataset_name=job.name,
        dialogues=dialogues,
        total=len(annotations),
        settings=describe_settings(job.settings),
        figures=figures,
        scenario_bars=count_bars(annotations, "scenario_type"),
        response_bars=count_bars(annotations, "response_type"),
        timelines=timelines,
        notice=notice,
    )


def describe_settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """The settings that a reader of the page or the card wants to know, in words."""
    model = settings["model"]
    if Path(model).is_absolute():
        # Whose folder it is in is nobody's business.
        model = Path(model).name
    return [
        ("model", model),
        ("engine", settings["engine"]),
        ("skills from", settings["skill_source"]),
        ("cameras", ", ".join(settings["camera_keys"])),
        ("sample interval", f"{settings['sample_interval']} s"),
        ("grid starts anew at each skill", "yes" if settings["align_skills"] else "no"),
        ("verified", "yes" if settings["verify"] else "no"),
        ("temperature", str(settings["temperature"])),
        ("seed", str(settings["seed"])),
    ]


# --------------------------------------------------------------------------------- Hub
# The card, the rights to write, and the upload.

PAPER = "https://arxiv.org/abs/2502.19417"
RETRY_AFTER = (1, 5, 20, 60, 120)  # seconds

READING = """\
from lerobot.datasets.lerobot_dataset import LeRobotDataset
import pandas as pd

dataset = LeRobotDataset({arguments})
tasks = pd.read_parquet(dataset.root / "meta" / "tasks_high_level.parquet")
print(tasks.iloc[dataset[0]["task_index_high_level"].item()])"""

CARD = """\
---
{{ card_data }}
---
# {{ name }}

Each frame has a dialogue that goes with what the robot is doing: what a person might
have said to bring it about, and what the robot would answer. **The dialogues are
synthetic**: a vision-language model wrote them, after [Hi Robot]({{ paper }}). Nobody
said them, and nobody has checked them.
{% if source %}
It was made from [{{ source }}](https://huggingface.co/datasets/{{ source }}).
{% endif %}
- **License:** {{ license or "not known" }}
- **Paper:** {{ paper }}

## Dialogues

| | |
| --- | --- |
{% for label, value in facts -%}
| {{ label | cell }} | {{ value | cell }} |
{% endfor %}
{% for title, counts in types -%}
| {{ title }} | dialogues |
| --- | --- |
{% for type, count in counts -%}
| {{ type | cell }} | {{ count }} |
{% endfor %}
{% endfor -%}
| scenario | response | skill | user prompt | robot utterance |
| --- | --- | --- | --- | --- |
{% for line in examples -%}
| {{ line.scenario_type | cell }} | {{ line.response_type | cell }} \
| {{ line.skill_current | cell }} | {{ line.user_prompt | cell }} \
| {{ line.robot_utterance | cell }} |
{% endfor %}
## How to read it

`{{ column }}` of a frame is the row of its dialogue in
`meta/tasks_high_level.parquet`, with skill and types; `meta/syn_annotations.jsonl` has
all dialogues, with what the model was told; `meta/annotate_pgen.json` has the settings.

```python
{{ reading }}
```

A local copy is opened with `root="<its folder>"` beside the name.

LeRobot's tools that write a new dataset (`delete_episodes`, `split_dataset`,
`merge_datasets`, `remove_feature`) leave the table of dialogues behind: copy it to the
new `meta/`. Merge before annotating, as the rows of two tables collide.

## Dataset structure

[meta/info.json](meta/info.json):

```json
{{ info }}
```
{% if source_text %}
---

{{ source_text }}
{% endif -%}
"""


def write_card(folder: Path, name: str) -> None:
    """Write README.md of a finished dataset, from what stands in its folder.

    The text and metadata (licence, tags and so on) of the source's card are kept.

    Args:
        folder: the dataset.
        name: what it is called on the Hub.
    """
    import jinja2
    from huggingface_hub import DatasetCard, DatasetCardData

    record = read_json(folder / RECORD)
    settings = record["settings"]
    annotations = read_annotations(folder)
    info = (folder / "meta" / "info.json").read_text(encoding="utf-8")
    source_data: dict[str, Any] = {}
    source_text = record["source_card"]
    try:
        source_card = DatasetCard(source_text, ignore_metadata_errors=True)
        source_data = source_card.data.to_dict()
        source_text = source_card.text
    except Exception:
        # Metadata that cannot be read stay in the text.
        say("the source's README.md has no metadata that can be read")
    card_data: Any = DatasetCardData()
    for key, value in source_data.items():
        # The one key that has another name in huggingface_hub.
        name_there = "train_eval_index" if key == "train-eval-index" else str(key)
        # dataset_info describes the columns that were. A method is not to be hidden.
        if key != "dataset_info" and not hasattr(DatasetCardData, name_there):
            setattr(card_data, name_there, value)
    card_data.tags = merge_tags(source_data.get("tags"))
    if not source_data.get("task_categories"):
        card_data.task_categories = ["robotics"]
    if record["source"]:
        card_data.source_datasets = [record["source"]]
    card_data.configs = [{"config_name": "default", "data_files": "data/*/*.parquet"}]
    facts = [
        ("date", record["date"]),
        ("frames", str(json.loads(info).get("total_frames", "not known"))),
        ("dialogues", str(len(annotations))),
    ]
    facts += describe_settings(settings)
    late = f"{record['late_share']:.1%} of frames"
    facts.append(("carry another skill's dialogue", late))
    facts += measure_quality(annotations)
    environment = jinja2.Environment(keep_trailing_newline=True)
    environment.filters["cell"] = table_cell
    text = environment.from_string(CARD).render(
        card_data=card_data.to_yaml(),
        name=name,
        paper=PAPER,
        source=record["source"],
        license=source_data.get("license"),
        facts=facts,
        types=[
            ("scenario type", count_types(annotations, "scenario_type")),
            ("response type", count_types(annotations, "response_type")),
        ],
        examples=annotations[:: math.ceil(len(annotations) / 3)],
        column=COLUMN,
        reading=READING.format(arguments=f'"{name}", video_backend="pyav"'),
        info=info,
        source_text=source_text.strip(),
    )
    with writing(folder / "README.md") as path:
        path.write_text(text, encoding="utf-8")


def merge_tags(source_tags: Any) -> list[str]:
    """The tags of the new card: LeRobot's, synthetic, and those of the source."""
    given = source_tags if isinstance(source_tags, list) else [source_tags]
    tags = ["LeRobot", "synthetic"]
    tags += [tag for tag in given if isinstance(tag, str)]
    return list(dict.fromkeys(tags))


def table_cell(value: Any) -> str:
    """A text that stays within its cell of a table in Markdown, and is no HTML."""
    text = one_line(str(value))
    return text.replace("|", "\\|").replace("<", "&lt;")


def rename_dataset(folder: Path, name: str) -> None:
    """Give a finished dataset another name, and write its card again.

    Raises:
        RunError: it cannot be written.
    """
    record = read_json(folder / RECORD)
    if record["name"] == name:
        return
    write_card(folder, name)
    # Last, so that an interrupt leaves the old name, and the card is written again.
    record["name"] = name
    with writing(folder / RECORD) as path:
        write_json(path, record)


def ask_hub(call: Callable, **arguments: Any) -> Any:
    """Call the Hub, again when it is busy (429, 5xx) or the connection breaks.

    Raises:
        Exception: whatever the last call raised.
    """
    for pause in RETRY_AFTER:
        try:
            return call(**arguments)
        except Exception as error:
            if not is_passing(error):
                raise
            say(f"the Hub: {str(error)[:99]}; again in {pause} s")
        time.sleep(pause)
    return call(**arguments)


def is_passing(error: Exception) -> bool:
    """Whether an error of the Hub's client is worth another try.

    The clients raise errors of many libraries; an answer of the Hub may be attached to
    the error or to its cause.
    """
    for candidate in (error, error.__cause__):
        answer = getattr(candidate, "response", None)
        # Compared with None, since a response that reports an error is false.
        if answer is not None:
            return answer.status_code >= 500 or answer.status_code == 429
    for candidate in (error, error.__cause__):
        library = type(candidate).__module__.partition(".")[0]
        if library in ("httpx", "requests"):
            return True
    return isinstance(error, (ConnectionError, TimeoutError, RuntimeError))


def open_target(target: str, source: str | None, private: bool) -> None:
    """Make the repository on the Hub if it is not there, and try the rights to write.

    Args:
        target: its name.
        source: name of the source's repository. If it is private, gated or not shown
            to this user, the target is made private.
        private: whether it is to be private in any case.

    Raises:
        InputError: this user may not write to it, or it is public although it has to
            be private.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with errors_as(
        InputError,
        f"--push-to-hub: cannot write to {target}",
        "log in with `hf auth login` as somebody who may, or name another repository "
        "with --new-repo-id",
    ):
        ask_hub(api.whoami)
        reason = "--private is given"
        if not private and source and is_hidden(source):
            private = True
            reason = f"{source} is private, gated or not shown to this user"
        ask_hub(
            api.create_repo,
            repo_id=target,
            repo_type="dataset",
            private=private or None,
            exist_ok=True,
        )
        if private:
            known = ask_hub(api.repo_info, repo_id=target, repo_type="dataset")
            if not known.private:
                raise InputError(
                    f"--push-to-hub: {target} is public, but {reason}; make it private"
                )
        # The first step of an upload, which changes nothing. create_repo succeeds for a
        # repository that is there already, also without the right to write to it.
        ask_hub(
            api.preupload_lfs_files,
            repo_id=target,
            repo_type="dataset",
            additions=[CommitOperationAdd("README.md", b"-")],
        )
    say(f"the result will be pushed to {target}")


def is_hidden(repo_id: str) -> bool:
    """Whether a dataset on the Hub is private, gated, or not shown to this user."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        known = ask_hub(HfApi().repo_info, repo_id=repo_id, repo_type="dataset")
    except RepositoryNotFoundError:
        return True
    return bool(known.private or known.gated)


def push(folder: Path, target: str) -> None:
    """Upload a dataset, and tag it with its version, which LeRobot asks for.

    Args:
        folder: the dataset.
        target: name of the repository. Files there that are not in the folder are
            deleted.

    Raises:
        RunError: the upload failed; the folder stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    api = HfApi()
    tag = read_json(folder / "meta" / "info.json")["codebase_version"]
    with errors_as(
        RunError,
        f"--push-to-hub: {target}",
        f"the dataset is safe in {folder}, and the same command, without --overwrite, "
        "only uploads",
    ):
        ask_hub(
            api.upload_folder,
            repo_id=target,
            repo_type="dataset",
            folder_path=folder,
            commit_message="Add dialogues",
            delete_patterns="*",
            ignore_patterns=[".cache/*", ".gitignore"],
        )
        arrived = ask_hub(api.list_repo_files, repo_id=target, repo_type="dataset")
        sent = [file for file in list_source_files(folder) if file.name != ".gitignore"]
        missing = sorted({file.as_posix() for file in sent} - set(arrived))
        if missing:
            raise OSError(f"{missing[:3]} did not arrive")
        # There may be no such tag, or an earlier try has deleted it.
        with suppress(RevisionNotFoundError):
            ask_hub(api.delete_tag, repo_id=target, repo_type="dataset", tag=tag)
        ask_hub(
            api.create_tag, repo_id=target, repo_type="dataset", tag=tag, exist_ok=True
        )
    print(f"pushed to      {api.endpoint}/datasets/{target}")


# --------------------------------------------------------------------------------- job
# The whole job, from the flags to the new dataset.


@dataclass(frozen=True)
class Job:
    """What a command line comes down to, before anything is generated or written."""

    args: argparse.Namespace
    # LeRobotDatasetMetadata of the source.
    meta: Any
    plan: Plan
    # All that the dialogues depend on.
    settings: dict[str, Any]
    output: Path
    # The folder of the work, until the output appears whole.
    work_dir: Path
    # Of the new dataset, on the Hub.
    name: str


def annotate_dataset(args: argparse.Namespace) -> None:
    """Do the whole job, from the source dataset to the new one.

    Args:
        args: the flags.

    Raises:
        InputError: what the user gave cannot be used.
        RunError: the run cannot go on; the work is kept.
    """
    launch = Launch()
    if launch.rank > 0:
        run_as_worker(args, launch)
        return
    job = prepare_job(args)
    if args.dry_run:
        print_plan(job)
        dismiss_ranks(launch, job.settings)
        return
    check_output(job)
    if args.preview and not is_finished(job.output):
        preview(job, launch)
        return
    if args.push_to_hub:
        open_target(job.name, args.repo_id, args.private)
    if is_finished(job.output) and not args.overwrite:
        print(f"finished already, with the same settings: {job.output}")
        print(f"look at {job.output / 'meta' / 'dialogues.html'}")
        dismiss_ranks(launch, job.settings)
        rename_dataset(job.output, job.name)
    else:
        make_dataset(job, launch)
    if args.push_to_hub:
        push(job.output, job.name)


def prepare_job(args: argparse.Namespace, quiet: bool = False) -> Job:
    """Find the source, check it, and plan the job.

    Args:
        args: the flags.
        quiet: whether to print nothing, as by ranks other than 0.

    Raises:
        InputError: the dataset cannot be annotated.
    """
    with saying_how_long("loading LeRobot", quiet):
        import av
        from lerobot.utils.constants import HF_LEROBOT_HOME

        # It loads torch, which takes longest. All that follows needs it.
        importlib.import_module("lerobot.datasets.lerobot_dataset")
    root = find_dataset(args.repo_id, args.data_dir, args.revision).resolve()
    base = HF_LEROBOT_HOME / args.repo_id if args.repo_id else root
    output = args.output_dir or base.with_name(base.name + SUFFIX)
    with errors_as(InputError, f"--output-dir {output}", "name another folder"):
        output = output.resolve()
        work_dir = Path(f"{output}.partial")
        # Fails where the name is too long.
        work_dir.exists()
    if not is_text(str(output)):
        raise InputError(
            "--output-dir: holds bytes that are no UTF-8, which pyarrow cannot write "
            "to; name another folder"
        )
    for folder in (output, work_dir):
        if root.is_relative_to(folder) or is_in_dataset(folder, root):
            raise InputError(
                f"--output-dir {output}: overlaps the source; name another folder"
            )
    meta = open_dataset(root, args.repo_id)
    # LeRobot sets FFmpeg's own messages free; what is broken is reported here.
    av.logging.set_level(av.logging.PANIC)
    records = [work_dir / "run.json", output / RECORD]
    dataset = dataset_fingerprint(meta)
    check_files = not was_checked(dataset, records)
    reading = "reading and checking" if check_files else "reading"
    with saying_how_long(f"{reading} {root}", quiet):
        plan = make_plan(
            dataset=meta,
            sample_interval=args.sample_interval,
            num_image_views_per_sample=args.num_image_views_per_sample,
            camera_keys=args.camera_keys,
            seed=args.seed,
            align_skills=args.align_skills,
            check_files=check_files,
        )
    source_name = args.repo_id or f"local/{root.name}"
    return Job(
        args=args,
        meta=meta,
        plan=plan,
        settings=make_settings(args, plan, dataset),
        output=output,
        work_dir=work_dir,
        name=args.new_repo_id or source_name + SUFFIX,
    )


def is_in_dataset(path: Path, root: Path) -> bool:
    """Whether a path lies in a dataset, also through the links in it."""
    folders = {root}
    for folder, subfolders, _ in os.walk(root):
        for name in subfolders:
            folders.add(Path(folder, name).resolve())
    return any(path.is_relative_to(folder) for folder in folders)


def was_checked(dataset: str, records: Sequence[Path]) -> bool:
    """Whether an earlier run has checked the same files.

    Args:
        dataset: fingerprint of the dataset.
        records: files in which earlier runs may have kept their settings.
    """
    settings = [read_settings(path) for path in records]
    return any(found.get("dataset") == dataset for found in settings)


def make_settings(args: argparse.Namespace, plan: Plan, dataset: str) -> dict[str, Any]:
    """All that the dialogues depend on.

    The URL of a server, the batch size, device and precision may change when a run goes
    on, and are not among them.

    Args:
        args: the flags.
        plan: the whole job.
        dataset: fingerprint of the dataset.
    """
    return {
        "engine": "server" if args.server else "transformers",
        "model": name_model(args),
        "temperature": args.temperature,
        "sample_interval": args.sample_interval,
        "align_skills": args.align_skills,
        "camera_keys": plan.camera_keys,
        "seed": args.seed,
        "verify": args.verify,
        "skill_source": plan.skill_source.name,
        "skills": skills_fingerprint(plan.skill_source),
        "dataset": dataset,
        "prompt": prompt_settings(),
        "samples": samples_fingerprint(plan.samples),
    }


def name_model(args: argparse.Namespace) -> str:
    """The model as the settings name it.

    Raises:
        InputError: none is named, and a server is not there or serves several.
    """
    if args.server and not args.model:
        return str(ServerPgen(args.server).model)
    if not args.server and Path(args.model).is_dir():
        return str(Path(args.model).resolve())
    return args.model


def samples_fingerprint(samples: Iterable[Sample]) -> str:
    """What stands for all that is asked, which a dataset changed in place changes."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.index} {sample.timestamp} {sample.prompt}".encode())
    return digest.hexdigest()[:16]


def dataset_fingerprint(meta: Any) -> str:
    """What stands for a dataset: its tables' content, and its other files' sizes."""
    root = meta.root
    sizes = []
    for path in list_needed_files(meta):
        sizes.append([str(path.relative_to(root)), path.stat().st_size])
    tables = [root / "meta" / "info.json", root / "meta" / "tasks.parquet"]
    tables += sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in tables]
    return fingerprint([digests, sizes])


def check_output(job: Job) -> None:
    """Check that the output may be written, before the model is loaded.

    Raises:
        InputError: something else is there, it has other settings, or the disk is full.
    """
    output = job.output
    overwrite = job.args.overwrite
    if is_finished(output):
        if not overwrite:
            if read_settings(output / RECORD) != job.settings:
                raise other_settings(output / RECORD, job.settings)
            return
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output-dir {output}: is not empty; name another folder")
    if os.path.ismount(output):
        raise InputError(
            f"--output-dir {output}: is a mount point, which no folder can replace; "
            "name a folder inside it"
        )
    if job.args.preview:
        return
    needed = space_needed(job.meta.root)
    # What an interrupted run has written is removed first.
    free = free_space(output) + folder_size(job.work_dir / "dataset")
    if free < needed:
        raise InputError(
            f"--output-dir {output}: needs {(needed - free) / 1e9:.2f} GB more; free "
            "some space on the disk"
        )


def space_needed(root: Path) -> int:
    """About how many bytes the new dataset takes."""
    return int(folder_size(root) * 1.02) + 16_000_000


def folder_size(folder: Path) -> int:
    """The bytes of all files in a folder, which need not be there."""
    return sum((folder / file).stat().st_size for file in list_source_files(folder))


def free_space(output: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not be there."""
    existing = next(path for path in output.parents if path.exists())
    return shutil.disk_usage(existing).free


def make_dataset(job: Job, launch: Launch) -> None:
    """Generate what is missing, write the new dataset, and put it in its place.

    Args:
        job: the whole job.
        launch: the processes that share it; this one is rank 0.

    Raises:
        InputError: another run is at work, or has other settings.
        RunError: the run cannot go on; the work is kept.
    """
    started = time.monotonic()
    with lock_work_dir(job.work_dir):
        if is_finished(job.output) and not job.args.overwrite:
            raise InputError(
                f"{job.output}: another run has just finished it; run the same command "
                "again"
            )
        known = take_up_work(job.work_dir, job.settings, job.args.overwrite)
        generating = time.monotonic()
        progress = generate_missing(job, launch, known)
        seconds = time.monotonic() - generating
        for place, reason in progress.failed.items():
            say(f"failed: {place}: {reason}")
        dialogues = read_journals(job.work_dir, job.settings)
        results = build_results(job.plan, dialogues)
        with saying_how_long(f"writing {job.output}"):
            shutil.rmtree(job.work_dir / "dataset", ignore_errors=True)
            write_dataset(job, results, job.work_dir / "dataset")
            put_in_place(job)
    print_summary(job, results, progress, seconds, time.monotonic() - started)


def generate_missing(job: Job, launch: Launch, known: Dialogues) -> Progress:
    """As rank 0, deal the missing samples, generate a part, and wait for the others.

    Args:
        job: the whole job.
        launch: the processes that share it.
        known: the dialogues that are there already.

    Returns:
        The counts of all ranks.

    Raises:
        InputError: the model cannot be loaded.
        RunError: the run cannot go on.
    """
    samples = job.plan.samples
    missing = [sample for sample in samples if sample.index not in known]
    part = deal_samples(launch, job.settings, missing, resumed=bool(known))
    say(f"{len(known)} of {len(samples)} dialogues are there already")
    annotator = make_annotator(job, launch, known) if part else None
    progress = annotator.progress if annotator else Progress()
    with progress_bar(total=len(samples), initial=len(known)) as bar:
        if annotator:
            for finished in generate_part(job, launch, part, annotator):
                bar.set_postfix(retried=progress.retried, refresh=False)
                generated = progress.generated
                if launch.world_size > 1:
                    generated = launch.add_generated(len(finished))
                show_generated(bar, len(known) + generated)
        if launch.world_size > 1:
            wait_for_ranks(launch, progress, bar, len(known))
    return progress


def preview(job: Job, launch: Launch) -> None:
    """Generate a few samples and show them, on stdout and on a page.

    They go into the journal, from which a run with the same settings takes them over.

    Args:
        job: the whole job.
        launch: the processes that share it; the others have nothing to do.

    Raises:
        InputError: the model cannot be loaded, or another run is at work.
        RunError: the run cannot go on.
    """
    dismiss_ranks(launch, job.settings)
    every = job.plan.samples
    positions = pick_for_page([vars(sample) for sample in every], job.args.preview)
    samples = [every[position] for position in positions]
    with lock_work_dir(job.work_dir):
        known = take_up_work(job.work_dir, job.settings, job.args.overwrite)
        missing = [sample for sample in samples if sample.index not in known]
        seconds = 0.0
        progress = Progress()
        if missing:
            annotator = make_annotator(job, launch, known)
            progress = annotator.progress
            started = time.monotonic()
            with progress_bar(total=len(missing)) as bar:
                for finished in generate_part(job, launch, missing, annotator):
                    known.update(finished)
                    bar.update(len(finished))
            seconds = time.monotonic() - started
    lines = []
    for sample in samples:
        if sample.index in known:
            lines.append(annotation_line(sample, known[sample.index]))
    for place, reason in progress.failed.items():
        say(f"failed: {place}: {reason}")
    if not lines:
        raise RunError(
            "no valid dialogue for any sample of the preview; try another --model"
        )
    page = job.output.with_name(job.output.name + ".preview.html")
    notice = f"A preview of {len(lines)} of {len(every)} dialogues. No dataset yet."
    late_share = job.plan.sum_figures().late_share
    write_page(page, make_page(job, lines, late_share, notice))
    print_dialogues(lines)
    print_rows(measure_quality(lines))
    if progress.generated:
        speed = progress.generated / seconds
        minutes = (len(every) - len(known)) / speed / 60
        print_rows(
            [
                ("speed", f"{speed:.2f} samples/s"),
                ("the whole job", f"about {math.ceil(minutes)} min more at that speed"),
            ]
        )
    print(f"\nlook at {page}")


def make_annotator(
    job: Job, launch: Launch, known: Dialogues, resumed: bool = False
) -> Annotator:
    """Load the model for this process, or connect it to the server.

    Args:
        job: the whole job.
        launch: of which each process has a GPU.
        known: the dialogues that are there already.
        resumed: whether an earlier run has generated dialogues. Then other random
            numbers are drawn, since what has failed must not be repeated.

    Raises:
        InputError: the model cannot be loaded.
    """
    args = job.args
    pgen: QwenPgen | ServerPgen
    if args.server:
        pgen = connect_to_server(job)
    else:
        pgen = load_model(job, launch, bool(known) or resumed)
    annotator = Annotator(pgen, args.batch_size, args.verify, args.seed)
    annotator.remember_known(job.plan.samples, known)
    return annotator


def load_model(job: Job, launch: Launch, resumed: bool) -> QwenPgen:
    """Load the model into this process.

    Args:
        job: the whole job.
        launch: of which each process has a GPU.
        resumed: whether other random numbers are drawn than in a first run.

    Raises:
        InputError: the model cannot be loaded.
    """
    args = job.args
    with saying_how_long(f"loading {args.model}", quiet=launch.rank > 0):
        import torch

        device = args.device
        if device == "cuda" and launch.world_size > 1:
            device = f"cuda:{launch.local_rank % max(1, torch.cuda.device_count())}"
        if resumed:
            torch.seed()
        else:
            drawn = random.Random(f"{args.seed} {launch.rank}").getrandbits(63)
            torch.manual_seed(drawn)
        return QwenPgen(args.model, device, args.dtype, args.temperature)


def connect_to_server(job: Job) -> ServerPgen:
    """Connect this process to the server, and try a first request.

    Raises:
        InputError: the server refuses it.
    """
    args = job.args
    model = job.settings["model"]
    pgen = ServerPgen(args.server, model, args.temperature, args.seed, args.batch_size)
    urls = ", ".join(server.url for server in pgen.servers)
    prompts = (sample.prompt for sample in job.plan.samples)
    with saying_how_long(f"asking {model} at {urls}"):
        pgen.check(len(job.plan.camera_keys), max(prompts, key=len))
    return pgen


def generate_part(
    job: Job, launch: Launch, samples: Sequence[Sample], annotator: Annotator
) -> Iterator[Dialogues]:
    """Generate samples into the journal of this process.

    Yields:
        The finished dialogues of each call, once they are on the disk.
    """
    path = job.work_dir / journal_name(job.settings, launch.rank)
    with closing(Journal(path)) as journal:
        for finished in generate_dialogues(job.meta, job.plan, samples, annotator):
            journal.add(finished)
            yield finished


# ------------------------------------------------------------------------------ report
# What is said before, during and after the work.


def progress_bar(total: int, initial: int = 0) -> Any:
    """tqdm's bar of samples on stderr."""
    from tqdm import tqdm

    return tqdm(total=total, initial=initial, unit="sample")


def show_generated(bar: Any, finished: int) -> None:
    """Move tqdm's bar to the number of finished dialogues."""
    bar.update(finished - bar.n)


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    for name, value in rows:
        print(f"{name:38} {value}")


def describe_grid(figures: GridFigures) -> str:
    """What a sampling grid comes down to, in words."""
    return (
        f"{figures.samples} samples; {figures.late_share:.1%} of frames carry another "
        f"skill's dialogue; {figures.skills_without} of {figures.skills} skills have "
        "none"
    )


def describe_grids(job: Job) -> list[tuple[str, str]]:
    """Both sampling grids in words, the one in use first."""
    used = describe_grid(job.plan.sum_figures())
    other = describe_grid(job.plan.sum_figures_of_other_grid())
    if job.args.align_skills:
        return [("with --align-skills", used), ("without, it would be", other)]
    return [("sampling grid", used), ("with --align-skills", other)]


def describe_skills(plan: Plan, fps: float) -> list[tuple[str, str]]:
    """Where the skills come from, and what is odd about them, in words."""
    source = plan.skill_source
    rows = [("skills from", source.name)]
    if source.others:
        rows.append(("skills not used", ", ".join(source.others)))
    odd = count_irregularities(source.episodes.values(), fps)
    if odd != SkillIrregularities():
        rows.append(
            (
                "odd, but allowed",
                f"{odd.late_starts} episodes whose first skill starts late, {odd.gaps} "
                f"gaps, {odd.overlaps} overlaps",
            )
        )
    return rows


def describe_job(job: Job) -> list[tuple[str, str]]:
    """What a job comes down to, in words."""
    plan = job.plan
    rows = [
        ("new dataset", str(job.output)),
        ("episodes", str(len(plan.episodes))),
        ("frames", str(plan.frame_count)),
        ("cameras", ", ".join(plan.camera_keys)),
    ]
    return rows + describe_skills(plan, job.meta.fps) + describe_grids(job)


def describe_types(lines: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """How often each type occurs, in words."""
    rows = []
    for title, kind in (("scenarios", "scenario_type"), ("responses", "response_type")):
        counts = [f"{name} {count}" for name, count in count_types(lines, kind)]
        rows.append((title, ", ".join(counts)))
    return rows


def describe_output(job: Job) -> list[tuple[str, str]]:
    """What is there already, and what the output takes, in words."""
    known = read_journals(job.work_dir, job.settings)
    missing = len(job.plan.samples) - len(known)
    batches = math.ceil(missing / job.args.batch_size)
    needed = space_needed(job.meta.root) / 1e9
    free = free_space(job.output) / 1e9
    return [
        ("dialogues there already", str(len(known))),
        ("to generate", str(missing)),
        (f"batches of {job.args.batch_size}", str(batches)),
        ("disk", f"{needed:.2f} GB needed, {free:.2f} GB free"),
    ]


def give_advice(job: Job) -> list[str]:
    """Say what to do where something of a plan looks wrong."""
    advice = []
    used = job.plan.sum_figures()
    other = job.plan.sum_figures_of_other_grid()
    if not job.args.align_skills and (used.late_share > 0.05 or used.skills_without):
        advice.append(
            f"{used.late_share:.1%} of frames would carry the dialogue of another "
            f"skill, and {used.skills_without} skills would have none: add "
            f"--align-skills ({other.samples} samples) or lower --sample-interval"
        )
    odd = count_irregularities(job.plan.skill_source.episodes.values(), job.meta.fps)
    if odd.late_starts > len(job.plan.episodes) / 2:
        advice.append(
            "most episodes begin without a skill, and their first one is told there: "
            "check the times of the skills"
        )
    try:
        check_output(job)
    except InputError as error:
        advice.append(str(error))
    if find_other_journals(job.work_dir, job.settings) and not job.args.overwrite:
        record = job.work_dir / "run.json"
        advice.append(str(other_settings(record, job.settings)))
    return advice


def print_plan(job: Job) -> None:
    """Print what would be done, what looks wrong, and a prompt for each scenario."""
    samples = job.plan.samples
    print_rows(describe_job(job))
    print_rows(describe_types([vars(sample) for sample in samples]))
    print_rows(describe_output(job))
    shown = set()
    for sample in samples:
        if sample.scenario_type not in shown:
            shown.add(sample.scenario_type)
            print(f"\nprompt for {sample.place}:\n\n{sample.prompt}")
    print(f"\nThe answer begins with: {PREFILL}")
    for line in give_advice(job):
        print(f"\nnote: {line}")


def print_dialogues(lines: Sequence[dict[str, Any]]) -> None:
    """Print dialogues with what they are about."""
    for line in lines:
        print(
            f"episode {line['episode_id']}, {line['timestamp']:.2f} s, "
            f"{one_line(line['skill_current'])} "
            f"({line['scenario_type']}, {line['response_type']})\n"
            f"  person: {line['user_prompt']}\n"
            f"  robot:  {line['robot_utterance']}\n"
        )


def print_summary(
    job: Job,
    results: Results,
    progress: Progress,
    generating_seconds: float,
    seconds: float,
) -> None:
    """Print what has become of a job."""
    speed = progress.generated / generating_seconds
    arguments = f'"{job.name}", root="{job.output}", video_backend="pyav"'
    print_rows(describe_job(job))
    print_rows(describe_types(results.annotations))
    print_rows(
        [
            ("dialogues", str(len(results.annotations))),
            ("generated in this run", str(progress.generated)),
            ("asked again", str(progress.retried)),
            ("failed", str(len(progress.failed))),
            ("rows of the table of tasks", str(len(results.tasks))),
            ("carry another skill's dialogue", f"{results.late_share:.1%} of frames"),
        ]
    )
    print_rows(measure_quality(results.annotations))
    print(f"\n{seconds:.1f} s, {speed:.2f} samples/s while generating\n")
    print(READING.format(arguments=arguments))
    print(f"\nlook at {job.output / 'meta' / 'dialogues.html'}")


# ------------------------------------------------------------------------ command line


DEFAULT_MODEL = "Qwen/Qwen2-VL-7B-Instruct"
DEFAULT_BATCH_SIZE = 16
# With a server, which batches by itself and needs many requests to do so.
DEFAULT_REQUESTS = 64


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are those of this script."""

    def error(self, message: str) -> NoReturn:
        """Report a command line that cannot be parsed.

        Raises:
            InputError: always.
        """
        raise InputError(f"{message}; see --help")


def make_parser() -> ArgumentParser:
    """The flags, with their defaults."""
    description, _, examples = (__doc__ or "").partition("examples:")
    parser = ArgumentParser(
        prog="annotate_pgen.py",
        description=description,
        epilog=f"examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--repo-id",
        metavar="USER/NAME",
        help="dataset on the Hugging Face Hub (default: %(default)s)",
    )
    data.add_argument(
        "--data-dir",
        type=Path,
        help="dataset in a local folder, which a repo id then only names "
        "(default: %(default)s)",
    )
    data.add_argument(
        "--revision",
        help="branch, tag or commit of the dataset on the Hub (default: %(default)s)",
    )
    data.add_argument(
        "--num-image-views-per-sample",
        type=int,
        default=1,
        help="number of cameras shown to the model (default: %(default)s)",
    )
    data.add_argument(
        "--camera-keys",
        nargs="+",
        metavar="KEY",
        help="cameras shown, by name instead of number (default: %(default)s)",
    )
    data.add_argument(
        "--sample-interval",
        type=float,
        default=1.0,
        help="generate a dialogue every so many seconds (default: %(default)s)",
    )
    data.add_argument(
        "--align-skills",
        action="store_true",
        help="start the sampling grid anew at each skill, so that no frame carries the "
        "dialogue of another skill (default: %(default)s)",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        help="Qwen vision-language model, Hub id or folder; with --server the served "
        f"name, or the only one served (default: {DEFAULT_MODEL})",
    )
    model.add_argument(
        "--server",
        nargs="+",
        metavar="URL",
        help="servers that speak OpenAI's chat completions, such as "
        "http://localhost:8000/v1; they share the load, and a key is taken from "
        f"{KEY_VARIABLE} (default: %(default)s)",
    )
    model.add_argument(
        "--device",
        default="cuda",
        help="cuda, cuda:1, cpu, or auto to spread it over all GPUs "
        "(default: %(default)s)",
    )
    model.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="precision (default: %(default)s)",
    )
    generation = parser.add_argument_group("generation")
    generation.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        help="higher is more diverse; 0 takes the likeliest words "
        "(default: %(default)s)",
    )
    generation.add_argument(
        "--batch-size",
        type=int,
        help="samples at once, halved when GPU memory runs out; with --server, "
        f"{DEFAULT_REQUESTS} requests under way (default: {DEFAULT_BATCH_SIZE})",
    )
    generation.add_argument(
        "--verify",
        action="store_true",
        help="ask the model which skill each user prompt leads to, and ask again where "
        "it is another (default: %(default)s)",
    )
    generation.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of all random choices (default: %(default)s)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-dir",
        type=Path,
        help=f"folder of the new dataset, else <source>{SUFFIX} (default: %(default)s)",
    )
    output.add_argument(
        "--overwrite",
        action="store_true",
        help="discard a finished output, and unfinished work with other settings "
        "(default: %(default)s)",
    )
    output.add_argument(
        "--push-to-hub",
        action="store_true",
        help="upload the result to the Hugging Face Hub (default: %(default)s)",
    )
    output.add_argument(
        "--new-repo-id",
        metavar="USER/NAME",
        help=f"where to, else <repo-id>{SUFFIX} (default: %(default)s)",
    )
    output.add_argument(
        "--private",
        action="store_true",
        help="make the repository there private, as for a private source "
        "(default: %(default)s)",
    )
    output.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan and some prompts; load no model, write nothing "
        "(default: %(default)s)",
    )
    output.add_argument(
        "--preview",
        type=int,
        metavar="N",
        help="generate N samples, show them on a page beside the output, and write no "
        "dataset; a run that follows takes them over (default: %(default)s)",
    )
    output.add_argument(
        "--debug",
        action="store_true",
        help="show the traceback of an error (default: %(default)s)",
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags.

    Args:
        argv: the arguments; those of the process if None.

    Raises:
        InputError: a flag that no dataset or machine could make usable.
    """
    args = make_parser().parse_args(argv)
    if args.model is None and not args.server:
        args.model = DEFAULT_MODEL
    if args.batch_size is None:
        args.batch_size = DEFAULT_REQUESTS if args.server else DEFAULT_BATCH_SIZE
    if not args.repo_id and not args.data_dir:
        raise InputError("neither --repo-id nor --data-dir is given; name a dataset")
    for flag, name in (
        ("--repo-id", args.repo_id),
        ("--new-repo-id", args.new_repo_id),
    ):
        if name is not None and not re.fullmatch(
            r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII
        ):
            raise InputError(f"{flag} {name}: is not of the form user/name; correct it")
    target = args.new_repo_id
    if target and args.repo_id and target.lower() == args.repo_id.lower():
        raise InputError(f"--new-repo-id {target}: is the source; name another")
    if args.push_to_hub and not (args.repo_id or target):
        raise InputError("--push-to-hub: has no target; add --new-repo-id")
    if args.revision and args.data_dir:
        raise InputError("--revision: has no effect beside --data-dir; leave it out")
    if args.num_image_views_per_sample < 1:
        raise InputError("--num-image-views-per-sample: must be 1 or more; correct it")
    if not 0 < args.sample_interval < math.inf:
        raise InputError("--sample-interval: must be positive and finite; correct it")
    if not 0 <= args.temperature < math.inf:
        raise InputError("--temperature: must be 0 or more and finite; correct it")
    if args.batch_size < 1:
        raise InputError("--batch-size: must be 1 or more; correct it")
    if args.preview is not None and args.preview < 1:
        raise InputError("--preview: must be 1 or more; correct it")
    if args.preview and (args.push_to_hub or args.overwrite):
        raise InputError(
            "--preview: writes no dataset; leave out --push-to-hub and --overwrite"
        )
    return args


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def interrupt(number: int, frame: Any) -> None:
    """Handle a signal; a second one ends the process at once.

    Raises:
        Interrupted: always.
    """
    signal.signal(number, signal.SIG_DFL)
    raise Interrupted(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit code: 0 done, 2 bad input, 1 failed on the way with the work kept,
        130 or 143 interrupted.
    """
    code = 0
    message = ""
    debug = "--debug" in (sys.argv if argv is None else argv)
    try:
        prepare_streams()
        args = parse_args(argv)
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, interrupt)
        silence_libraries()
        annotate_dataset(args)
        sys.stdout.flush()
    except InputError as error:
        code = 2
        message = str(error)
        if debug:
            traceback.print_exc()
    except RunError as error:
        code = 1
        message = str(error)
        if debug:
            traceback.print_exc()
    except ModuleNotFoundError as error:
        code = 2
        message = (
            f"the package {error.name} is not installed; run "
            "`python -m pip install -r requirements.txt`"
        )
        if debug:
            traceback.print_exc()
    except BrokenPipeError:
        # `--dry-run | head` has seen enough, and what is left cannot be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as error:
        code = 128 + getattr(error, "number", signal.SIGINT)
        # Why a launch ends is said by rank 0, or by the rank that failed.
        if not rank_name():
            message = "interrupted; the same command goes on from here"
    except Exception as error:
        # Anything else is a bug of this script.
        traceback.print_exc()
        code = 1
        message = (
            f"{type(error).__name__}; this is a bug, please report the lines above"
        )
    if message:
        print(f"error: {rank_name()}{one_line(message)}", file=sys.stderr)
    return code


def prepare_streams() -> None:
    """See to it that what is printed cannot end a run."""
    # One that is closed, as by `>&-`, is None.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")
    sys.stderr = sys.stderr or Path(os.devnull).open("w")
    for stream in (sys.stdout, sys.stderr):
        # A terminal may not be able to show a character.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def rank_name() -> str:
    """Which process of a launch says something; "" for rank 0."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def silence_libraries() -> None:
    """Keep the warnings of libraries off the terminal: they are not about the data."""
    logging.captureWarnings(True)
    logging.disable(logging.CRITICAL)


if __name__ == "__main__":
    sys.exit(main())
