"""Skills in every form that LeRobot's tools write, made by these tools themselves."""

import json
import shutil
from pathlib import Path

import make_demo
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skill_datasets as sd
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata

import annotate_pgen as ap

EPISODES = [0, 1, 2]
EXPECTED = {
    index: ap.EpisodeSkills("", tuple(ap.Skill(*entry) for entry in entries))
    for index, entries in sd.SKILLS.items()
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Three recorded episodes without skills, in one data file."""
    return sd.record(tmp_path_factory.mktemp("skills") / "recorded")


@pytest.fixture
def root(recorded, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(recorded, tmp_path / "dataset"))


@pytest.fixture
def sarm():
    """LeRobot's SARM annotator, which needs more than LeRobot's `dataset` extra."""
    name = "lerobot.data_processing.sarm_annotations.subtask_annotation"
    return pytest.importorskip(name, exc_type=ImportError)


def load(root, episodes=EPISODES):
    meta = LeRobotDatasetMetadata("demo/skills", root=root)
    return ap.load_skills(meta, episodes)


def refusal(root, episodes=EPISODES):
    """The error, which is one line that says what to do."""
    with pytest.raises(ap.InputError) as caught:
        load(root, episodes)
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message
    assert str(root) in message
    return message


def change_table(path, change):
    """Rewrite a parquet file after `change(pandas.DataFrame)`."""
    change(pd.read_parquet(path)).to_parquet(path)


def episode_table(root):
    (path,) = root.glob("meta/episodes/*/*.parquet")
    return path


# ---------------------------------------------------------------- the same in all forms


def test_skills_file(root):
    source = load(sd.write_skills_file(root))
    assert source == ap.SkillSource("meta/skills.json", EXPECTED)


def test_language_rows(root):
    source = load(sd.write_language(root))
    assert source == ap.SkillSource("language_persistent (subtask rows)", EXPECTED)


def test_subtask_index(root):
    source = load(sd.write_subtask_index(root))
    assert source.name == "subtask_index with meta/subtasks.parquet"
    assert source.episodes == EXPECTED
    assert source.others == ()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_sarm_columns(kind, root, sarm):
    source = load(sd.write_sarm(root, kind=kind))
    name = f"{kind}_subtask columns of meta/episodes"
    assert source == ap.SkillSource(name, EXPECTED)


@pytest.mark.parametrize("write", [sd.write_language, sd.write_subtask_index])
def test_one_data_file_for_each_episode(write, tmp_path):
    root = sd.record(tmp_path / "dataset", file_per_episode=True)
    source = load(write(root))
    assert len(sd.data_files(root)) == 3
    assert source.episodes == EXPECTED
    assert load(root, [1]).episodes == {1: EXPECTED[1]}


def test_times_that_are_no_whole_seconds(tmp_path):
    """The forms that count frames give the decimals people would write."""
    entries = [("reach", 0.0, 1.2), ("lift", 1.2, 3.7), ("put", 3.7, 5.0)]
    skills = dict.fromkeys(EPISODES, entries)
    expected = tuple(ap.Skill(*entry) for entry in entries)
    for write in (sd.write_language, sd.write_subtask_index):
        root = sd.record(tmp_path / write.__name__, (50, 50, 50))
        source = load(write(root, skills))
        assert source.episodes[2].skills == expected


def test_the_first_form_is_taken_for_all_episodes(root, sarm):
    """No form fills in what an earlier one lacks."""
    sd.write_subtask_index(root)
    sd.write_sarm(root, kind="sparse")
    sd.write_sarm(root, kind="dense")
    # The pipeline takes subtask_index away, so the language rows are written by hand.
    sd.write_language_columns(root, sd.SKILLS, None, speech=False)
    sd.write_skills_file(root)
    names = [
        "meta/skills.json",
        "language_persistent (subtask rows)",
        "subtask_index with meta/subtasks.parquet",
        "dense_subtask columns of meta/episodes",
        "sparse_subtask columns of meta/episodes",
    ]
    source = load(root)
    assert [source.name, *source.others] == names
    sd.write_skills_file(root, {0: sd.SKILLS[0]})
    assert "meta/skills.json: no skills for episode [1, 2]" in refusal(root)
    (root / "meta" / "skills.json").unlink()
    for path in sd.data_files(root):
        sd.replace_column(path, "language_persistent", None)
    source = load(root)
    assert [source.name, *source.others] == names[2:]
    (root / "meta" / "subtasks.parquet").unlink()
    source = load(root)
    assert [source.name, *source.others] == names[3:]


def test_no_skills_at_all(root):
    message = refusal(root)
    for form in ("meta/skills.json", "language_persistent", "subtask_index"):
        assert form in message
    assert "dense_subtask" in message and "sparse_subtask" in message
    command = f"lerobot-annotate --repo_id=demo/skills --root={root}"
    flags = "--interjections.enabled=false --vqa.enabled=false"
    assert f"{command} {flags};" in message
    assert "--revision main" in message


def test_the_command_that_is_recommended_is_lerobots(root):
    config = pytest.importorskip("lerobot.annotations.steerable_pipeline.config")
    command = refusal(root).split(": lerobot-annotate ")[1].split(";")[0]
    flags = command.split()
    settings = config.AnnotationPipelineConfig()
    for flag in flags:
        value = settings
        for name in flag.removeprefix("--").split("=")[0].split("."):
            value = getattr(value, name)
    assert len(flags) == 4


@pytest.mark.parametrize("name", ["language_persistent", "subtask_index"])
def test_info_json_declares_columns_that_are_not_there(name, root):
    """As `lerobot-annotate` leaves the entry of the subtask_index that it drops."""
    sd.write_skills_file(root)
    sd.declare(root, **{name: {"dtype": "int64", "shape": [1], "names": None}})
    sd.write_subtask_names(root, {"reach": 0})
    assert load(root).others == ()


# ---------------------------------------------------------------- meta/skills.json


def test_texts_of_skills_json(root):
    skills = make_demo.skills_of(sd.LENGTHS)
    skills["skill_to_subtask_index"] = {}
    skills["episodes"]["1"]["description"] = None
    make_demo.write_skills(root, skills)
    episodes = load(root).episodes
    assert episodes[0].description == make_demo.TASK
    assert episodes[0].coarse_description == "tidy up the table"
    assert episodes[1].description == ""


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"skills": []}, "no skills for episode [1]"),
        ({"skills": None}, "no skills for episode [1]"),
        ({"skills": "reach"}, "is not a list"),
        ({"skills": ["reach"]}, 'episode "1": skill 0 lacks name, start or end'),
        ({"skills": [{"name": "a", "start": 0}]}, "lacks name, start or end"),
        ({"description": 5}, 'episode "1": description is 5'),
        ({"description": "\ud800"}, 'episode "1": description'),
    ],
)
def test_skills_json_in_the_wrong_form(change, expected, root):
    skills = make_demo.skills_of(sd.LENGTHS)
    skills["episodes"]["1"].update(change)
    make_demo.write_skills(root, skills)
    message = refusal(root)
    assert "skills.json" in message
    assert expected in message


# ---------------------------------------------------------------- language_persistent


def language_column(change, types=None):
    """Every frame's rows after `change(episode_index, rows)`."""
    column = []
    for index, length in enumerate(sd.LENGTHS):
        rows = change(index, sd.language_rows(sd.SKILLS[index]))
        column.extend([rows] * length)
    return pa.array(column, types)


def write_language_column(root, column):
    (path,) = sd.data_files(root)
    sd.replace_column(path, "language_persistent", column)
    return root


def keep(index, rows):
    return rows


def test_other_episodes_of_the_same_file_hold_empty_lists(root):
    sd.write_language(root, only_episodes=(0, 2))
    assert load(root, [0, 2]).episodes == {0: EXPECTED[0], 2: EXPECTED[2]}
    message = refusal(root)
    assert "language_persistent (subtask rows): no skills for episode [1]" in message


def test_other_files_lack_the_column(tmp_path):
    root = sd.record(tmp_path / "dataset", file_per_episode=True)
    sd.write_language(root, only_episodes=(0, 2))
    has_column = [
        "language_persistent" in pq.read_schema(path).names
        for path in sd.data_files(root)
    ]
    assert sorted(has_column) == [False, True, True]
    assert load(root, [0, 2]).episodes == {0: EXPECTED[0], 2: EXPECTED[2]}
    assert "no skills for episode [1]" in refusal(root)


def test_rows_of_other_styles_are_no_skills(root):
    def without_subtasks(index, rows):
        return [row for row in rows if row["style"] != "subtask"]

    write_language_column(root, language_column(without_subtasks))
    assert "has no skills" in refusal(root)
    write_language_column(root, pa.array([[]] * sum(sd.LENGTHS)))
    assert "has no skills" in refusal(root)


@pytest.mark.parametrize("timestamp", [pa.float32(), pa.float64()])
@pytest.mark.parametrize("calls", [pa.null(), pa.list_(pa.string()), "json"])
@pytest.mark.parametrize("make_list", [pa.list_, pa.large_list])
def test_arrow_types_that_occur(timestamp, calls, make_list, root):
    fields = {name: pa.string() for name in ("role", "content", "style")}
    fields["timestamp"] = timestamp
    fields["camera"] = pa.null()
    fields["tool_calls"] = pa.list_(pa.string()) if calls == "json" else calls
    column = language_column(keep, make_list(pa.struct(fields.items())))
    if calls == "json":
        if not hasattr(pa, "json_"):
            pytest.skip("this pyarrow has no type for JSON")
        fields["tool_calls"] = pa.list_(pa.json_())
        column = column.cast(make_list(pa.struct(fields.items())))
    assert load(write_language_column(root, column)).episodes == EXPECTED


def test_an_episode_in_several_row_groups(root):
    write_language_column(root, language_column(keep))
    (path,) = sd.data_files(root)
    table = pq.read_table(path)
    for size in (1, 7, 60, 1000):
        pq.write_table(table, path, row_group_size=size)
        assert load(root).episodes == EXPECTED


def test_rows_out_of_order_are_sorted(root):
    def backwards(index, rows):
        return rows[::-1]

    write_language_column(root, language_column(backwards))
    assert load(root).episodes == EXPECTED


def test_timestamps_are_on_the_frames_clock(root):
    """Frames that begin at 7 s, as after cutting an episode's start off."""

    def later(index, rows):
        return [{**row, "timestamp": row["timestamp"] + 7.0} for row in rows]

    (path,) = sd.data_files(root)
    timestamps = pq.read_table(path)["timestamp"].to_numpy() + np.float32(7)
    sd.replace_column(path, "timestamp", pa.array(timestamps))
    write_language_column(root, language_column(later))
    assert load(root).episodes == EXPECTED


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"content": None}, "needs a name"),
        ({"content": " "}, "needs a name"),
        ({"timestamp": None}, "lacks its timestamp"),
        ({"timestamp": float("nan")}, "finite start <= end"),
        ({"timestamp": 3.5}, "episode 1 lasts 3 s"),
    ],
)
def test_wrong_language_rows(change, expected, root):
    def damaged(index, rows):
        if index != 1:
            return rows
        return [*rows[:-1], {**rows[-1], **change}]

    message = refusal(write_language_column(root, language_column(damaged)))
    assert expected in message
    assert "language_persistent of episode 1" in message


@pytest.mark.parametrize("cell", [[], None])
def test_an_episode_without_language_rows(cell, root):
    def without(index, rows):
        return cell if index == 1 else rows

    message = refusal(write_language_column(root, language_column(without)))
    assert "no skills for episode [1]" in message


def test_language_rows_are_not_decoded_for_every_frame(root):
    """One row group of 240,000 frames with the same few lists over and over."""
    times = 2000
    (path,) = sd.data_files(root)
    frames = pq.read_table(path, columns=["episode_index", "timestamp"])
    cells = language_column(keep)
    rows = np.repeat(np.arange(len(frames)), times)
    table = frames.append_column("language_persistent", cells).take(rows)
    decoded = table["language_persistent"].nbytes
    pq.write_table(table, path, row_group_size=len(table))
    del table
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    default = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        found = [index for index, _, _ in ap.first_language_rows(path)]
    finally:
        pa.set_memory_pool(default)
    assert found == EPISODES
    assert 0 < pool.max_memory() < decoded / 10


# ---------------------------------------------------------------- subtask_index


def write_labels(root, change):
    """Rewrite subtask_index after `change(labels)`, one array for all frames."""
    (path,) = sd.data_files(root)
    labels = pq.read_table(path)["subtask_index"].to_numpy().copy()
    sd.replace_column(path, "subtask_index", change(labels))


def test_frames_without_label_belong_to_no_skill(root):
    skills = {
        0: [("reach", 1.0, 2.0), ("lift", 3.0, 5.0)],
        1: [("reach", 0.0, 1.0), ("reach", 2.0, 3.0)],
        2: [("reach", 0.0, 4.0)],
    }
    source = load(sd.write_subtask_index(root, skills))
    for index, entries in skills.items():
        expected = tuple(ap.Skill(*entry) for entry in entries)
        assert source.episodes[index].skills == expected
    counted = ap.count_irregularities(source.episodes.values(), sd.FPS)
    assert counted == ap.SkillIrregularities(late_starts=1, gaps=2)


def test_an_episode_without_labels(root):
    def unlabel(labels):
        labels[50:80] = -1
        return pa.array(labels)

    sd.write_subtask_index(root)
    write_labels(root, unlabel)
    assert "no skills for episode [1]" in refusal(root)
    write_labels(root, lambda labels: pa.array(np.full_like(labels, -1)))
    assert "has no skills" in refusal(root)


def test_a_label_without_name(root):
    def mislabel(labels):
        labels[60] = 9
        return pa.array(labels)

    sd.write_subtask_index(root)
    write_labels(root, mislabel)
    message = refusal(root)
    assert "subtask_index of episode 1: holds 9, which meta/subtasks.parquet" in message


def test_a_frame_without_label(root):
    def clear(labels):
        return pa.array(labels, mask=np.arange(len(labels)) == 60)

    sd.write_subtask_index(root)
    write_labels(root, clear)
    assert "subtask_index holds nulls" in refusal(root)


@pytest.mark.parametrize("name", [" ", "\x07", None])
def test_a_label_with_a_blank_name(name, root):
    sd.write_subtask_index(root)
    path = root / "meta" / "subtasks.parquet"
    names = pd.read_parquet(path).reset_index()
    names["subtask"] = names["subtask"].replace("lift it", name)
    names.set_index("subtask").to_parquet(path)
    assert "needs a name" in refusal(root)


def test_names_in_a_column_instead_of_pandas_index(root):
    sd.write_subtask_index(root)
    path = root / "meta" / "subtasks.parquet"
    names = pd.read_parquet(path).reset_index()
    names.to_parquet(path, index=False)
    assert load(root).episodes == EXPECTED
    names[["subtask"]].to_parquet(path)
    assert "lacks the column subtask_index" in refusal(root)


# ---------------------------------------------------------------- SARM


def test_a_sparse_task_is_a_placeholder(root, sarm):
    placeholder = {index: [("task", 0.0, 3.0)] for index in EPISODES}
    sd.write_sarm(root, placeholder, kind="sparse")
    assert "has no skills" in refusal(root)
    sd.write_sarm(root, kind="dense")
    source = load(root)
    assert source.episodes == EXPECTED
    assert source.others == ()


def test_an_episode_that_sarm_has_not_annotated(root, sarm):
    sd.write_sarm(root, {0: sd.SKILLS[0], 2: sd.SKILLS[2]})
    assert "no skills for episode [1]" in refusal(root)
    assert load(root, [2, 0]).episodes == {0: EXPECTED[0], 2: EXPECTED[2]}


@pytest.mark.parametrize(
    "column, value, expected",
    [
        ("names", [], "no skills for episode [1]"),
        ("names", ["reach", None], "needs a name"),
        ("names", ["reach", ""], "needs a name"),
        ("start_times", [0], "2 names, 1 starts and 2 ends"),
        ("end_times", None, "2 names, 2 starts and 0 ends"),
        ("start_times", [0, None], "finite start <= end"),
        ("end_times", [1, 0], "finite start <= end"),
        ("start_times", [0, 3], "episode 1 lasts 3 s"),
    ],
)
def test_wrong_sarm_columns(column, value, expected, root, sarm):
    def damage(table):
        table.at[1, f"dense_subtask_{column}"] = value
        return table

    sd.write_sarm(root)
    change_table(episode_table(root), damage)
    assert expected in refusal(root)


def test_annotations_in_rows_without_episode(root, sarm):
    """LeRobot appends such rows where meta/episodes has several files (pandas 3)."""

    def append(table):
        row = dict.fromkeys(table.columns)
        row["dense_subtask_names"] = ["reach"]
        row["dense_subtask_start_times"] = [0]
        row["dense_subtask_end_times"] = [1]
        return pd.concat([table, pd.DataFrame([row])], ignore_index=True)

    sd.write_sarm(root)
    change_table(episode_table(root), append)
    assert "in a row without episode_index" in refusal(root)
    meta = LeRobotDatasetMetadata("demo/skills", root=root)
    assert ap.read_episode_table(meta).index.tolist() == EPISODES
    # Another form is read all the same.
    assert load(sd.write_skills_file(root)).episodes == EXPECTED


# ---------------------------------------------------------------- wrong times


def scaled(change):
    """The skills after `change(episode_index, seconds)` of every time."""
    return {
        index: [
            (name, change(index, start), change(index, end))
            for name, start, end in entries
        ]
        for index, entries in sd.SKILLS.items()
    }


def test_frames_instead_of_seconds(root):
    frames = scaled(lambda index, seconds: seconds * sd.FPS)
    message = refusal(sd.write_skills_file(root, frames))
    assert "episode \"0\": 'lift it' runs from 20 to 40 s" in message
    assert "episode 0 lasts 5 s, as in 2 more episodes; " in message
    assert "frames, not seconds; divide them by 10 fps" in message


def test_times_from_the_datasets_start(root):
    before = {0: 0.0, 1: 5.0, 2: 8.0}
    absolute = scaled(lambda index, seconds: seconds + before[index])
    message = refusal(sd.write_skills_file(root, absolute))
    assert "episode \"1\": 'reach the brick' runs from 5 to 6 s" in message
    assert "episode 1 lasts 3 s" in message
    assert "subtract the 5 s of the episodes before it" in message
    # Episodes that are not asked for count, too.
    message = refusal(root, [2])
    assert "subtract the 8 s of the episodes before it" in message


@pytest.mark.parametrize(
    "start, allowed", [(2.9, True), (2.985, True), (2.995, False), (3.0, False)]
)
def test_the_last_moment_at_which_a_skill_may_start(start, allowed, root):
    """A tenth of a frame before the end at 3 s counts as the end."""
    skills = {**sd.SKILLS, 1: [("reach", 0.0, start), ("lift", start, 60.0)]}
    sd.write_skills_file(root, skills)
    if allowed:
        assert load(root).episodes[1].skills[1].start == start
    else:
        assert "episode 1 lasts 3 s; correct them" in refusal(root)


# ---------------------------------------------------------------- data files


def test_damaged_files(root):
    sd.write_subtask_index(root)
    (path,) = sd.data_files(root)
    for damaged in (path, root / "meta" / "subtasks.parquet"):
        whole = damaged.read_bytes()
        meta = LeRobotDatasetMetadata("demo/skills", root=root)
        damaged.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ap.InputError, match=f"{damaged}: cannot be read: .*; rest"):
            ap.load_skills(meta, EPISODES)
        damaged.write_bytes(whole)


def test_columns_that_may_be_decoded_whole(root):
    sd.write_language(root, speech=False)
    (path,) = sd.data_files(root)
    names = ap.list_flat_columns(pq.read_schema(path))
    assert names == [
        "observation.state",
        "action",
        "timestamp",
        "frame_index",
        "episode_index",
        "index",
        "task_index",
    ]


@pytest.mark.parametrize(
    "values, placeholder",
    [
        (pa.array([-1] * 120), True),
        (pa.array([-1.0] * 120), True),
        (pa.array([-1] * 119 + [0]), False),
        (pa.array([-1] * 119 + [None]), False),
        (pa.array(["-1"] * 120), False),
    ],
)
def test_a_placeholder_is_no_annotation(values, placeholder, root):
    (path,) = sd.data_files(root)
    sd.replace_column(path, "task_index_high_level", values)
    assert ap.holds_placeholder(path) == placeholder


@pytest.mark.parametrize("size", [1, 50, 1000])
def test_row_groups_are_read_as_they_are(size, root):
    sd.write_language(root)
    (path,) = sd.data_files(root)
    pq.write_table(pq.read_table(path), path, row_group_size=size)
    with pq.ParquetFile(path) as parquet:
        for group in range(parquet.num_row_groups):
            table = ap.read_whole_row_group(parquet, group)
            assert table.schema.equals(parquet.schema_arrow)
            assert table.equals(parquet.read_row_group(group))


# ---------------------------------------------------------------- training


def test_default_collation_fails_on_language_and_this_does_not(root):
    torch = pytest.importorskip("torch")
    sd.write_language(root)
    if not sd.HAS_PIPELINE:
        with pytest.raises(ValueError, match="language"):
            LeRobotDataset("demo/skills", root=root)
        return
    dataset = LeRobotDataset("demo/skills", root=root)
    with pytest.raises((TypeError, RuntimeError)):
        next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, collate_fn=collate)
    batch = next(iter(loader))
    assert batch["observation.state"].shape == (4, 2)
    assert not any(key.startswith("language_") for key in batch)


def collate(frames):
    """A batch without LeRobot's language columns, whose lists differ in length."""
    import torch

    batch = []
    for frame in frames:
        names = [name for name in frame if not name.startswith("language_")]
        batch.append({name: frame[name] for name in names})
    return torch.utils.data.default_collate(batch)


def test_tools_in_info_json_are_there_to_be_kept(root):
    sd.write_language(root)
    info = json.loads((root / "meta" / "info.json").read_text(encoding="utf-8"))
    assert info["tools"][0]["function"]["name"] == "say"
    assert info["codebase_version"] == "v3.0"


# ---------------------------------------------------------------- plans


def plan_of(root):
    return ap.make_plan(LeRobotDatasetMetadata("demo/skills", root=root))


def test_the_same_skills_in_all_forms_give_the_same_plan(recorded, tmp_path, sarm):
    plans = []
    for write in (
        sd.write_skills_file,
        sd.write_language,
        sd.write_subtask_index,
        sd.write_sarm,
    ):
        root = Path(shutil.copytree(recorded, tmp_path / write.__name__))
        plans.append(plan_of(write(root)))
    assert len({plan.skill_source.name for plan in plans}) == 4
    assert len({repr(plan.samples).encode() for plan in plans}) == 1
    assert len(plans[0].samples) == 12


@pytest.mark.parametrize("file_per_episode", [False, True])
def test_chosen_episodes_only(file_per_episode, tmp_path, built):
    """LeRobotDataset(episodes=[...]) means those, in plan and results."""
    root = sd.record(tmp_path / "dataset", file_per_episode=file_per_episode)
    sd.write_skills_file(root)
    dataset = LeRobotDataset("demo/skills", root=root, episodes=[0, 2])
    plan = ap.make_plan(dataset)
    whole = plan_of(root)
    assert [episode.episode_index for episode in plan.episodes] == [0, 2]
    chosen = [sample for sample in whole.samples if sample.episode_id != 1]
    assert [(s.index, s.skill_current) for s in plan.samples] == [
        (s.index, s.skill_current) for s in chosen
    ]
    model = built("model", make_demo.make_model)
    pgen = ap.QwenPgen(str(model), "cpu", "float32")
    tasks, indices, lines = ap.generate_synthetic_data(dataset, pgen, plan)
    assert len(indices) == len(dataset)
    assert {line["episode_id"] for line in lines} == {0, 2}
    rows = [line["task_index_high_level"] for line in lines]
    assert sorted(set(indices.tolist())) == sorted(set(rows))
    assert len(tasks) == len(set(rows))
