"""Whole jobs on datasets that LeRobot's annotation tools have been at."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skill_datasets as sd
import torch
from checks import COLUMN, annotations, content, high_level, record, task_table
from conftest import annotate
from lerobot.datasets.lerobot_dataset import LeRobotDataset

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TOOLS = [{"type": "function", "function": {"name": "say"}}]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A dataset with language columns and tools."""
    root = sd.record(tmp_path_factory.mktemp("language") / "dataset")
    sd.write_language(root)
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    info["tools"] = TOOLS
    path.write_text(json.dumps(info), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def output(spoken, model, tmp_path_factory):
    """The annotated dataset."""
    folder = tmp_path_factory.mktemp("annotated") / "out"
    code, _, err = annotate(spoken, model, folder, "--align-skills")
    assert code == 0, err
    return folder


def test_language_columns_and_tools_come_out_as_they_were(spoken, output):
    (old_path,) = sd.data_files(spoken)
    (new_path,) = sd.data_files(output)
    old = pq.read_table(old_path)
    new = pq.read_table(new_path)
    assert "language_persistent" in old.column_names
    assert new.drop_columns([COLUMN]).equals(old)
    for name in old.column_names:
        assert new.schema.field(name).equals(old.schema.field(name))
    info = json.loads((output / "meta" / "info.json").read_text(encoding="utf-8"))
    assert info["tools"] == TOOLS
    assert info["features"].keys() >= {"language_persistent", "language_events", COLUMN}


def test_the_source_of_the_skills_is_recorded(output):
    assert record(output)["settings"]["skill_source"].startswith("language_persistent")
    lines = annotations(output)
    skills = {}
    for line in lines:
        skills.setdefault(line["episode_id"], []).append(line["skill_current"])
    for episode, entries in sd.SKILLS.items():
        named = [name for name, _, _ in entries]
        changes = [
            name
            for number, name in enumerate(skills[episode])
            if number == 0 or name != skills[episode][number - 1]
        ]
        assert changes == named


def test_the_training_loop_of_the_readme(output):
    section = README.split("\n### In a training loop\n")[1].split("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    if not sd.HAS_PIPELINE:
        pytest.skip("LeRobot 0.4.4 cannot open a dataset with language columns")
    code = re.sub(r"LeRobotDataset\(.*?\)\n", "opened\n", code, flags=re.DOTALL)
    names = {"opened": LeRobotDataset("lab/bricks", root=output)}
    exec(code.split("for batch in")[0], names)
    tasks = task_table(output)
    rows = high_level(output)
    seen = 0
    for batch in names["loader"]:
        for number, index in enumerate(batch["index"].tolist()):
            expected = tasks["user_prompt"][rows[index]]
            assert batch["user_prompt"][number] == expected
            seen += 1
        assert isinstance(batch["action"], torch.Tensor)
    assert seen == len(rows)


@pytest.mark.parametrize("place", ["last", "in the middle"])
def test_a_placeholder_is_replaced(place, spoken, model, tmp_path):
    root = Path(shutil.copytree(spoken, tmp_path / "dataset"))
    (path,) = sd.data_files(root)
    sd.replace_column(path, COLUMN, pa.array([-1] * 120))
    if place == "in the middle":
        table = pq.read_table(path)
        names = [COLUMN, *(name for name in table.column_names if name != COLUMN)]
        pq.write_table(table.select(names), path, row_group_size=50)
    sd.declare(root, task_index_high_level={"dtype": "int64", "shape": [1]})
    before = content(root)
    code, _, err = annotate(root, model, tmp_path / "out")
    assert code == 0, err
    assert content(root) == before
    (new_path,) = sd.data_files(tmp_path / "out")
    old = pq.read_table(path)
    new = pq.read_table(new_path)
    assert new.column_names == old.column_names
    assert new.drop_columns([COLUMN]).equals(old.drop_columns([COLUMN]))
    indices = high_level(tmp_path / "out")
    assert set(indices) == set(range(len(task_table(tmp_path / "out"))))


def test_entries_in_info_without_a_column_are_no_error(spoken, model, tmp_path):
    """lerobot-annotate drops subtask_index and leaves its entry."""
    root = Path(shutil.copytree(spoken, tmp_path / "dataset"))
    feature = {"dtype": "int64", "shape": [1], "names": None}
    sd.declare(root, subtask_index=feature, task_index_high_level=feature)
    code, _, err = annotate(root, model, tmp_path / "out", "--sample-interval", 9)
    assert code == 0, err
    assert len(high_level(tmp_path / "out")) == 120


@pytest.mark.parametrize("value", [0, 5])
def test_a_column_with_dialogues_is_refused(value, spoken, model, tmp_path):
    root = Path(shutil.copytree(spoken, tmp_path / "dataset"))
    (path,) = sd.data_files(root)
    values = np.full(120, -1)
    values[60] = value
    sd.replace_column(path, COLUMN, pa.array(values))
    code, _, err = annotate(root, model, tmp_path / "out")
    assert code == 2
    assert f"{path}: has {COLUMN} already" in err
