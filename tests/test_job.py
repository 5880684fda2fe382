"""The whole job through the command line, judged by reading the result back."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import checks
import make_demo
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checks import COLUMN, annotations, check, content, record, samples_of
from conftest import HOME, annotate, run
from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from processes import assert_kept, journal_lines

import annotate_pgen as ap

pytestmark = pytest.mark.usefixtures("short_prompt", "many_tries")

CPU = ("--device", "cpu", "--dtype", "float32")
FEW = ("--sample-interval", 2)
DATA = "data/chunk-000/file-000.parquet"


def change_json(path, **changes):
    """Change keys of a JSON file."""
    path.write_text(json.dumps(checks.read_json(path) | changes))


@pytest.fixture(scope="module")
def many_tries():
    """No sample fails, although the model of the demo knows few sentences."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ap, "MAX_TRIES", 12)
        yield


@pytest.fixture(scope="module")
def finished(short_prompt, many_tries, dataset, model, tmp_path_factory):
    """The demo, annotated: its folder, and what the run said on stdout and stderr."""
    output = tmp_path_factory.mktemp("finished") / "out"
    before = content(dataset)
    code, out, err = annotate(dataset, model, output)
    assert code == 0, err
    assert content(dataset) == before, "the source is never written"
    assert list(output.parent.iterdir()) == [output]
    return output, out, err


def finish(source, model, output, *flags):
    """Annotate, check the result, and return its lines of annotations."""
    code, _, err = annotate(source, model, output, *flags)
    assert code == 0, err
    return check(source, output)


def test_demo(finished, dataset, model):
    output, out, err = finished
    lines = check(dataset, output)
    assert samples_of(output) == checks.expected_samples(dataset)
    assert len(lines) == 12
    names = [name for name, _, _ in make_demo.PICK_AND_PLACE]
    assert [line["skill_current"] for line in lines[:3]] == [*names[:1], *names[:2]]
    assert {line["task_description"] for line in lines} == {make_demo.TASK}
    assert "12/12" in err
    assert "12/12" not in out
    assert "error" not in err
    made = record(output)
    assert (made["source"], made["source_card"]) == (None, "")
    summary = dict(made["summary"])
    # Frames 12 to 19 and 26 to 29 of each episode carry the skill before theirs.
    assert summary["frames with another skill's dialogue"] == f"{36 / 113:.1%}"
    for name, value in summary.items():
        assert f"{name:38} {value}" in out
    settings = {"engine": "transformers", "temperature": 0.7, "seed": 0}
    settings |= {"sample_interval": 1.0, "align_skills": False}
    assert settings.items() <= made["settings"].items()
    assert made["settings"]["model"].startswith(f"{model.name} (")
    assert str(model.parent) not in json.dumps(made)


def test_printed_code_reads_it_back(finished, capsys):
    output, out, _ = finished
    printed = out[out.index("from lerobot") :].partition("\n\nlook at")[0]
    with pd.option_context("display.max_colwidth", None):
        exec(printed, {})
    assert annotations(output)[0]["user_prompt"] in capsys.readouterr().out


def test_accessing_the_data_as_the_specification_prints_it(built, model, tmp_path):
    cameras = {"observation.images.front": "image"}
    source = built("images", make_demo.make_dataset, (25, 12), cameras=cameras)
    assert annotate(source, model, tmp_path / "out", *FEW)[0] == 0
    name = "lerobot/svla_so101_pickplace_with_high_level_tasks"
    dataset = LeRobotDataset(repo_id=name, root=tmp_path / "out")
    frame = dataset[24]
    high_level_task_idx = frame["task_index_high_level"].item()
    tasks_df = pd.read_parquet(dataset.root / "meta" / "tasks_high_level.parquet")
    task_info = tasks_df.iloc[high_level_task_idx]
    assert task_info["user_prompt"] in make_demo.USER_PROMPTS
    assert task_info["robot_utterance"] in make_demo.ROBOT_UTTERANCES
    assert task_info["skill"] == make_demo.PICK_AND_PLACE[1][0]


def test_public_functions_as_in_a_notebook(dataset, model):
    source = LeRobotDataset(
        "demo/bricks", root=dataset, episodes=[0, 2], video_backend="pyav"
    )
    pgen = ap.QwenPgen(str(model), "cpu", "float32")
    plan = ap.make_plan(source, sample_interval=2.0)
    tasks, indices, lines = ap.generate_synthetic_data(source, pgen, plan)
    assert [line["episode_id"] for line in lines] == [0, 0, 0, 2, 2]
    assert len(indices) == 45 + 38
    assert indices.max() == len(tasks) - 1
    known = {}
    for sample, line in zip(plan.samples, lines, strict=True):
        known[sample.index] = say(line["user_prompt"], line["robot_utterance"])
    # Nothing is generated that is there.
    _, again, _ = ap.generate_synthetic_data(source, None, plan, dialogues=known)
    assert (again == indices).all()
    images = next(ap.read_views(plan, plan.samples))
    line = ap.annotate_sample(pgen, images, plan.samples[0])
    assert list(line) == list(lines[0])[:-1]
    prompt = ap.construct_prompt("tidy up", [], "pick the brick")
    assert pgen.call_qwen(images, prompt).keys() == {"user_prompt", "robot_utterance"}


@pytest.mark.parametrize("fps, interval", [(25, 0.5), (30, 0.7)])
def test_every_frame_carries_its_last_sample(fps, interval, built, model, tmp_path):
    arguments = ((40, 33), fps, {"image": "video"})
    source = built(f"{fps}fps", make_demo.make_dataset, *arguments)
    lines = finish(source, model, tmp_path / "out", "--sample-interval", interval)
    assert samples_of(tmp_path / "out") == checks.expected_samples(source, interval)
    expected = np.full(73, -1)
    for line in lines:
        first, end = ((0, 40), (40, 73))[line["episode_id"]]
        expected[first + line["frame_index"] : end] = line[COLUMN]
    assert (checks.high_level(tmp_path / "out") == expected).all()


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
    for name in ("meta/modality.json", "meta/notes/mine.txt", "README.md"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("# mine")
    tool = {"type": "function", "function": {"name": "say"}}
    change_json(root / "meta/info.json", tools=[tool])


def test_a_file_for_each_episode_two_tasks_and_links(built, model, tmp_path):
    """Every file is a link to a blob elsewhere, as in the Hub's cache."""
    many_files = built("many_files", draw_many_files)
    assert len(list(many_files.glob("data/*/*.parquet"))) == 5
    assert len(list(many_files.glob("videos/*/*/*.mp4"))) == 10
    source = tmp_path / "source"
    for number, (name, data) in enumerate(content(many_files).items()):
        (tmp_path / str(number)).write_bytes(data)
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).symlink_to(tmp_path / str(number))
    for name in (".cache/huggingface/state", ".git/config"):
        (source / name).parent.mkdir(parents=True)
        (source / name).write_text("private")
    before = content(source)
    flags = ("--num-image-views-per-sample", 2)
    code, _, err = annotate(source, model, tmp_path / "out", *flags)
    assert code == 0, err
    assert content(source) == before
    lines = check(many_files, tmp_path / "out")
    assert record(tmp_path / "out")["source_card"] == "# mine"
    described = {line["episode_id"]: line["task_description"] for line in lines}
    # The frames' own task, without a description and with a blank one.
    tasks = ("stack the bricks", "sort the bricks")
    assert described == {episode: tasks[episode % 2] for episode in range(5)}


def written_by_pandas(path):
    """As tools write it that know nothing of `datasets`."""
    codecs = {"action.list.element": "gzip", "index": "zstd", "timestamp": "none"}
    dictionaries = ["index", "task_index"]
    table = pa.Table.from_pandas(pd.read_parquet(path))
    pq.write_table(table, path, 7, compression=codecs, use_dictionary=dictionaries)
    assert b"huggingface" not in pq.read_schema(path).metadata


def with_placeholder(path):
    """LeRobot's older tool of annotation fills the column with -1."""
    frames = pd.read_parquet(path).assign(**{COLUMN: np.int64(-1)})
    frames.to_parquet(path)
    info = path.parents[2] / "meta" / "info.json"
    feature = {"dtype": "int64", "shape": [1], "names": None}
    features = checks.read_json(info)["features"] | {COLUMN: feature}
    change_json(info, features=features)


def with_language(path):
    """LeRobot 0.6 keeps what is said and done in lists of rows, on every frame."""
    language = pytest.importorskip("lerobot.datasets.language")
    table = pq.read_table(path)
    rows = []
    for name, start, _ in make_demo.PICK_AND_PLACE:
        row = {"role": "assistant", "content": name, "style": "subtask"}
        rows.append(row | {"timestamp": start, "camera": None, "tool_calls": None})
    said = {"role": "assistant", "content": None, "style": None, "camera": None}
    said["tool_calls"] = [{"name": "say"}]
    events = [[said] if frame % 9 == 0 else [] for frame in range(len(table))]
    table = table.append_column("language_persistent", pa.array([rows] * len(table)))
    table = table.append_column("language_events", pa.array(events))
    pq.write_table(table.replace_schema_metadata(None), path, row_group_size=50)
    info = path.parents[2] / "meta" / "info.json"
    features = checks.read_json(info)["features"] | language.language_feature_info()
    change_json(info, features=features)


@pytest.mark.parametrize("change", [written_by_pandas, with_placeholder, with_language])
def test_other_data_files(change, own_dataset, model, tmp_path):
    change(own_dataset / DATA)
    finish(own_dataset, model, tmp_path / "out", *FEW)


def test_images_of_which_some_cannot_be_decoded(built, model, tmp_path):
    cameras = {"image": "image", "wrist_image": "image"}
    drawn = built("two_images", make_demo.make_dataset, (14, 9), cameras=cameras)
    source = Path(shutil.copytree(drawn, tmp_path / "source"))
    path = source / DATA
    table = pq.read_table(path)
    cells = table["image"].to_pylist()
    broken = {(0, 2): 2, (0, 6): 6, (1, 2): 16}
    for row in broken.values():
        cells[row] = {"bytes": b"no picture", "path": None}
    field = table.schema.field("image")
    place = table.schema.get_field_index("image")
    table = table.set_column(place, field, pa.array(cells, field.type))
    pq.write_table(table, path)
    output = tmp_path / "out"
    flags = ("--camera-keys", "wrist_image", "image", "--sample-interval", "0.2")
    code, _, err = annotate(source, model, output, *flags)
    assert code == 0, err
    check(source, output, sampled=False)
    assert record(output)["settings"]["camera_keys"] == ["wrist_image", "image"]
    expected = set(checks.expected_samples(source, 0.2)) - broken.keys()
    assert set(samples_of(output)) == expected
    indices = checks.high_level(output)
    for (episode, frame), row in broken.items():
        assert f"episode {episode}, frame {frame}" in err
        assert indices[row] == indices[row - 2], "that of the nearest earlier sample"


# Shorter than the interval, a gap, and a start between two frames.
AWKWARD = (("reach", 0.0, 0.3), ("grasp", 0.3, 0.55), ("carry", 2.04, 3.0))


@pytest.mark.parametrize("skills", [make_demo.PICK_AND_PLACE, AWKWARD])
def test_align_skills(skills, own_dataset, model, tmp_path):
    make_demo.write_skills(
        own_dataset, make_demo.skills_of((45, 30, 38), skills=skills)
    )
    output = tmp_path / "out"
    lines = finish(own_dataset, model, output, "--align-skills")
    aligned = checks.expected_samples(own_dataset, align_skills=True)
    assert samples_of(output) == aligned
    assert aligned != checks.expected_samples(own_dataset)
    summary = dict(record(output)["summary"])
    assert summary["frames with another skill's dialogue"] == "0.0%"
    covered = {(line["episode_id"], line["skill_current"]) for line in lines}
    names = [name for name, _, _ in skills]
    assert covered == {(episode, name) for episode in range(3) for name in names}


def test_a_fifth_of_the_answers_is_bad(built, dataset, tmp_path, monkeypatch):
    """What is left is verified: the blind model takes some skill or other."""
    monkeypatch.setattr(ap, "MAX_TRIES", 4)
    bad = built("bad_fifth", make_demo.make_model, failure_rate=0.2)
    output = tmp_path / "out"
    code, out, err = annotate(dataset, bad, output, "--verify")
    assert code == 0, err
    missing = set(checks.expected_samples(dataset)) - set(samples_of(output))
    lines = check(dataset, output, sampled=not missing)
    for episode, frame in missing:
        assert f"episode {episode}, frame {frame}" in err
    assert f"{'failed':38} {len(missing)}\n" in out
    assert f"{'asked again':38} 0\n" not in out
    share = sum(line["skill_recovered"] for line in lines) / len(lines)
    summary = dict(record(output)["summary"])
    assert summary["skill recovered"] == f"{share:.1%} of {len(lines)}"
    assert "--verify means little here" in out


@pytest.mark.parametrize("flags, sent", [((), None), (("--seed", "0"), 0)])
def test_a_seed_is_sent_to_servers_if_one_is_given(flags, sent):
    assert ap.parse_args(["--repo-id", "a/b", *flags]).seed == sent


def test_default_output_and_names(dataset, model):
    """The local copy that LeRobot has made of a dataset on the Hub is used."""
    copy = Path(shutil.copytree(dataset, HOME / "lerobot" / "me" / "cached"))
    output = copy.with_name("cached_with_high_level_tasks")
    code, _, err = run("--model", model, *CPU, "--repo-id", "me/cached", *FEW)
    assert code == 0, err
    check(dataset, output)
    assert "# me/cached_with_high_level_tasks" in (output / "README.md").read_text()
    assert record(output)["source"] == "me/cached"
    assert content(copy) == content(dataset)
    shutil.rmtree(copy.parent)


def test_dry_run(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(ap, "QwenPgen", None)
    before = content(dataset)
    flags = ("--num-image-views-per-sample", 2, "--dry-run")
    code, out, err = annotate(dataset, "no/model", tmp_path / "out", *flags)
    assert code == 0, err
    assert "observation.images.front, observation.images.wrist" in out
    dealt = re.search("scenario types +(.*)", out)[1]
    for name in re.findall("[a-z_]+", dealt):
        assert ap.SCENARIO_TYPES[name] in out, "a prompt for each scenario type"
    assert f"{'samples':38} 12\n" in out
    assert f"{36 / 113:.1%}" in out
    assert "--align-skills" in out.splitlines()[-1], "the advice"
    assert not list(tmp_path.iterdir())
    assert content(dataset) == before


def test_a_preview_is_taken_over(dataset, model, tmp_path):
    output = tmp_path / "out"
    code, out, err = annotate(dataset, model, output, "--preview", 3)
    assert code == 0, err
    assert not output.exists()
    kept = journal_lines(output)
    assert len(kept) == 3
    page = (tmp_path / "out.preview.html").read_text(encoding="utf-8")
    for entry in map(json.loads, kept):
        assert entry["robot_utterance"] in out
        assert entry["robot_utterance"].replace("'", "&#39;") in page
    finish(dataset, model, output)
    assert_kept(kept, output)


def test_finished_already(finished, dataset, model, tmp_path, monkeypatch):
    output = Path(shutil.copytree(finished[0], tmp_path / "out"))
    before = content(output)
    with monkeypatch.context() as patch:
        patch.setattr(ap, "QwenPgen", None)
        code, out, err = annotate(dataset, model, output, "--batch-size", 3)
        assert code == 0, err
        assert "finished already" in out
        code, out, err = annotate(dataset, model, output, "--seed", 1)
        assert (code, out) == (2, "")
        assert "seed = 0" in err.splitlines()[-1]
        assert "--overwrite" in err.splitlines()[-1]
        assert content(output) == before
    with (output / ap.RECORD).open() as file:
        finish(dataset, model, output, "--seed", 1, *FEW, "--overwrite")
        # The old one is gone, also from under its other names.
        assert os.fstat(file.fileno()).st_nlink == 0
    assert not Path(f"{output}.partial").exists()


def test_our_own_files_are_synced_and_no_others(dataset, model, tmp_path, monkeypatch):
    fsync = os.fsync
    synced = set()

    def fsync_and_note(descriptor):
        synced.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_and_note)
    monkeypatch.setattr(os, "sync", None)
    output = tmp_path / "out"
    code, _, err = annotate(dataset, model, output, *FEW)
    assert code == 0, err
    fresh = f"{output}.partial/dataset/"
    assert {f"{fresh}{name}" for name in checks.files(output)} <= synced
    assert all(name.startswith(f"{tmp_path}/") for name in synced)


def test_our_own_bugs_are_not_blamed_on_the_disk(dataset, model, tmp_path, monkeypatch):
    def fail(*args):
        raise IndexError("list index out of range")

    monkeypatch.setattr(ap, "describe_column", fail)
    code, out, err = annotate(dataset, model, tmp_path / "out", *FEW)
    assert (code, out) == (1, "")
    assert "Traceback" in err
    assert "IndexError; this is a bug" in err.splitlines()[-1]


EPISODES = st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=5)
TEXTS = st.sampled_from(["Take it.", "Lift it.", "Put it down."])


def draw_plan(*episodes, span=1):
    """A plan of episodes, given as a letter for the skill of each sample.

    A capital is the same skill in another task. `span` frames carry each sample.
    """
    plans = []
    first_index = 0
    for episode, letters in enumerate(episodes):
        samples = []
        for number, letter in enumerate(letters):
            index = first_index + number * span
            times = (number * span, float(number))
            told = (letter.lower(), (), "clear up" if letter.isupper() else "tidy up")
            sample = ap.Sample(episode, *times, *told, index=index)
            dealt = {"scenario_type": "negative_task", "response_type": "confirmation"}
            samples.append(replace(sample, **dealt))
        numbers = np.arange(len(letters), dtype=np.int32).repeat(span)
        plans.append(
            ap.EpisodePlan(episode, first_index, tuple(letters), numbers, samples)
        )
        first_index += len(numbers)
    return ap.Plan(plans, ["camera"], None, ap.SkillSource("meta/skills.json", {}))


def say(user_prompt="Take it.", robot_utterance="Okay.", **more):
    """A dialogue."""
    return {"user_prompt": user_prompt, "robot_utterance": robot_utterance, **more}


@pytest.mark.parametrize(
    "episodes, answered, carried",
    [
        (["aab", "b"], [0, 1, 2, 3], [0, 1, 2, 3]),
        # The nearest earlier one of the same skill.
        (["abbab"], [0, 1, 3], [0, 1, 1, 3, 1]),
        (["aba"], [0, 1], [0, 1, 0]),
        # Else the nearest earlier one of another, else the nearest later one.
        (["abcc"], [0, 1], [0, 1, 1, 1]),
        (["abbab"], [3, 4], [3, 3, 3, 3, 4]),
        # An episode that failed borrows from others, and goes on as any.
        (["ab", "ab", "ab", "c"], [0, 1, 4, 5, 6], [0, 1, 0, 5, 4, 5, 6]),
        (["ab", "ab", "c"], [1, 4], [1, 1, 1, 1, 4]),
        (["Aa", "ab", "AB"], [0, 1, 3], [0, 1, 3, 3, 0, 3]),
        # What is borrowed is spread over what there is.
        (["aaa", "aaaaaa"], [0, 1, 2], [0, 1, 2] * 3),
    ],
)
def test_who_carries_whose_dialogue(episodes, answered, carried):
    dialogues = {index: say() for index in answered}
    lenders = ap.assign_dialogues(draw_plan(*episodes), dialogues)
    assert {index: lender.index for index, lender in lenders.items()} == dict(
        enumerate(carried)
    )


@given(episodes=EPISODES, span=st.integers(1, 3), data=st.data())
@settings(deadline=None, max_examples=60)
def test_every_frame_points_at_the_row_of_what_it_carries(episodes, span, data):
    plan = draw_plan(*episodes, span=span)
    dialogues = {}
    for sample in plan.samples:
        if data.draw(st.booleans()):
            dialogues[sample.index] = say(data.draw(TEXTS), data.draw(TEXTS))
    answered = [sample for sample in plan.samples if sample.index in dialogues]
    skills = {sample.skill_current for sample in answered}
    if not all(skills & set(letters) for letters in episodes):
        with pytest.raises(ap.RunError):
            ap.build_results(plan, dialogues)
        return
    results = ap.build_results(plan, dialogues)
    tasks = results.tasks
    assert not tasks.drop(columns="task_index").duplicated().any()
    assert results.task_indices.dtype == np.int64
    assert len(results.task_indices) == plan.frame_count
    # A line for each dialogue, in dataset order; rows are counted as they first occur.
    rows = [line[COLUMN] for line in results.annotations]
    assert list(dict.fromkeys(rows)) == tasks["task_index"].tolist()
    for line, sample in zip(results.annotations, answered, strict=True):
        assert line["frame_index"] == sample.frame_index
        assert results.task_indices[sample.index] == line[COLUMN]
    lenders = ap.assign_dialogues(plan, dialogues)
    late = 0
    for sample in plan.samples:
        lender = lenders[sample.index]
        late += span * (lender.skill_current != sample.skill_current)
        for frame in range(sample.index, sample.index + span):
            row = tasks.loc[results.task_indices[frame]]
            assert row["skill"] == lender.skill_current
            spoken = say(row["user_prompt"], row["robot_utterance"])
            assert spoken == dialogues[lender.index]
    share = f"{late / plan.frame_count:.1%}"
    summary = dict(results.summary)
    assert summary["frames with another skill's dialogue"] == share


def test_figures_of_the_summary():
    dialogues = {
        0: say("Take it.", "Okay.", skill_recovered=True),
        1: say("Take it.", "Okay.", skill_recovered=True),
        2: say("Take it.", "Just to confirm, this one. Right?", skill_recovered=False),
        3: say("Lift it.", "好的。对吗\uff1f"),
    }
    summary = ap.build_results(draw_plan("aaab"), dialogues).summary
    assert [value for _, value in summary] == [
        *("4", "4", "0.0%", "2 of 4"),
        *("negative_task 4", "confirmation 4", "66.7% of 3"),
    ]
