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
NEW_FILES = {"meta/tasks_high_level.parquet", "meta/syn_annotations.jsonl"}
NEW_FILES |= {"meta/annotate_pgen.json", "meta/dialogues.html", "README.md"}
TASK_COLUMNS = ["task_index", "user_prompt", "robot_utterance", "skill"]
TASK_COLUMNS += ["scenario_type", "response_type"]
ANNOTATION_KEYS = ["episode_id", "frame_index", "timestamp", "skill_current"]
ANNOTATION_KEYS += ["skill_history", "task_description", "scenario_type"]
ANNOTATION_KEYS += ["response_type", "user_prompt", "robot_utterance"]
RECORD_KEYS = {"settings", "source", "date", "summary", "source_card"}
SCENARIO_TYPES = {"specific_object", "negative_task", "situated_correction"}
SCENARIO_TYPES |= {"implicit_request", "constraint_based"}
RESPONSE_TYPES = {"confirmation", "clarification", "acknowledgment"}
RESPONSE_TYPES |= {"constraint_acknowledgment"}


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


def read_json(*parts):
    """The content of a JSON file."""
    return json.loads(Path(*parts).read_text(encoding="utf-8"))


def annotations(output):
    """The lines of syn_annotations.jsonl."""
    text = Path(output, "meta/syn_annotations.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def samples_of(output):
    """(episode, frame) of each line of syn_annotations.jsonl."""
    lines = annotations(output)
    return [(line["episode_id"], line["frame_index"]) for line in lines]


def task_table(output):
    """tasks_high_level.parquet, read as users read it."""
    return pd.read_parquet(Path(output, "meta/tasks_high_level.parquet"))


def record(output):
    """annotate_pgen.json, which says how the dataset was made."""
    return read_json(output, "meta/annotate_pgen.json")


def read_frames(root, *columns):
    """The given columns of all frames, in dataset order."""
    paths = sorted(Path(root, "data").glob("*/*.parquet"))
    frames = [pd.read_parquet(path, columns=list(columns)) for path in paths]
    return pd.concat(frames, ignore_index=True)


def high_level(output):
    """The new column of all frames, in dataset order."""
    return read_frames(output, COLUMN)[COLUMN].to_numpy()


def skill_numbers(frame_count, fps, starts):
    """Which of an episode's skills each frame shows, in exact fractions of a second."""
    starts = [Fraction(str(start)) for start in starts]
    seconds = [Fraction(frame, fps) for frame in range(frame_count)]
    return [max(0, sum(start <= now for start in starts) - 1) for now in seconds]


def grid(frame_count, fps, interval):
    """The first frame at or after each multiple of `interval` seconds."""
    step = Fraction(str(interval)) * fps
    frames = {-(-number * step // 1) for number in range(frame_count + 1)}
    return sorted(int(frame) for frame in frames if frame < frame_count)


def read_episodes(source):
    """The length of each episode, its skills' names, and which one each frame shows."""
    fps = read_json(source, "meta/info.json")["fps"]
    skills = {}
    if Path(source, "meta/skills.json").is_file():
        skills = read_json(source, "meta/skills.json")["episodes"]
    counts = read_frames(source, "episode_index")["episode_index"].value_counts()
    for episode, count in sorted(counts.items()):
        entries = skills.get(str(episode), {"skills": []})["skills"]
        times = sorted((skill["start"], skill["name"]) for skill in entries)
        numbers = skill_numbers(count, fps, [start for start, _ in times])
        yield episode, count, [name for _, name in times], numbers


def expected_samples(source, interval=1.0, align_skills=False):
    """(episode, frame) of each sample of a dataset whose frames keep time exactly."""
    fps = read_json(source, "meta/info.json")["fps"]
    samples = []
    for episode, count, _, numbers in read_episodes(source):
        parts = [(0, count)]
        if align_skills:
            shown = sorted(set(numbers))
            parts = [(numbers.index(number), numbers.count(number)) for number in shown]
        for first, length in parts:
            samples += [(episode, first + x) for x in grid(length, fps, interval)]
    return samples


def check(source, output, sampled=True):
    """Check that `output` is `source` plus the new column, complete and readable.

    If every sample has a dialogue of its own (`sampled`), every frame carries that of
    the last sample. Returns the lines of syn_annotations.jsonl.
    """
    check_files(source, output)
    check_data(source, output)
    tasks, lines = task_table(output), annotations(output)
    check_tasks(tasks)
    check_annotations(source, output, tasks, lines, sampled)
    if Path(source, "meta/skills.json").is_file():
        check_skills(source, output, tasks, lines)
    assert record(output).keys() == RECORD_KEYS
    card = DatasetCard.load(Path(output, "README.md"))
    assert all(f"| {name} |" in card.text for name, _ in record(output)["summary"])
    dataset = LeRobotDataset("somebody/cubes", root=output, video_backend="pyav")
    for row in (0, len(dataset) // 2, len(dataset) - 1):
        assert dataset[row][COLUMN].item() == high_level(output)[row]
    return lines


def check_files(source, output):
    """All but data and the card came through unchanged, as real files."""
    assert files(output) == files(source) | NEW_FILES
    for name in files(source) - {"meta/info.json", "README.md"}:
        assert not Path(output, name).is_symlink()
        if not name.startswith("data/"):
            old = Path(source, name).read_bytes()
            assert Path(output, name).read_bytes() == old, name
    info = read_json(output, "meta/info.json")
    old_info = read_json(source, "meta/info.json")
    old_info["features"].pop(COLUMN, None)
    feature = info["features"].pop(COLUMN)
    assert feature == {"dtype": "int64", "shape": [1], "names": None}
    assert list(info.items()) == list(old_info.items())


def check_data(source, output):
    """Rows, row groups, codecs and descriptions are those of the source."""
    for path in sorted(Path(source, "data").glob("*/*.parquet")):
        groups, table, notes = read_data(path)
        new_path = Path(output, path.relative_to(source))
        new_groups, new_table, new_notes = read_data(new_path)
        assert new_groups == groups
        assert new_table.schema.field(COLUMN).type == pa.int64()
        kept = [name for name in table.column_names if name != COLUMN]
        assert sorted(new_table.column_names) == sorted([*kept, COLUMN])
        assert new_table.select(kept).equals(table.select(kept))
        described = json.loads(new_notes.pop(b"huggingface", "{}"))
        old_described = json.loads(notes.pop(b"huggingface", "{}"))
        if described:
            feature = {"dtype": "int64", "_type": "Value"}
            assert described["info"]["features"].pop(COLUMN) == feature
            old_described["info"]["features"].pop(COLUMN, None)
        assert (new_notes, described) == (notes, old_described)


def read_data(path):
    """Row groups (with codec and dictionary of each old column), rows and notes."""
    groups = []
    with pq.ParquetFile(path) as parquet:
        for number in range(parquet.metadata.num_row_groups):
            group = parquet.metadata.row_group(number)
            columns = [group.column(place) for place in range(group.num_columns)]
            layout = [
                (x.path_in_schema, x.compression, x.has_dictionary_page)
                for x in columns
                if x.path_in_schema != COLUMN
            ]
            groups.append((group.num_rows, layout))
        return groups, parquet.read(), dict(parquet.schema_arrow.metadata or {})


def check_tasks(tasks):
    """The columns of the specification, a row for each different dialogue."""
    assert list(tasks.columns) == TASK_COLUMNS
    assert isinstance(tasks.index, pd.RangeIndex)
    assert tasks["task_index"].tolist() == list(range(len(tasks)))
    assert not tasks.drop(columns="task_index").duplicated().any()
    for name in TASK_COLUMNS[1:]:
        assert (tasks[name].str.strip() != "").all()
    assert set(tasks["scenario_type"]) <= SCENARIO_TYPES
    assert set(tasks["response_type"]) <= RESPONSE_TYPES


def check_annotations(source, output, tasks, lines, sampled):
    """Each line agrees with its frame and its row of the table."""
    frames = read_frames(source, "episode_index", "frame_index", "timestamp")
    indices = high_level(output)
    assert (len(indices), set(indices)) == (len(frames), set(range(len(tasks))))
    verified = record(output)["settings"]["verify"]
    keys = [*ANNOTATION_KEYS, *(["skill_recovered"] if verified else []), COLUMN]
    pairs = zip(frames["episode_index"], frames["frame_index"], strict=True)
    rows = dict(zip(pairs, range(len(frames)), strict=True))
    places = [rows[pair] for pair in samples_of(output)]
    assert places == sorted(set(places)), "in dataset order, each frame once"
    ends = [*places[1:], len(frames)] if sampled else [place + 1 for place in places]
    for line, place, end in zip(lines, places, ends, strict=True):
        assert list(line) == keys
        row = tasks.iloc[line[COLUMN]]
        assert row["skill"] == line["skill_current"]
        for key in ("user_prompt", "robot_utterance", "scenario_type", "response_type"):
            assert row[key] == line[key]
        assert (indices[place:end] == line[COLUMN]).all()
        assert np.float32(line["timestamp"]) == np.float32(frames["timestamp"][place])


def check_skills(source, output, tasks, lines):
    """Skill and history of each line, and the share of frames with another skill's."""
    own = {}
    for episode, _, names, numbers in read_episodes(source):
        for frame, number in enumerate(numbers):
            own[episode, frame] = (names[number], names[:number])
    for line in lines:
        said = (line["skill_current"], line["skill_history"])
        assert said == own[line["episode_id"], line["frame_index"]]
    carried = tasks["skill"].to_numpy()[high_level(output)]
    late = np.mean([name for name, _ in own.values()] != carried)
    summary = dict(record(output)["summary"])
    assert summary["frames with another skill's dialogue"] == f"{late:.1%}"
