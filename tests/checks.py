"""What must hold of every finished dataset.

Nothing of the script is used to find out: source and result are read with pyarrow,
pandas and LeRobot, and skills and sampling grids are worked out here once more.
"""

import json
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard
from lerobot.datasets.lerobot_dataset import LeRobotDataset

COLUMN = "task_index_high_level"
NEW_FILES = {
    "meta/tasks_high_level.parquet",
    "meta/syn_annotations.jsonl",
    "meta/annotate_pgen.json",
    "meta/dialogues.html",
    "README.md",
}
TASK_COLUMNS = [
    "task_index",
    "user_prompt",
    "robot_utterance",
    "skill",
    "scenario_type",
    "response_type",
]
ANNOTATION_KEYS = [
    "episode_id",
    "frame_index",
    "timestamp",
    "skill_current",
    "skill_history",
    "task_description",
    "scenario_type",
    "response_type",
    "user_prompt",
    "robot_utterance",
]
RECORD_KEYS = {"settings", "name", "source", "date", "late_share", "source_card"}
SCENARIO_TYPES = {
    "specific_object",
    "negative_task",
    "situated_correction",
    "implicit_request",
    "constraint_based",
}
RESPONSE_TYPES = {
    "confirmation",
    "clarification",
    "acknowledgment",
    "constraint_acknowledgment",
}


# ------------------------------------------------------------------------ reading files


def files(root):
    """The paths of all files, relative to `root`."""
    return {
        str(Path(folder, name).relative_to(root))
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
    }


def content(root):
    """Every file's bytes, to show that nothing has changed."""
    return {name: Path(root, name).read_bytes() for name in files(root)}


def annotations(output):
    """The lines of syn_annotations.jsonl."""
    text = Path(output, "meta", "syn_annotations.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def task_table(output):
    """tasks_high_level.parquet, read as users read it."""
    return pd.read_parquet(Path(output, "meta", "tasks_high_level.parquet"))


def record(output):
    """annotate_pgen.json, which says how the dataset was made."""
    return json.loads(Path(output, "meta", "annotate_pgen.json").read_text())


def read_frames(root, *columns):
    """The given columns of all frames, in dataset order."""
    paths = sorted(Path(root, "data").glob("*/*.parquet"))
    tables = [pq.read_table(path, columns=list(columns)) for path in paths]
    frames = [table.to_pandas(ignore_metadata=True) for table in tables]
    return pd.concat(frames, ignore_index=True)


def high_level(output):
    """The new column of all frames, in dataset order."""
    return read_frames(output, COLUMN)[COLUMN].to_numpy()


def read_skills(root):
    """Skills of skills.json by episode, sorted: lists of (name, start)."""
    text = Path(root, "meta", "skills.json").read_text(encoding="utf-8")
    skills = {}
    for index, episode in json.loads(text)["episodes"].items():
        named = [(skill["name"], skill["start"]) for skill in episode["skills"]]
        skills[int(index)] = sorted(named, key=lambda skill: skill[1])
    return skills


def layout(parquet):
    """Row groups with the codec and encodings of each column but the new one."""
    groups = []
    for number in range(parquet.metadata.num_row_groups):
        group = parquet.metadata.row_group(number)
        columns = [group.column(place) for place in range(group.num_columns)]
        described = [
            (
                column.path_in_schema,
                column.compression,
                column.has_dictionary_page,
                set(column.encodings) & {"BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED"},
            )
            for column in columns
            if column.path_in_schema != COLUMN
        ]
        groups.append((group.num_rows, described))
    return groups


# ------------------------------------------------------------------ skills and the grid


def skill_numbers(frame_count, fps, skills):
    """Which of an episode's skills each frame shows, in exact fractions of a second."""
    starts = [Fraction(str(start)) for _, start in skills]
    numbers = []
    for frame in range(frame_count):
        seconds = Fraction(frame, fps)
        started = [n for n, start in enumerate(starts) if start <= seconds]
        numbers.append(started[-1] if started else 0)
    return numbers


def grid(frame_count, fps, interval):
    """The first frame at or after each multiple of `interval` seconds."""
    step = Fraction(str(interval)) * fps
    frames = []
    multiple = 0
    while -(-multiple // 1) < frame_count:
        frames.append(-(-multiple // 1))
        multiple += step
    return sorted(set(frames))


def expected_samples(source, interval=1.0, align_skills=False):
    """(episode, frame) of each sample of a dataset whose frames keep time exactly."""
    fps = json.loads(Path(source, "meta", "info.json").read_text())["fps"]
    skills = read_skills(source)
    samples = []
    for episode, frames in read_frames(source, "episode_index").groupby(
        "episode_index"
    ):
        count = len(frames)
        if not align_skills:
            samples += [(episode, frame) for frame in grid(count, fps, interval)]
            continue
        numbers = skill_numbers(count, fps, skills[episode])
        for number in sorted(set(numbers)):
            first = numbers.index(number)
            length = numbers.count(number)
            places = grid(length, fps, interval)
            samples += [(episode, first + frame) for frame in places]
    return samples


# -------------------------------------------------------------------- whole new dataset


def check(source, output, sampled=True):
    """Check that `output` is `source` plus the new column, complete and readable.

    Args:
        source: the folder that was annotated.
        output: the new one.
        sampled: whether every sample has a dialogue of its own, so that every frame
            carries that of the last sample.

    Returns:
        The lines of syn_annotations.jsonl.
    """
    check_other_files(source, output)
    check_data_files(source, output)
    tasks = task_table(output)
    check_task_table(tasks)
    lines = annotations(output)
    check_annotations(source, output, tasks, lines, sampled)
    check_record(source, output, tasks)
    dataset = LeRobotDataset("somebody/cubes", root=output, video_backend="pyav")
    indices = high_level(output)
    for row in (0, len(dataset) // 2, len(dataset) - 1):
        assert dataset[row][COLUMN].item() == indices[row]
    return lines


def check_other_files(source, output):
    """All but data and the card came through unchanged, as real files."""
    assert files(output) - {".gitattributes"} == files(source) | NEW_FILES
    for name in files(source) - {"meta/info.json", "README.md"}:
        assert not Path(output, name).is_symlink()
        if not name.startswith("data/"):
            old = Path(source, name).read_bytes()
            assert Path(output, name).read_bytes() == old, name
    info = json.loads(Path(output, "meta/info.json").read_text())
    old_info = json.loads(Path(source, "meta/info.json").read_text())
    old_info["features"].pop(COLUMN, None)
    feature = info["features"].pop(COLUMN)
    assert feature == {"dtype": "int64", "shape": [1], "names": None}
    assert info == old_info
    assert list(info) == list(old_info)


def check_data_files(source, output):
    """Rows, row groups, codecs and descriptions are those of the source."""
    for path in sorted(Path(source, "data").glob("*/*.parquet")):
        new_path = Path(output, path.relative_to(source))
        with pq.ParquetFile(path) as old, pq.ParquetFile(new_path) as new:
            assert layout(old) == layout(new)
            assert new.schema_arrow.field(COLUMN).type == pa.int64()
            old_table = old.read()
            kept = [name for name in old_table.column_names if name != COLUMN]
            assert new.read().column_names == [*kept, COLUMN]
            assert new.read().select(kept).equals(old_table.select(kept))
            old_notes = old.schema_arrow.metadata or {}
            notes = new.schema_arrow.metadata or {}
        assert old_notes.keys() == notes.keys()
        for key in old_notes.keys() - {b"huggingface"}:
            assert old_notes[key] == notes[key]
        if b"huggingface" in old_notes:
            features = json.loads(notes[b"huggingface"])["info"]["features"]
            assert features.pop(COLUMN) == {"dtype": "int64", "_type": "Value"}
            assert features == json.loads(old_notes[b"huggingface"])["info"]["features"]


def check_task_table(tasks):
    """The columns of the specification, a row for each different dialogue."""
    assert list(tasks.columns) == TASK_COLUMNS
    assert isinstance(tasks.index, pd.RangeIndex)
    assert tasks["task_index"].tolist() == list(range(len(tasks)))
    assert not tasks.drop(columns="task_index").duplicated().any()
    assert tasks.notna().all().all()
    for name in TASK_COLUMNS[1:]:
        assert (tasks[name].str.strip() != "").all()
    assert set(tasks["scenario_type"]) <= SCENARIO_TYPES
    assert set(tasks["response_type"]) <= RESPONSE_TYPES


def check_annotations(source, output, tasks, lines, sampled):
    """Each line agrees with its frame, its row of the table and the skills."""
    frames = read_frames(source, "episode_index", "frame_index", "timestamp")
    indices = high_level(output)
    assert len(indices) == len(frames)
    assert indices.min() == 0
    assert indices.max() == len(tasks) - 1
    keys = [*ANNOTATION_KEYS, COLUMN]
    if record(output)["settings"]["verify"]:
        keys.insert(-1, "skill_recovered")
    pairs = zip(frames["episode_index"], frames["frame_index"], strict=True)
    rows = {pair: row for row, pair in enumerate(pairs)}
    places = [rows[line["episode_id"], line["frame_index"]] for line in lines]
    assert places == sorted(set(places)), "in dataset order, each frame once"
    for line, place in zip(lines, places, strict=True):
        assert list(line) == keys
        row = tasks.iloc[line[COLUMN]]
        for key in ("user_prompt", "robot_utterance", "scenario_type", "response_type"):
            assert row[key] == line[key]
        assert row["skill"] == line["skill_current"]
        assert indices[place] == line[COLUMN]
        assert np.float32(line["timestamp"]) == np.float32(frames["timestamp"][place])
    if sampled:
        ends = [*places[1:], len(frames)]
        for line, place, end in zip(lines, places, ends, strict=True):
            assert (indices[place:end] == line[COLUMN]).all()
    if Path(source, "meta", "skills.json").is_file():
        check_skills(source, lines)


def check_skills(source, lines):
    """Skill and history of each line are those of skills.json."""
    fps = json.loads(Path(source, "meta", "info.json").read_text())["fps"]
    skills = read_skills(source)
    lengths = read_frames(source, "episode_index")["episode_index"].value_counts()
    for line in lines:
        named = skills[line["episode_id"]]
        numbers = skill_numbers(lengths[line["episode_id"]], fps, named)
        number = numbers[line["frame_index"]]
        names = [name for name, _ in named]
        assert line["skill_current"] == names[number]
        assert line["skill_history"] == names[:number]


def check_record(source, output, tasks):
    """The record and the card say how the dataset was made."""
    said = record(output)
    assert said.keys() == RECORD_KEYS
    if Path(source, "meta", "skills.json").is_file():
        late = late_share(source, output, tasks)
        assert abs(said["late_share"] - late) < 1e-9
    card = DatasetCard.load(output / "README.md")
    assert said["name"] in card.text


def late_share(source, output, tasks):
    """The share of frames that carry the dialogue of another skill than their own."""
    fps = json.loads(Path(source, "meta", "info.json").read_text())["fps"]
    skills = read_skills(source)
    own = []
    for episode, frames in read_frames(source, "episode_index").groupby(
        "episode_index", sort=False
    ):
        named = skills[episode]
        numbers = skill_numbers(len(frames), fps, named)
        own += [named[number][0] for number in numbers]
    carried = tasks["skill"].to_numpy()[high_level(output)]
    return float((np.array(own, dtype=object) != carried).mean())
