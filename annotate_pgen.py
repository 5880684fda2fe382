#!/usr/bin/env python
"""Write a LeRobot dataset in which every frame has a dialogue.

A Qwen vision-language model looks at sampled frames of a dataset whose episodes
carry skill annotations. For each it invents what a person might have said to bring
about the robot's skill, and what the robot answers. This is the synthetic data
generation (p_gen) of Hi Robot, arXiv 2502.19417.

To change what the model is asked, edit the tables of the first section and look at the
outcome with --dry-run. The whole job is annotate_dataset. The sections follow the data:

  prompt        what the model is asked: the examples, the types, the template
  source        the dataset that is annotated: found, opened, never written
  skills        what the robot does when, in the forms that people's tools write
  plan          which frames are sampled and what is asked about each, in advance
  images        the sampled frames of the chosen cameras, decoded
  answers       the dialogue in what a model wrote, and whether it is worth training on
  generator     the model in this process
  server        the model behind a server
  annotation    samples are asked about, and again where the answer is not good enough
  journal       finished dialogues on the disk, taken up again
  ranks         the processes of a torchrun launch
  result        which dialogue each frame carries, and how good they are together
  output        the new dataset: the old one plus a column
  page          frames beside dialogues, in one HTML file
  Hub           the card, the rights to write, the upload
  job           the whole job, from the flags to the new dataset
  report        what is said before and after
  command line  the flags, and how a run ends
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import logging
import math
import os
import queue
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
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import cache, cached_property, partial
from itertools import chain, count, groupby, islice, pairwise, product, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

INSTALL = "run `python -m pip install -r requirements.txt`"
# What takes seconds to import is imported where it is used.
try:
    import av
    import jinja2
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from filelock import FileLock, Timeout
    from PIL import Image
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    print(f"error: {missing}; {INSTALL}", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    import pandas as pd

Turns = Sequence[tuple[str, str]]  # Earlier questions of a chat with their answers.
Views = Sequence[Image.Image]  # RGB, the cameras' images of one frame.
Prepared = tuple[str, Views]  # The text of a chat, and its images.
Settings = dict[str, Any]  # All that the dialogues depend on.
Line = dict[str, Any]  # A line of syn_annotations.jsonl.
Rows = list[tuple[str, str]]  # Names and values of figures, in words.

COLUMN = "task_index_high_level"
SUFFIX = "_with_high_level_tasks"
# The settings that a dataset was made with, in the finished dataset.
RECORD = Path("meta", "annotate_pgen.json")
RESUME_REMEDY = "the same command goes on from here"
DISK_REMEDY = f"check the disk; {RESUME_REMEDY}"
# They break lines, act on terminals, or cannot be written in UTF-8.
CONTROL_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class InputError(Exception):
    """What the user gave cannot be used (exit code 2). It says where and what to do."""


class RunError(Exception):
    """The run cannot go on; what was generated so far is kept (exit code 1)."""


@contextmanager
def errors_as(kind: type, problem: str, remedy: str, errors: Any = Exception) -> Any:
    """Report what a library's call raises as one line: its problem and a remedy."""
    try:
        yield
    except errors as error:
        reason = one_line(str(error)).rstrip(".") or type(error).__name__
        raise kind(f"{problem}: {reason[:500]}; {remedy}") from error


def one_line(text: str) -> str:
    """Put a text on one line, without characters that act on prompts and terminals."""
    return " ".join(CONTROL_CHARACTER.sub(" ", text).split())


def name_some(items: Iterable[Any], limit: int = 10) -> str:
    """Name the first of some items, and how many more there are."""
    names = [str(item) for item in items]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def say(message: str) -> None:
    """Write a line to stderr as rank 0, above a progress bar if there is one."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(one_line(message), file=sys.stderr)


# ------------------------------------------------------------------------------ prompt
# What the model is asked. It is shown how: three of the EXAMPLES are earlier turns of
# the chat, and then comes the frame. Their form comes out again: the person speaks as
# one can hear people speak, the robot in the words of the action, and the scenes are
# such as robot datasets do not have.

SYSTEM = (
    "You write what a person says to a robot and what the robot answers. In the "
    "recording the robot does exactly the given action. So the person tells the robot, "
    "as you, to do that action alone, in short everyday words, about what is in "
    "the picture; the robot answers with the words of the action. Answer in JSON."
)

SCENARIO_TYPES = {
    "specific_object": "a plain request that names the object",
    "negative_task": "a request for just this, after a word on what to leave",
    "situated_correction": "a request to go on, after a word on what is done or seen",
    "implicit_request": "what is seen, and a request that follows from it",
    "constraint_based": "a request that adds with which hand, which one or where",
}

RESPONSE_TYPES = {
    "confirmation": "agrees and says what it will do",
    "clarification": "says in full what it understood and will do",
    "acknowledgment": "says what it is doing",
    "constraint_acknowledgment": "repeats what was laid down and says what it will do",
}

# A line whose field is empty is left out, as the picture's is where there are images.
PROMPT = """\
Picture: {picture}
Task: {task}
Done before: {history}
Write {scenario}, and a reply that {response}.
Action: {skill}"""

# How SYSTEM speaks of the two. Nobody speaks so, and such an answer is refused.
NARRATION = ("the person", "the robot")

# An answer begins with the action, which is not read: a small model keeps to it then.
ANSWER_KEYS = ["action", "user_prompt", "robot_utterance"]
# The model goes on from here, so that it writes neither a preamble nor a code fence.
PREFILL = '{"action": "'

# Nothing is done yet on an episode's first sample.
NOT_ON_FIRST_SAMPLE = {"situated_correction"}
OPTION_LABELS = string.ascii_uppercase
# How words are drawn, in both engines; a top_k of 0 is off.
TOP_P = 0.8
TOP_K = 20

# How many earlier skills are told, and how many examples are shown.
HISTORY_LENGTH = 3
EXAMPLE_COUNT = 3


@dataclass(frozen=True)
class Example:
    """A dialogue about another scene, with replies by response type."""

    picture: str
    task: str
    user_prompt: str
    history: tuple[str, ...]
    skill: str
    replies: dict[str, str]


def read_examples(text: str) -> dict[str, list[Example]]:
    """Read the table of examples, by scenario type.

    A block is an example, of the scenario of the block before if it names none. The
    last of its steps is the skill; all but picture, task, steps and person are replies.
    """
    table: dict[str, list[Example]] = {}
    scenario = ""
    for block in re.split(r"\n\s*\n", text.strip()):
        fields = {}
        try:
            for line in block.splitlines():
                name, said = line.split(": ", 1)
                fields[name] = said
            line = block.partition("\n")[0]
            scenario = fields.pop("scenario", scenario)
            told = [fields.pop(name) for name in ("picture", "task", "person", "steps")]
            *history, skill = told.pop().split("; ")
            example = Example(*told, tuple(history), skill, fields)
        except (KeyError, ValueError) as error:
            # It is found before main has begun.
            remedy = "write each block's picture, task, steps and person as 'name: …'"
            print(f"error: EXAMPLES: {line!r}: {error!r}; {remedy}", file=sys.stderr)
            sys.exit(2)
        table.setdefault(scenario, []).append(example)
    return table


# A response type is dealt where all examples of a scenario have such a reply.
EXAMPLE_TABLE = """
scenario: specific_object
picture: a chessboard, the gripper open above the white knight
task: play a game of chess
steps: reach over the chessboard; close the gripper around the white knight
person: Can you grab the white knight now?
confirmation: Sure, I'll close my gripper around it.
acknowledgment: Got it, closing my gripper around the white knight.

picture: a snowman in the sun, a scarf in the gripper
task: dress the snowman
steps: place the scarf around the snowman's neck
person: Could you put the scarf on the snowman, please?
confirmation: Of course, I'll place the scarf around its neck.
acknowledgment: On it, placing the scarf around the snowman's neck.

picture: a ukulele on the wall, the left hand around its neck
task: put the ukulele away
steps: hang up the ukulele; release the ukulele
person: Nice, it's safe up there. You can let go of the ukulele.
confirmation: Okay, I'll release the ukulele.
acknowledgment: Got it, releasing the ukulele.

scenario: negative_task
picture: white pumpkins in a field, one of them in both hands, a wheelbarrow
task: bring in the pumpkins
steps: fetch the wheelbarrow; lift the pumpkin into the wheelbarrow
person: Leave the rest for later. Just put this pumpkin into the wheelbarrow.
acknowledgment: Got it, lifting the pumpkin into the wheelbarrow.
constraint_acknowledgment: I'll leave the rest and just lift the pumpkin in.

picture: a scarecrow upright in a field, both hands around its post
task: put up the scarecrow
steps: dig a hole; put the scarecrow's post in; hold the scarecrow
person: Don't let go just yet, the post is still loose. Keep holding the scarecrow.
acknowledgment: Okay, I'm holding the scarecrow.
constraint_acknowledgment: I won't let go, I'll hold the scarecrow.

picture: an aquarium with a goldfish, a fishing net in the gripper
task: clean the aquarium
steps: reach into the aquarium; robot catches goldfish with fishing net
person: Don't touch anything else. Just catch the goldfish with the net.
acknowledgment: Alright, just catching the goldfish.
constraint_acknowledgment: I won't touch anything else, I'll catch the goldfish.

picture: a kayak in both hands, the river a few steps away
task: launch the kayak
steps: lift the kayak; carry the kayak to the river
person: Don't put the kayak down yet. Carry it to the river.
acknowledgment: Okay, carrying the kayak to the river.
constraint_acknowledgment: I won't put it down yet, I'll carry the kayak to the river.

scenario: situated_correction
picture: a scoop of gravel in the gripper, a concrete mixer to the left of it
task: mix some concrete
steps: fill the scoop with gravel; position the scoop over the mixer
person: Good, you've got it. Can you move the scoop over the mixer now?
confirmation: Okay, I'll position it over the mixer.
clarification: Okay, I'll position the scoop right over the mixer.
acknowledgment: Got it, positioning the scoop over the mixer.

picture: a trumpet on its stand, the open hand right at it
task: play a fanfare
steps: move the hand to the trumpet; close the hand around the trumpet
person: Good, you're right there. Can you grab the trumpet now?
confirmation: Sure, I'll close my hand around it.
clarification: Sure, I'll close my hand around the trumpet.
acknowledgment: Okay, closing my hand around the trumpet.

picture: a cuckoo clock that is going, the arm inside its case
task: wind up the cuckoo clock
steps: open the case; wind up the cuckoo clock; retract the arm from the cuckoo clock
person: Nice, that's done. You can take your arm out of the cuckoo clock.
confirmation: Okay, I'll retract my arm.
clarification: Alright, I'll retract my arm from the cuckoo clock.
acknowledgment: Alright, retracting my arm from the cuckoo clock.

scenario: implicit_request
picture: a campfire burning low, a log in the gripper
task: keep the campfire going
steps: pick up a log; place the log on the campfire
person: It's burning low. Could you put the log on the campfire?
clarification: Sure, I'll place the log on the campfire.
acknowledgment: Got it, placing the log on the campfire.

picture: a stroller in the sun, its canopy folded back, the hand in front of it
task: get the stroller ready
steps: unfold the stroller; move the right hand to the canopy
person: The sun is right on the stroller. Can you reach for the canopy?
clarification: Okay, I'll move my right hand to the canopy.
acknowledgment: On it, moving my right hand to the canopy.

picture: a motorbike under a tarpaulin on a dry road, the hand on the tarpaulin
task: get the motorbike ready
steps: reach for the tarpaulin; remove the tarpaulin from the motorbike
person: The rain is over. You can take the tarpaulin off the motorbike.
clarification: Alright, I'll remove the tarpaulin from the motorbike.
acknowledgment: Alright, I'm removing the tarpaulin from the motorbike.

picture: an open umbrella in a narrow hallway, its handle in the right hand
task: come in from the rain
steps: walk into the hallway; robot closes umbrella
person: We're inside now. Go ahead and close the umbrella.
clarification: Sure, I'll close the umbrella.
acknowledgment: Sure thing, closing the umbrella.

scenario: constraint_based
picture: a violin on a sofa, the left hand at its neck
task: put the violin away
steps: move the left hand to the violin; close the left hand around the violin
person: Good, you're at the violin. Grab it with your left hand.
confirmation: Sure, I'll close my hand around the violin.
constraint_acknowledgment: Sure, I'll close my left hand around the violin.

picture: an empty canoe at a jetty, a paddle in the gripper above its left side
task: get the canoe ready
steps: pull in the canoe; pick up the paddle; lower the paddle into the canoe
person: Good, you've got the paddle. Lay it into the canoe, along the left side.
confirmation: Okay, I'll lower the paddle into the canoe.
constraint_acknowledgment: Okay, I'll lower it in along the left side.

picture: a bare Christmas tree, a garland in the hand at its top
task: decorate the Christmas tree
steps: unpack the garland; hang the garland on the Christmas tree
person: Can you hang the garland right at the top of the tree?
confirmation: Alright, I'll hang it on the Christmas tree.
constraint_acknowledgment: Got it, I'll hang the garland right at the top.

picture: three beehives in a row, all closed, the arm above them
task: check the beehives
steps: move the arm over the beehives; robot arm opens middle beehive
person: Let's start with the middle beehive. Go ahead and open it.
confirmation: Sure, I'll open the middle beehive.
constraint_acknowledgment: Sure, I'll start with the middle beehive and open it.
"""

EXAMPLES = read_examples(EXAMPLE_TABLE)


def construct_prompt(
    task: str,
    history: Sequence[str],
    skill: str,
    scenario_type: str = "",
    response_type: str = "",
    picture: str = "",
) -> str:
    """Say what the model is asked about one frame or example.

    Args:
        task: what the whole episode is about.
        history: the skills done before, the earliest first.
        skill: the skill that the robot performs.
        scenario_type: a key of SCENARIO_TYPES; "" leaves the choice to the model.
        response_type: a key of RESPONSE_TYPES; "" leaves the choice to the model.
        picture: what can be seen, in the examples.

    Returns:
        PROMPT with its fields filled in, without the lines that have nothing to say.
    """
    last_skills = history[max(0, len(history) - HISTORY_LENGTH) :]
    fields = {
        "picture": picture,
        "task": one_line(task),
        "history": "; ".join(map(one_line, last_skills)),
        "scenario": SCENARIO_TYPES.get(scenario_type, ""),
        "response": RESPONSE_TYPES.get(response_type, ""),
        "skill": one_line(skill),
    }
    lines = []
    for line in PROMPT.splitlines():
        names = [name for _, name, _, _ in string.Formatter().parse(line) if name]
        if not names or any(fields[name] for name in names):
            lines.append(line.format(**fields).strip())
    return "\n".join(lines)


def choose_examples(scenario: str = "", response: str = "", draw: int = 0) -> Turns:
    """Choose the examples that are shown before a frame, as questions and answers.

    `draw` rotates the choice. Without a scenario it takes each in turn, and without a
    response each example's first reply is shown.
    """
    pools = [EXAMPLES[scenario]] if scenario else zip(*EXAMPLES.values(), strict=False)
    pool = [x for xs in pools for x in xs if not response or response in x.replies]
    start = draw % max(1, len(pool))
    turns = []
    for x in (pool[start:] + pool[:start])[:EXAMPLE_COUNT]:
        told = (x.task, x.history, x.skill, scenario, response, x.picture)
        said = (x.skill, x.user_prompt, x.replies[response or next(iter(x.replies))])
        answer = dict(zip(ANSWER_KEYS, said, strict=True))
        turns.append((construct_prompt(*told), json.dumps(answer, ensure_ascii=False)))
    return turns


def suitable_responses(scenario: str) -> list[str]:
    """The response types that every example of a scenario has a reply for."""
    pool = EXAMPLES[scenario]
    return [name for name in RESPONSE_TYPES if all(name in x.replies for x in pool)]


VERIFY_PROMPT = """\
A person says to a robot: "{user_prompt}"
The robot can do these actions:
{options}
The person said: "{user_prompt}"
Which action do they ask for? Answer with its letter only."""


def construct_verify_prompt(user_prompt: str, options: Sequence[str]) -> str:
    """Say what --verify asks about a user prompt, with the skills to choose from."""
    lines = map("{}. {}".format, OPTION_LABELS, options)
    return VERIFY_PROMPT.format(user_prompt=user_prompt, options="\n".join(lines))


def check_prompt() -> None:
    """Check the tables of this section, which users edit."""
    try:
        construct_prompt(task="x", history=["x"], skill="x", picture="x")
        construct_verify_prompt("x", ["x"])
    except (KeyError, IndexError, ValueError) as error:
        problem = f"PROMPT or VERIFY_PROMPT: {error!r} is no field of before"
        raise InputError(f"{problem}; write other braces twice") from error
    for scenario in {*SCENARIO_TYPES, *EXAMPLES}:
        pool = EXAMPLES.get(scenario, [])
        replies = {name for x in pool for name in x.replies}
        is_dealt = scenario in SCENARIO_TYPES and pool and suitable_responses(scenario)
        if replies - set(RESPONSE_TYPES) or not is_dealt:
            raise InputError(
                f"SCENARIO_TYPES and EXAMPLES: {scenario!r} has to be in both, and "
                f"its examples share one of RESPONSE_TYPES; they have {sorted(replies)}"
            )


def prompt_settings() -> Settings:
    """All that is asked, as it is recorded in a dataset and compared on resuming."""
    names = "SYSTEM PROMPT SCENARIO_TYPES RESPONSE_TYPES EXAMPLES EXAMPLE_COUNT "
    names += "HISTORY_LENGTH ANSWER_KEYS PREFILL TOP_P TOP_K VERIFY_PROMPT"
    return {name: repr(globals()[name]) for name in names.split()}


# ------------------------------------------------------------------------------ source
# The dataset that is annotated: found, opened, never written.

FRAME_COLUMNS = ["episode_index", "frame_index", "timestamp", "task_index"]
# Columns in which writers other than LeRobot keep the names of tasks and subtasks.
NAME_COLUMNS = ["task", "subtask", "name", "label"]
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class EpisodeFrames:
    """The frames of an episode (FRAME_COLUMNS), and where they stand."""

    episode_index: int
    path: Path
    first_row: int  # In the data file.
    first_index: int  # Among the frames of all data files that are there.
    frames: pd.DataFrame


@dataclass(frozen=True)
class Source:
    """A dataset, as far as the plan needs it."""

    meta: Any  # Its LeRobotDatasetMetadata.
    root: Path
    fps: float
    table: pd.DataFrame  # The rows of meta/episodes, by episode index.
    tasks: dict[int, str]  # The texts of LeRobot's tasks, by task index.
    data_files: list[Path]  # Those that are there, in LeRobot's order.
    episodes: dict[int, EpisodeFrames]  # Those wanted, by index, in dataset order.

    def seconds(self, episode_index: int) -> float:
        """The length of an episode: its frames over `fps`."""
        return len(self.episodes[episode_index].frames) / self.fps


def find_dataset(args: argparse.Namespace) -> Path:
    """Find the folder of a dataset, and download main if there is no local copy."""
    from huggingface_hub import snapshot_download
    from lerobot.utils.constants import HF_LEROBOT_HOME

    folder = args.data_dir or HF_LEROBOT_HOME / args.repo_id
    if args.data_dir and not folder.is_dir():
        raise InputError(f"--data-dir {folder}: no such folder; check the path")
    if args.data_dir or (not args.revision and (folder / "data").is_dir()):
        return folder.resolve()
    say(f"downloading {args.repo_id}")
    remedy = "check the name, --revision, the network and that you are logged in"
    with errors_as(InputError, f"--repo-id {args.repo_id}: no download", remedy):
        folder = ask_hub(
            snapshot_download,
            repo_id=args.repo_id,
            repo_type="dataset",
            revision=args.revision,
            cache_dir=HF_LEROBOT_HOME / "hub",
        )
    return Path(folder)


def open_dataset(root: Path, repo_id: str | None = None) -> Any:
    """Open a dataset, its files checked first: LeRobot would ask the Hub for them."""
    from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata

    tables = sorted(root.glob("meta/episodes/*/*.parquet"))
    info_file = root / "meta" / "info.json"
    for path in (info_file, root / "meta" / "tasks.parquet", *tables):
        check_file(path)
    info = read_json(info_file)
    version = str(info.get("codebase_version"))
    if not version.startswith("v3."):
        remedy = "convert it; from v2.1 with LeRobot's convert_dataset_v21_to_v30"
        raise InputError(f"{info_file}: has format {version}, not v3.0; {remedy}")
    fps = info.get("fps")
    if not isinstance(fps, (int, float)) or not 0 < fps < 1e6:
        raise InputError(f"{info_file}: fps is {fps!r:.50}; mend it")
    if not tables:
        raise InputError(f"{root}/meta/episodes: has no parquet file; restore it")
    with errors_as(InputError, f"{root}: LeRobot cannot open it", "repair meta/"):
        meta = LeRobotDatasetMetadata(repo_id or f"local/{root.name}", root=root)
    # LeRobot sets FFmpeg's own messages free; what is broken is reported here.
    av.logging.set_level(av.logging.PANIC)
    return meta


def check_file(path: Path) -> None:
    """Refuse a file that is not there, or for which Git LFS has left a pointer."""
    remedy = "check the path, or download the dataset again"
    with errors_as(InputError, f"{path}: cannot be read", remedy), path.open("rb") as f:
        is_pointer = f.read(len(LFS_POINTER)) == LFS_POINTER
    if is_pointer:
        raise InputError(f"{path}: is only a pointer to the file; run `git lfs pull`")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file."""
    with errors_as(InputError, f"{path}: holds no JSON object", "restore the file"):
        return dict(json.loads(path.read_text(encoding="utf-8-sig")))


def read_source(dataset: Any) -> Source:
    """Read what the plan needs of a LeRobotDataset, for `episodes=` if it has some."""
    import pandas as pd

    meta = getattr(dataset, "meta", dataset)
    root = Path(meta.root)
    columns = ["episode_index", "length"]
    for key in meta.video_keys:
        for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp"):
            columns.append(f"videos/{key}/{name}")
    paths = sorted(root.glob("meta/episodes/*/*.parquet"))
    # LeRobot's SARM annotator can leave rows without an index, which are no episodes.
    table = pd.concat([read_columns(path, columns) for path in paths])
    table = table.dropna(subset=["episode_index"])
    if not np.isfinite(table.astype(float)).all(axis=None):
        raise InputError(f"{root}/meta/episodes: holds nulls; restore the files")
    table = table.astype({"episode_index": "int64"}).set_index("episode_index")
    wanted = set(table.index)
    if dataset is not meta and dataset.episodes is not None:
        wanted &= set(dataset.episodes)
    if not wanted or not table.index.is_unique:
        raise InputError(f"{root}/meta/episodes: has none, or one twice; mend it")
    for key in meta.video_keys:
        for path in sorted(set(find_videos(meta, table, key, wanted).values())):
            check_file(path)
    # LeRobot's converters name wrong data files now and then, and LeRobot reads all of
    # them: which episode a frame is of stands in the files themselves.
    data_files = sorted(root.glob("data/*/*.parquet"))
    if not data_files:
        raise InputError(f"{root}/data: has no parquet file; restore it")
    parts = []
    for path in data_files:
        check_file(path)
        part = read_columns(path, FRAME_COLUMNS)
        if part.isna().any(axis=None):
            raise InputError(f"{path}: {FRAME_COLUMNS} hold nulls; restore the file")
        check_not_annotated(path)
        parts.append(part.assign(path=path, row=range(len(part))))
    episodes = find_episodes(pd.concat(parts), table["length"])
    episodes = {index: x for index, x in episodes.items() if index in wanted}
    missing = sorted(wanted - set(episodes))
    if missing:
        raise InputError(f"{root}/data: lacks episode {name_some(missing)}; restore it")
    tasks = read_names(root / "meta" / "tasks.parquet", "task_index")
    return Source(meta, root, float(meta.fps), table, tasks, data_files, episodes)


def find_episodes(frames: pd.DataFrame, lengths: pd.Series) -> dict[int, EpisodeFrames]:
    """Find the frames of each episode, by index, in dataset order."""
    frames = frames.reset_index(drop=True)
    episodes = {}
    for index, part in frames.groupby("episode_index", sort=False):
        path = part["path"].iloc[0]
        # In a row among the frames of all files, they are of one if both ends are.
        is_one_run = part.index[-1] - part.index[0] == len(part) - 1
        is_together = is_one_run and part["path"].iloc[-1] == path
        if len(part) != lengths.get(index) or not is_together:
            raise InputError(
                f"{path}: has not all frames of episode {index} together: there are "
                f"{len(part)}, and {lengths.get(index)} in meta/episodes; restore them"
            )
        place = (path, int(part["row"].iloc[0]), int(part.index[0]))
        episodes[int(index)] = EpisodeFrames(int(index), *place, part)
    return episodes


def read_columns(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read columns of a parquet file, which must be there and hold numbers."""
    import pandas as pd

    with errors_as(InputError, f"{path}: cannot be read", "restore the file"):
        lacking = [name for name in columns if name not in pq.read_schema(path).names]
        table = pq.read_table(path, columns=list(set(columns) - set(lacking)))
        frame = table.to_pandas(ignore_metadata=True)
    if lacking:
        raise InputError(f"{path}: lacks {name_some(lacking, 3)}; restore the file")
    for name in columns:
        if not pd.api.types.is_numeric_dtype(frame[name]):
            raise InputError(f"{path}: {name} holds no numbers; restore the file")
    return frame


def check_not_annotated(path: Path) -> None:
    """Refuse dialogues in a data file; negative numbers alone are a placeholder."""
    root = path.parents[2]
    is_there = COLUMN in pq.read_schema(path).names
    if is_there and (read_columns(path, [COLUMN])[COLUMN] >= 0).any():
        raise InputError(
            f"{path}: has {COLUMN} already; annotate its source, or remove the column: "
            'python -c "from lerobot.datasets.lerobot_dataset import LeRobotDataset; '
            "from lerobot.datasets.dataset_tools import remove_feature; remove_feature("
            f"LeRobotDataset('local/{root.name}', root='{root}'), '{COLUMN}', "
            f"output_dir='{root}_without', repo_id='local/{root.name}_without')\" and "
            "copy the file of its skills or subtasks to the new meta folder"
        )


def read_names(path: Path, number_column: str) -> dict[int, str]:
    """Read the names of tasks or subtasks by number, from the index or a column."""
    import pandas as pd

    with errors_as(InputError, f"{path}: cannot be read", "restore the file"):
        if path.suffix == ".jsonl":
            table = pd.read_json(path, lines=True)
        else:
            table = pd.read_parquet(path).reset_index()
        # LeRobot's index of names may have lost its own name.
        for name in sorted(table, key=lambda name: name not in NAME_COLUMNS):
            texts = table[name].tolist()
            if name != number_column and all(isinstance(text, str) for text in texts):
                numbers = table.get(number_column, table.index)
                return dict(zip(map(int, numbers), map(one_line, texts), strict=True))
    raise InputError(f"{path}: holds no names beside {number_column}; add them")


def find_videos(meta: Any, table: Any, key: str, indices: Any) -> dict[int, Path]:
    """The video file of each episode of a camera, by LeRobot's path template."""
    names = ["chunk_index", "file_index"]
    rows = table[[f"videos/{key}/{name}" for name in names]].astype("int64")
    paths = {}
    for index in indices:
        place = dict(zip(names, rows.loc[index].tolist(), strict=True))
        paths[index] = Path(meta.root, meta.video_path.format(video_key=key, **place))
    return paths


def choose_cameras(source: Source, count: int, keys: Sequence[str] | None) -> list[str]:
    """Decide which cameras the model sees: the first colour cameras, or those named."""
    features = source.meta.features.items()
    cameras = [key for key, feature in features if is_colour(source, key, feature)]
    wanted = list(dict.fromkeys(keys or cameras[:count]))
    if not set(wanted) <= set(cameras) or not (keys or len(wanted) == count):
        flags = "--camera-keys or --num-image-views-per-sample"
        raise InputError(f"{flags}: choose from colour cameras: {name_some(cameras)}")
    return wanted


def is_colour(source: Source, camera_key: str, feature: dict[str, Any]) -> bool:
    """Whether a feature is a camera, without marks of depth or more than 8 bits."""
    if feature["dtype"] not in ("video", "image"):
        return False
    details = dict(feature.get("video_info") or {})
    details.update(feature.get("info") or {})
    if details.get("is_depth_map") or details.get("video.is_depth_map"):
        return False
    if feature["dtype"] == "video":
        # gray10le, gray12le and gray16le are depth; yuv420p10le is a fine colour.
        return not str(details.get("video.pix_fmt")).startswith("gray1")
    try:
        file = pq.ParquetFile(source.data_files[0])
        stored = next(file.iter_batches(1, columns=[camera_key]))[0][0].as_py()
        return Image.open(io.BytesIO(stored["bytes"])).mode[0] not in "IF"
    except Exception:
        # What cannot be opened is refused if it is shown.
        return True


# ------------------------------------------------------------------------------ skills
# What the robot does when, in the forms that people's tools write.

SKILLS_FILE = "meta/skills.json"
LANGUAGE_COLUMN = "language_persistent"
DENSE_SUBTASKS = "dense_subtask columns of meta/episodes"
SPARSE_SUBTASKS = "sparse_subtask columns of meta/episodes"
# Times are compared with this tolerance, as a share of a frame. It absorbs what float32
# timestamps and rounded annotations are off, and never moves a skill by a frame.
TIME_TOLERANCE = 0.1


@dataclass(frozen=True)
class Skill:
    """What the robot does from `start` on, in seconds from the first frame."""

    name: str
    start: float


@dataclass(frozen=True)
class EpisodeSkills:
    """An episode's skills, sorted by start and never empty, with texts beside them."""

    skills: tuple[Skill, ...]
    description: str = ""  # The episode's task.
    coarse_description: str = ""  # The dataset's.


# The skills of the wanted episodes that a form has any for, by episode index.
Found = dict[int, EpisodeSkills]
# What a form has: an episode's index, where it stands, its names and starts, and texts.
Entries = Iterator[tuple[Any, ...]]


@dataclass(frozen=True)
class SkillSource:
    """The skills of the wanted episodes, and the form that they were read from."""

    name: str
    episodes: Found
    task_count: int = 0  # Episodes that have their task as their only skill.
    notes: tuple[str, ...] = ()  # What a person should know about the skills.


def load_skills(source: Source, task_as_skill: bool = False) -> SkillSource:
    """Load the skills from the form that has most of the wanted episodes."""
    forms: dict[str, Found] = {}
    states = []
    damaged = False
    for name, read in SKILL_READERS.items():
        try:
            found: Found = {}
            for index, place, entries, *texts in read(source):
                if entries and index in source.episodes:
                    found[index] = check_skills(place, entries, *texts)
            forms[name] = found
            states.append(f"{name}: {len(found)} episodes")
        except Exception as error:
            # Another form may be whole; if none is, this is part of the answer.
            states.append(f"{name}: {error}")
            damaged = True
    # The fullest form, and the first of those that have as many episodes.
    name = max(forms, key=lambda form: len(forms[form]), default="")
    found = forms.get(name, {})
    lacking = [index for index in source.episodes if index not in found]
    if lacking and (damaged or not task_as_skill):
        # What is there but cannot be read is not replaced by the task.
        raise InputError(
            f"{source.root}: no skills for {len(lacking)} of {len(source.episodes)} "
            f"episodes ({name_some(lacking)}); found {'; '.join(states)}; annotate "
            "them with LeRobot 0.6 (pip install 'lerobot[annotations]'): "
            f"lerobot-annotate --repo_id={source.meta.repo_id} --root={source.root} "
            "--interjections.enabled=false --vqa.enabled=false; or add --task-as-skill"
        )
    notes = find_other_version(source) if found and name == SKILLS_FILE else []
    kept = leave_out_late(source, name, found, notes)
    for other, theirs in forms.items():
        # Sparse skills are coarser than all others.
        is_alike = other not in (name, SPARSE_SUBTASKS) and len(theirs) == len(found)
        if is_alike and not lacking:
            theirs = leave_out_late(source, other, theirs, notes=[])
            compare_forms(source, name, kept, other, theirs)
    for index in lacking:
        first = source.episodes[index].frames["task_index"].iloc[0]
        task = source.tasks.get(int(first))
        if not task:
            raise InputError(f"{source.root}: episode {index} has no task; add it")
        kept[index] = EpisodeSkills((Skill(task, 0.0),))
    if lacking:
        notes.append(f"the task is the only skill of {len(lacking)} episodes")
    form = name if found else "tasks (--task-as-skill)"
    episodes = {index: kept[index] for index in source.episodes}
    return SkillSource(form, episodes, len(lacking), tuple(notes))


def check_skills(place: str, entries: Any, *texts: str) -> EpisodeSkills:
    """Check and sort an episode's skills, names and starts as they stand in a form.

    A name twice in a row is one skill. `place` says where they stand, for errors.
    """
    skills = []
    for name, start in entries:
        problem = f"{place}: the skill {name!r:.50} at {start!r:.9}"
        if not isinstance(name, str) or not one_line(name):
            raise InputError(f"{problem} has no name; give it one")
        # The comparison holds for no NaN, and needs no float for a huge integer.
        if not isinstance(start, (int, float)) or not abs(start) < 1e9:
            raise InputError(f"{problem} has no start in seconds; correct it")
        skills.append(Skill(one_line(name), float(start)))
    skills.sort(key=lambda skill: skill.start)
    merged = [next(same) for _, same in groupby(skills, key=lambda skill: skill.name)]
    return EpisodeSkills(tuple(merged), *map(one_line, texts))


def compare_forms(
    source: Source, first: str, ours: Found, other: str, theirs: Found
) -> None:
    """Refuse forms that differ in names or by more than a frame: one is out of date."""
    frame = (1 + TIME_TOLERANCE) / source.fps
    nothing = Skill("", math.inf)
    for index in source.episodes:
        skills = (ours[index].skills, theirs[index].skills)
        for one, two in zip_longest(*skills, fillvalue=nothing):
            if one.name != two.name or abs(one.start - two.start) > frame:
                raise InputError(
                    f"{source.root}: its skills contradict each other: in episode "
                    f"{index} {first}, which would be read, has {one.name!r:.60} at "
                    f"{one.start:g} s, and {other} has {two.name!r:.60} at "
                    f"{two.start:g} s; remove the one that is out of date"
                )


def leave_out_late(source: Source, form: str, found: Found, notes: list[str]) -> Found:
    """Leave out skills that start after the end, as models have them now and then."""
    kept: Found = {}
    late = []
    only_last = True
    for index, episode in found.items():
        end = source.seconds(index) - TIME_TOLERANCE / source.fps
        in_time = tuple(skill for skill in episode.skills if skill.start < end)
        kept[index] = replace(episode, skills=in_time)
        if len(in_time) < len(episode.skills):
            late.append((index, episode.skills[len(in_time)]))
            only_last &= 0 < len(in_time) == len(episode.skills) - 1
    if not late:
        return kept
    index, skill = late[0]
    problem = f"{len(late)} skills start after the end of their episodes"
    example = f"{skill.name!r:.60} at {skill.start:g} s in episode {index}"
    allowed = len(found) // 5 if len(found) >= 10 else len(found) - 1
    if len(late) > allowed or not only_last:
        raise InputError(f"{source.root}: {form}: {problem}: {example}; give seconds")
    notes.append(f"{problem} and are left out: {example}")
    return kept


def read_skills_file(source: Source) -> Entries:
    """Read meta/skills.json, as annotate.py writes it."""
    path = source.root / SKILLS_FILE
    if not path.is_file():
        return
    content = read_json(path)
    episodes = dict(content["episodes"])
    descriptions = [str((x or {}).get("description")) for x in episodes.values()]
    # annotate.py writes the dataset's first task into every episode, so that equal
    # descriptions in a dataset of several tasks say nothing about an episode.
    is_equal = len(descriptions) > 1 and len(set(descriptions)) == 1
    is_equal &= len(set(source.tasks.values())) > 1
    for index in source.episodes:
        place = f'{path}: episode "{index}"'
        with errors_as(InputError, place, "bring it into the form of the README"):
            episode = dict(episodes.get(str(index)) or {})
            skills = episode.get("skills") or ()
            entries = [(skill["name"], skill["start"]) for skill in skills]
            own = one_line(episode.get("description") or "")
        coarse = content.get("coarse_description") or ""
        texts = ("", own or coarse) if is_equal else (own, coarse)
        yield index, place, entries, *texts


def find_other_version(source: Source) -> list[str]:
    """A note where skills.json seems to be from before episodes were deleted."""
    episodes = dict(read_json(source.root / SKILLS_FILE)["episodes"])
    off = []
    for index in source.episodes:
        skills = (episodes.get(str(index)) or {}).get("skills") or ()
        ends = [x["end"] for x in skills if isinstance(x.get("end"), (int, float))]
        if ends:
            off.append(abs(max(ends) - source.seconds(index)) > 1)
    if sum(off) * 2 <= len(off):
        return []
    sign = f"in {sum(off)} of {len(off)} episodes the last skill ends elsewhere"
    return [f"{SKILLS_FILE} may belong to another version of the dataset: {sign}"]


def episodes_by_file(source: Source, column: str) -> dict[Path, list[EpisodeFrames]]:
    """The wanted episodes of each data file that has a column."""
    by_file = {}
    for path, episodes in groupby(source.episodes.values(), key=lambda x: x.path):
        if column in pq.read_schema(path).names:
            by_file[path] = list(episodes)
    return by_file


def seconds_between(first_timestamp: float, timestamp: float | None) -> float | None:
    """Seconds between two timestamps, without the 0.0000000477 of a float32."""
    return None if timestamp is None else round(float(timestamp - first_timestamp), 6)


def read_language_rows(source: Source) -> Entries:
    """Read the subtasks that stand in `language_persistent` of each first frame."""
    for path, episodes in episodes_by_file(source, LANGUAGE_COLUMN).items():
        waiting = deque(episodes)
        row = 0
        # A few rows at a time: the column takes gigabytes when it is decoded whole.
        for batch in pq.ParquetFile(path).iter_batches(256, columns=[LANGUAGE_COLUMN]):
            while waiting and waiting[0].first_row < row + len(batch):
                episode = waiting.popleft()
                place = f"{path}: {LANGUAGE_COLUMN} of episode {episode.episode_index}"
                first_timestamp = episode.frames["timestamp"].iloc[0]
                entries = []
                for entry in batch[0][episode.first_row - row].as_py() or ():
                    if entry and entry["style"] == "subtask":
                        start = seconds_between(first_timestamp, entry["timestamp"])
                        entries.append((entry["content"], start))
                yield episode.episode_index, place, entries
            row += len(batch)


def read_subtask_index(source: Source) -> Entries:
    """Read the runs of equal values in `subtask_index`; a negative one is no skill."""
    names: dict[int, str] = {}
    for path, episodes in episodes_by_file(source, "subtask_index").items():
        labels = read_columns(path, ["subtask_index"])["subtask_index"].fillna(-1)
        if not names and (labels >= 0).any():
            names = read_subtask_names(source.root)
        for episode in episodes:
            end = episode.first_row + len(episode.frames)
            values = labels.to_numpy()[episode.first_row : end]
            timestamps = episode.frames["timestamp"].to_numpy()
            place = f"{path}: subtask_index of episode {episode.episode_index}"
            entries = []
            for row in np.flatnonzero(np.diff(values, prepend=values[:1] - 1)).tolist():
                label = int(values[row])
                if label >= 0:
                    start = seconds_between(timestamps[0], timestamps[row])
                    entries.append((names.get(label, label), start))
            yield episode.episode_index, place, entries


def read_subtask_names(root: Path) -> dict[int, str]:
    """Read the names of the labels in `subtask_index`."""
    for path in (root / "meta" / "subtasks.parquet", root / "meta" / "subtasks.jsonl"):
        if path.is_file():
            return read_names(path, "subtask_index")
    raise InputError(
        f"{root}: has labels in subtask_index, but neither meta/subtasks.parquet nor "
        "meta/subtasks.jsonl; copy that file from the dataset that this was made of"
    )


def read_sarm_columns(source: Source, kind: str) -> Entries:
    """Read what SARM's annotator has put there; `kind` is "dense" or "sparse"."""
    columns = ["episode_index", f"{kind}_subtask_names", f"{kind}_subtask_start_times"]
    for path in sorted(source.root.glob("meta/episodes/*/*.parquet")):
        if not set(columns) <= set(pq.read_schema(path).names):
            continue
        for row in pq.read_table(path, columns=columns).to_pylist():
            index, names, starts = (row[name] for name in columns)
            # A single "task" is what the annotator fills in where nobody has annotated.
            if not names or names == ["task"]:
                continue
            place = f"{path}: {columns[1]} of episode {index}"
            # The annotator takes an episode's index for its row in the file. In any
            # file but the first that is the row of another episode, or a new one.
            if index is None or len(starts or ()) != len(names):
                remedy = "bring meta/episodes into one file and annotate again"
                raise InputError(f"{place} is mixed up; {remedy}")
            yield int(index), place, list(zip(names, starts, strict=True))


# The forms of skills. The fullest is read, and of equals the first.
SKILL_READERS: dict[str, Callable[[Source], Entries]] = {
    SKILLS_FILE: read_skills_file,
    "language_persistent (subtask rows)": read_language_rows,
    "subtask_index with meta/subtasks.parquet": read_subtask_index,
    DENSE_SUBTASKS: partial(read_sarm_columns, kind="dense"),
    SPARSE_SUBTASKS: partial(read_sarm_columns, kind="sparse"),
}


# -------------------------------------------------------------------------------- plan
# Which frames are sampled, and what is asked about each: the whole job, in advance.


@dataclass(frozen=True)
class Sample:
    """A frame to generate a dialogue for, and all that is asked about it."""

    episode_id: int
    frame_index: int  # Within the episode, as in LeRobot.
    timestamp: float  # In seconds, as stored.
    skill_current: str
    skill_history: tuple[str, ...]  # The skills before it, the earliest first.
    task_description: str
    scenario_type: str = ""
    response_type: str = ""
    index: int = 0  # Among the frames of all data files that are there.
    episode_skills: tuple[str, ...] = ()  # The episode's different skills.

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        told = (self.task_description, self.skill_history, self.skill_current)
        return construct_prompt(*told, self.scenario_type, self.response_type)

    def examples(self, tries: int = 0) -> Turns:
        """The earlier turns of the chat, in another order with each try."""
        draw = random.Random(self.index).getrandbits(16) + tries
        return choose_examples(self.scenario_type, self.response_type, draw)

    @property
    def place(self) -> str:
        """Where the frame is, in words."""
        return f"episode {self.episode_id}, frame {self.frame_index}"

    @property
    def aim(self) -> tuple[str, str]:
        """What its dialogue has to fit."""
        return self.skill_current, self.task_description


@dataclass(frozen=True)
class EpisodePlan:
    """An episode's frames and samples.

    `skill_numbers`, int32 (frames,), says which of `skill_names` each frame shows.
    """

    episode_index: int
    first_index: int
    skill_names: tuple[str, ...]
    skill_numbers: np.ndarray
    samples: list[Sample]

    def sample_spans(self) -> np.ndarray:
        """How many frames carry the dialogue of each sample, int64 (samples,)."""
        starts = [sample.index - self.first_index for sample in self.samples]
        return np.diff([*starts, len(self.skill_numbers)])


@dataclass(frozen=True)
class Plan:
    """The whole job, in dataset order, decided before anything is generated."""

    episodes: list[EpisodePlan]
    camera_keys: list[str]
    source: Source
    skill_source: SkillSource
    notes: tuple[str, ...] = ()

    @cached_property
    def samples(self) -> list[Sample]:
        """The samples of all episodes."""
        return [sample for episode in self.episodes for sample in episode.samples]

    @property
    def frame_count(self) -> int:
        """The number of frames of all episodes."""
        return sum(len(episode.skill_numbers) for episode in self.episodes)


class TypeDealer:
    """Deals types like cards, from shuffled decks: left to itself, a model picks one.

    Each skill name has decks of its own, so that no skill is tied to a type.
    """

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.decks: dict[tuple[str, ...], list[str]] = {}

    def deal(self, skill: str, is_first: bool) -> tuple[str, str]:
        """Deal a scenario type, fewer for a first sample, and a response type."""
        forbidden = NOT_ON_FIRST_SAMPLE if is_first else set()
        scenarios = [name for name in SCENARIO_TYPES if name not in forbidden]
        scenario = self.draw((skill, *forbidden), scenarios or list(SCENARIO_TYPES))
        response = self.draw((skill, "replies", scenario), suitable_responses(scenario))
        return scenario, response

    def draw(self, deck_name: tuple[str, ...], types: Sequence[str]) -> str:
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
    task_as_skill: bool = False,
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
        task_as_skill: whether an episode without skills counts as one skill, its task.

    Raises:
        InputError: the dataset cannot be annotated.
    """
    check_prompt()
    source = read_source(dataset)
    cameras = choose_cameras(source, num_image_views_per_sample, camera_keys)
    skill_source = load_skills(source, task_as_skill)
    dealer = TypeDealer(seed)
    episodes = []
    for index in source.episodes:
        known = skill_source.episodes[index]
        grid = (sample_interval, align_skills)
        episodes.append(plan_episode(source, index, known, dealer, *grid))
    notes = [*skill_source.notes, *find_video_overlaps(source, cameras)]
    plan = Plan(episodes, cameras, source, skill_source, tuple(notes))
    check_images(plan)
    return plan


def plan_episode(
    source: Source,
    episode_index: int,
    known: EpisodeSkills,
    dealer: TypeDealer,
    sample_interval: float,
    align_skills: bool,
) -> EpisodePlan:
    """Decide which frames of an episode are sampled, and what is asked about each.

    A frame's skill is the last that has started, before any the first. A sample is the
    first frame at or after each multiple of the interval, counted from the first frame
    of the episode or, with `align_skills`, of each skill.
    """
    episode = source.episodes[episode_index]
    columns = {name: episode.frames[name].to_numpy() for name in FRAME_COLUMNS}
    timestamps = columns["timestamp"]
    seconds = timestamps.astype("float64") - float(timestamps[0])
    if not (np.diff(seconds, append=math.inf) >= 0).all():
        problem = f"the timestamps of episode {episode_index} do not run forwards"
        raise InputError(f"{episode.path}: {problem}; correct them")
    on_time = seconds + TIME_TOLERANCE / source.fps
    starts = np.array([skill.start for skill in known.skills])
    numbers = (np.searchsorted(starts, on_time, "right").astype("int32") - 1).clip(0)
    firsts = np.unique(numbers, return_index=True)[1] if align_skills else [0]
    # Half a frame samples every frame already, and less would overflow the division.
    step = max(sample_interval, 0.5 / source.fps)
    names = tuple(skill.name for skill in known.skills)
    samples: list[Sample] = []
    for first, end in pairwise([*firsts, len(seconds)]):
        multiples = (on_time[first:end] - seconds[first]) // step
        for position in first + np.unique(multiples, return_index=True)[1]:
            number = int(numbers[position])
            task = source.tasks.get(int(columns["task_index"][position]), "")
            scenario, response = dealer.deal(names[number], is_first=not samples)
            sample = Sample(
                episode_id=episode_index,
                frame_index=int(columns["frame_index"][position]),
                # 0.1, not the float64 that is nearest to its float32.
                timestamp=float(str(timestamps[position])),
                skill_current=names[number],
                skill_history=names[:number],
                task_description=known.description or task or known.coarse_description,
                scenario_type=scenario,
                response_type=response,
                index=episode.first_index + int(position),
                episode_skills=tuple(dict.fromkeys(names)),
            )
            samples.append(sample)
    return EpisodePlan(episode_index, episode.first_index, names, numbers, samples)


def count_late_frames(plan: Plan, carried: Mapping[int, str] | None = None) -> int:
    """Count the frames with another skill's dialogue, `carried` by sample index."""
    late = 0
    for episode in plan.episodes:
        shown = np.array(episode.skill_names, dtype=object)[episode.skill_numbers]
        aims = {sample.index: sample.skill_current for sample in episode.samples}
        skills = [(carried or aims)[index] for index in aims]
        heard = np.array(skills, dtype=object).repeat(episode.sample_spans())
        late += int((shown != heard).sum())
    return late


def draw_samples(samples: Sequence[Sample], limit: int) -> list[Sample]:
    """Draw samples to look at, the same ones each time, in dataset order."""
    drawn = random.Random(0).sample(list(samples), min(len(samples), limit))
    return sorted(drawn, key=lambda sample: sample.index)


# ------------------------------------------------------------------------------ images
# The sampled frames of the chosen cameras are decoded, and no others.

# Where an image is: a file, with the seconds in a video or the row in a parquet file.
Place = tuple[Path, float]


class VideoReader:
    """A video being read, mostly forwards; it raises whatever PyAV raises."""

    def __init__(self, path: Path, fps: float):
        self.path = path
        self.container = av.open(str(path))
        self.stream: Any = self.container.streams.video[0]
        # A frame is taken for the one at a time if it is nearer than any other.
        self.tolerance = 0.5 / fps + 1e-4
        self.frames: Iterator[Any] = iter(())
        self.frame: Any = None
        # Seconds that a seek has had to decode at most, so far.
        self.reach = 0.0

    def image_at(self, seconds: float) -> Image.Image:
        """The RGB image at a time in the file, in seconds."""
        ahead = seconds - self.frame.time if self.frame else math.inf
        if not -self.tolerance <= ahead <= self.reach:
            self.seek(seconds)
        while self.frame and self.frame.time < seconds - self.tolerance:
            self.frame = next(self.frames, None)
        if self.frame is None or self.frame.time > seconds + self.tolerance:
            raise ValueError(f"no frame at {seconds} s")
        return self.frame.to_image()

    def seek(self, seconds: float) -> None:
        """Go to a key frame at or before a time.

        A file is sought by the times at which frames are decoded, which precede those
        at which they are shown: a key frame may be too late, and one before is sought.
        What is decoded before a key frame lacks its own beginning, and is passed over.
        """
        start = seconds
        while True:
            start = max(0.0, start)
            self.container.seek(int(start / self.stream.time_base), stream=self.stream)
            self.frames = self.container.decode(self.stream)
            self.frame = next(self.frames)
            while start > 0 and not self.frame.key_frame:
                self.frame = next(self.frames)
            if start == 0 or self.frame.time <= seconds + self.tolerance:
                break
            start -= 2 * (seconds - start) + 4 * self.tolerance
        self.reach = max(self.reach, seconds - self.frame.time)


class StoredImages:
    """The images of a camera in a parquet file, of which it holds one row group."""

    def __init__(self, path: Path, camera_key: str):
        self.path = path
        self.camera_key = camera_key
        self.file = pq.ParquetFile(path)
        groups = map(self.file.metadata.row_group, range(self.file.num_row_groups))
        self.ends = np.cumsum([group.num_rows for group in groups])
        self.group = -1
        self.table: Any = None

    def image_at(self, row: float) -> Image.Image:
        """The RGB image in a row of the file."""
        group = int(np.searchsorted(self.ends, row, "right"))
        if group != self.group:
            self.table = self.file.read_row_group(group, [self.camera_key])
            self.group = group
        # Counted from the end of the row group.
        stored = self.table[self.camera_key][int(row - self.ends[group])].as_py()
        return Image.open(io.BytesIO(stored["bytes"])).convert("RGB")


def find_places(plan: Plan, samples: Sequence[Sample], camera_key: str) -> list[Place]:
    """Find the image of a camera for each sample, as LeRobotDataset does."""
    source = plan.source
    places: list[Place] = []
    if camera_key not in source.meta.video_keys:
        for sample in samples:
            episode = source.episodes[sample.episode_id]
            row = episode.first_row + sample.index - episode.first_index
            places.append((episode.path, row))
        return places
    paths = find_videos(source.meta, source.table, camera_key, source.episodes)
    starts = source.table[f"videos/{camera_key}/from_timestamp"].to_dict()
    ends = source.table[f"videos/{camera_key}/to_timestamp"].to_dict()
    slack = 1 / source.fps
    for sample in samples:
        start = starts[sample.episode_id]
        length = ends[sample.episode_id] - start
        if not -slack <= sample.timestamp <= length + slack:
            problem = f"{sample.place} is outside its {length:g} s of {camera_key}"
            raise InputError(f"{source.root}: {problem}; correct its timestamps")
        places.append((paths[sample.episode_id], start + sample.timestamp))
    return places


def find_video_overlaps(source: Source, camera_keys: Sequence[str]) -> list[str]:
    """A note for each camera in which episodes begin with another episode's images."""
    notes = []
    for key in set(camera_keys) & set(source.meta.video_keys):
        paths = find_videos(source.meta, source.table, key, source.episodes)
        starts = source.table[f"videos/{key}/from_timestamp"]
        ends = source.table[f"videos/{key}/to_timestamp"]
        slack = (1 - TIME_TOLERANCE) / source.fps
        places = sorted((paths[i], starts[i], ends[i] - slack, i) for i in paths)
        early = [b[3] for a, b in pairwise(places) if a[0] == b[0] and b[1] < a[2]]
        if early:
            problem = "as in LeRobot, these episodes begin with another's images"
            notes.append(f"{key}: {problem}: {name_some(early)}")
    return notes


def read_images(plan: Plan, camera_key: str, places: Iterable[Place]) -> Iterator[Any]:
    """Read the RGB image of a camera at each place; None where it cannot be decoded."""
    is_video = camera_key in plan.source.meta.video_keys
    reader: VideoReader | StoredImages | None = None
    for path, position in places:
        # Every decoder has errors of its own, and one bad image must not end a run.
        try:
            if reader is None or reader.path != path:
                if is_video:
                    reader = VideoReader(path, plan.source.fps)
                else:
                    reader = StoredImages(path, camera_key)
            yield reader.image_at(position)
        except Exception:
            reader = None
            yield None


def read_views(plan: Plan, samples: Sequence[Sample]) -> Iterator[Views | None]:
    """The views of each sample, one per camera; None where one cannot be decoded."""
    cameras = []
    for key in plan.camera_keys:
        cameras.append(read_images(plan, key, find_places(plan, samples, key)))
    for views in zip(*cameras, strict=True):
        yield None if None in views else list(views)


def check_images(plan: Plan) -> None:
    """Decode the last image needed of each file: cut off videos still open."""
    for camera_key in plan.camera_keys:
        places = find_places(plan, plan.samples, camera_key)
        last = dict(sorted(places, key=lambda place: place[1]))
        images = read_images(plan, camera_key, last.items())
        for path, image in zip(last, images, strict=True):
            if image is None:
                problem = f"the last image needed of {camera_key} cannot be decoded"
                raise InputError(f"{path}: {problem}; restore the file")


# ----------------------------------------------------------------------------- answers
# The dialogue in what a model wrote, and whether it is worth training on.

MAX_LENGTH = 300  # Characters of one side of a dialogue.
QUESTION_MARKS = ("?", "\uff1f", "\u061f")  # Latin, Chinese and Arabic.
MARKUP = re.compile("user_prompt|robot_utterance|<\\||\\|>|</|[{}\ufffd]")
SENTENCE_ENDS = ".!?\u3002\uff01\uff1f\u061f\u2026"
SENTENCE = re.compile(f"[^{SENTENCE_ENDS}]+[{SENTENCE_ENDS}]*")

Dialogue = dict[str, Any]  # user_prompt, robot_utterance; with --verify skill_recovered
Dialogues = dict[int, Dialogue]  # by index of the frame


def parse_answer(text: str) -> Dialogue | None:
    """Find the dialogue in an answer of the model.

    Args:
        text: the answer; a closed thought or a code fence around it does no harm.

    Returns:
        user_prompt and robot_utterance; None if there are none that somebody could say.
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
    """Whether a text could be said: it has letters, a sane length and no markup."""
    has_letters = any(character.isalpha() for character in text)
    is_odd = MARKUP.search(text) or CONTROL_CHARACTER.search(text)
    return 2 <= len(text) <= MAX_LENGTH and has_letters and not is_odd


def plain_words(text: str) -> str:
    """The words of a text in lower case, without punctuation, to compare sentences."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def only_asks(text: str) -> bool:
    """Whether a text is nothing but questions."""
    # A quotation mark or an ellipsis after the last question is no sentence.
    sentences = [part for part in SENTENCE.findall(text) if plain_words(part)]
    return all(sentence.rstrip().endswith(QUESTION_MARKS) for sentence in sentences)


def check_dialogue(dialogue: Dialogue | None, sample: Sample) -> str:
    """Say what a model got wrong in a dialogue about a sample; "" if nothing.

    It goes by words alone, in any language that puts spaces between them.
    """
    if not dialogue:
        return "the answer was no dialogue"
    user_prompt = dialogue["user_prompt"]
    reply = dialogue["robot_utterance"]
    both = f"{user_prompt} {reply}"
    skill = sample.skill_current
    task = sample.task_description
    known = [skill, task, *sample.episode_skills, *sample.skill_history]
    told = plain_words(" ".join(known))
    for phrase in map(plain_words, NARRATION):
        if f" {phrase} " in f" {plain_words(both)} " and phrase not in told:
            return "it tells of the person or the robot"
    if robot_words() & spoken_words(user_prompt):
        return "the person speaks as the robot"
    if any(label in both for label in re.findall(r"\w[\w ]+:", PROMPT)):
        return "it repeats the prompt"
    if (stems(both) & example_stems()) - stems(told):
        return "it speaks of an example's scene"
    if points_elsewhere(user_prompt, sample):
        return "the user prompt asks for another skill"
    if points_elsewhere(reply, sample):
        return "the reply promises another skill"
    asked = stems(user_prompt)
    own = stems(skill) - stems(task)
    if stems(task) and stems(task) <= asked and own and not own & asked:
        return "the user prompt asks for the whole task"
    fitting = stems(skill) | asked
    if " " in user_prompt and stems(skill) and not stems(reply) & fitting:
        return "the reply says nothing of the action"
    # "Okay, I'll lift it" answers "Lift it", and "Okay, lift it" does not.
    repeat = plain_words(user_prompt)
    own_part = plain_words(reply).replace(repeat, "").split()
    if repeat in plain_words(reply) and len(own_part) < 2:
        return "the reply repeats the user prompt"
    return ""


@cache
def example_stems() -> set[str]:
    """What the examples are about: words that two lines of one have, and no other."""
    counts = []
    for example in chain(*EXAMPLES.values()):
        lines = (example.picture, example.task, example.skill, *example.history)
        counts.append(Counter(stem for line in lines for stem in stems(line)))
    seen = Counter(chain(*counts))
    subjects = {stem for x in counts for stem, count in x.items() if count > 1}
    return {stem for stem in subjects if seen[stem] == 1 and len(stem) > 3}


@cache
def robot_words() -> set[str]:
    """Words that half of the examples' replies have and no user prompt, as I'll."""
    examples = list(chain(*EXAMPLES.values()))
    replies = [reply for example in examples for reply in example.replies.values()]
    counts = Counter(word for text in replies for word in spoken_words(text))
    common = {x for x, count in counts.items() if count >= max(4, len(replies) / 2)}
    return common - spoken_words(" ".join(x.user_prompt for x in examples))


def spoken_words(text: str) -> set[str]:
    """The words of a text in lower case; "I'll" is one."""
    return set(re.findall(r"[\w']+", text.casefold()))


def points_elsewhere(text: str, sample: Sample) -> bool:
    """Whether a text has more of what sets another skill apart from the sample's."""
    said = stems(text)
    own = stems(sample.skill_current)
    for name in sample.episode_skills:
        theirs = stems(name)
        for_them = len(said & (theirs - own)) / max(1, len(theirs - own))
        for_us = len(said & (own - theirs)) / max(1, len(own - theirs))
        if for_them > for_us:
            return True
    return False


def stems(text: str) -> set[str]:
    """The words of a text that carry its meaning, without common endings."""
    return word_stems(text) - common_stems()


def word_stems(text: str) -> set[str]:
    """Numbers, and words of three letters and more without common endings."""
    found = set()
    # A few examples do not tell which short words mean nothing, such as "die".
    shortest = 3 if sum(map(len, EXAMPLES.values())) >= 8 else 4
    for word in plain_words(text).split():
        if len(word) >= shortest or word.isdigit():
            stem = re.sub("(?<=...)(ing|ed|[ens])+$", "", word)
            # "putting" is like "put".
            found.add(re.sub(r"([^aeiou\d])\1$", r"\1", stem))
    return found


@cache
def common_stems() -> set[str]:
    """The words that at least half of the examples say."""
    examples = chain(*EXAMPLES.values())
    texts = [" ".join([x.user_prompt, *x.replies.values()]) for x in examples]
    counts = Counter(stem for text in texts for stem in word_stems(text))
    return {stem for stem, count in counts.items() if count >= max(2, len(texts) / 2)}


# --------------------------------------------------------------------------- generator
# The model in this process.

MAX_NEW_TOKENS = 128  # The action and two sentences in JSON take 40 to 75.
MAX_TRIES = 4
MAX_PIXELS = 448 * 448  # Of an image: 256 tokens for Qwen2-VL, 196 for Qwen3-VL.
MODEL_REMEDY = "check the name, the network, and that it is a Qwen VL model that fits"


def make_messages(turns: Turns, content: list[Any]) -> list[Any]:
    """A chat: the system's message, earlier turns, the parts of the question."""
    said = [("system", SYSTEM)]
    for question, answer in turns:
        said += [("user", question), ("assistant", answer)]
    messages = [{"role": role, "content": [text_part(text)]} for role, text in said]
    return [*messages, {"role": "user", "content": content}]


def text_part(text: str) -> dict[str, str]:
    """A text as a part of a message, which every chat template takes."""
    return {"type": "text", "text": text}


class QwenPgen:
    """A Qwen vision-language model that writes dialogues, in this process (p_gen).

    Args:
        model: Hub id or folder of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5.
        device: a device of torch, or "auto" to spread the model over all GPUs.
        dtype: a type of torch, by name.
        temperature: of sampling; 0 takes the likeliest token.

    Raises:
        InputError: the model cannot be loaded, or cannot run.
    """

    def __init__(
        self,
        model: str,
        device: str = "cuda",
        dtype: str = "bfloat16",
        temperature: float = 0.7,
    ):
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.temperature = temperature
        # Lowered when GPU memory runs out.
        self.batch_limit = sys.maxsize
        with errors_as(InputError, f"--device {device}", "try --device cpu"):
            torch.empty(1, device="cpu" if device == "auto" else device).tolist()
        check_model(model)
        problem = f"--model {model}: transformers {transformers.__version__} cannot"
        with errors_as(InputError, f"{problem} load it", MODEL_REMEDY):
            self.processor: Any = transformers.AutoProcessor.from_pretrained(model)
            loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(
                model,
                dtype=getattr(torch, dtype),
                device_map=device,
                attn_implementation="sdpa",
                use_safetensors=True,
                output_loading_info=True,
            )
        self.model, loading = loaded
        missing = name_some(sorted(loading["missing_keys"]), limit=3)
        if missing:
            raise InputError(f"--model {model}: lacks the weights {missing}; mend it")
        self.tokenizer: Any = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        ends = self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        # A checkpoint's own settings would hold wherever ours are silent: Qwen2-VL's
        # has top_k=1.
        self.model.generation_config = transformers.GenerationConfig(
            eos_token_id=ends, pad_token_id=self.tokenizer.pad_token_id
        )
        # A checkpoint of another version of transformers may load and not run.
        remedy = "try another version of transformers, a smaller model, another device"
        with errors_as(InputError, f"{problem} run it", remedy):
            trial = self.prepare([Image.new("RGB", (64, 64))], prompt="Hello.")
            self.generate([trial], tries=0, limit=1)

    def call_qwen(self, images: Views, prompt: str, examples: Any = None) -> Dialogue:
        """Ask about one frame until the answer is a dialogue.

        Args:
            images: RGB, the views of the frame.
            prompt: from construct_prompt.
            examples: earlier turns, from choose_examples; any plain ones if None.

        Returns:
            user_prompt and robot_utterance.

        Raises:
            RunError: no answer was a dialogue.
        """
        for tries in range(MAX_TRIES):
            turns = choose_examples(draw=tries) if examples is None else examples
            (text,) = self.answer([self.prepare(images, prompt, turns)], tries)
            dialogue = parse_answer(text)
            if dialogue:
                return dialogue
        raise RunError(f"none of {MAX_TRIES} answers was a dialogue, as {text[:300]!r}")

    def prepare(self, images: Views, prompt: str, examples: Turns = ()) -> Prepared:
        """Turn a sample into what the model is given.

        Args:
            images: RGB, the views of the frame.
            prompt: from construct_prompt.
            examples: earlier turns, from choose_examples.

        Returns:
            The text of the chat, and the images at the size that the model sees.
        """
        from qwen_vl_utils import process_vision_info

        bound = {"type": "image", "max_pixels": MAX_PIXELS}
        content: list[Any] = [dict(bound, image=image) for image in images]
        content.append(text_part(without_markers(prompt)))
        chat = make_messages(examples, content)
        # The model goes on from here, so that it writes no preamble and no code fence.
        chat.append({"role": "assistant", "content": [text_part(PREFILL)]})
        text = self.processor.apply_chat_template(
            chat, tokenize=False, continue_final_message=True
        )
        # The size of a patch differs between the families of Qwen.
        patch_size = self.processor.image_processor.patch_size
        bounded, _ = process_vision_info(chat, image_patch_size=patch_size)
        return text, bounded or []

    def answer(self, batch: Sequence[Prepared], tries: int = 0) -> list[str]:
        """Generate one answer to each prepared sample.

        Args:
            batch: prepared samples. Out of GPU memory, batches are halved from here on.
            tries: how often these were asked before. At temperature 0, a repeat is
                sampled.

        Returns:
            The texts, which may be no dialogues.

        Raises:
            RunError: the model fails, or one sample does not fit into GPU memory.
        """
        generate = partial(self.generate, tries=tries, limit=MAX_NEW_TOKENS)
        answers = self.call_in_parts(generate, batch)
        return [PREFILL + answer for answer in answers]

    def call_in_parts(
        self, call: Callable[[Sequence[Any]], Iterable[Any]], batch: Sequence[Any]
    ) -> list[Any]:
        """Call the model with a batch, in smaller parts once GPU memory has run out."""
        import torch

        results: list[Any] = []
        while len(results) < len(batch):
            part = batch[len(results) : len(results) + self.batch_limit]
            try:
                results += call(part)
                continue
            except torch.OutOfMemoryError as error:
                if len(part) == 1:
                    remedy = "use fewer views or a smaller --model"
                    raise RunError(f"out of GPU memory; {remedy}") from error
                self.batch_limit = len(part) // 2
            except RuntimeError as error:
                # As where the logits are not finite.
                remedy = "try another --dtype or --device, or check its files"
                raise RunError(f"the model fails: {error}; {remedy}") from error
            # Only outside of `except` is the memory of the failed call free.
            torch.cuda.empty_cache()
        return results

    def generate(self, batch: Sequence[Prepared], tries: int, limit: int) -> list[str]:
        """Generate what follows PREFILL for each prepared sample."""
        import torch

        temperature = retry_temperature(self.temperature, tries)
        inputs = self.encode(batch)
        with torch.inference_mode():
            tokens = self.model.generate(
                **inputs,
                do_sample=temperature > 0,
                # Lower temperatures make the logits overflow.
                temperature=max(temperature, 0.01),
                top_k=TOP_K,
                top_p=TOP_P,
                max_new_tokens=limit,
            )
        new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)

    def encode(self, batch: Sequence[Prepared]) -> Any:
        """Tokens and pixels of texts and their images, padded on the left."""
        inputs = self.processor(
            text=[text for text, _ in batch],
            images=[image for _, images in batch for image in images] or None,
            do_resize=False,
            padding=True,
            return_tensors="pt",
        )
        return inputs.to(self.model.device)

    def choose(self, questions: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
        """Say which skill each user prompt asks for, for --verify.

        Args:
            questions: user prompts, each with the skills to choose from.

        Returns:
            The likeliest skill of each.

        Raises:
            RunError: the model fails, or one question does not fit into GPU memory.
        """
        batch = []
        for user_prompt, options in questions:
            question = without_markers(construct_verify_prompt(user_prompt, options))
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": [text_part(question)]}],
                tokenize=False,
                add_generation_prompt=True,
                # The first token is to be the answer, not that of a thought.
                enable_thinking=False,
            )
            batch.append((text, []))
        labels = self.tokenizer.convert_tokens_to_ids(list(OPTION_LABELS))
        logits = self.call_in_parts(self.last_logits, batch)
        chosen = []
        for row, (_, options) in zip(logits, questions, strict=True):
            chosen.append(options[int(row[labels[: len(options)]].argmax())])
        return chosen

    def last_logits(self, batch: Sequence[Prepared]) -> Any:
        """The logits of what follows each text, (texts, vocabulary)."""
        import torch

        with torch.inference_mode():
            # The padding is on the left, so the last position is that of the answer.
            return self.model(**self.encode(batch), logits_to_keep=1).logits[:, -1]


def without_markers(text: str) -> str:
    """Break up what may end a turn or call for an image, as <|im_end|> or <image>."""
    return re.sub(r"<(?=[^<>\s]+>)", "< ", text)


def check_model(model: str) -> None:
    """See that a model is there and is one of Qwen's, before anything else is done."""
    from transformers import AutoConfig

    with errors_as(InputError, f"--model {model}: is not to be found", MODEL_REMEDY):
        kind = AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
    if not kind.startswith("qwen"):
        raise InputError(f"--model {model}: is a {kind}; name a Qwen VL model")


def retry_temperature(temperature: float, tries: int) -> float:
    """The temperature of an answer; a greedy one that was no good is sampled again."""
    return 0.7 if temperature == 0 and tries else temperature


# ------------------------------------------------------------------------------ server
# The model behind a server that speaks OpenAI's chat completions, such as vLLM.

KEY_VARIABLE = "OPENAI_API_KEY"
SERVER_PATIENCE = 600.0  # Seconds without any answer, after which the run ends.
ANSWER_TIMEOUT = 120.0  # Seconds for an answer; more where the server is only busy.
LONGEST_PAUSE = 15.0  # Seconds before a failed request is sent again.

DIALOGUE_SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ANSWER_KEYS},
    "required": ANSWER_KEYS,
    "additionalProperties": False,
}


@dataclass
class Server:
    """A server, and what is known of it. Times are those of time.monotonic()."""

    url: str
    client: Any  # openai.OpenAI.
    left_out: int = 0  # 1: the fields of vLLM are not sent; 2: nor response_format.
    under_way: int = 0
    rests_until: float = 0.0
    answered_at: float = 0.0

    def load(self) -> tuple[bool, int]:
        """What makes another server the better choice."""
        return self.rests_until > time.monotonic(), self.under_way


class ServerPgen:
    """A vision-language model behind a server that writes dialogues (p_gen).

    Any server that speaks OpenAI's chat completions will do: vLLM, SGLang, transformers
    serve, Hugging Face Inference Endpoints. A key is read from the environment variable
    OPENAI_API_KEY. After check, all may be called from many threads at once.

    Args:
        urls: of servers of the same model, such as http://localhost:8000/v1.
        model: the name that they give it; None for the only one that they serve.
        temperature: of sampling; 0 takes the likeliest token.
        seed: of sampling, sent along with each request; None sends none.

    Raises:
        InputError: no server is there, it refuses the key, or does not serve the model.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str | None = None,
        temperature: float = 0.7,
        seed: int | None = None,
    ):
        import openai

        # A proxy would look for these names on its own machine.
        os.environ.setdefault("NO_PROXY", "localhost,127.0.0.1,0.0.0.0")
        self.temperature = temperature
        self.seed = seed
        self.key = os.environ.get(KEY_VARIABLE, "").strip()
        if not re.fullmatch("[!-~]*", self.key):
            raise InputError(f"{KEY_VARIABLE}: is no key; set it again")
        # What the threads of the requests share is changed under this lock.
        self.lock = threading.Lock()
        self.timeout = ANSWER_TIMEOUT
        # A request that was answered, and why the last one was refused.
        self.answered: Any = None
        self.refusal = ""
        self.servers = []
        for url in dict.fromkeys(urls):
            if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", url):
                raise InputError("--server: give each URL as http://host:port/v1")
            with errors_as(InputError, f"--server {url}", "correct it, or the proxy"):
                key = self.key or "EMPTY"
                client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
            server = Server(url.rstrip("/"), client)
            model = self.find_model(server, model)
            self.servers.append(server)
        self.model = str(model)

    def find_model(self, server: Server, model: str | None) -> str:
        """The name of the model that a server is asked for, which it has to serve."""
        try:
            names = [str(x.id) for x in server.client.models.list(timeout=30.0).data]
        except Exception as error:
            # Some servers keep no list. The first request tells more.
            if getattr(error, "status_code", 0) in (404, 405) and model:
                return model
            raise InputError(
                f"--server {server.url}: {self.describe(error)}; start it, correct the "
                f"URL, which most often ends in /v1, or set the key in {KEY_VARIABLE}"
            ) from None
        wanted = model or (names[0] if len(names) == 1 else "")
        if wanted in names:
            return wanted
        served = name_some(names) or "no model"
        problem = f"serves {served}, and not {model or 'only one'}"
        raise InputError(f"--server {server.url}: {problem}; name one with --model")

    def describe(self, error: Exception) -> str:
        """An error on one line of at most 300 characters, without the key."""
        text = one_line(f"{error} {error.__cause__ or ''}").rstrip(". ")
        # Some servers quote it. A shorter one, such as EMPTY, is no secret.
        return (text.replace(self.key, "***") if len(self.key) > 7 else text)[:300]

    def check(self, view_count: int, sample: Sample) -> None:
        """Find out with first requests, with drawn images, what each server takes.

        A server has to answer one of them with a dialogue. `sample` has the longest
        prompt, to see whether there is room for it.
        """
        drawn = [Image.new("RGB", (448, 448), (90, 130, 170))] * view_count
        for server in self.servers:
            self.answered = None
            for left_out, tries in product(range(3), range(3)):
                server.left_out = left_out
                messages = self.prepare(drawn, sample.prompt, sample.examples(tries))
                answer = self.ask(messages, tries, MAX_NEW_TOKENS, [server])
                if parse_answer(answer):
                    self.answered = messages
                    break
            else:
                outcome = f"it answers {answer[:200]!r}" if answer else self.refusal
                raise InputError(
                    f"--server {server.url}: no answer to a first request (images: "
                    f"{view_count}) is a dialogue: {outcome}; check {KEY_VARIABLE}, "
                    "the URL, and that the model sees images and does not think first"
                )
            if server.left_out:
                say(f"{server.url}: requests are without what only vLLM knows")

    def prepare(self, images: Views, prompt: str, examples: Turns = ()) -> list[Any]:
        """Turn a sample into the messages of a request.

        The examples come first and are the same for many samples, so that a server's
        prefix cache holds them. Images are sent as JPEG data URLs.
        """
        content: list[dict[str, Any]] = []
        for image in images:
            scale = math.sqrt(MAX_PIXELS / (image.width * image.height))
            if scale < 1:
                width = max(1, int(image.width * scale))
                image = image.resize((width, max(1, int(image.height * scale))))
            url = f"data:image/jpeg;base64,{encode_jpeg(image, quality=90)}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append(text_part(without_markers(prompt)))
        return make_messages(examples, content)

    def answer(self, batch: Sequence[Any], tries: int = 0) -> list[str]:
        """Ask once about each prepared sample; "" where a request is refused."""
        return [self.ask(x, tries, MAX_NEW_TOKENS, self.servers) for x in batch]

    def choose(self, questions: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
        """Say which skill each user prompt asks for; "" where no skill is named."""
        chosen = []
        for user_prompt, options in questions:
            question = construct_verify_prompt(user_prompt, options)
            messages = self.prepare([], question)[1:]
            text = self.ask(messages, 0, 1, self.servers).strip()
            number = OPTION_LABELS.find(text[:1] or "?")
            chosen.append(options[number] if 0 <= number < len(options) else "")
        return chosen

    def ask(self, messages: Any, tries: int, limit: int, servers: list[Server]) -> str:
        """Send a request until it is answered; "" if just this one is refused."""
        import openai

        began = time.monotonic()
        for failures in count(1):
            with self.lock:
                server = min(servers, key=Server.load)
                server.under_way += 1
            sent = time.monotonic()
            try:
                text = self.post(server, messages, tries, limit)
                server.answered_at = time.monotonic()
                return text
            except (openai.APIError, ValueError) as error:
                failure = error
            finally:
                with self.lock:
                    server.under_way -= 1
            problem = f"{server.url}: {self.describe(failure)}"
            status = getattr(failure, "status_code", 0)
            # A request that breaks a server which answers others is to blame itself.
            is_broken = status not in (429, 503) and (
                self.answered is None or (failures > 3 and self.is_there(server))
            )
            if is_broken or status in (400, 413, 422):
                self.refusal = problem
                if self.answered:
                    say(f"no answer to a sample: {problem}")
                return ""
            last_answer = max(began, *(x.answered_at for x in self.servers))
            is_lost = time.monotonic() - last_answer > SERVER_PATIENCE
            if is_lost or status in (401, 403, 404, 405):
                raise RunError(f"{problem}; check the server; {RESUME_REMEDY}")
            is_timeout = isinstance(failure, openai.APITimeoutError)
            if is_timeout and server.answered_at > sent:
                # It answers others, so it is only busy.
                self.timeout = min(2 * self.timeout, SERVER_PATIENCE)
            if failures == 3:
                say(f"waiting, ten minutes at most: {problem}")
            self.rest(server, failure, failures)
        raise AssertionError

    def rest(self, server: Server, failure: Exception, failures: int) -> None:
        """Leave a server alone for a while; another one is asked at once."""
        pause = min(random.uniform(0.25, 0.5) * 2 ** min(failures, 10), LONGEST_PAUSE)
        pause = max(pause, retry_after(failure))
        now = time.monotonic()
        server.rests_until = now + pause
        if all(other.rests_until > now for other in self.servers):
            time.sleep(pause)

    def is_there(self, server: Server) -> bool:
        """Whether a server still answers the request that one has answered."""
        import openai

        try:
            return bool(self.post(server, self.answered, 0, MAX_NEW_TOKENS))
        except (openai.APIError, ValueError):
            return False

    def post(self, server: Server, messages: Any, tries: int, limit: int) -> str:
        """Send one request with every setting; raise openai.APIError or ValueError."""
        import openai

        unset: Any = openai.NOT_GIVEN
        # One token is the letter of a skill, for --verify.
        is_letter = limit == 1
        temperature = retry_temperature(self.temperature, tries)
        schema = {"name": "dialogue", "strict": True, "schema": DIALOGUE_SCHEMA}
        form: Any = {"type": "json_schema", "json_schema": schema}
        own = {"top_k": TOP_K or -1, "chat_template_kwargs": {"enable_thinking": False}}
        seed = random.Random(f"{self.seed} {tries} {messages}").getrandbits(31)
        completion = server.client.chat.completions.create(
            model=self.model,
            messages=messages,
            temperature=0.0 if is_letter else temperature,
            top_p=TOP_P,
            max_tokens=limit,
            seed=unset if self.seed is None else seed,
            response_format=unset if is_letter or server.left_out > 1 else form,
            extra_body={} if server.left_out else own,
            timeout=self.timeout,
        )
        return answer_text(completion)


# Either engine.
Pgen = QwenPgen | ServerPgen


def answer_text(completion: Any) -> str:
    """The text of an answer, also one in parts, or else its thoughts."""
    try:
        message = completion.choices[0].message
        content = message.content or getattr(message, "reasoning_content", "") or ""
    except (AttributeError, IndexError, TypeError):
        # As when a proxy replies.
        raise ValueError("the reply is no chat completion") from None
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content)
    return str(content)


def retry_after(error: Exception) -> float:
    """Seconds that a server asks to be left alone for; 0 if it does not."""
    response = getattr(error, "response", None)
    text = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(text), SERVER_PATIENCE) if re.fullmatch("[0-9]+", text) else 0.0


# -------------------------------------------------------------------------- annotation
# Samples are asked about, and again where the answer is not good enough.

# So many samples that all fail mean that the rest will fail, too.
HOPELESS = 20
NO_IMAGE = "an image cannot be decoded"


@dataclass
class Request:
    """A sample on its way to its dialogue."""

    sample: Sample
    views: Views | None  # RGB; None if one could not be decoded.
    prepared: Any = None  # What pgen.prepare made of them.
    tries: int = 0  # How many answers were not good enough so far.
    dialogue: Any = None  # The last answer, if it was a Dialogue.
    fault: str = ""  # What was wrong with it.
    fallback: Dialogue | None = None  # Its only fault is the verdict of --verify.


@dataclass
class Progress:
    """What a process has done. `failed` has a reason for each place."""

    generated: int = 0
    retried: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def describe(self) -> Rows:
        """Names and values of the counts, in words."""
        speed = self.generated / self.seconds if self.seconds else 0.0
        return [
            ("generated in this run", f"{self.generated:,} ({speed:.2f} samples/s)"),
            ("asked again", f"{self.retried:,}"),
            ("failed", f"{len(self.failed):,}"),
            *[("note", note) for note in self.notes],
        ]


def annotate_sample(pgen: Pgen, images: Views, sample: Sample) -> Line:
    """Generate the dialogue of one sample.

    Args:
        pgen: the model.
        images: RGB, the views of the frame.
        sample: from a plan.

    Returns:
        Its line of syn_annotations.jsonl, without the row of the table of tasks.

    Raises:
        RunError: no answer was good enough.
    """
    annotator = Annotator(pgen, batch_size=1)
    finished = annotator.finish(annotator.prepare(Request(sample, images)))
    if not finished:
        raise RunError(f"{sample.place}: {annotator.progress.failed[sample.place]}")
    return annotation_line(sample, finished[sample.index])


def annotation_line(sample: Sample, dialogue: Dialogue) -> Line:
    """A line of syn_annotations.jsonl, without the row of the table of tasks."""
    line = asdict(sample)
    del line["index"], line["episode_skills"]
    line.update(dialogue)
    return line


class Annotator:
    """Asks a model about samples, and again where an answer is not good enough.

    Args:
        pgen: the model.
        batch_size: samples in one call; requests under way for a server.
        verify: whether each user prompt is checked to lead to its skill.
    """

    def __init__(self, pgen: Pgen, batch_size: int, verify: bool = False):
        self.pgen = pgen
        self.batch_size = batch_size
        self.verify = verify
        self.progress = Progress()
        # What the threads of a server's requests share is changed under this lock.
        self.lock = threading.Lock()
        # The skill that each user prompt of an episode stands for.
        self.skills_of_prompts: dict[tuple[int, str], str] = {}

    def remember(self, sample: Sample, dialogue: Dialogue | None) -> bool:
        """Whether a dialogue's user prompt stands for no other skill of the episode."""
        if not dialogue:
            return False
        key = (sample.episode_id, plain_words(dialogue["user_prompt"]))
        skill = self.skills_of_prompts.setdefault(key, sample.skill_current)
        return skill == sample.skill_current

    def annotate(
        self, plan: Plan, samples: Sequence[Sample], known: Dialogues | None = None
    ) -> Iterator[Dialogues]:
        """Generate dialogues of some of a plan's samples, yielded as they come."""
        for sample in plan.samples:
            self.remember(sample, (known or {}).get(sample.index))
        inputs = zip(samples, read_views(plan, samples), strict=True)
        fresh = (Request(sample, views) for sample, views in inputs)
        size = min(self.batch_size, len(samples))
        # One thread reads ahead: several in one video decoder crash the interpreter.
        ahead = call_in_threads(self.prepare, fresh, thread_count=1, limit=2 * size)
        with closing(ahead) as ready:
            if isinstance(self.pgen, QwenPgen):
                yield from self.annotate_in_batches(ready)
            else:
                yield from call_in_threads(self.finish, ready, size)

    def prepare(self, request: Request) -> Request:
        """Make what the model is given for the next try of a request."""
        if request.views is not None:
            sample = request.sample
            turns = sample.examples(request.tries)
            if request.tries:
                # The task draws small models away from the skill.
                sample = replace(sample, task_description="")
            request.prepared = self.pgen.prepare(request.views, sample.prompt, turns)
        return request

    def annotate_in_batches(self, fresh: Iterator[Request]) -> Iterator[Dialogues]:
        """Ask the model in this process, a whole batch at a time."""
        waiting: deque[Request] = deque()
        while True:
            size = min(self.batch_size, self.pgen.batch_limit)
            batch = [waiting.popleft() for _ in range(min(size, len(waiting)))]
            # At temperature 0 only repeats are sampled: one call holds either.
            if not batch or self.pgen.temperature > 0:
                batch += islice(fresh, size - len(batch))
            if not batch:
                return
            finished, again = self.ask(batch)
            waiting.extend(map(self.prepare, again))
            yield finished

    def finish(self, request: Request) -> Dialogues:
        """Ask about one sample until it has its dialogue, or has failed."""
        while True:
            finished, again = self.ask([request])
            if not again:
                return finished
            self.prepare(request)

    def ask(self, batch: Sequence[Request]) -> tuple[Dialogues, list[Request]]:
        """Ask once about each request: what is finished, what is asked again."""
        asked = [request for request in batch if request.views is not None]
        inputs = [request.prepared for request in asked]
        texts = self.pgen.answer(inputs, asked[0].tries) if asked else []
        for request, text in zip(asked, texts, strict=True):
            request.dialogue = parse_answer(text)
            request.fault = check_dialogue(request.dialogue, request.sample)
        if self.verify:
            self.verify_answers([request for request in asked if not request.fault])
        finished: Dialogues = {}
        with self.lock:
            again = [request for request in batch if self.settle(request, finished)]
            reasons = [x for x in self.progress.failed.values() if x != NO_IMAGE]
        if not self.skills_of_prompts and len(reasons) >= HOPELESS:
            problem = f"the first {HOPELESS} samples all failed: {reasons[-1]}"
            answer = f"the model answered {''.join(texts[-1:])[:300]!r}"
            raise RunError(f"{problem}; {answer}; try another --model")
        return finished, again

    def verify_answers(self, requests: Sequence[Request]) -> None:
        """Ask the model which skill each user prompt leads to."""
        judged = [x for x in requests if len(x.sample.episode_skills) > 1]
        pairs = [(x.sample, x.dialogue["user_prompt"]) for x in judged]
        for request, is_right in zip(judged, self.recovers(pairs), strict=True):
            request.dialogue["skill_recovered"] = is_right
            if not is_right:
                request.fault = "--verify takes it for another skill"
                request.fallback = request.dialogue

    def recovers(self, pairs: Sequence[tuple[Sample, str]]) -> list[bool]:
        """Whether the model takes each sentence for the skill of its sample.

        Small models prefer some letters: a wrong answer is asked for again in reverse.
        """
        questions = [(said, self.list_options(sample)) for sample, said in pairs]
        chosen = self.pgen.choose(questions)
        wanted = [sample.skill_current for sample, _ in pairs]
        wrong = [i for i, skill in enumerate(chosen) if skill != wanted[i]]
        again = [(questions[i][0], questions[i][1][::-1]) for i in wrong]
        for i, skill in zip(wrong, self.pgen.choose(again), strict=True):
            chosen[i] = skill
        return [skill == name for skill, name in zip(chosen, wanted, strict=True)]

    def list_options(self, sample: Sample) -> list[str]:
        """The skills of a sample's episode, shuffled, as many as have labels."""
        shuffler = random.Random(sample.index)
        others = [x for x in sample.episode_skills if x != sample.skill_current]
        shuffler.shuffle(others)
        listed = [sample.skill_current, *others[: len(OPTION_LABELS) - 1]]
        shuffler.shuffle(listed)
        return listed

    def try_verification(self, samples: Sequence[Sample]) -> None:
        """Ask the model about the skills' own names, and note it if it fails there."""
        of_skill = {x.skill_current: x for x in samples if len(x.episode_skills) > 1}
        pairs = [(sample, name) for name, sample in of_skill.items()][:32]
        right = self.recovers(pairs)
        if sum(right) < 0.8 * len(right):
            self.progress.notes.append(
                f"--verify means little here: the model takes only {sum(right)} of "
                f"{len(right)} skills' own names for that skill"
            )

    def settle(self, request: Request, finished: Dialogues) -> bool:
        """Take an answer into `finished`, or say whether it is asked again."""
        sample = request.sample
        if request.views is None:
            self.progress.failed[sample.place] = NO_IMAGE
            return False
        dialogue = None if request.fault else request.dialogue
        if dialogue and not self.remember(sample, dialogue):
            request.fault = "the same sentence stands for another skill of the episode"
            dialogue = None
        request.tries += 1
        if not dialogue and request.tries < MAX_TRIES:
            self.progress.retried += 1
            return True
        if not dialogue and self.remember(sample, request.fallback):
            dialogue = request.fallback
        if dialogue:
            finished[sample.index] = dialogue
            self.progress.generated += 1
        else:
            reason = f"none of {MAX_TRIES} answers was good enough; {request.fault}"
            self.progress.failed[sample.place] = reason
        return False


def call_in_threads(
    call: Callable[[Any], Any], items: Iterator[Any], thread_count: int, limit: int = 0
) -> Generator[Any, None, None]:
    """Call a function with each item in threads, and yield what comes.

    At most `limit` results wait to be taken, if it is not 0. The threads do not hold up
    the end of the process, as those of ThreadPoolExecutor do. After an error at most
    one more item is taken. It is raised once all calls under way have ended.
    """
    lock = threading.Lock()
    done: queue.Queue[Any] = queue.Queue(limit)
    errors: list[BaseException] = []
    end = object()

    def work() -> None:
        try:
            while True:
                with lock:
                    item = end if errors else next(items, end)
                if item is end:
                    break
                done.put(call(item))
        except BaseException as error:
            errors.append(error)
        done.put(end)

    for _ in range(thread_count):
        threading.Thread(target=work, daemon=True).start()
    running = thread_count
    try:
        while running:
            result = done.get()
            if result is end:
                running -= 1
            else:
                yield result
    finally:
        # A thread may be about to take another item, or wait for room.
        with lock:
            items = iter(())
        while not done.empty():
            done.get()
    if errors:
        raise errors[0]


# ----------------------------------------------------------------------------- journal
# Finished dialogues on the disk, in <output-dir>.partial, taken up again.


class Journal:
    """A file that finished dialogues are appended to, a JSON line each.

    What is added survives the end of the process at once, and that of the machine a
    second later or once the journal is closed.

    Args:
        path: of the file, which is made if it is not there.

    Raises:
        RunError: the disk fails, in any of its methods.
    """

    def __init__(self, path: Path):
        self.synced_at = time.monotonic()
        self.failure = f"{path}: cannot be written"
        with errors_as(RunError, self.failure, DISK_REMEDY):
            self.file = path.open("ab", buffering=0)

    def add(self, dialogues: Dialogues) -> None:
        """Write dialogues, given by the index of their frame."""
        if not dialogues:
            return
        # Start on a new line: a crash may have torn the last one.
        lines = [json_line(dict(x, index=i)) for i, x in dialogues.items()]
        content = ("\n" + "".join(lines)).encode()
        with errors_as(RunError, self.failure, DISK_REMEDY):
            if self.file.write(content) != len(content):
                raise OSError("the disk is full")
            if time.monotonic() - self.synced_at >= 1:
                os.fsync(self.file.fileno())
                self.synced_at = time.monotonic()

    def close(self) -> None:
        """Put all on the disk and close the file."""
        with errors_as(RunError, self.failure, DISK_REMEDY):
            os.fsync(self.file.fileno())
        self.file.close()


def journal_name(settings: Settings, rank: int | str) -> str:
    """The name of a rank's journal; journals of other settings have other names."""
    return f"dialogues-{fingerprint(settings)}-{rank}.jsonl"


def read_journals(work_dir: Path, settings: Settings) -> Dialogues:
    """Read what was generated with these settings, but for lines that were torn."""
    dialogues: Dialogues = {}
    for path in sorted(work_dir.glob(journal_name(settings, "*"))):
        for line in path.read_bytes().decode(errors="replace").split("\n"):
            try:
                entry = json.loads(line)
                index = entry.pop("index")
            except (ValueError, KeyError, AttributeError, TypeError):
                continue
            if parse_answer(line):
                dialogues.setdefault(index, entry)
    return dialogues


@contextmanager
def lock_work_dir(work_dir: Path) -> Iterator[None]:
    """Hold the work folder, which is made if it is not there."""
    names = {path.name for path in work_dir.glob("*")} - {"lock", ".run.json"}
    if names and not read_settings(work_dir / "run.json"):
        raise InputError(f"{work_dir}: holds somebody else's files; move it away")
    lock = FileLock(work_dir / "lock", timeout=0)
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InputError(f"{work_dir}: another run is at work; wait for it") from None
    except OSError as error:
        raise InputError(f"--output-dir: {error}; name another folder") from error
    try:
        yield
    finally:
        # A journal is there from when the model is loaded, so none of a worker goes.
        if not any(work_dir.glob("dialogues-*.jsonl")):
            remove_work(work_dir)
        lock.release()
        # What another run has locked meanwhile holds a run.json by the time it matters.
        if {path.name for path in work_dir.glob("*")} == {"lock"}:
            shutil.rmtree(work_dir, ignore_errors=True)


def take_up_work(work_dir: Path, settings: Settings, overwrite: bool) -> Dialogues:
    """Read the dialogues that an interrupted run with the same settings has left."""
    own = set(work_dir.glob(journal_name(settings, "*")))
    for path in sorted(set(work_dir.glob("dialogues-*.jsonl")) - own):
        if path.stat().st_size and not overwrite:
            raise other_settings(work_dir / "run.json", settings)
        path.unlink()
    write_text(work_dir / "run.json", json.dumps({"settings": settings}, indent=4))
    return read_journals(work_dir, settings)


def remove_work(work_dir: Path) -> None:
    """Remove what a finished run, or one that has come to nothing, leaves behind."""
    shutil.rmtree(work_dir / "dataset", ignore_errors=True)
    for path in [*work_dir.glob("dialogues-*.jsonl"), work_dir / "run.json"]:
        path.unlink(missing_ok=True)


def read_settings(record: Path) -> dict[str, Any]:
    """The settings that an earlier run has kept in a file; {} if it cannot be read."""
    try:
        return dict(json.loads(record.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def other_settings(record: Path, settings: Settings) -> InputError:
    """The error for results that were made with other settings, as a file says."""
    difference = first_difference(read_settings(record), settings)
    remedy = "undo the change, name another --output-dir, or discard with --overwrite"
    return InputError(f"{record}: made with {difference}; {remedy}")


def first_difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first setting that differs, in words."""
    for name in [*wanted, *found]:
        old = found.get(name)
        new = wanted.get(name)
        if old != new and isinstance(new, dict):
            changed = [x for x in new if (old or {}).get(x) != new[x]]
            return f"another {name} ({name_some(changed)})"
        if old != new:
            return f"{name} = {old!r:.80}, but this run has {new!r:.80}"
    return "other settings"


def fingerprint(value: Any) -> str:
    """Sixteen hexadecimal digits that stand for a value of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def json_line(entry: dict[str, Any]) -> str:
    """An entry on one line, also for readers that end lines at U+2028 and the like."""
    text = json.dumps(entry, ensure_ascii=False)
    return CONTROL_CHARACTER.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once, so that no crash leaves half of it."""
    fresh = path.with_name(f".{path.name}")
    with errors_as(RunError, f"{path}: cannot be written", DISK_REMEDY):
        fresh.write_text(text, encoding="utf-8", newline="\n")
        fresh.replace(path)


# ------------------------------------------------------------------------------- ranks
# The processes that torchrun started share the work through torchrun's own store.

LOST_LAUNCH = "the processes of this launch have lost each other"


class Launch:
    """The processes of one launch, and the key-value store that they meet in.

    Without torchrun it is one process. The store is polled, so that signals are heard.
    """

    def __init__(self) -> None:
        problem = "RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR in the environment"
        remedy = "start the script with torchrun, or unset them"
        with errors_as(InputError, problem, remedy):
            self.rank = int(os.environ.get("RANK", "0"))
            self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
            self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
            if not 0 <= self.rank < self.world_size:
                raise ValueError(f"rank {self.rank} of {self.world_size}")
            if self.world_size > 1:
                from torch.distributed import rendezvous

                self.store, _, _ = next(rendezvous("env://"))

    def send(self, key: str, message: dict[str, Any]) -> None:
        """Leave a message in the store."""
        with errors_as(RunError, LOST_LAUNCH, RESUME_REMEDY):
            self.store.set(key, json.dumps(message))

    def receive(self, key: str) -> dict[str, Any]:
        """Wait for a message."""
        with errors_as(RunError, LOST_LAUNCH, RESUME_REMEDY):
            while not self.store.check([key]):
                time.sleep(0.2)
            return json.loads(self.store.get(key))


def deal_samples(
    launch: Launch, settings: Settings, samples: Sequence[Sample], again: bool
) -> Sequence[Sample]:
    """As rank 0, send every other rank its stretch of the samples, keep the first."""
    parts = np.array_split([sample.index for sample in samples], launch.world_size)
    for rank, part in enumerate(parts[1:], 1):
        message = {"settings": settings, "again": again, "indices": part.tolist()}
        launch.send(f"part-{rank}", message)
    return samples[: len(parts[0])]


def run_as_worker(args: argparse.Namespace, launch: Launch) -> None:
    """As another rank: wait for a part, generate it into a journal, and report."""
    part = launch.receive(f"part-{launch.rank}")
    progress = Progress()
    if part["indices"]:
        job = prepare_job(args)
        if part["settings"] != job.settings:
            difference = first_difference(part["settings"], job.settings)
            raise RunError(f"rank 0 has {difference}; start all processes alike")
        wanted = set(part["indices"])
        samples = [sample for sample in job.plan.samples if sample.index in wanted]
        known = read_journals(job.work_dir, job.settings)
        progress = generate_part(job, launch, samples, known, part["again"])
    launch.send(f"report-{launch.rank}", asdict(progress))


def add_reports(launch: Launch, progress: Progress) -> None:
    """As rank 0, wait until all other ranks have reported, and add up the counts."""
    for rank in range(1, launch.world_size):
        report = launch.receive(f"report-{rank}")
        progress.generated += report["generated"]
        progress.retried += report["retried"]
        progress.failed.update(report["failed"])
        progress.seconds = max(progress.seconds, report["seconds"])


# ------------------------------------------------------------------------------ result
# Which dialogue each frame carries, and how good they are together.


@dataclass(frozen=True)
class Results:
    """What becomes of a plan and its dialogues.

    Attributes:
        tasks: the table of different dialogues.
        task_indices: int64 (frames,), each frame's row in it.
        annotations: the lines of syn_annotations.jsonl.
        summary: names and values of figures, in words.
    """

    tasks: pd.DataFrame
    task_indices: np.ndarray
    annotations: list[dict[str, Any]]
    summary: Rows


def generate_synthetic_data(
    dataset: Any,
    pgen: Pgen,
    plan: Plan | None = None,
    batch_size: int = 16,
    dialogues: Dialogues | None = None,
    verify: bool = False,
) -> tuple[pd.DataFrame, np.ndarray, list[dict[str, Any]]]:
    """Generate the dialogues of a dataset. Nothing is written.

    Args:
        dataset: a LeRobotDataset, or its metadata.
        pgen: the model.
        plan: from make_plan, for the same dataset; make_plan(dataset) if None.
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
    plan = plan or make_plan(dataset)
    known = dict(dialogues or {})
    missing = [sample for sample in plan.samples if sample.index not in known]
    annotator = Annotator(pgen, batch_size, verify)
    with tqdm(total=len(missing), unit="sample") as bar:
        for finished in annotator.annotate(plan, missing, known):
            known.update(finished)
            bar.update(len(finished))
    results = build_results(plan, known)
    return results.tasks, results.task_indices, results.annotations


def assign_dialogues(plan: Plan, dialogues: Dialogues) -> dict[int, Sample]:
    """For the index of each sample, the sample whose dialogue its frames carry.

    Its own, else the nearest earlier one of the episode with the same skill and task,
    else the nearest earlier one, else the nearest later one. An episode in which all
    samples failed borrows from others: of the same skill and task, else of the skill.
    """
    lenders = defaultdict(list)
    for sample in plan.samples:
        if sample.index in dialogues:
            lenders[sample.aim].append(sample)
            lenders[sample.skill_current].append(sample)
    carried = {}
    for episode in plan.episodes:
        there = {x.index: x for x in episode.samples if x.index in dialogues}
        if not there:
            for number, sample in enumerate(episode.samples):
                fitting = lenders[sample.aim] or lenders[sample.skill_current]
                if fitting:
                    there[sample.index] = fitting[number % len(fitting)]
        if not there:
            problem = f"no dialogue for the skills of episode {episode.episode_index}"
            remedy = "run again, or with another --model and --overwrite"
            raise RunError(f"{problem}; {remedy}")
        latest: dict[Any, Sample] = {"any": next(iter(there.values()))}
        for sample in episode.samples:
            lender = there.get(sample.index) or latest.get(sample.aim, latest["any"])
            carried[sample.index] = lender
            if sample.index in there:
                latest["any"] = lender
                latest[sample.aim] = lender
    return carried


def build_results(plan: Plan, dialogues: Dialogues) -> Results:
    """Build the table of dialogues and find each frame's row in it.

    Args:
        plan: the whole job.
        dialogues: by index of the frame.

    Raises:
        RunError: an episode is left without any dialogue.
    """
    import pandas as pd

    carried = assign_dialogues(plan, dialogues)
    columns = ["user_prompt", "robot_utterance", "skill_current"]
    columns += ["scenario_type", "response_type"]
    done = [sample for sample in plan.samples if sample.index in dialogues]
    annotations = [annotation_line(sample, dialogues[sample.index]) for sample in done]
    table = pd.DataFrame(annotations)[columns]
    # Rows are counted as they are first seen, in dataset order.
    rows = table.groupby(columns, sort=False).ngroup().tolist()
    for line, row in zip(annotations, rows, strict=True):
        line[COLUMN] = row
    row_of_sample = {x.index: row for x, row in zip(done, rows, strict=True)}
    tasks = table.drop_duplicates(ignore_index=True)
    tasks = tasks.rename(columns={"skill_current": "skill"})
    tasks.insert(0, "task_index", range(len(tasks)))
    parts = []
    for episode in plan.episodes:
        lenders = [carried[sample.index] for sample in episode.samples]
        indices = np.array([row_of_sample[lender.index] for lender in lenders])
        parts.append(indices.repeat(episode.sample_spans()))
    skills = {index: lender.skill_current for index, lender in carried.items()}
    return Results(
        tasks=tasks,
        task_indices=np.concatenate(parts).astype("int64"),
        annotations=annotations,
        summary=summarize(plan, annotations, count_late_frames(plan, skills)),
    )


def summarize(plan: Plan, annotations: Sequence[Line], late_frames: int) -> Rows:
    """Count what the summary, the card and the page say of the dialogues, in words."""
    total = len(annotations)
    prompts = Counter(line["user_prompt"] for line in annotations)
    late_share = late_frames / plan.frame_count
    figures = [
        ("dialogues", f"{total:,}"),
        ("frames", f"{plan.frame_count:,}"),
        ("frames with another skill's dialogue", f"{late_share:.1%}"),
        ("different user prompts", f"{len(prompts):,} of {total:,}"),
        ("scenario types", count_values(line["scenario_type"] for line in annotations)),
        ("response types", count_values(line["response_type"] for line in annotations)),
    ]
    if plan.skill_source.task_count:
        task_count = f"{plan.skill_source.task_count:,}"
        figures.append(("episodes with their task as skill", task_count))
    verified = [line for line in annotations if "skill_recovered" in line]
    if verified:
        share = sum(line["skill_recovered"] for line in verified) / len(verified)
        figures.append(("skill recovered", f"{share:.1%} of {len(verified):,}"))
    return figures


def count_values(values: Iterable[str]) -> str:
    """How often each value occurs, in words."""
    counts = sorted(Counter(values).items())
    return ", ".join(f"{value} {count:,}" for value, count in counts)


# ------------------------------------------------------------------------------ output
# The new dataset: the old one plus a column. It appears whole or not at all.


def write_dataset(source: Source, results: Results, target: Path) -> None:
    """Write the source plus the new column, with the tables of dialogues."""
    first = 0
    problem = f"{target}: cannot be written"
    with errors_as(RunError, problem, DISK_REMEDY, (OSError, pa.ArrowException)):
        for path in list_files(source.root):
            copy = target / path.relative_to(source.root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path in source.data_files:
                first += add_column(path, copy, results.task_indices[first:])
            else:
                shutil.copyfile(path, copy)
        results.tasks.to_parquet(target / "meta" / "tasks_high_level.parquet")
    info = read_json(source.root / "meta" / "info.json")
    info["features"][COLUMN] = {"dtype": "int64", "shape": [1], "names": None}
    write_text(target / "meta" / "info.json", json.dumps(info, indent=4))
    lines = "".join(json_line(line) for line in results.annotations)
    write_text(target / "meta" / "syn_annotations.jsonl", lines)


def list_files(root: Path) -> Iterator[Path]:
    """The files of a dataset in order, links followed, but for caches."""

    def fail(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=fail):
        subfolders[:] = sorted(set(subfolders) - {".cache", ".git"})
        yield from (Path(folder, name) for name in sorted(names))


def add_column(source: Path, target: Path, values: np.ndarray) -> int:
    """Copy a parquet file with the new column, and return its number of rows.

    Row groups, codecs and dictionaries stay. `values` begin with the file's first row.
    """
    with pq.ParquetFile(source) as parquet:
        schema = parquet.schema_arrow
        if COLUMN in schema.names:
            schema = schema.remove(schema.get_field_index(COLUMN))
        new = pa.field(COLUMN, pa.int64())
        file = parquet.metadata
        codecs = {}
        dictionaries = [COLUMN]
        for number in range(file.num_columns if file.num_row_groups else 0):
            column = file.row_group(0).column(number)
            name = column.path_in_schema
            codecs[name] = column.compression.replace("UNCOMPRESSED", "NONE")
            if column.has_dictionary_page:
                dictionaries.append(name)
        codecs[COLUMN] = codecs.get("index", "SNAPPY")
        described = describe_column(schema.metadata)
        with pq.ParquetWriter(
            target,
            schema.append(new).with_metadata(described),
            version=file.format_version,
            compression=codecs,
            use_dictionary=dictionaries,
        ) as writer:
            row = 0
            for group in range(file.num_row_groups):
                # read_row_group fails where the texts in the lists of a language
                # column decode to more than 2 GB.
                batches = parquet.iter_batches(10_000, [group], schema.names)
                table = pa.Table.from_batches(batches, schema)
                column = pa.array(values[row : row + len(table)], pa.int64())
                table = table.append_column(new, column)
                writer.write_table(table, row_group_size=max(1, len(table)))
                row += len(table)
    return row


def describe_column(metadata: dict[bytes, bytes] | None) -> dict[bytes, bytes]:
    """Add the column to what `datasets` says in the parquet files it has written."""
    described = dict(metadata or {})
    if b"huggingface" in described:
        content = json.loads(described[b"huggingface"])
        content["info"]["features"][COLUMN] = {"dtype": "int64", "_type": "Value"}
        described[b"huggingface"] = json.dumps(content).encode()
    return described


def put_in_place(job: Job) -> None:
    """Move the new dataset from the work folder to its place, as the last step."""
    fresh = job.work_dir / "dataset"
    replaced = job.work_dir / "replaced"
    with errors_as(RunError, f"{job.output}: cannot be written", DISK_REMEDY):
        for path in [fresh, *fresh.rglob("*")]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        shutil.rmtree(replaced, ignore_errors=True)
        if is_finished(job.output):
            # A folder cannot be replaced by another one at once.
            job.output.rename(replaced)
        fresh.rename(job.output)
    shutil.rmtree(replaced, ignore_errors=True)


def is_finished(output: Path) -> bool:
    """Whether a folder holds a dataset that this script has finished."""
    return bool(read_settings(output / RECORD))


# -------------------------------------------------------------------------------- page
# Frames beside dialogues in one HTML file, to judge them at a glance.

MAX_PAGE_DIALOGUES = 200
MAX_PAGE_TIMELINES = 6
MAX_PAGE_TEXT = 1000  # Characters; what is longer is cut.
THUMBNAIL_WIDTH = 320  # Pixels, of a single view; several views share its area.

# Every value is escaped. Text from a dataset or a model stands in <bdi>: it keeps its
# own writing direction, and the search looks for words there and nowhere else. The
# script shows the filters: without it they would do nothing.
PAGE = """\
{% macro rows(pairs) %}
<dl class="panel figures">
  {% for name, text in pairs %}
  <div><dt>{{ name }}</dt><dd><bdi>{{ text }}</bdi></dd></div>
  {% endfor %}
</dl>
{% endmacro %}
{% macro number(skill, style="") %}
<b class="number" title="{{ skill }}" style="--skill: {{ skills[skill] }}; {{ style }}">
  {{- skills[skill] + 1 -}}
</b>
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>Dialogues of {{ title }}</title>
<style>{{ style | safe }}</style>
<h1>Dialogues of <bdi>{{ title }}</bdi></h1>
<p class="quiet">What a person might have said to make each skill the right thing to do,
  and what the robot answers, beside the frames that the model saw. A vision-language
  model wrote them. {{ notice }}</p>
{{ rows(summary) }}
<details><summary>Settings</summary>{{ rows(settings) }}</details>

<h2>Episodes, skills and samples</h2>
<div class="panel">
  {% for timeline in timelines %}
  <div class="timeline">
    <span>Episode {{ timeline.episode }}</span>
    <div class="strip" style="width: {{ timeline.width }}%">
      {% for name, start, width in timeline.bars %}
      {{ number(name, "left: %f%%; width: %f%%" | format(start, width)) }}
      {% endfor %}
      {% for tick in timeline.ticks %}<i style="left: {{ tick }}%"></i>{% endfor %}
    </div>
    <span class="quiet">{{ timeline.seconds }} s</span>
  </div>
  {% endfor %}
  <details {{ "open" if skills | length <= 12 else "" }}>
    <summary>Skills ({{ skills | length }}); a tick is a sample</summary>
    {% for x in skills %}<p>{{ number(x) }} <bdi>{{ x }}</bdi></p>{% endfor %}
  </details>
</div>

<h2>Frames and dialogues</h2>
<p class="quiet">{{ articles | length }} of {{ total }} dialogues, drawn at random.</p>
<form id="filters" hidden>
  {% for name, options in filters.items() if options | length > 1 %}
  <label>{{ name }}
    <select name="{{ name }}">
      <option value="">All</option>
      {% for text, value in options | dictsort %}
      <option value="{{ value }}">{{ text | string | truncate(80, true) }}</option>
      {% endfor %}
    </select>
  </label>
  {% endfor %}
  <label>search <input name="search" type="search" placeholder="Words"></label>
  <output></output>
  <button type="reset">Show all</button>
</form>
<div class="dialogues">
  {% for sample, dialogue, views, verified in articles %}
  {% set id = "episode-%d-frame-%d" | format(sample.episode_id, sample.frame_index) %}
  <article id="{{ id }}" class="panel" data-episode="{{ sample.episode_id }}"
    data-skill="{{ skills[sample.skill_current] }}" data-verified="{{ verified }}"
    data-scenario="{{ sample.scenario_type }}"
    data-response="{{ sample.response_type }}">
    <h3><a href="#{{ id }}">Episode {{ sample.episode_id }}</a>,
      frame {{ sample.frame_index }}, {{ "%.2f" | format(sample.timestamp) }} s</h3>
    <div>
      {% for camera, jpeg in views %}
      <img src="data:image/jpeg;base64,{{ jpeg | safe }}" alt="{{ id }}, {{ camera }}">
      <p class="quiet"><bdi>{{ camera }}</bdi></p>
      {% endfor %}
    </div>
    <div>
      <p class="person" dir="auto"><bdi>{{ dialogue.user_prompt }}</bdi></p>
      <p class="robot" dir="auto"><bdi>{{ dialogue.robot_utterance }}</bdi></p>
      <p>{{ number(sample.skill_current) }} <bdi>{{ sample.skill_current }}</bdi></p>
      <p class="quiet">{{ sample.scenario_type }}, {{ sample.response_type }}
        {{- ", " ~ verified if verified else "" }}</p>
      <p class="quiet">Task: <bdi>{{ sample.task_description }}</bdi></p>
      <p class="quiet">Before:
        <bdi>{{ sample.skill_history[-history:] | join("; ") or "nothing" }}</bdi></p>
    </div>
  </article>
  {% endfor %}
</div>
<script>{{ script | safe }}</script>
"""

PAGE_STYLE = """
:root { color-scheme: light dark; --quiet: color-mix(in srgb, CanvasText 68%, Canvas);
  --line: color-mix(in srgb, CanvasText 14%, Canvas);
  --person: color-mix(in srgb, CanvasText 8%, Canvas);
  --robot: color-mix(in srgb, RoyalBlue 22%, Canvas); }
* { box-sizing: border-box; margin: 0; padding: 0; }
body { max-width: 84rem; margin: 0 auto; padding: 2rem 1.25rem; overflow-wrap: anywhere;
  font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; }
h2 { font-size: 1.3rem; margin: 2rem 0 .8rem; }
h3 { font-size: 1rem; grid-column: 1 / -1; }
.quiet, dt, summary, label { color: var(--quiet); font-size: .9rem; }
.panel { background: Canvas; border: 1px solid var(--line); border-radius: .9rem;
  padding: 1rem 1.2rem; margin: .8rem 0; min-width: 0; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2rem; }
.figures dd { font-weight: 600; }
.timeline { display: grid; grid-template-columns: 6.5rem 1fr 4rem; gap: 1rem; }
.strip { position: relative; height: 2.4rem; }
.strip .number { position: absolute; padding: 0; min-width: 0; overflow: hidden; }
.strip i { position: absolute; bottom: .2rem; height: .5rem; border-left: 2px solid; }
.number { display: inline-block; min-width: 1.35rem; padding: 0 .25rem; color: #15181b;
  background: hsl(calc(137deg * var(--skill)) 60% 78%);
  border-radius: .35rem; font-size: .8rem; text-align: center; }
#filters { display: flex; flex-wrap: wrap; gap: .75rem 1rem; align-items: end;
  position: sticky; top: 0; padding: .75rem 0; background: Canvas; }
#filters[hidden], article[hidden] { display: none; }
#filters label { flex: 1 1 8rem; min-width: 0; }
#filters :is(select, input, button) { width: 100%; min-height: 2.5rem; font: inherit; }
#filters button { width: auto; padding: 0 .8rem; }
.dialogues { display: grid; gap: 0 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); }
article { display: grid; grid-template-columns: 14rem 1fr; gap: .6rem 1.2rem; }
article img { display: block; width: 100%; border-radius: .5rem; }
.person, .robot { width: fit-content; max-width: 92%; margin-bottom: .5rem;
  padding: .5rem .85rem; border-radius: 1.1rem; background: var(--person); }
.robot { background: var(--robot); margin-left: auto; }
"""

# It shows the articles that match the filters, which are empty after a reset's event.
PAGE_SCRIPT = """
const form = document.getElementById("filters");
const selects = [...form.querySelectorAll("select")];
const articles = [...document.querySelectorAll("article")];

function matches(article) {
  const words = [...article.querySelectorAll("bdi")].map((text) => text.textContent);
  const text = words.join(" ").toLowerCase();
  const asked = form.elements.search.value.toLowerCase().split(/\\s+/);
  return asked.every((word) => text.includes(word)) &&
    selects.every(({ name, value }) => !value || article.dataset[name] === value);
}

function filter() {
  articles.forEach((article) => { article.hidden = !matches(article); });
  const shown = articles.filter((article) => !article.hidden).length;
  form.querySelector("output").textContent = `${shown} of ${articles.length} dialogues`;
}

form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(filter));
form.hidden = false;
filter();
"""


def write_page(
    path: Path, job: Job, dialogues: Dialogues, summary: Rows, notice: str = ""
) -> None:
    """Write the page: dialogues with their frames, figures and timelines."""
    plan = job.plan
    samples = [sample for sample in plan.samples if sample.index in dialogues]
    shown = draw_samples(samples, MAX_PAGE_DIALOGUES)
    # Views share the area of a single one, so that the page stays below some 6 MB.
    width = round(THUMBNAIL_WIDTH / math.sqrt(len(plan.camera_keys)))
    verdicts = {True: "recovered", False: "not recovered"}
    articles = []
    for sample, views in zip(shown, read_views(plan, shown), strict=True):
        pictures = []
        for camera_key, view in zip(plan.camera_keys, views or (), strict=False):
            view.thumbnail((width, width))
            camera = camera_key.removeprefix("observation.images.")
            pictures.append((camera, encode_jpeg(view, quality=80)))
        dialogue = dialogues[sample.index]
        verified = verdicts.get(dialogue.get("skill_recovered"), "")
        articles.append((sample, dialogue, pictures, verified))
    timelines = make_timelines(plan)
    names = [name for timeline in timelines for name, _, _ in timeline["bars"]]
    names += [sample.skill_current for sample in shown]
    skills = {name: number for number, name in enumerate(dict.fromkeys(names))}
    environment = jinja2.Environment(
        autoescape=True, finalize=page_text, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.from_string(PAGE).render(
        title=job.name,
        notice=notice,
        summary=summary,
        settings=describe_settings(job.settings),
        timelines=timelines,
        articles=articles,
        total=len(samples),
        history=HISTORY_LENGTH,
        skills=skills,
        filters={
            "episode": {x.episode_id: x.episode_id for x in shown},
            "skill": {x.skill_current: skills[x.skill_current] for x in shown},
            "scenario": {x.scenario_type: x.scenario_type for x in shown},
            "response": {x.response_type: x.response_type for x in shown},
            "verified": {article[-1]: article[-1] for article in articles},
        },
        style=PAGE_STYLE,
        script=PAGE_SCRIPT,
    )
    write_text(path, html.lstrip())


def page_text(value: Any) -> Any:
    """Make a text harmless and of readable length; the page's own HTML stays."""
    is_own = not isinstance(value, str) or hasattr(value, "__html__")
    return value if is_own else one_line(value[:MAX_PAGE_TEXT])


def encode_jpeg(image: Image.Image, quality: int) -> str:
    """An image as a JPEG file in base64."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return base64.b64encode(file.getvalue()).decode()


def make_timelines(plan: Plan) -> list[dict[str, Any]]:
    """Lay out skills and samples of a few episodes, in percent of their lengths."""
    chosen = plan.episodes[:: math.ceil(len(plan.episodes) / MAX_PAGE_TIMELINES)]
    longest = max(len(episode.skill_numbers) for episode in chosen)
    timelines = []
    for episode in chosen:
        total = len(episode.skill_numbers)
        numbers, firsts = np.unique(episode.skill_numbers, return_index=True)
        shares = pairwise(100 * np.array([*firsts, total]) / total)
        bars = []
        for number, (start, end) in zip(numbers, shares, strict=True):
            bars.append((episode.skill_names[number], start, end - start))
        places = [sample.index - episode.first_index for sample in episode.samples]
        timeline = {
            "episode": episode.episode_index,
            "seconds": round(total / plan.source.fps, 1),
            "width": 100 * total / longest,
            "bars": bars,
            "ticks": [100 * place / total for place in places],
        }
        timelines.append(timeline)
    return timelines


# --------------------------------------------------------------------------------- Hub
# The card, the rights to write, the upload.

RETRY_PAUSES = (1, 5, 20, 60, 120)  # Seconds.

READING = """\
from lerobot.datasets.lerobot_dataset import LeRobotDataset
import pandas as pd

dataset = LeRobotDataset({arguments})
tasks = pd.read_parquet(dataset.root / "meta" / "tasks_high_level.parquet")
print(tasks.iloc[dataset[0]["task_index_high_level"].item()])"""

CARD = """\
# {{ name }}

Each frame has a dialogue that goes with what the robot is doing: what a person might
have said to bring it about, and what the robot would answer. **The dialogues are
synthetic**: a vision-language model wrote them, after
[Hi Robot](https://arxiv.org/abs/2502.19417). Nobody said them, and nobody has checked
them.
{% if source %}
It was made from [{{ source }}](https://huggingface.co/datasets/{{ source }}).
{% endif %}
## Dialogues

| | |
| --- | --- |
{% for label, value in facts -%}
| {{ label | cell }} | {{ value | cell }} |
{% endfor %}
{% for x in examples -%}
- {{ x.skill_current | cell }}: "{{ x.user_prompt | cell }}"
  "{{ x.robot_utterance | cell }}"
{% endfor %}
## How to read it

`{{ column }}` of a frame is the row of its dialogue in
`meta/tasks_high_level.parquet`, with skill and types; `meta/syn_annotations.jsonl` has
all dialogues, with what the model was told; `meta/annotate_pgen.json` has the settings.

```python
{{ reading }}
```

A local copy is opened with `root="<its folder>"` beside the name. How a policy is
trained on it stands in the section *Training* of the README of `annotate_pgen.py`.

LeRobot's tools that write a new dataset (`delete_episodes`, `split_dataset`,
`merge_datasets`, `remove_feature`) leave the table of dialogues behind: copy it to the
new `meta/`. Merge before annotating, as the rows of two tables collide.

{% if source_text %}
---

{{ source_text }}
{% endif -%}
"""


def read_card(folder: Path) -> str:
    """The text of a dataset's README.md; "" if it has none."""
    card = folder / "README.md"
    return card.read_text("utf-8-sig", "replace") if card.is_file() else ""


def write_card(folder: Path, name: str) -> None:
    """Write README.md of a finished dataset, with what the source's card says."""
    from huggingface_hub import DatasetCard

    record = read_json(folder / RECORD)
    try:
        card = DatasetCard(record["source_card"], ignore_metadata_errors=True)
    except Exception:
        say("the metadata of the source's README.md cannot be read; they stay as text")
        card = DatasetCard("")
        card.text = record["source_card"]
    data: Any = card.data
    # It describes the columns that were.
    data.pop("dataset_info", None)
    tags = data.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    data.tags = list(dict.fromkeys(["LeRobot", "synthetic", *map(str, tags)]))
    data.task_categories = data.get("task_categories") or ["robotics"]
    data.configs = [{"config_name": "default", "data_files": "data/*/*.parquet"}]
    if record["source"]:
        data.source_datasets = [record["source"]]
    lines = (folder / "meta" / "syn_annotations.jsonl").read_text(encoding="utf-8")
    annotations = [json.loads(line) for line in lines.split("\n") if line]
    settings = describe_settings(record["settings"])
    environment = jinja2.Environment(keep_trailing_newline=True)
    environment.filters["cell"] = table_cell
    text = environment.from_string(CARD).render(
        name=name,
        source=record["source"],
        facts=[("date", record["date"]), *settings, *record["summary"]],
        examples=annotations[:: math.ceil(len(annotations) / 3)],
        column=COLUMN,
        reading=READING.format(arguments=f'"{name}", video_backend="pyav"'),
        source_text=card.text.strip(),
    )
    write_text(folder / "README.md", f"---\n{data.to_yaml()}\n---\n{text}")


def table_cell(value: Any) -> str:
    """A text that stays within its cell of a table in Markdown, and is only text."""
    # An underscore within a word is no markup.
    markup = r"([\\`*\[\]!|<~&]|(?<![^\W_])_|_(?![^\W_]))"
    text = re.sub(markup, r"\\\1", one_line(str(value)))
    # Addresses would become links by themselves.
    return text.replace("://", "&#58;//").replace("www.", "www&#46;")


def ask_hub(call: Callable, **arguments: Any) -> Any:
    """Call the Hub, again when it is busy (429, 5xx) or the connection breaks."""
    for pause in RETRY_PAUSES:
        try:
            return call(**arguments)
        except Exception as error:
            if not is_passing(error):
                raise
            say(f"the Hub: {str(error)[:99]}; again in {pause} s")
        time.sleep(pause)
    return call(**arguments)


def is_passing(error: BaseException | None) -> bool:
    """Whether an error of the Hub's client, or its cause, is worth another try."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if error is None or isinstance(error, OfflineModeIsEnabled):
        return False
    answer = getattr(error, "response", None)
    # Compared with None, since an answer that reports an error is false.
    if answer is not None:
        return answer.status_code == 429 or answer.status_code >= 500
    is_broken = type(error).__module__.startswith(("httpx", "requests"))
    is_broken |= isinstance(error, (ConnectionError, TimeoutError, RuntimeError))
    return is_broken or is_passing(error.__cause__)


def check_target(target: str, source: str | None, private: bool) -> bool:
    """See that the result may be pushed, and whether the target is to be private.

    A repository that is not there is made, which shows the right to write, and removed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    on_target = partial(ask_hub, repo_id=target, repo_type="dataset")
    remedy = "log in with `hf auth login`, or name another --new-repo-id"
    with errors_as(InputError, f"--push-to-hub: {target}: no access", remedy):
        ask_hub(api.whoami)
        if source and not private:
            known = find_repository(source)
            private = known is None or bool(known.private or known.gated)
        known = find_repository(target)
        if known is None:
            on_target(api.create_repo, private=private)
            on_target(api.delete_repo, missing_ok=True)
            return private
        # The first step of an upload, which changes nothing.
        first_step = [CommitOperationAdd("README.md", b"-")]
        on_target(api.preupload_lfs_files, additions=first_step)
        files = on_target(api.list_repo_files)
    if private and not known.private:
        problem = "is public, but --private is given, or the source is not public"
        raise InputError(f"--push-to-hub: {target} {problem}; make it private")
    foreign = sorted(set(files) - {".gitattributes", "README.md"})
    if foreign and RECORD.as_posix() not in files:
        problem = f"{target} holds {name_some(foreign, 3)}, which is not this script's"
        raise InputError(f"--push-to-hub: {problem}; name another --new-repo-id")
    return private


def find_repository(repo_id: str) -> Any:
    """What the Hub says about a dataset; None if it is not there, or not shown."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return ask_hub(HfApi().repo_info, repo_id=repo_id, repo_type="dataset")
    except RepositoryNotFoundError:
        return None


def push(folder: Path, target: str, private: bool) -> None:
    """Upload a dataset instead of what is there, and tag it as LeRobot asks for."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    api = HfApi()
    on_target = partial(ask_hub, repo_id=target, repo_type="dataset")
    tag = read_json(folder / "meta" / "info.json")["codebase_version"]
    remedy = f"{folder} is safe, and the same command without --overwrite only uploads"
    with errors_as(RunError, f"--push-to-hub: {target}", remedy):
        on_target(api.create_repo, private=private or None, exist_ok=True)
        on_target(
            api.upload_folder,
            folder_path=folder,
            commit_message="Add dialogues",
            delete_patterns="*",
            ignore_patterns=[".cache/*", ".gitignore"],
        )
        with suppress(RevisionNotFoundError):
            on_target(api.delete_tag, tag=tag)
        on_target(api.create_tag, tag=tag, exist_ok=True)
    print(f"pushed to      {api.endpoint}/datasets/{target}")


# --------------------------------------------------------------------------------- job
# The whole job, from the flags to the new dataset.


@dataclass(frozen=True)
class Job:
    """What a command line comes down to, before anything is generated or written."""

    args: argparse.Namespace
    plan: Plan
    settings: Settings
    output: Path
    work_dir: Path
    name: str  # Of the new dataset, on the Hub.


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
    for note in job.plan.notes:
        # They are read before the work begins.
        print(f"note: {note}")
    is_done = is_finished(job.output) and not args.overwrite
    if args.dry_run or is_done:
        deal_samples(launch, job.settings, samples=[], again=is_done)
    if args.dry_run:
        print_plan(job)
        return
    if is_done and read_settings(job.output / RECORD) != job.settings:
        raise other_settings(job.output / RECORD, job.settings)
    private = args.private
    if args.push_to_hub:
        private = check_target(job.name, args.repo_id, args.private)
    if is_done:
        print(f"finished already, with the same settings: {job.output}")
        print(f"look at {job.output / 'meta' / 'dialogues.html'}")
        # The name may be another one than it was; a card under this one may be edited.
        if f'"{job.name}"' not in read_card(job.output):
            write_card(job.output, job.name)
    elif args.preview:
        preview(job, launch)
    else:
        make_dataset(job, launch)
    if args.push_to_hub:
        push(job.output, job.name, private)


def prepare_job(args: argparse.Namespace) -> Job:
    """Find the source, check it, and plan the job; what is quick to check is first."""
    say("loading LeRobot, which takes some ten seconds")
    from lerobot.utils.constants import HF_LEROBOT_HOME

    root = find_dataset(args)
    base = HF_LEROBOT_HOME / args.repo_id if args.repo_id else root
    # A link stays, and what it points to is replaced.
    output = Path(os.path.realpath(args.output_dir or f"{base}{SUFFIX}"))
    work_dir = Path(f"{output}.partial")
    problem = f"--output-dir {output}"
    remedy = "name another folder"
    for folder in (output, work_dir.resolve()):
        if root.is_relative_to(folder) or folder.is_relative_to(root):
            raise InputError(f"{problem}: overlaps the source; {remedy}")
    with errors_as(InputError, problem, remedy, OSError):
        recorded = read_settings(output / RECORD)
        is_new = recorded or not output.exists()
        if not is_new and (any(output.iterdir()) or os.path.ismount(output)):
            raise InputError(f"{problem}: is not empty, or a mount point; {remedy}")
    model = args.model
    if recorded and not args.overwrite:
        # Nothing will be generated, so the model may be gone.
        model = model or recorded["model"]
    elif args.server and not (args.dry_run and model):
        model = ServerPgen(args.server, model).model
    elif not args.server and not args.dry_run:
        check_model(model)
    say(f"reading {root}")
    plan = make_plan(
        dataset=open_dataset(root, args.repo_id),
        sample_interval=args.sample_interval,
        num_image_views_per_sample=args.num_image_views_per_sample,
        camera_keys=args.camera_keys,
        seed=args.seed or 0,
        align_skills=args.align_skills,
        task_as_skill=args.task_as_skill,
    )
    settings = make_settings(args, plan, model)
    name = args.new_repo_id or f"{args.repo_id or f'local/{root.name}'}{SUFFIX}"
    return Job(args, plan, settings, output, work_dir, name)


def make_settings(args: argparse.Namespace, plan: Plan, model: str) -> Settings:
    """All that the dialogues depend on; batch size and the like may change."""
    asked = [(x.index, x.timestamp, x.prompt, x.episode_skills) for x in plan.samples]
    if not args.server and Path(model).is_dir():
        # Whose folder it is in is nobody's business.
        path = Path(model).resolve()
        model = f"{path.name} ({fingerprint(str(path))})"
    sizes = {}
    for key in plan.camera_keys:
        for path in {path for path, _ in find_places(plan, plan.samples, key)}:
            sizes[str(path.relative_to(plan.source.root))] = path.stat().st_size
    settings = {
        "engine": "server" if args.server else "transformers",
        "model": model,
        "temperature": args.temperature,
        "sample_interval": args.sample_interval,
        "align_skills": args.align_skills,
        "camera_keys": plan.camera_keys,
        "seed": args.seed or 0,
        "verify": args.verify,
        "skill_source": plan.skill_source.name,
        "prompt": prompt_settings(),
        "frames, skills and tasks": fingerprint(asked),
        "files with images": fingerprint(sizes),
    }
    # As it reads back: a tuple comes back as a list.
    return json.loads(json.dumps(settings))


def make_dataset(job: Job, launch: Launch) -> None:
    """Generate what is missing, write the new dataset, and put it in its place."""
    from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata

    fresh = job.work_dir / "dataset"
    with lock_work_dir(job.work_dir):
        if is_finished(job.output) and not job.args.overwrite:
            raise InputError(f"{job.output}: another run has just finished it")
        dialogues, progress = generate_missing(job, launch, job.plan.samples)
        results = build_results(job.plan, dialogues)
        say(f"writing {job.output}")
        shutil.rmtree(fresh, ignore_errors=True)
        write_dataset(job.plan.source, results, fresh)
        record = {
            "settings": job.settings,
            "source": job.args.repo_id,
            "date": date.today().isoformat(),
            "summary": results.summary,
            "source_card": read_card(job.plan.source.root),
        }
        write_text(fresh / RECORD, json.dumps(record, indent=4))
        write_page(fresh / "meta" / "dialogues.html", job, dialogues, results.summary)
        write_card(fresh, job.name)
        with errors_as(RunError, f"{fresh}: does not read back", DISK_REMEDY):
            LeRobotDatasetMetadata(job.name, root=fresh)
        put_in_place(job)
        remove_work(job.work_dir)
    print_summary(job, results, progress)


def generate_missing(
    job: Job, launch: Launch, samples: Sequence[Sample]
) -> tuple[Dialogues, Progress]:
    """As rank 0, generate what is not there yet, and count what all ranks did."""
    known = take_up_work(job.work_dir, job.settings, job.args.overwrite)
    missing = [sample for sample in samples if sample.index not in known]
    part = deal_samples(launch, job.settings, missing, again=bool(known))
    say(f"{len(samples) - len(missing)} of {len(samples)} dialogues are there already")
    progress = Progress()
    if part:
        progress = generate_part(job, launch, part, known, again=bool(known))
    add_reports(launch, progress)
    for place, reason in progress.failed.items():
        say(f"failed: {place}: {reason}")
    return read_journals(job.work_dir, job.settings), progress


def generate_part(
    job: Job, launch: Launch, samples: Sequence[Sample], known: Dialogues, again: bool
) -> Progress:
    """Generate samples into the journal of this process, and count them."""
    pgen = load_model(job, launch, again)
    annotator = Annotator(pgen, job.args.batch_size, job.args.verify)
    if job.args.verify and launch.rank == 0:
        annotator.try_verification(job.plan.samples)
    path = job.work_dir / journal_name(job.settings, launch.rank)
    bar = tqdm(total=len(samples), unit="sample", disable=launch.rank > 0)
    progress = annotator.progress
    started = time.monotonic()
    with closing(Journal(path)) as journal, bar:
        for finished in annotator.annotate(job.plan, samples, known):
            journal.add(finished)
            bar.set_postfix(retried=progress.retried, refresh=False)
            bar.update(len(finished))
    progress.seconds = time.monotonic() - started
    return progress


def load_model(job: Job, launch: Launch, again: bool) -> Pgen:
    """Load the model, or connect to it; `again` draws other random numbers."""
    args = job.args
    if args.server:
        seed = None if again else args.seed
        model = job.settings["model"]
        server = ServerPgen(args.server, model, args.temperature, seed)
        longest = max(job.plan.samples, key=lambda sample: len(sample.prompt))
        server.check(len(job.plan.camera_keys), longest)
        return server
    import torch

    say(f"loading {args.model}, which may take minutes")
    device = args.device
    if device == "cuda" and launch.world_size > 1:
        device = f"cuda:{launch.local_rank % max(1, torch.cuda.device_count())}"
    pgen = QwenPgen(args.model, device, args.dtype, args.temperature)
    seed = f"{job.settings['seed']} {launch.rank} {time.time_ns() if again else 0}"
    torch.manual_seed(random.Random(seed).getrandbits(63))
    return pgen


def preview(job: Job, launch: Launch) -> None:
    """Generate a few samples into the journal, and show them on stdout and a page."""
    samples = draw_samples(job.plan.samples, job.args.preview)
    with lock_work_dir(job.work_dir):
        known, progress = generate_missing(job, launch, samples)
    shown = [sample for sample in samples if sample.index in known]
    if not shown:
        raise RunError("no valid dialogue for any sample; try another --model")
    lines = [annotation_line(sample, known[sample.index]) for sample in shown]
    page = job.output.with_name(job.output.name + ".preview.html")
    summary = summarize(job.plan, lines, count_late_frames(job.plan))
    dialogues = {sample.index: known[sample.index] for sample in shown}
    notice = f"A preview of {len(lines)} of {len(job.plan.samples)} dialogues."
    write_page(page, job, dialogues, summary, f"{notice} No dataset yet.")
    for sample, line in zip(shown, lines, strict=True):
        print(f"{sample.place}, {sample.skill_current}")
        print(f"  {sample.scenario_type}, {sample.response_type}")
        print(f"  person: {line['user_prompt']}")
        print(f"  robot:  {line['robot_utterance']}\n")
    print_rows([*summary, *progress.describe()])
    print(f"\nlook at {page}")


# ------------------------------------------------------------------------------ report
# What is said before and after.


def print_rows(rows: Iterable[Sequence[Any]]) -> None:
    """Print names and values in two columns."""
    for name, value in rows:
        print(f"{name:38} {value}")


def describe_settings(settings: Settings) -> Rows:
    """The settings that a reader of the page or the card wants to know, in words."""
    names = ["model", "engine", "skill_source", "camera_keys", "sample_interval"]
    names += ["align_skills", "verify", "temperature", "seed"]
    shown = dict(settings, camera_keys=", ".join(settings["camera_keys"]))
    return [(name.replace("_", " "), str(shown[name])) for name in names]


def print_plan(job: Job) -> None:
    """Print what would be done, a chat for each scenario, and what looks wrong."""
    plan = job.plan
    late_share = count_late_frames(plan) / plan.frame_count
    rows = [
        ("new dataset", job.output),
        ("frames", plan.frame_count),
        ("frames with another skill's dialogue", f"{late_share:.1%}"),
        ("samples", len(plan.samples)),
        ("scenario types", count_values(x.scenario_type for x in plan.samples)),
        ("response types", count_values(x.response_type for x in plan.samples)),
    ]
    print_rows([*rows, *describe_settings(job.settings)])
    for sample in {sample.scenario_type: sample for sample in plan.samples}.values():
        print(f"\n----- {sample.place}, {sample.scenario_type} -----\n\n{SYSTEM}")
        for question, answer in sample.examples():
            print(f"\n{question}\n> {answer}")
        print(f"\n(the frame)\n{sample.prompt}\n> {PREFILL}")
    if not job.args.align_skills and late_share > 0.05:
        print(
            f"\nnote: {late_share:.1%} of frames would carry the dialogue of another "
            "skill: add --align-skills, or lower --sample-interval"
        )


def print_summary(job: Job, results: Results, progress: Progress) -> None:
    """Print what has become of a job."""
    arguments = f'"{job.name}", root="{job.output}", video_backend="pyav"'
    print_rows([("new dataset", job.output), *describe_settings(job.settings)])
    print_rows([*results.summary, *progress.describe()])
    print(f"\n{READING.format(arguments=arguments)}")
    print(f"\nlook at {job.output / 'meta' / 'dialogues.html'}")


# ------------------------------------------------------------------------ command line
# The flags, and how a run ends.

DEFAULT_MODEL = "Qwen/Qwen2-VL-7B-Instruct"
DEFAULT_BATCH_SIZE = 16
# With a server, which batches by itself and needs many requests to do so.
DEFAULT_REQUESTS = 64


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are those of this script."""

    def error(self, message: str) -> NoReturn:
        """Report a command line that cannot be parsed."""
        raise InputError(f"{message}; see --help")


def make_parser() -> ArgumentParser:
    """The flags, with their defaults."""
    parser = ArgumentParser(
        prog="annotate_pgen.py",
        description=(__doc__ or "").partition("There are two doors")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--repo-id", metavar="USER/NAME", help="dataset on the Hub")
    add("--data-dir", type=Path, help="dataset in a local folder")
    add("--revision", help="branch, tag or commit on the Hub, else main")
    add("--num-image-views-per-sample", type=int, default=1, help="cameras (1)")
    add("--camera-keys", nargs="+", metavar="KEY", help="which cameras, by name")
    add("--sample-interval", type=float, default=1.0, help="seconds (1.0)")
    add("--align-skills", action="store_true", help="sample each skill from its start")
    add("--task-as-skill", action="store_true", help="where skills lack, take the task")
    model = f"Qwen VL model, Hub id or folder, else {DEFAULT_MODEL}; "
    model += "with --server the served name, else the only one served"
    add("--model", help=model)
    server = "servers that speak OpenAI's chat completions (http://localhost:8000/v1), "
    server += f"in place of a model in this process; a key is taken from {KEY_VARIABLE}"
    add("--server", nargs="+", metavar="URL", help=server)
    add("--device", default="cuda", help="cuda, cuda:1, cpu; auto: all GPUs (cuda)")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    add("--temperature", type=float, default=0.7, help="0 takes the likeliest (0.7)")
    batch_size = f"samples at once, else {DEFAULT_BATCH_SIZE}, halved when GPU memory "
    batch_size += f"runs out; with --server requests at once, else {DEFAULT_REQUESTS}"
    add("--batch-size", type=int, help=batch_size)
    add("--verify", action="store_true", help="ask again where another skill is heard")
    add("--seed", type=int, help="of all random choices; sent to servers if given")
    add("--output-dir", type=Path, help=f"else <source>{SUFFIX}")
    add("--overwrite", action="store_true", help="discard finished and other work")
    add("--push-to-hub", action="store_true", help="upload the result")
    add("--new-repo-id", metavar="USER/NAME", help=f"where to, else <repo-id>{SUFFIX}")
    add("--private", action="store_true", help="make the repository there private")
    add("--dry-run", action="store_true", help="print the plan and prompts; no model")
    add("--preview", type=int, metavar="N", help="show N dialogues; write no dataset")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags, and raise InputError for what cannot be used."""
    args = make_parser().parse_args(argv)
    if args.model is None and not args.server:
        args.model = DEFAULT_MODEL
    if args.batch_size is None:
        args.batch_size = DEFAULT_REQUESTS if args.server else DEFAULT_BATCH_SIZE
    views = args.num_image_views_per_sample
    target = args.new_repo_id or ""
    is_source = target.lower() == str(args.repo_id).lower()
    rules = [
        (args.repo_id or args.data_dir, "--repo-id or --data-dir: name a dataset"),
        (is_repo_id(args.repo_id), "--repo-id: must be of the form user/name"),
        (is_repo_id(args.new_repo_id), "--new-repo-id: must be of the form user/name"),
        (not is_source, "--new-repo-id: is the source; name another"),
        (target or args.repo_id or not args.push_to_hub, "--new-repo-id: is missing"),
        (not (args.revision and args.data_dir), "--revision: not beside --data-dir"),
        (views > 0, "--num-image-views-per-sample: must be 1 or more"),
        (0 < args.sample_interval < math.inf, "--sample-interval: must be positive"),
        (0 <= args.temperature < math.inf, "--temperature: must be 0 or more"),
        (args.batch_size > 0, "--batch-size: must be 1 or more"),
        (args.preview is None or args.preview > 0, "--preview: must be 1 or more"),
        (not (args.preview and args.push_to_hub), "--preview: not with --push-to-hub"),
    ]
    for is_kept, message in rules:
        if not is_kept:
            raise InputError(f"{message}; see --help")
    return args


def is_repo_id(name: str | None) -> bool:
    """Whether it is a name on the Hub, or None."""
    return name is None or bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII))


def interrupt(number: int, frame: Any) -> None:
    """Handle a signal; a second one ends the process at once."""
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit code: 0 done, 2 bad input, 1 failed on the way with the work kept,
        130 or 143 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal may not be able to show a character.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    rank = os.environ.get("RANK", "0")
    try:
        args = parse_args(argv)
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, interrupt)
        # Warnings of libraries are not about the data.
        logging.captureWarnings(True)
        logging.disable(logging.CRITICAL)
        annotate_dataset(args)
        sys.stdout.flush()
        return 0
    except (InputError, RunError) as error:
        code = 1 if isinstance(error, RunError) else 2
        message = str(error)
        if "--debug" in (argv or sys.argv):
            traceback.print_exc()
    except ModuleNotFoundError as error:
        code = 2
        message = f"{error}; {INSTALL}"
    except BrokenPipeError:
        # `--dry-run | head` has seen enough, and what is left cannot be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as error:
        code = 128 + (error.args or (signal.SIGINT,))[0]
        message = f"interrupted; {RESUME_REMEDY}"
        if rank != "0":
            # Why a launch ends is said by rank 0, or by the rank that failed.
            return code
    except Exception as error:
        traceback.print_exc()
        code = 1
        message = f"{type(error).__name__}; this is a bug, please report these lines"
    name = "" if rank == "0" else f"rank {rank}: "
    print(f"error: {name}{one_line(message)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
