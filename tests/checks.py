"""What must hold of every finished dataset, read back with LeRobot, pandas and pyarrow."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from lerobot.datasets.lerobot_dataset import LeRobotDataset

import annotate_pgen

NEW_FILES = {
    "meta/tasks_high_level.parquet",
    "meta/syn_annotations.jsonl",
    "meta/annotate_pgen.json",
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
    "task_index_high_level",
]


def files(root):
    return {
        str(Path(folder, name).relative_to(root))
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
    }


def content(root):
    """Every file's bytes, to show that nothing has changed."""
    return {name: Path(root, name).read_bytes() for name in files(root)}


def layout(parquet):
    """Row groups with the codec and encodings of each column but the new one."""
    groups = [parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups)]
    return [
        (
            group.num_rows,
            [
                (column.path_in_schema, column.compression, column.has_dictionary_page)
                for column in map(group.column, range(group.num_columns))
                if column.path_in_schema != "task_index_high_level"
            ],
        )
        for group in groups
    ]


def annotations(output):
    lines = Path(output, "meta", "syn_annotations.jsonl").read_text(encoding="utf-8")
    assert lines.endswith("\n")
    return [json.loads(line) for line in lines.split("\n")[:-1]]


def high_level(output):
    """The new column of all frames, in dataset order."""
    paths = sorted(Path(output, "data").glob("*/*.parquet"))
    columns = [pq.read_table(path)["task_index_high_level"].to_numpy() for path in paths]
    return np.concatenate(columns)


def check(source, output, sampled=True):
    """`output` is `source` plus the new column, complete and readable. Returns its annotations.

    `sampled`: every sample has its own dialogue, so every frame carries its last sample's.
    """
    unchanged = files(source) - {"meta/info.json", "README.md"}
    assert files(output) - {".gitattributes"} == files(source) | NEW_FILES
    for name in unchanged:
        if not name.startswith("data/"):
            assert Path(output, name).read_bytes() == Path(source, name).read_bytes(), name
        assert not Path(output, name).is_symlink()
    info, before = (
        json.loads(Path(root, "meta/info.json").read_text()) for root in (output, source)
    )
    feature = info["features"].pop("task_index_high_level")
    assert feature == {"dtype": "int64", "shape": [1], "names": None}
    assert info == before and list(info) == list(before)

    tasks = pd.read_parquet(Path(output, "meta/tasks_high_level.parquet"))
    assert list(tasks.columns) == TASK_COLUMNS
    assert isinstance(tasks.index, pd.RangeIndex)
    assert tasks["task_index"].tolist() == list(range(len(tasks)))
    assert not tasks.drop(columns="task_index").duplicated().any()
    assert tasks.notna().all().all() and (tasks["user_prompt"].str.strip() != "").all()

    for path in sorted(Path(source, "data").glob("*/*.parquet")):
        new_path = Path(output, path.relative_to(source))
        with pq.ParquetFile(path) as old, pq.ParquetFile(new_path) as new:
            assert layout(old) == layout(new)
            assert new.read().drop_columns(["task_index_high_level"]).equals(old.read())
            was, now = old.schema_arrow.metadata or {}, new.schema_arrow.metadata or {}
            assert was.keys() == now.keys()
            for key in was.keys() - {b"huggingface"}:
                assert was[key] == now[key]
            if b"huggingface" in was:
                features = json.loads(now[b"huggingface"])["info"]["features"]
                new_feature = features.pop("task_index_high_level")
                assert new_feature == {"dtype": "int64", "_type": "Value"}
                assert features == json.loads(was[b"huggingface"])["info"]["features"]

    indices = high_level(output)
    lines = annotations(output)
    episodes = annotate_pgen.read_episodes(LeRobotDataset("a/b", root=source).meta)
    frames = pd.concat([episode for _, episode in episodes], ignore_index=True)
    position = {(e, f): i for i, e, f in frames[["episode_index", "frame_index"]].itertuples()}
    assert len(indices) == len(frames)
    assert indices.min() == 0 and indices.max() == len(tasks) - 1
    spans = [position[line["episode_id"], line["frame_index"]] for line in lines]
    assert spans == sorted(spans)
    for line, start in zip(lines, spans, strict=True):
        assert list(line) == ANNOTATION_KEYS
        row = tasks.iloc[line["task_index_high_level"]]
        for key in ("user_prompt", "robot_utterance", "scenario_type", "response_type"):
            assert row[key] == line[key]
        assert row["skill"] == line["skill_current"]
        assert indices[start] == line["task_index_high_level"]
        responses = annotate_pgen.SUITABLE_RESPONSES[line["scenario_type"]]
        assert line["response_type"] in responses
        assert np.float32(line["timestamp"]) == np.float32(frames["timestamp"][start])
    if sampled:
        ends = [*spans[1:], len(frames)]
        for line, start, end in zip(lines, spans, ends, strict=True):
            assert (indices[start:end] == line["task_index_high_level"]).all()

    dataset = LeRobotDataset("somebody/some_dataset", root=output, video_backend="pyav")
    for i in (0, len(dataset) // 2, len(dataset) - 1):
        assert dataset[i]["task_index_high_level"].item() == indices[i]
    return lines
