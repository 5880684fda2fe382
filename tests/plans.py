"""Frames, skills and plans to test with, made without a dataset."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from annotate_pgen import (
    EpisodeFrames,
    EpisodePlan,
    EpisodeSkills,
    GridFigures,
    Plan,
    Sample,
    Skill,
    SkillSource,
)

NAMES = ("reach", "grasp", "lift", "place")


def make_frames(
    lengths: Sequence[int],
    fps: float,
    offset: float = 0.0,
    dtype: type = np.float32,
    tasks: Sequence[int] = (0,),
) -> list[EpisodeFrames]:
    """The frames of episodes, whose timestamps begin at `offset` seconds.

    Episode i has the task index `tasks[i % len(tasks)]`.
    """
    episodes = []
    first_index = 0
    for episode_index, length in enumerate(lengths):
        frame_index = np.arange(length)
        columns = {
            "episode_index": episode_index,
            "frame_index": frame_index,
            "timestamp": (frame_index / fps + offset).astype(dtype),
            "task_index": tasks[episode_index % len(tasks)],
        }
        frames = pd.DataFrame(columns)
        episodes.append(EpisodeFrames(episode_index, first_index, frames))
        first_index += length
    return episodes


def make_skills(
    *starts: float, names: Sequence[str] = NAMES, description: str = "tidy up"
) -> EpisodeSkills:
    """Skills of a second each, which start at the given seconds."""
    skills = []
    for number, start in enumerate(starts):
        skills.append(Skill(names[number % len(names)], start, start + 1))
    return EpisodeSkills(description, tuple(skills), "coarse description")


def make_sample(skill: str = "grasp", episode: int = 0, index: int = 0, **more):
    """A sample with as little as it needs."""
    return Sample(
        episode_id=episode,
        frame_index=index,
        timestamp=float(index),
        skill_current=skill,
        skill_history=(),
        task_description="tidy up",
        index=index,
        **more,
    )


def make_plan(*episodes: str, span: int = 1) -> Plan:
    """A plan of episodes that are given as a letter for the skill of each sample.

    Each sample is followed by `span - 1` frames of the same skill. So `"aab"` with a
    span of 2 has six frames, the last two of the skill "b".
    """
    plans = []
    first_index = 0
    for episode_index, letters in enumerate(episodes):
        samples = []
        for number, letter in enumerate(letters):
            sample = make_sample(letter, episode_index, first_index + number * span)
            samples.append(sample)
        numbers = np.arange(len(letters), dtype=np.int32).repeat(span)
        plans.append(
            EpisodePlan(
                episode_index=episode_index,
                first_index=first_index,
                skill_names=tuple(letters),
                skill_numbers=numbers,
                samples=samples,
                figures=GridFigures(),
                figures_of_other_grid=GridFigures(),
            )
        )
        first_index += len(letters) * span
    return Plan(plans, ["camera"], [], SkillSource("meta/skills.json", {}))
