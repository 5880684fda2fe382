"""Datasets whose skills stand in each of the forms that LeRobot's tools write.

Every function takes the root of a recorded dataset and the skills of its episodes,
`{episode_index: [(name, start, end), ...]}` with times in seconds, and adds them in one
form, by the writer that people use:

    write_skills_file    meta/skills.json, which is written by hand here, too
    write_language       `language_persistent`, by LeRobot 0.6's annotation pipeline; as
                         LeRobot 0.4.4 has none, pyarrow writes the same form there
    write_subtask_index  `subtask_index`, by LeRobot's tool that adds features, and
                         meta/subtasks.parquet
    write_sarm           columns of meta/episodes, by the saving function of SARM
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import make_demo
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

FPS = 10
LENGTHS = (50, 30, 40)
# Whole seconds, because SARM stores no others, and with a name that is repeated.
SKILLS = {
    0: [
        ("reach the brick", 0.0, 2.0),
        ("lift it", 2.0, 4.0),
        ("put it down", 4.0, 5.0),
    ],
    1: [("reach the brick", 0.0, 1.0), ("lift it", 1.0, 3.0)],
    2: [
        ("reach the brick", 0.0, 1.0),
        ("lift it", 1.0, 2.0),
        ("reach the brick", 2.0, 3.0),
        ("put it down", 3.0, 4.0),
    ],
}
HAS_PIPELINE = importlib.util.find_spec("lerobot.annotations") is not None

EpisodeTimes = Sequence[tuple[str, float, float]]


def record(root: Path, lengths: Sequence[int] = LENGTHS, **settings: object) -> Path:
    """Record drawn episodes without skills, with one small camera that is no video."""
    settings.setdefault("cameras", {"observation.images.front": "image"})
    settings.setdefault("size", (16, 20))
    make_demo.make_dataset(root, lengths, fps=FPS, **settings)
    (root / "meta" / "skills.json").unlink()
    return root


def data_files(root: Path) -> list[Path]:
    return sorted(root.glob("data/*/*.parquet"))


def replace_column(path: Path, name: str, values: pa.Array | None) -> None:
    """Replace, append or (None) drop a column of a parquet file; keep row groups."""
    with pq.ParquetFile(path) as parquet:
        sizes = [
            parquet.metadata.row_group(i).num_rows
            for i in range(parquet.num_row_groups)
        ]
        table = parquet.read()
    if name in table.column_names:
        table = table.drop_columns([name])
    if values is not None:
        table = table.append_column(name, values)
    with pq.ParquetWriter(path, table.schema) as writer:
        first = 0
        for size in sizes:
            writer.write_table(table.slice(first, size))
            first += size


def declare(root: Path, **features: dict | None) -> None:
    """Add (or, with None, remove) features in meta/info.json."""
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    for name, feature in features.items():
        info["features"].pop(name, None)
        if feature is not None:
            info["features"][name] = feature
    path.write_text(json.dumps(info, indent=4), encoding="utf-8")


# ---------------------------------------------------------------- meta/skills.json


def write_skills_file(root: Path, skills: Mapping[int, EpisodeTimes] = SKILLS) -> Path:
    episodes = {}
    for episode, entries in skills.items():
        episodes[str(episode)] = {
            "episode_index": episode,
            "description": "",
            "skills": [
                {"name": name, "start": start, "end": end}
                for name, start, end in entries
            ],
        }
    content = {"coarse_description": "", "episodes": episodes}
    make_demo.write_skills(root, content)
    return root


# ---------------------------------------------------------------- language_persistent


def write_language(
    root: Path,
    skills: Mapping[int, EpisodeTimes] = SKILLS,
    only_episodes: tuple[int, ...] | None = None,
    speech: bool = True,
) -> Path:
    """Add both language columns; by LeRobot's pipeline where it has one.

    Args:
        root: the dataset.
        skills: of each episode name, start and end in seconds.
        only_episodes: as in `lerobot-annotate --only_episodes`.
        speech: with interjections, so that `language_events` holds rows, too.
    """
    if HAS_PIPELINE:
        annotate_with_lerobot(root, skills, only_episodes, speech)
    else:
        write_language_columns(root, skills, only_episodes, speech)
    return root


class Responder:
    """Stands in for the vision-language model: answers the pipeline's own prompts."""

    def __init__(self, skills: EpisodeTimes):
        self.skills = skills

    def __call__(self, messages: Sequence[dict]) -> dict:
        text = str(messages[-1]["content"])
        if '"subtasks"' in text:
            spans = [
                {"text": name, "start": start, "end": end}
                for name, start, end in self.skills
            ]
            return {"subtasks": spans}
        if '"memory"' in text:
            return {"memory": "one step is done"}
        if '"interjection"' in text:
            return {"interjection": "wait a moment", "speech": "I am waiting."}
        if '"rephrasings"' in text:
            return {"rephrasings": ["tidy the brick away", "clear the table"]}
        return {"text": "Sure, I start now.", "description": "The arm moves."}


def annotate_with_lerobot(
    root: Path,
    skills: Mapping[int, EpisodeTimes],
    only_episodes: tuple[int, ...] | None,
    speech: bool,
) -> None:
    """Run the annotation pipeline of LeRobot 0.6, one episode's answers at a time."""
    from lerobot.annotations.steerable_pipeline.config import (
        AnnotationPipelineConfig,
        InterjectionsConfig,
        PlanConfig,
        VqaConfig,
    )
    from lerobot.annotations.steerable_pipeline.executor import Executor
    from lerobot.annotations.steerable_pipeline.modules import (
        GeneralVqaModule,
        InterjectionsAndSpeechModule,
        PlanSubtasksMemoryModule,
    )
    from lerobot.annotations.steerable_pipeline.validator import StagingValidator
    from lerobot.annotations.steerable_pipeline.vlm_client import StubVlmClient
    from lerobot.annotations.steerable_pipeline.writer import LanguageColumnsWriter

    class PlanOfEpisode(PlanSubtasksMemoryModule):
        """Answers for the episode at hand; everything else is LeRobot's."""

        def run_episode(self, record, staging):
            self.vlm.responder.skills = skills[record.episode_index]
            super().run_episode(record, staging)

    config = AnnotationPipelineConfig(
        root=root,
        only_episodes=only_episodes,
        plan=PlanConfig(),
        interjections=InterjectionsConfig(enabled=speech),
        vqa=VqaConfig(enabled=False),
    )
    config.executor.episode_parallelism = 1
    vlm = StubVlmClient(Responder([]))
    executor = Executor(
        config=config,
        plan=PlanOfEpisode(vlm=vlm, config=config.plan),
        interjections=InterjectionsAndSpeechModule(
            vlm=vlm, config=config.interjections, seed=config.seed
        ),
        vqa=GeneralVqaModule(vlm=vlm, config=config.vqa, seed=config.seed),
        writer=LanguageColumnsWriter(),
        validator=StagingValidator(),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        executor.run(root)
    shutil.rmtree(root / ".annotate_staging")


def write_language_columns(
    root: Path,
    skills: Mapping[int, EpisodeTimes],
    only_episodes: tuple[int, ...] | None,
    speech: bool,
) -> None:
    """Write with pyarrow what the pipeline writes, for LeRobot 0.4.4 without it."""
    for path in data_files(root):
        table = pq.read_table(path, columns=["episode_index", "frame_index"])
        episodes = table["episode_index"].to_pylist()
        frames = table["frame_index"].to_pylist()
        if only_episodes is not None and not set(only_episodes) & set(episodes):
            continue
        persistent = []
        events = []
        for episode, frame in zip(episodes, frames, strict=True):
            annotated = only_episodes is None or episode in only_episodes
            persistent.append(language_rows(skills[episode]) if annotated else [])
            events.append([SAY] if annotated and speech and frame == 0 else [])
        replace_column(path, "language_persistent", pa.array(persistent))
        replace_column(path, "language_events", pa.array(events))
    feature = {"dtype": "language", "shape": [1], "names": None}
    declare(root, language_persistent=feature, language_events=feature)
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    info["tools"] = [{"type": "function", "function": {"name": "say"}}]
    path.write_text(json.dumps(info, indent=4), encoding="utf-8")


SAY = {
    "role": "assistant",
    "content": None,
    "style": None,
    "camera": None,
    "tool_calls": [
        {
            "type": "function",
            "function": {"name": "say", "arguments": {"text": "I start now."}},
        }
    ],
}


def language_row(style: str, content: str, timestamp: float, role: str) -> dict:
    return {
        "role": role,
        "content": content,
        "style": style,
        "timestamp": timestamp,
        "camera": None,
        "tool_calls": None,
    }


def language_rows(skills: EpisodeTimes) -> list[dict]:
    """The rows of an episode in the pipeline's order, with some that are no skills."""
    rows = [language_row("task_aug", "tidy the brick away", 0.0, "user")]
    for name, start, _ in skills:
        rows.append(language_row("plan", f"1. {name}", start, "assistant"))
        rows.append(language_row("subtask", name, start, "assistant"))
    return rows


# ---------------------------------------------------------------- subtask_index


def write_subtask_index(
    root: Path, skills: Mapping[int, EpisodeTimes] = SKILLS
) -> Path:
    """Add `subtask_index` by LeRobot's own tool for adding features, and its names.

    Frames outside all skills get -1. The names do not stand in the order of their
    indices, so that only the column tells which is which.
    """
    import numpy as np
    from lerobot.datasets.dataset_tools import add_features
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    names = sorted({name for entries in skills.values() for name, _, _ in entries})
    labels = []
    for path in data_files(root):
        frames = pq.read_table(path, columns=["episode_index", "frame_index"])
        for frame in frames.to_pylist():
            label = -1
            for name, start, end in skills[frame["episode_index"]]:
                if start <= frame["frame_index"] / FPS < end:
                    label = names.index(name)
            labels.append(label)
    feature = {"dtype": "int64", "shape": (1,), "names": None}
    plain = root.rename(root.with_name(f"{root.name}_plain"))
    add_features(
        LeRobotDataset("demo/plain", root=plain),
        {"subtask_index": (np.array(labels), feature)},
        output_dir=root,
        repo_id="demo/subtasks",
    )
    shutil.rmtree(plain)
    write_subtask_names(root, {name: index for index, name in enumerate(names)})
    return root


def write_subtask_names(root: Path, indices: Mapping[str, int]) -> None:
    """Write meta/subtasks.parquet as LeRobot reads it: the names are the index."""
    names = sorted(indices, key=indices.get, reverse=True)
    table = pd.DataFrame(
        {"subtask_index": [indices[name] for name in names]},
        index=pd.Index(names, name="subtask"),
    )
    table.to_parquet(root / "meta" / "subtasks.parquet")


# ---------------------------------------------------------------- SARM


def write_sarm(
    root: Path, skills: Mapping[int, EpisodeTimes] = SKILLS, kind: str = "dense"
) -> Path:
    """Save the skills with LeRobot's own function for SARM's annotations."""
    from lerobot.data_processing.sarm_annotations import subtask_annotation as sarm

    annotations = {}
    for episode, entries in skills.items():
        subtasks = []
        for name, start, end in entries:
            times = sarm.Timestamp(start=f"00:{start:02.0f}", end=f"00:{end:02.0f}")
            subtasks.append(sarm.Subtask(name=name, timestamps=times))
        annotations[episode] = sarm.SubtaskAnnotation(subtasks=subtasks)
    sarm.save_annotations_to_dataset(root, annotations, FPS, prefix=kind)
    return root
