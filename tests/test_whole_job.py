"""The whole command on every kind of dataset, judged by reading the result back."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import make_demo
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from checks import annotations, check, content, high_level
from conftest import annotate, run

import annotate_pgen


def test_demo(dataset, model, tmp_path):
    before = content(dataset)
    code, out, err = annotate(dataset, model, tmp_path / "out")
    assert code == 0, err
    assert content(dataset) == before, "the source has changed"
    lines = check(dataset, tmp_path / "out")
    # 45, 30 and 38 frames at 10 fps: one sample each full second
    assert [(line["episode_id"], line["frame_index"]) for line in lines] == [
        (e, f) for e, n in enumerate((45, 30, 38)) for f in range(0, n, 10)
    ]
    assert [line["skill_current"] for line in lines[:3]] == [
        "robot arm moves towards pink lego brick",
        "robot arm moves towards pink lego brick",
        "robot arm picks up pink lego brick",
    ]
    assert lines[2]["skill_history"] == ["robot arm moves towards pink lego brick"]
    assert {line["task_description"] for line in lines} == {make_demo.TASK}
    assert not (tmp_path / "out.partial").exists()
    for figure in ("frames         113", "samples        12", "dialogues      12", "given up 0"):
        assert figure in out
    # frames 12-19 and 26-29 of each episode carry the skill before theirs
    assert f"{3 * (8 + 4) / 113:.1%} carry the dialogue of an earlier skill" in out


def test_printed_code_reads_it_back(dataset, model, tmp_path):
    code, out, _ = annotate(dataset, model, tmp_path / "out")
    printed = out[out.index("from lerobot") :]
    assert code == 0
    shown = subprocess.run(
        [sys.executable, "-c", printed], capture_output=True, text=True, check=True
    ).stdout
    assert "user_prompt" in shown and annotations(tmp_path / "out")[0]["user_prompt"] in shown


def test_accessing_the_data_as_the_specification_prints_it(built, model, tmp_path):
    cameras = {"observation.images.front": "image"}
    source = built("images", make_demo.make_dataset, (25, 12), cameras=cameras)
    assert annotate(source, model, tmp_path / "out", "--sample-interval", "0.3")[0] == 0
    dataset = annotate_pgen_dataset(tmp_path / "out")
    frame = dataset[20]
    high_level_task_idx = frame["task_index_high_level"].item()
    tasks_df = pd.read_parquet(dataset.root / "meta" / "tasks_high_level.parquet")
    task_info = tasks_df.iloc[high_level_task_idx]
    assert task_info["user_prompt"] in make_demo.USER_PROMPTS
    assert task_info["robot_utterance"] in make_demo.ROBOT_UTTERANCES
    assert task_info["skill"] == make_demo.PICK_AND_PLACE[1][0]


def annotate_pgen_dataset(root):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset(repo_id="lerobot/svla_so101_pickplace_with_high_level_tasks", root=root)


def test_public_functions_as_in_a_notebook(dataset, model):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    source = LeRobotDataset("demo/pick_and_place", root=dataset, video_backend="pyav")
    pgen = annotate_pgen.QwenPgen(str(model), "cpu", "float32")
    plan = annotate_pgen.make_plan(source, sample_interval=2.0)
    tasks, indices, lines = annotate_pgen.generate_synthetic_data(source, pgen, plan)
    assert len(lines) == 3 + 2 + 2 and len(indices) == 113 and indices.max() == len(tasks) - 1
    known = {sample.index: line for sample, line in zip(plan.samples, lines, strict=True)}
    progress = annotate_pgen.Progress(known)
    _, again, _ = annotate_pgen.generate_synthetic_data(source, pgen, plan, progress=progress)
    assert (again == indices).all(), "nothing is generated that is there"
    image = next(annotate_pgen.read_samples(source.meta, plan.samples, plan.camera_keys))
    line = annotate_pgen.annotate_sample(pgen, image, plan.samples[0])
    assert list(line) == list(lines[0])[:-1]
    prompt = annotate_pgen.construct_prompt("tidy up", [], "pick the brick")
    assert pgen.call_qwen(image, prompt).keys() == {"user_prompt", "robot_utterance"}


@pytest.mark.parametrize(
    "fps, interval, expected", [(25, 0.5, [0, 13, 25, 38, 50]), (30, 1, [0, 30])]
)
def test_frame_rates(fps, interval, expected, built, model, tmp_path):
    camera = {"image": "video"}
    source = built(f"{fps}fps", make_demo.make_dataset, (55,), fps, camera)
    code, _, err = annotate(source, model, tmp_path / "out", "--sample-interval", interval)
    assert code == 0, err
    assert [line["frame_index"] for line in check(source, tmp_path / "out")] == expected


@pytest.fixture(scope="session")
def many_files(built):
    """Five episodes, a data file and two videos for each, over three chunks, and two tasks."""
    tasks, lengths = ("stack the bricks", "sort the bricks"), (21, 15, 18, 20, 11)
    skills = make_demo.skills_of(lengths, tasks)
    del skills["episodes"]["1"]["description"]
    skills["episodes"]["2"]["description"] = " "

    def build(root):
        make_demo.make_dataset(root, lengths, tasks=tasks, file_per_episode=True, skills=skills)
        pd.DataFrame({"subtask_index": [0]}, index=["reach"]).to_parquet(
            root / "meta/subtasks.parquet"
        )
        extra = {"meta/modality.json": b"{}", "meta/notes/mine.txt": b"hello"}
        for name, text in (extra | {"README.md": b"# mine", ".cache/x/y": b"no"}).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(text)
        info = json.loads((root / "meta/info.json").read_text())
        info["tools"] = [{"type": "function", "function": {"name": "say"}}]
        (root / "meta/info.json").write_text(json.dumps(info))
        shutil.rmtree(root / ".cache")

    return built("many_files", build)


def test_file_per_episode_two_tasks_extra_files(many_files, model, tmp_path):
    assert len(list(many_files.glob("data/*/*.parquet"))) == 5
    assert len(list(many_files.glob("videos/*/*/*.mp4"))) == 10
    source = Path(shutil.copytree(many_files, tmp_path / "source"))
    (source / ".cache" / "huggingface").mkdir(parents=True)
    (source / ".cache" / "huggingface" / "state").write_text("private")
    code, _, err = annotate(source, model, tmp_path / "out", "--num-image-views-per-sample", 2)
    assert code == 0, err
    assert not (tmp_path / "out" / ".cache").exists()
    lines = check(many_files, tmp_path / "out")
    described = {line["episode_id"]: line["task_description"] for line in lines}
    assert described == {
        0: "stack the bricks",
        1: "sort the bricks",  # the frames' own task: no description
        2: "stack the bricks",  # the same: a blank one
        3: "sort the bricks",
        4: "stack the bricks",
    }


def test_symlinked_dataset(dataset, model, tmp_path):
    """As in LeRobot 0.6's Hub cache: every file a link to a blob elsewhere."""
    linked = tmp_path / "snapshot"
    for number, (name, data) in enumerate(content(dataset).items()):
        blob = tmp_path / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(data)
        (linked / name).parent.mkdir(parents=True, exist_ok=True)
        (linked / name).symlink_to(blob)
    code, _, err = annotate(linked, model, tmp_path / "out")
    assert code == 0, err
    check(linked, tmp_path / "out")


@pytest.mark.parametrize("row_group_size", [None, 7])
def test_parquet_without_huggingface_metadata(own_dataset, model, tmp_path, row_group_size):
    (path,) = own_dataset.glob("data/*/*.parquet")
    frame = pd.read_parquet(path)
    options = {"row_group_size": row_group_size} if row_group_size else {}
    frame.to_parquet(path, compression={"action.list.element": "gzip", "index": "zstd"}, **options)
    assert b"huggingface" not in pq.read_schema(path).metadata
    code, _, err = annotate(own_dataset, model, tmp_path / "out")
    assert code == 0, err
    check(own_dataset, tmp_path / "out")


def test_image_cameras(built, model, tmp_path):
    cameras = {"image": "image", "wrist_image": "image"}
    source = built("two_image_cameras", make_demo.make_dataset, (14, 9, 11), cameras=cameras)
    flags = ("--camera-keys", "wrist_image", "image", "--sample-interval", "0.4")
    code, _, err = annotate(source, model, tmp_path / "out", *flags)
    assert code == 0, err
    check(source, tmp_path / "out")


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_third_of_the_answers_is_bad(built, model, dataset, tmp_path, batch_size):
    bad = built("bad_third", make_demo.make_model, failure_rate=1 / 3)
    flags = ("--sample-interval", "0.2", "--batch-size", batch_size)
    code, out, err = annotate(dataset, bad, tmp_path / "out", *flags)
    assert code == 0, err
    given_up = int(out.split("given up ")[1].split()[0])
    lines = check(dataset, tmp_path / "out", sampled=not given_up)
    assert len(lines) == 23 + 15 + 19 - given_up
    assert int(out.split("asked again    ")[1].split(",")[0]) > 3
    assert err.count("given up: episode") == given_up


def test_a_model_that_never_answers_well(built, dataset, tmp_path):
    bad = built("bad", make_demo.make_model, failure_rate=1.0)
    code, _, err = annotate(dataset, bad, tmp_path / "out", "--sample-interval", "2")
    assert code == 1
    assert "no valid dialogue for episode [0, 1, 2]" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_whose_own_settings_allow_one_answer(built, dataset, tmp_path):
    qwen = {"do_sample": True, "top_k": 1, "top_p": 0.001, "temperature": 0.01}
    narrow = built("narrow", make_demo.make_model, generation=qwen)
    flags = ("--sample-interval", "0.2")
    assert annotate(dataset, narrow, tmp_path / "out", *flags)[0] == 0
    assert len({line["user_prompt"] for line in annotations(tmp_path / "out")}) > 3


def test_seed_and_temperature(dataset, model, tmp_path):
    flags = ("--sample-interval", "0.5", "--batch-size", "4")
    results = []
    for name, more in {"a": (), "b": (), "c": ("--seed", 1), "d": ("--temperature", 0)}.items():
        code, _, err = annotate(dataset, model, tmp_path / name, *flags, *more)
        assert code == 0, err
        results.append(check(dataset, tmp_path / name))
    assert results[0] == results[1] and results[0] != results[2]
    assert len({line["user_prompt"] for line in results[3]}) == 1, "greedy"


def test_default_output_and_names(own_dataset, model, tmp_path):
    flags = ("--model", model, "--device", "cpu", "--dtype", "float32", "--data-dir", own_dataset)
    code, out, _ = run(*flags)
    assert code == 0
    check(own_dataset, tmp_path / "dataset_with_high_level_tasks")
    code, out, _ = run(*flags, "--repo-id", "me/robot")
    home = Path(annotate_pgen.find_dataset.__globals__["os"].environ["HF_LEROBOT_HOME"])
    assert code == 0 and '"me/robot_with_high_level_tasks"' in out
    check(own_dataset, home / "me" / "robot_with_high_level_tasks")
    shutil.rmtree(home / "me")


def test_a_local_copy_of_a_hub_dataset_is_used(dataset, model, tmp_path):
    home = Path(__import__("os").environ["HF_LEROBOT_HOME"])
    shutil.copytree(dataset, home / "me" / "cached")
    flags = ("--model", model, "--device", "cpu", "--dtype", "float32", "--repo-id", "me/cached")
    code, _, err = run(*flags, "--output-dir", tmp_path / "out")
    assert code == 0, err
    check(dataset, tmp_path / "out")


def test_dry_run(dataset, tmp_path):
    flags = ("--data-dir", dataset, "--output-dir", tmp_path / "out", "--dry-run")
    code, out, err = run(*flags, "--num-image-views-per-sample", 2)
    assert (code, err) == (0, "")
    assert "samples        12" in out and "episodes       3" in out
    assert "observation.images.front, observation.images.wrist" in out
    assert out.count("Answer in JSON") == 5, "a prompt for each scenario type"
    assert "specific_object" in out and "clarification" in out
    assert not list(tmp_path.iterdir())


def test_every_index_is_its_last_samples(dataset, model, tmp_path):
    assert annotate(dataset, model, tmp_path / "out", "--sample-interval", "0.7")[0] == 0
    indices, lines = high_level(tmp_path / "out"), annotations(tmp_path / "out")
    starts = np.cumsum([0, 45, 30, 38])
    expected = np.full(113, -1)
    for line in lines:
        episode = line["episode_id"]
        first = starts[episode] + line["frame_index"]
        expected[first : starts[episode + 1]] = line["task_index_high_level"]
    assert (indices == expected).all()
