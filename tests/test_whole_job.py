"""The whole command on every kind of dataset, judged by reading the result back."""

import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import make_demo
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checks import (
    annotations,
    check,
    content,
    expected_samples,
    files,
    high_level,
    late_share,
    record,
    task_table,
)
from conftest import HOME, annotate, run
from lerobot.datasets.lerobot_dataset import LeRobotDataset

import annotate_pgen as ap

pytestmark = pytest.mark.usefixtures("short_prompt")

CPU = ("--device", "cpu", "--dtype", "float32")


def samples_of(output):
    lines = annotations(output)
    return [(line["episode_id"], line["frame_index"]) for line in lines]


@pytest.fixture(scope="module")
def finished(short_prompt, dataset, model, tmp_path_factory):
    """The demo, annotated: its folder, and what the run said on stdout and stderr."""
    output = tmp_path_factory.mktemp("finished") / "out"
    before = content(dataset)
    code, out, err = annotate(dataset, model, output)
    assert code == 0, err
    assert content(dataset) == before, "the source is never written"
    return output, out, err


# ---------------------------------------------------------------- the demo


def test_demo(finished, dataset):
    output, _, _ = finished
    lines = check(dataset, output)
    assert samples_of(output) == expected_samples(dataset)
    assert len(lines) == 12
    assert [line["skill_current"] for line in lines[:3]] == [
        "robot arm moves towards pink lego brick",
        "robot arm moves towards pink lego brick",
        "robot arm picks up pink lego brick",
    ]
    assert {line["task_description"] for line in lines} == {make_demo.TASK}
    assert not Path(f"{output}.partial").exists()


def test_the_record_says_how_it_was_made(finished, dataset, model):
    output, _, _ = finished
    made = record(output)
    assert made["name"] == f"local/{dataset.name}{ap.SUFFIX}"
    assert made["source"] is None
    assert made["source_card"] == ""
    # Frames 12 to 19 and 26 to 29 of each episode carry the skill before theirs.
    assert made["late_share"] == 3 * (8 + 4) / 113
    settings = made["settings"]
    assert settings["model"] == str(model)
    assert settings["sample_interval"] == 1.0
    assert settings["temperature"] == 0.7
    assert settings["camera_keys"] == ["observation.images.front"]
    assert settings["prompt"]["PROMPT"] == ap.PROMPT
    assert dict(settings["prompt"]["SCENARIO_TYPES"]) == ap.SCENARIO_TYPES


def test_stdout_carries_results_and_stderr_the_rest(finished):
    _, out, err = finished
    assert "12/12" in err
    assert "12/12" not in out
    assert "error" not in err


def test_printed_code_reads_it_back(finished, capsys):
    output, out, _ = finished
    printed = []
    for line in out[out.index("from lerobot") :].splitlines():
        printed.append(line)
        if line.startswith("print("):
            break
    exec("\n".join(printed), {})
    assert annotations(output)[0]["user_prompt"] in capsys.readouterr().out


def test_accessing_the_data_as_the_specification_prints_it(built, model, tmp_path):
    cameras = {"observation.images.front": "image"}
    source = built("images", make_demo.make_dataset, (25, 12), cameras=cameras)
    flags = ("--sample-interval", "0.3")
    assert annotate(source, model, tmp_path / "out", *flags)[0] == 0
    name = "lerobot/svla_so101_pickplace_with_high_level_tasks"
    dataset = LeRobotDataset(repo_id=name, root=tmp_path / "out")
    frame = dataset[20]
    high_level_task_idx = frame["task_index_high_level"].item()
    tasks_df = pd.read_parquet(dataset.root / "meta" / "tasks_high_level.parquet")
    task_info = tasks_df.iloc[high_level_task_idx]
    assert task_info["user_prompt"] in make_demo.USER_PROMPTS
    assert task_info["robot_utterance"] in make_demo.ROBOT_UTTERANCES
    assert task_info["skill"] == make_demo.PICK_AND_PLACE[1][0]


def test_public_functions_as_in_a_notebook(dataset, model, monkeypatch):
    source = LeRobotDataset("demo/bricks", root=dataset, video_backend="pyav")
    pgen = ap.QwenPgen(str(model), "cpu", "float32")
    plan = ap.make_plan(source, sample_interval=2.0)
    tasks, indices, lines = ap.generate_synthetic_data(source, pgen, plan)
    assert len(lines) == 3 + 2 + 2
    assert len(indices) == 113
    assert indices.max() == len(tasks) - 1
    known = {
        sample.index: {
            "user_prompt": line["user_prompt"],
            "robot_utterance": line["robot_utterance"],
        }
        for sample, line in zip(plan.samples, lines, strict=True)
    }
    with monkeypatch.context() as patch:
        # Nothing is generated that is there.
        patch.setattr(pgen, "answer", None)
        _, again, _ = ap.generate_synthetic_data(source, pgen, plan, dialogues=known)
    assert (again == indices).all()
    images = next(ap.read_views(source.meta, plan.samples, plan))
    line = ap.annotate_sample(pgen, images, plan.samples[0])
    assert list(line) == list(lines[0])[:-1]
    prompt = ap.construct_prompt("tidy up", [], "pick the brick")
    dialogue = pgen.call_qwen(images, prompt)
    assert dialogue.keys() == {"user_prompt", "robot_utterance"}


def test_some_episodes_as_in_a_notebook(dataset, model):
    source = LeRobotDataset(
        "demo/bricks", root=dataset, episodes=[0, 2], video_backend="pyav"
    )
    pgen = ap.QwenPgen(str(model), "cpu", "float32")
    plan = ap.make_plan(source)
    _, indices, lines = ap.generate_synthetic_data(source, pgen, plan)
    assert {line["episode_id"] for line in lines} == {0, 2}
    assert len(indices) == 45 + 38


# ---------------------------------------------------------------- kinds of datasets


@pytest.mark.parametrize("fps, interval", [(25, 0.5), (30, 1)])
def test_frame_rates(fps, interval, built, model, tmp_path):
    source = built(
        f"{fps}fps", make_demo.make_dataset, (55,), fps, cameras={"image": "video"}
    )
    flags = ("--sample-interval", interval)
    code, _, err = annotate(source, model, tmp_path / "out", *flags)
    assert code == 0, err
    check(source, tmp_path / "out")
    assert samples_of(tmp_path / "out") == expected_samples(source, interval)


def draw_many_files(root):
    """Five episodes, each with files of its own, over three chunks, and two tasks."""
    tasks = ("stack the bricks", "sort the bricks")
    lengths = (21, 15, 18, 20, 11)
    skills = make_demo.skills_of(lengths, tasks)
    del skills["episodes"]["1"]["description"]
    skills["episodes"]["2"]["description"] = " "
    make_demo.make_dataset(
        root, lengths, tasks=tasks, file_per_episode=True, skills=skills
    )
    extra = {
        "meta/modality.json": b"{}",
        "meta/notes/mine.txt": b"hello",
        "README.md": b"# mine",
    }
    for name, data in extra.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    info = json.loads((root / "meta/info.json").read_text())
    info["tools"] = [{"type": "function", "function": {"name": "say"}}]
    (root / "meta/info.json").write_text(json.dumps(info))


def test_a_file_for_each_episode_two_tasks_and_extra_files(built, model, tmp_path):
    many_files = built("many_files", draw_many_files)
    assert len(list(many_files.glob("data/*/*.parquet"))) == 5
    assert len(list(many_files.glob("videos/*/*/*.mp4"))) == 10
    source = Path(shutil.copytree(many_files, tmp_path / "source"))
    for name in (".cache/huggingface/state", ".git/config"):
        (source / name).parent.mkdir(parents=True)
        (source / name).write_text("private")
    flags = ("--num-image-views-per-sample", 2)
    code, _, err = annotate(source, model, tmp_path / "out", *flags)
    assert code == 0, err
    assert not (tmp_path / "out" / ".cache").exists()
    assert not (tmp_path / "out" / ".git").exists()
    lines = check(many_files, tmp_path / "out")
    described = {line["episode_id"]: line["task_description"] for line in lines}
    assert described == {
        0: "stack the bricks",
        # The frames' own task, without a description and with a blank one.
        1: "sort the bricks",
        2: "stack the bricks",
        3: "sort the bricks",
        4: "stack the bricks",
    }


def test_a_dataset_of_links(dataset, model, tmp_path):
    """As in the Hub's cache, where every file is a link to a blob elsewhere."""
    linked = tmp_path / "snapshot"
    (tmp_path / "blobs").mkdir()
    for number, (name, data) in enumerate(content(dataset).items()):
        blob = tmp_path / "blobs" / str(number)
        blob.write_bytes(data)
        (linked / name).parent.mkdir(parents=True, exist_ok=True)
        (linked / name).symlink_to(blob)
    before = content(linked)
    code, _, err = annotate(linked, model, tmp_path / "out")
    assert code == 0, err
    check(linked, tmp_path / "out")
    assert content(linked) == before


@pytest.mark.parametrize("row_group_size", [None, 7])
def test_parquet_last_written_by_pandas(row_group_size, own_dataset, model, tmp_path):
    (path,) = own_dataset.glob("data/*/*.parquet")
    frames = pd.read_parquet(path)
    codecs = {"action.list.element": "gzip", "index": "zstd"}
    table = pa.Table.from_pandas(frames)
    encodings = {
        "timestamp": "BYTE_STREAM_SPLIT",
        "action.list.element": "BYTE_STREAM_SPLIT",
        "frame_index": "DELTA_BINARY_PACKED",
    }
    pq.write_table(
        table,
        path,
        compression=codecs,
        row_group_size=row_group_size,
        use_dictionary=["index", "task_index"],
        column_encoding=encodings,
    )
    assert b"huggingface" not in pq.read_schema(path).metadata
    code, _, err = annotate(own_dataset, model, tmp_path / "out")
    assert code == 0, err
    check(own_dataset, tmp_path / "out")


def test_image_cameras(built, model, tmp_path):
    cameras = {"image": "image", "wrist_image": "image"}
    lengths = (14, 9, 11)
    source = built("two_images", make_demo.make_dataset, lengths, cameras=cameras)
    flags = ("--camera-keys", "wrist_image", "image", "--sample-interval", "0.4")
    code, _, err = annotate(source, model, tmp_path / "out", *flags)
    assert code == 0, err
    check(source, tmp_path / "out")
    settings = record(tmp_path / "out")["settings"]
    assert settings["camera_keys"] == ["wrist_image", "image"]


def test_images_that_cannot_be_decoded_do_not_end_the_run(built, model, tmp_path):
    cameras = {"image": "image"}
    drawn = built("one_image", make_demo.make_dataset, (14, 9), cameras=cameras)
    source = Path(shutil.copytree(drawn, tmp_path / "source"))
    (path,) = source.glob("data/*/*.parquet")
    table = pq.read_table(path)
    place = table.schema.get_field_index("image")
    cells = table["image"].to_pylist()
    broken = {(0, 2): 2, (0, 6): 6, (1, 2): 16}
    for row in broken.values():
        cells[row] = {"bytes": b"no picture", "path": None}
    column = pa.array(cells, table.schema.field("image").type)
    pq.write_table(table.set_column(place, "image", column), path)
    output = tmp_path / "out"
    code, _, err = annotate(source, model, output, "--sample-interval", "0.2")
    assert code == 0, err
    check(source, output, sampled=False)
    expected = set(expected_samples(source, 0.2)) - broken.keys()
    assert set(samples_of(output)) == expected
    for episode, frame in broken:
        assert f"episode {episode}, frame {frame}" in err
    indices = high_level(output)
    for row in broken.values():
        assert indices[row] == indices[row - 2], "that of the nearest earlier sample"


def test_a_placeholder_column_is_replaced(own_dataset, model, tmp_path):
    """LeRobot's older tool of annotation fills the column with -1."""
    (path,) = own_dataset.glob("data/*/*.parquet")
    frames = pd.read_parquet(path)
    frames.assign(task_index_high_level=np.int64(-1)).to_parquet(path)
    info_file = own_dataset / "meta" / "info.json"
    info = json.loads(info_file.read_text())
    feature = {"dtype": "int64", "shape": [1], "names": None}
    info["features"]["task_index_high_level"] = feature
    info_file.write_text(json.dumps(info))
    code, _, err = annotate(own_dataset, model, tmp_path / "out")
    assert code == 0, err
    check(own_dataset, tmp_path / "out")


# ---------------------------------------------------------------- --align-skills


AWKWARD = (
    # Shorter than the interval, a gap, and a start between two frames.
    ("reach", 0.0, 0.3),
    ("grasp", 0.3, 0.55),
    ("lift", 0.55, 1.2),
    ("carry", 2.04, 3.0),
)


@pytest.mark.parametrize("skills", [make_demo.PICK_AND_PLACE, AWKWARD])
def test_align_skills(skills, own_dataset, model, tmp_path):
    content_of_skills = make_demo.skills_of((45, 30, 38), skills=skills)
    make_demo.write_skills(own_dataset, content_of_skills)
    output = tmp_path / "out"
    code, _, err = annotate(own_dataset, model, output, "--align-skills")
    assert code == 0, err
    lines = check(own_dataset, output)
    aligned = expected_samples(own_dataset, align_skills=True)
    assert samples_of(output) == aligned
    assert aligned != expected_samples(own_dataset)
    assert late_share(own_dataset, output, task_table(output)) == 0
    assert record(output)["late_share"] == 0
    covered = {(line["episode_id"], line["skill_current"]) for line in lines}
    names = [name for name, _, _ in skills]
    assert covered == {(episode, name) for episode in range(3) for name in names}


# ---------------------------------------------------------------- --verify


def test_verify(dataset, model, tmp_path):
    """The blind model takes some label or other: not all skills are found."""
    output = tmp_path / "out"
    code, _, err = annotate(dataset, model, output, "--verify")
    assert code == 0, err
    lines = check(dataset, output)
    assert len(lines) == 12
    assert {type(line["skill_recovered"]) for line in lines} == {bool}
    assert record(output)["settings"]["verify"]


def choose_what_was_requested(wanted):
    """A `choose` that finds the skill in requests for which `wanted` is true."""

    def choose(self, questions, option_counts):
        choices = []
        for question, count in zip(questions, option_counts, strict=True):
            options = [line[3:] for line in question.splitlines() if line[1:3] == ". "]
            assert len(options) == count
            assert len(set(options)) == count
            choices.append(wanted(question, options))
        return choices

    return choose


def test_verify_asks_again_until_the_skill_is_found(
    dataset, model, tmp_path, monkeypatch
):
    """Here a request leads to the same skill wherever it is made."""
    by_request = {}
    skills = [name for name, _, _ in make_demo.PICK_AND_PLACE]
    for number, request in enumerate(make_demo.USER_PROMPTS):
        by_request[request] = skills[number % len(skills)]

    def find(question, options):
        (skill,) = [by_request[text] for text in by_request if f'"{text}"' in question]
        return options.index(skill)

    monkeypatch.setattr(ap.QwenPgen, "choose", choose_what_was_requested(find))
    monkeypatch.setattr(ap, "MAX_TRIES", 60)
    output = tmp_path / "out"
    code, _, err = annotate(dataset, model, output, "--verify")
    assert code == 0, err
    for line in check(dataset, output):
        assert line["skill_recovered"]
        assert by_request[line["user_prompt"]] == line["skill_current"]


def test_verify_keeps_the_last_valid_answer(dataset, model, tmp_path, monkeypatch):
    asked = Counter()

    def find_never(question, options):
        asked["questions"] += 1
        return -1

    monkeypatch.setattr(ap.QwenPgen, "choose", choose_what_was_requested(find_never))
    output = tmp_path / "out"
    code, _, err = annotate(dataset, model, output, "--verify")
    assert code == 0, err
    lines = check(dataset, output)
    assert not any(line["skill_recovered"] for line in lines)
    assert asked["questions"] == 12 * ap.MAX_TRIES


# ---------------------------------------------------------------- models and settings


@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_third_of_the_answers_is_bad(batch_size, built, dataset, model, tmp_path):
    bad = built("bad_third", make_demo.make_model, failure_rate=1 / 3)
    output = tmp_path / "out"
    flags = ("--sample-interval", "0.5", "--batch-size", batch_size)
    code, _, err = annotate(dataset, bad, output, *flags)
    assert code == 0, err
    missing = set(expected_samples(dataset, 0.5)) - set(samples_of(output))
    check(dataset, output, sampled=not missing)
    for episode, frame in missing:
        assert f"episode {episode}, frame {frame}" in err
    assert len(missing) < 5


def test_a_model_that_never_answers_well(built, dataset, tmp_path):
    bad = built("bad", make_demo.make_model, failure_rate=1.0)
    code, out, err = annotate(dataset, bad, tmp_path / "out", "--sample-interval", "2")
    assert (code, out) == (1, "")
    assert "[0, 1, 2]" in err.splitlines()[-1], "the episodes without a dialogue"
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_checkpoint_whose_own_settings_allow_one_answer(built, dataset, tmp_path):
    qwen = {"do_sample": True, "top_k": 1, "top_p": 0.001, "temperature": 0.01}
    narrow = built("narrow", make_demo.make_model, generation=qwen)
    output = tmp_path / "out"
    assert annotate(dataset, narrow, output, "--sample-interval", "0.5")[0] == 0
    assert len({line["user_prompt"] for line in annotations(output)}) > 3


def test_seed_and_temperature(dataset, model, tmp_path):
    flags_of_runs = {
        "a": (),
        "b": (),
        "other seed": ("--seed", 1),
        "greedy": ("--temperature", 0),
    }
    lines = {}
    for name, flags in flags_of_runs.items():
        output = tmp_path / name
        code, _, err = annotate(dataset, model, output, "--batch-size", 4, *flags)
        assert code == 0, err
        lines[name] = check(dataset, output)
    assert lines["a"] == lines["b"]
    assert lines["a"] != lines["other seed"]
    # Only where a request stood for another skill already, it was asked again.
    prompts = Counter(line["user_prompt"] for line in lines["greedy"])
    assert prompts.most_common(1)[0][1] >= 4


# ---------------------------------------------------------------- names and places


def test_default_output_and_names(own_dataset, model, tmp_path):
    flags = ("--model", model, *CPU, "--data-dir", own_dataset)
    assert run(*flags)[0] == 0
    output = tmp_path / "dataset_with_high_level_tasks"
    check(own_dataset, output)
    assert record(output)["name"] == "local/dataset_with_high_level_tasks"
    assert run(*flags, "--repo-id", "me/robot")[0] == 0
    output = HOME / "lerobot" / "me" / "robot_with_high_level_tasks"
    check(own_dataset, output)
    assert record(output)["name"] == "me/robot_with_high_level_tasks"
    assert record(output)["source"] == "me/robot"
    shutil.rmtree(output)


def test_a_local_copy_of_a_hub_dataset_is_used(dataset, model, tmp_path):
    copy = Path(shutil.copytree(dataset, HOME / "lerobot" / "me" / "cached"))
    flags = ("--model", model, *CPU, "--repo-id", "me/cached")
    code, _, err = run(*flags, "--output-dir", tmp_path / "out")
    assert code == 0, err
    check(dataset, tmp_path / "out")
    assert content(copy) == content(dataset)
    shutil.rmtree(copy)


def test_dry_run(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(ap, "QwenPgen", None)
    flags = ("--data-dir", dataset, "--output-dir", tmp_path / "out", "--dry-run")
    before = content(dataset)
    code, out, err = run(*flags, "--num-image-views-per-sample", 2)
    assert code == 0, err
    assert "observation.images.front, observation.images.wrist" in out
    for name in ap.SCENARIO_TYPES:
        assert ap.SCENARIO_TYPES[name] in out, "a prompt for each scenario type"
    assert err.count("\n") == 2
    # Both grids, of which one is in use.
    regular = len(expected_samples(dataset))
    aligned = len(expected_samples(dataset, align_skills=True))
    assert f"{regular} samples" in out
    assert f"{aligned} samples" in out
    assert f"{36 / 113:.1%}" in out
    assert not list(tmp_path.iterdir())
    assert content(dataset) == before


def test_a_preview_is_taken_over(dataset, model, tmp_path):
    output = tmp_path / "out"
    code, _, err = annotate(dataset, model, output, "--preview", 3)
    assert code == 0, err
    assert not output.exists()
    (journal,) = (tmp_path / "out.partial").glob("dialogues-*.jsonl")
    shown = [json.loads(line) for line in journal.read_text().splitlines() if line]
    assert len(shown) == 3
    page = (tmp_path / "out.preview.html").read_text(encoding="utf-8")
    for entry in shown:
        assert entry["robot_utterance"].replace("'", "&#39;") in page
    assert annotate(dataset, model, output)[0] == 0
    lines = check(dataset, output)
    written = {(line["user_prompt"], line["robot_utterance"]) for line in lines}
    for entry in shown:
        assert (entry["user_prompt"], entry["robot_utterance"]) in written


def test_every_frame_carries_its_last_sample(dataset, model, tmp_path):
    output = tmp_path / "out"
    assert annotate(dataset, model, output, "--sample-interval", "0.7")[0] == 0
    indices = high_level(output)
    starts = np.cumsum([0, 45, 30, 38])
    expected = np.full(113, -1)
    for line in annotations(output):
        episode = line["episode_id"]
        first = starts[episode] + line["frame_index"]
        expected[first : starts[episode + 1]] = line["task_index_high_level"]
    assert (indices == expected).all()


def test_nothing_but_the_output_is_written(dataset, model, tmp_path):
    output = tmp_path / "deep" / "out"
    assert annotate(dataset, model, output, "--sample-interval", "9")[0] == 0
    assert files(tmp_path) == {f"deep/out/{name}" for name in files(output)}


def test_closed_streams(dataset, model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    flags = ("--data-dir", dataset, "--output-dir", tmp_path / "out", "--dry-run")
    assert ap.main([str(flag) for flag in flags]) == 0
    assert ap.main(["--no-such-flag"]) == 2


def test_a_wait_is_shown_again_and_again(monkeypatch, capsys):
    monkeypatch.setattr(ap, "TICK_SECONDS", 0.01)
    said = ""
    with ap.saying_how_long("loading\na model"):
        while said.count("loading a model 00:0") < 5:
            said += capsys.readouterr().err
    assert capsys.readouterr().err.endswith("\n")
    with ap.saying_how_long("loading", quiet=True):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
