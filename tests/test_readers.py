"""The result in the hands of its users: LeRobot and its tools, torch, datasets."""

import json
import re
import shutil
from pathlib import Path

import make_demo
import numpy as np
import pandas as pd
import pytest
import torch
from checks import high_level
from conftest import annotate
from lerobot.datasets import dataset_tools
from lerobot.datasets.lerobot_dataset import LeRobotDataset

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.usefixtures("short_prompt")

TABLE = Path("meta", "tasks_high_level.parquet")


@pytest.fixture(scope="module", params=["video", "image"])
def output(short_prompt, request, built, model, tmp_path_factory):
    cameras = {"observation.images.up": request.param}
    source = built(
        f"read_{request.param}", make_demo.make_dataset, (24, 18, 21), cameras=cameras
    )
    folder = tmp_path_factory.mktemp("read") / "out"
    code, _, err = annotate(source, model, folder, "--sample-interval", "0.5")
    assert code == 0, err
    return folder


def opened(root, **how):
    return LeRobotDataset("lab/bricks", root=root, video_backend="pyav", **how)


def expected(root):
    """user_prompt and robot_utterance of each frame, and its row in the table."""
    rows = high_level(root)
    return pd.read_parquet(root / TABLE).iloc[rows].reset_index(drop=True)


def test_delta_timestamps(output):
    deltas = {
        "observation.state": [-0.2, 0.0],
        "task_index_high_level": [-0.1, 0.0, 0.1],
    }
    dataset, rows = opened(output, delta_timestamps=deltas), high_level(output)
    item = dataset[10]
    assert item["task_index_high_level"].flatten().tolist() == rows[9:12].tolist()
    assert item["observation.state"].shape == (2, 2)


def readme_code(heading):
    section = README.split(f"\n### {heading}\n")[1].split("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def test_training_batches_as_in_the_readme(output):
    """The README's collate function, in a shuffled DataLoader over everything."""
    code = readme_code("In a training loop")
    code = re.sub(r"LeRobotDataset\(.*?\)\n", "opened()\n", code, flags=re.DOTALL)
    assert "opened()" in code
    names = {"opened": lambda: opened(output)}
    exec(code.split("for batch in")[0], names)
    frames, seen = expected(output), 0
    for batch in names["loader"]:
        for i, index in enumerate(batch["index"].tolist()):
            assert batch["user_prompt"][i] == frames["user_prompt"][index]
            assert batch["robot_utterance"][i] == frames["robot_utterance"][index]
            assert (
                batch["task_index_high_level"][i].item() == frames["task_index"][index]
            )
            seen += 1
        assert isinstance(batch["observation.images.up"], torch.Tensor)
    assert seen == len(frames) == 63


def test_datasets_reads_the_files_as_the_viewer_does(output, tmp_path):
    import datasets

    files = [str(path) for path in sorted(output.glob("data/*/*.parquet"))]
    how = {"data_files": files, "split": "train", "cache_dir": str(tmp_path)}
    whole = datasets.load_dataset("parquet", **how)
    assert whole.features["task_index_high_level"] == datasets.Value("int64")
    assert whole["task_index_high_level"][:] == high_level(output).tolist()
    stream = datasets.load_dataset("parquet", streaming=True, **how)
    assert next(iter(stream))["task_index_high_level"] == high_level(output)[0]
    card = datasets.load_dataset(str(output), split="train", cache_dir=str(tmp_path))
    assert len(card) == 63 and "task_index_high_level" in card.features


def test_pandas(output):
    frames = pd.concat(map(pd.read_parquet, sorted(output.glob("data/*/*.parquet"))))
    tasks = pd.read_parquet(output / TABLE)
    joined = frames.merge(tasks, left_on="task_index_high_level", right_on="task_index")
    assert len(joined) == 63 and joined["user_prompt"].notna().all()


# ---------------------------------------------------------------- LeRobot's tools


def dialogues(dataset, table):
    rows = np.concatenate(
        [np.atleast_1d(row) for row in dataset.hf_dataset["task_index_high_level"]]
    )
    return list(
        table.iloc[rows][["user_prompt", "robot_utterance"]].itertuples(index=False)
    )


def carry_over(source, target):
    """As the README says."""
    assert not (target / TABLE).exists(), (
        "LeRobot carries it over by now: mend the README"
    )
    shutil.copy(source / TABLE, target / TABLE)
    return pd.read_parquet(target / TABLE)


def test_delete_episodes(output, tmp_path):
    new = dataset_tools.delete_episodes(
        opened(output), [1], tmp_path / "new", "lab/less"
    )
    frames = expected(output)[["user_prompt", "robot_utterance"]]
    kept = [*frames[:24].itertuples(index=False), *frames[42:].itertuples(index=False)]
    assert dialogues(new, carry_over(output, tmp_path / "new")) == kept


def test_split_dataset(output, tmp_path):
    splits = {"train": [0, 2], "val": [1]}
    parts = dataset_tools.split_dataset(opened(output), splits, tmp_path / "parts")
    frames = expected(output)[["user_prompt", "robot_utterance"]]
    (validation,) = [part for name, part in parts.items() if name == "val"]
    table = carry_over(output, Path(validation.root))
    assert dialogues(validation, table) == list(frames[24:42].itertuples(index=False))


def test_remove_feature(output, tmp_path):
    new = dataset_tools.remove_feature(
        opened(output), "observation.state", tmp_path / "new", "lab/blind"
    )
    frames = expected(output)[["user_prompt", "robot_utterance"]]
    assert dialogues(new, carry_over(output, tmp_path / "new")) == list(
        frames.itertuples(index=False)
    )
    assert "observation.state" not in new.meta.features


def test_merge_before_annotating_not_after(output, model, tmp_path):
    """After it, the rows of two tables collide. Before, skills.json is merged too."""
    pair = [opened(output), opened(output)]
    merged = dataset_tools.merge_datasets(pair, "lab/twice", tmp_path / "after")
    rows = [int(row) for row in merged.hf_dataset["task_index_high_level"]]
    assert rows[:63] == rows[63:] == high_level(output).tolist()
    source = dataset_tools.remove_feature(
        opened(output), "task_index_high_level", tmp_path / "plain", "lab/plain"
    )
    twice = tmp_path / "before"
    dataset_tools.merge_datasets([source, opened(source.root)], "lab/twice", twice)
    skills = json.loads((output / "meta/skills.json").read_text())
    again = {
        str(int(i) + 3): e | {"episode_index": int(i) + 3}
        for i, e in skills["episodes"].items()
    }
    skills["episodes"] |= again
    (twice / "meta/skills.json").write_text(json.dumps(skills))
    code, _, err = annotate(twice, model, tmp_path / "out", "--sample-interval", "0.5")
    assert code == 0, err
    assert len(high_level(tmp_path / "out")) == 126
