"""Datasets as people's tools write them: what is found in them, and what is refused."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_datasets as sd
from conftest import run
from lerobot.datasets.dataset_tools import delete_episodes
from lerobot.datasets.lerobot_dataset import LeRobotDataset

import annotate_pgen as ap
from annotate_pgen import EpisodeSkills, InputError, Skill, SkillSource

SKILLS_FILE = "meta/skills.json"
LANGUAGE = "language_persistent (subtask rows)"
SUBTASKS = "subtask_index with meta/subtasks.parquet"
DENSE = "dense_subtask columns of meta/episodes"
DEPTH = "observation.images.depth"
SPARSE = "sparse_subtask columns of meta/episodes"
WRITERS = {
    SKILLS_FILE: sd.write_skills_file,
    LANGUAGE: sd.write_language,
    SUBTASKS: sd.write_subtask_index,
    DENSE: sd.write_sarm,
    SPARSE: lambda root, skills=sd.SKILLS: sd.write_sarm(root, skills, "sparse"),
}


@pytest.fixture
def root(tmp_path):
    """Three episodes of 5, 3 and 4 s without skills, in one data file."""
    return sd.make(tmp_path / "dataset")


def load(root, task_as_skill=False):
    """The skills of all episodes."""
    return ap.load_skills(ap.read_source(ap.open_dataset(root)), task_as_skill)


def as_skills(entries):
    """What is read of names and starts."""
    return EpisodeSkills(tuple(Skill(*entry) for entry in entries))


EXPECTED = {episode: as_skills(entries) for episode, entries in sd.SKILLS.items()}


def check_images(plan):
    """Check that each sample shows its own frame."""
    views = ap.read_views(plan, plan.samples)
    for sample, (image,) in zip(plan.samples, views, strict=True):
        assert sd.read_colour(image) == (sample.episode_id, sample.frame_index, 0)


def refusal(root, **settings):
    """The error, which is one line that says where and what to do."""
    with pytest.raises(InputError) as caught:
        ap.make_plan(ap.open_dataset(root), **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message
    assert str(root) in message
    return message


def dry_run(root, *flags):
    """The exit code of the command line, and all that it says."""
    code, *said = run("--data-dir", root, "--dry-run", *flags)
    return code, "".join(said)


# ---------------------------------------------------------------- the forms


@pytest.mark.parametrize("files", [(0, 0, 0), (0, 1, 2)], ids=["one file", "three"])
@pytest.mark.parametrize("form", WRITERS)
def test_the_same_skills_in_each_form(form, files, tmp_path):
    root = sd.make(tmp_path / "dataset", files=files)
    assert load(WRITERS[form](root)) == SkillSource(form, EXPECTED)
    assert len(sd.data_files(root)) == len(set(files))


@pytest.mark.parametrize("form", [SKILLS_FILE, LANGUAGE, SUBTASKS])
def test_a_name_twice_in_a_row_is_one_skill(form, root):
    """The forms that count frames give the decimals that people would write."""
    twice = [("reach", 0.0), ("reach", 0.9), ("lift", 1.2), ("reach", 2.7)]
    once = as_skills([("reach", 0.0), ("lift", 1.2), ("reach", 2.7)])
    WRITERS[form](root, {0: twice, 1: twice, 2: twice})
    assert load(root).episodes == {0: once, 1: once, 2: once}


@pytest.mark.parametrize("episodes", [{}, {0: sd.SKILLS[0]}], ids=["none", "one"])
@pytest.mark.parametrize("other, whole", [(SKILLS_FILE, SUBTASKS), (DENSE, SPARSE)])
def test_a_form_that_lacks_episodes_hides_no_complete_one(other, whole, episodes, root):
    WRITERS[whole](root)
    WRITERS[other](root, episodes)
    assert load(root) == SkillSource(whole, EXPECTED)


def test_the_first_complete_form_is_read(root):
    sd.write_subtask_index(root)
    # LeRobot's writer takes subtask_index away.
    sd.write_language_columns(sd.write_skills_file(sd.write_sarm(root)))
    assert load(root).name == SKILLS_FILE
    (root / SKILLS_FILE).unlink()
    assert load(root).name == LANGUAGE
    sd.add_column(*sd.data_files(root), "language_persistent", [[]] * 120)
    assert load(root).name == SUBTASKS
    (root / "meta" / "subtasks.parquet").unlink()
    assert load(root).name == DENSE


def test_sparse_skills_are_coarser_and_contradict_no_others(root):
    sd.write_sarm(root, {x: [("tidy up", 0.0)] for x in sd.SKILLS}, "sparse")
    assert load(sd.write_skills_file(root)) == SkillSource(SKILLS_FILE, EXPECTED)


@pytest.mark.parametrize("form", [LANGUAGE, SUBTASKS])
@pytest.mark.parametrize(
    "corrected, first_difference",
    [
        ([("reach the brick", 0.0), ("drop it", 1.0)], "has 'drop it' at 1 s"),
        ([("reach the brick", 0.0), ("lift it", 1.2)], "has 'lift it' at 1.2 s"),
        ([("reach the brick", 0.0)], ""),
        ([*sd.SKILLS[1], ("put it down", 2.0)], "has 'put it down' at 2 s"),
    ],
)
def test_forms_that_contradict_each_other(corrected, first_difference, form, root):
    """LeRobot's annotation tool copies an old skills.json beside its corrections."""
    WRITERS[form](root, {**sd.SKILLS, 1: corrected})
    sd.write_skills_file(root)
    message = refusal(root)
    assert f"in episode 1 {SKILLS_FILE}, which would be read" in message
    assert f"{form} {first_difference}" in message
    assert "remove the one that is out of date" in message
    (root / SKILLS_FILE).unlink()
    assert load(root).episodes[1] == as_skills(corrected)


def test_forms_that_differ_by_a_frame_agree(root):
    later = [(name, start + 0.1 * (start > 0)) for name, start in sd.SKILLS[2]]
    sd.write_skills_file(sd.write_subtask_index(root, {**sd.SKILLS, 2: later}))
    assert load(root) == SkillSource(SKILLS_FILE, EXPECTED)


# ---------------------------------------------------------------- missing skills


def test_a_partly_annotated_dataset(tmp_path):
    root = sd.make(tmp_path / "dataset", lengths=[10] * 30)
    sd.write_skills_file(root, {12: [("reach", 0.0)]})
    message = refusal(root)
    assert "no skills for 29 of 30 episodes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in message
    assert "27, 28" not in message
    assert f"{SKILLS_FILE}: 1 episodes; {LANGUAGE}: 0 episodes" in message
    assert "--task-as-skill" in message


@pytest.mark.parametrize("form", WRITERS)
def test_task_as_skill(form, tmp_path):
    """An episode without skills counts as one skill, its task."""
    root = sd.make(tmp_path / "dataset", files=(0, 1, 2))
    if form == LANGUAGE:
        # The file of the other episode then lacks the column.
        sd.write_language(root, only_episodes=(0, 2))
    else:
        WRITERS[form](root, {episode: sd.SKILLS[episode] for episode in (0, 2)})
    assert "no skills for 1 of 3 episodes (1)" in refusal(root)
    source = load(root, task_as_skill=True)
    assert (source.name, source.task_count) == (form, 1)
    task = as_skills([("tidy the brick away", 0.0)])
    assert source.episodes == EXPECTED | {1: task}


@pytest.mark.parametrize("leftover", ["nothing", "skills.json", "placeholder"])
def test_a_dataset_that_nobody_has_segmented(leftover, tmp_path):
    root = sd.make(tmp_path / "dataset", tasks=("stack the cups", "wipe the table"))
    if leftover == "skills.json":
        sd.write_skills_file(root, {})
    if leftover == "placeholder":
        sd.write_sarm(root, {x: [("task", 0.0)] for x in sd.SKILLS}, "sparse")
    assert "no skills for 3 of 3 episodes (0, 1, 2)" in refusal(root)
    code, said = dry_run(root, "--task-as-skill")
    assert code == 0
    assert "the task is the only skill of 3 episodes" in said
    names = [x.skills[0].name for x in load(root, True).episodes.values()]
    assert names == ["stack the cups", "wipe the table", "stack the cups"]


def test_an_episode_whose_task_has_no_words(root):
    sd.edit_table(*sd.data_files(root), lambda table: table.assign(task_index=7))
    assert "episode 0 has no task" in refusal(root, task_as_skill=True)


@pytest.mark.parametrize("task_as_skill", [False, True])
def test_a_damaged_form_is_no_missing_one(task_as_skill, root):
    """--task-as-skill does not hide that there are labels which cannot be read."""
    path = sd.write_skills_file(root) / SKILLS_FILE
    path.write_text(path.read_text()[:-20])
    assert f"{path}: " in refusal(root, task_as_skill=task_as_skill)


def test_the_command_that_is_recommended_is_lerobots(root):
    config = pytest.importorskip("lerobot.annotations.steerable_pipeline.config")
    flags = shlex.split(re.search(r"lerobot-annotate (.*?);", refusal(root))[1])
    assert f"--root={root}" in flags
    assert len(flags) == 4
    for flag in flags:
        value = config.AnnotationPipelineConfig()
        for name in flag.removeprefix("--").split("=")[0].split("."):
            value = getattr(value, name)


@pytest.mark.parametrize(
    "episodes, late, starts, are_few",
    [
        (3, 2, [1.0], True),
        (3, 2, [99.0], True),
        (9, 8, [1.0], True),
        (10, 2, [1.0], True),
        (3, 3, [1.0], False),
        (10, 3, [1.0], False),
        (3, 1, [1.0, 2.0], False),
    ],
)
def test_skills_after_the_end(episodes, late, starts, are_few, tmp_path):
    """Few are left out and counted; many look like a wrong unit."""
    root = sd.make(tmp_path / "dataset", lengths=[10] * episodes)
    skills = {episode: [("reach", 0.0)] for episode in range(episodes)}
    for episode in range(late):
        skills[episode] = [("reach", 0.0), *zip(["rest", "end"], starts, strict=False)]
    sd.write_skills_file(root, skills)
    code, said = dry_run(root)
    assert "s in episode 0" in said
    if are_few:
        assert code == 0
        assert f"note: {late} skills start after the end" in said
        assert set(load(root).episodes.values()) == {as_skills([("reach", 0.0)])}
    else:
        assert code == 2
        assert f"{late} skills start after the end" in said


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"skills": []}, "no skills for 1 of 3 episodes (1)"),
        ({"skills": "reach"}, 'episode "1"'),
        ({"skills": ["reach"]}, 'episode "1"'),
        ({"skills": [{"name": "a"}]}, 'episode "1"'),
        ({"skills": [{"name": None, "start": 0}]}, "has no name"),
        ({"skills": [{"name": "a", "start": "0"}]}, "has no start"),
        ({"skills": [{"name": "a", "start": float("nan")}]}, "has no start"),
        ({"skills": [{"name": "a", "start": 10**400}]}, "has no start"),
        ({"description": 5, "skills": [{"name": "a", "start": 0}]}, 'episode "1"'),
    ],
)
def test_skills_json_in_the_wrong_form(change, expected, root):
    path = sd.write_skills_file(root) / SKILLS_FILE
    sd.edit_json(path, lambda content: content["episodes"]["1"].update(change))
    assert expected in refusal(root)


def test_skills_in_any_order_and_entries_that_nobody_wants(root):
    path = sd.write_skills_file(root) / SKILLS_FILE
    entries = [
        {"name": " lift\nit", "start": 1},
        {"name": "a", "start": 0, "end": -5},
        {"name": "b", "start": 1.0, "end": None},
    ]
    more = {"1": {"skills": entries, "description": None}, "abc": {"skills": entries}}
    sd.edit_json(path, lambda content: content["episodes"].update(more))
    expected = as_skills([("a", 0.0), ("lift it", 1.0), ("b", 1.0)])
    assert load(root) == SkillSource(SKILLS_FILE, EXPECTED | {1: expected})


# ---------------------------------------------------------------- language_persistent


def write_rows(root, change, types=None):
    """Write every frame's language rows after `change(episode, rows)`."""
    column = []
    for episode, length in enumerate(sd.LENGTHS):
        rows = change(episode, sd.language_rows(sd.SKILLS[episode]))
        column += [rows] * length
    sd.add_column(*sd.data_files(root), "language_persistent", pa.array(column, types))
    return root


def backwards(episode, rows):
    """The rows in another order."""
    return rows[::-1]


@pytest.mark.parametrize(
    "timestamp, calls, make_list",
    [
        (pa.float32(), pa.null(), pa.list_),
        (pa.float64(), pa.list_(pa.string()), pa.list_),
        (pa.float64(), pa.null(), pa.large_list),
    ],
)
def test_arrow_types_and_orders_that_occur(timestamp, calls, make_list, root):
    fields = {name: pa.string() for name in ("role", "style", "content")}
    fields |= {"timestamp": timestamp, "camera": pa.null(), "tool_calls": calls}
    write_rows(root, backwards, make_list(pa.struct(fields.items())))
    assert load(root).episodes == EXPECTED
    (path,) = sd.data_files(root)
    pq.write_table(pq.read_table(path), path, row_group_size=7)
    assert load(root).episodes == EXPECTED


def test_timestamps_are_on_the_frames_clock(root):
    """Frames that begin at 7 s, as after cutting an episode's start off."""

    def later(episode, rows):
        return [{**row, "timestamp": row["timestamp"] + 7.0} for row in rows]

    def shift(table):
        table["timestamp"] += np.float32(7)

    sd.edit_table(*sd.data_files(root), shift)
    assert load(write_rows(root, later)).episodes == EXPECTED


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"content": None}, "has no name"),
        ({"content": " "}, "has no name"),
        ({"timestamp": None}, "has no start"),
        ({"timestamp": float("nan")}, "has no start"),
        (None, "no skills for 1 of 3 episodes (1)"),
    ],
)
def test_wrong_language_rows(change, expected, root):
    def damage(episode, rows):
        if episode != 1:
            return rows
        return change and [*rows[:-1], {**rows[-1], **change}]

    message = refusal(write_rows(root, damage))
    assert expected in message
    assert change is None or "language_persistent of episode 1" in message


def test_frames_without_label_belong_to_no_skill(root):
    entries = [("", 0.0), ("reach", 1.0), ("", 2.0), ("lift", 3.0)]
    again = [("reach", 0.0), ("", 1.0), ("reach", 2.0)]
    sd.write_subtask_index(root, {0: entries, 1: again, 2: again})
    found = load(root).episodes
    assert found[0] == as_skills([("reach", 1.0), ("lift", 3.0)])
    assert found[1] == found[2] == as_skills([("reach", 0.0)])


def rewrite_names(path, name, index):
    """Write a table of names as another writer does, the names in column `name`."""
    table = pd.read_parquet(path).rename_axis(name)
    path.unlink()
    if index != "names":
        table = table.reset_index()
    if index == "numbers":
        table = table.set_index(table.columns[1])
    if index == "jsonl":
        table.to_json(path.with_suffix(".jsonl"), orient="records", lines=True)
    else:
        table.to_parquet(path)


@pytest.mark.parametrize("name", ["subtask", "name", "label", "task", None])
@pytest.mark.parametrize("index", ["names", "numbers", "neither", "jsonl"])
def test_tables_of_subtasks_by_other_writers(name, index, root):
    sd.write_subtask_index(root)
    rewrite_names(root / "meta" / "subtasks.parquet", name, index)
    assert load(root) == SkillSource(SUBTASKS, EXPECTED)


@pytest.mark.parametrize("name", ["task", "name", None])
@pytest.mark.parametrize("index", ["names", "numbers", "neither"])
def test_tables_of_tasks_by_other_writers(name, index, tmp_path):
    root = sd.make(tmp_path / "dataset", tasks=("stack", "wipe"))
    rewrite_names(root / "meta" / "tasks.parquet", name, index)
    plan = ap.make_plan(ap.open_dataset(sd.write_skills_file(root)))
    told = [episode.samples[0].task_description for episode in plan.episodes]
    assert told == ["stack", "wipe", "stack"]


@pytest.mark.parametrize("name", [" ", "\x07", None])
def test_a_label_without_a_name(name, root):
    sd.write_subtask_index(root)
    path = root / "meta" / "subtasks.parquet"
    sd.write_subtask_names(root, ["lift it", name, "reach the brick"])
    assert "has no name" in (message := refusal(root)) or f"{path}: " in message
    sd.write_subtask_names(root, ["lift it", "put it down"])
    assert "subtask_index of episode 0: the skill 2 at" in refusal(root)


def test_labels_without_any_names(root):
    """LeRobot's delete_episodes leaves meta/subtasks.parquet behind."""
    sd.write_subtask_index(root)
    new = root.with_name("new")
    delete_episodes(LeRobotDataset("demo/x", root=root), [0], new, "demo/less")
    assert not (new / "meta" / "subtasks.parquet").exists()
    message = refusal(new)
    assert "neither meta/subtasks.parquet nor meta/subtasks.jsonl" in message
    assert "copy that file from the dataset" in message
    shutil.copy(root / "meta" / "subtasks.parquet", new / "meta")
    assert load(new).episodes == {0: EXPECTED[1], 1: EXPECTED[2]}


@pytest.mark.parametrize(
    "column, value, expected",
    [
        ("names", [], "no skills for 1 of 3 episodes (1)"),
        ("names", None, "no skills for 1 of 3 episodes (1)"),
        ("names", ["reach", None], "has no name"),
        ("start_times", [0], "is mixed up"),
        ("start_times", None, "is mixed up"),
        ("start_times", [0, None], "has no start"),
    ],
)
def test_wrong_sarm_columns(column, value, expected, root):
    def damage(table):
        table.at[1, f"dense_subtask_{column}"] = value

    sd.write_sarm(root)
    sd.edit_table(sd.episode_table(root), damage)
    assert expected in refusal(root)


def test_sarm_annotations_in_rows_without_episode(root):
    """LeRobot appends such rows where meta/episodes has several files."""

    def append(table):
        row = table.iloc[[1]].assign(episode_index=None)
        return pd.concat([table, row], ignore_index=True)

    sd.write_sarm(root)
    sd.edit_table(sd.episode_table(root), append)
    assert "is mixed up" in refusal(root)
    assert load(sd.write_skills_file(root)) == SkillSource(SKILLS_FILE, EXPECTED)


def test_skills_json_of_another_version(tmp_path):
    """It was copied after LeRobot had numbered the episodes anew."""
    root = sd.make(tmp_path / "dataset", lengths=(60, 20, 45, 20))
    sd.write_skills_file(root, {episode: [("reach", 0.0)] for episode in range(4)})
    assert not load(root).notes
    new = root.with_name("new")
    delete_episodes(LeRobotDataset("demo/x", root=root), [0], new, "demo/less")
    shutil.copy(root / SKILLS_FILE, new / SKILLS_FILE)
    (note,) = load(new).notes
    assert note in dry_run(new)[1]
    assert "another version of the dataset" in note
    assert "in 3 of 3 episodes the last skill" in note


def test_episodes_are_found_by_the_data_files_own_numbers(tmp_path):
    """Converters name a wrong data file for an episode, or one never written."""
    root = sd.make(tmp_path / "dataset", files=(0, 0, 1))
    sd.write_subtask_index(root)
    for wrong in ([0, 0, 0], [0, 1, 1], [7, 8, 9]):
        sd.edit_table(
            sd.episode_table(root),
            lambda x, w=wrong: x.assign(**{"data/file_index": w}),
        )
        plan = ap.make_plan(ap.open_dataset(root))
        assert plan.skill_source.episodes == EXPECTED
        assert [sample.index for sample in plan.samples] == list(range(0, 120, 10))
        check_images(plan)


@pytest.mark.parametrize("present", ["all files", "its own files"])
def test_chosen_episodes_of_a_dataset(present, tmp_path):
    """LeRobotDataset(episodes=[...]) downloads its own files alone."""
    cameras = {sd.FRONT: "video"}
    root = sd.make(tmp_path / "dataset", cameras=cameras, files=(0, 1, 2))
    sd.write_subtask_index(root)
    if present == "its own files":
        for path in root.glob("*/**/*000.*"):
            if "meta" not in path.parts:
                path.unlink()
    plan = ap.make_plan(LeRobotDataset("demo/x", root=root, episodes=[1, 2]))
    assert plan.skill_source == SkillSource(SUBTASKS, {1: EXPECTED[1], 2: EXPECTED[2]})
    assert [sample.episode_id for sample in plan.samples] == 3 * [1] + 4 * [2]
    check_images(plan)


def test_the_command_that_removes_a_half_filled_column(root):
    """The error's own command, carried out."""
    sd.write_subtask_index(root)
    sd.declare(root, task_index_high_level=sd.INDEX_FEATURE)
    sd.add_column(*sd.data_files(root), ap.COLUMN, [0] * 50 + [-1] * 70)
    command = re.search(r'already; .*(python -c ".*?") and copy', refusal(root))[1]
    exec(shlex.split(command)[2], {})
    new = Path(f"{root}_without")
    shutil.copy(root / "meta" / "subtasks.parquet", new / "meta")
    assert load(new).episodes == EXPECTED


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P"])
def test_pictures_of_any_mode_are_shown_as_rgb(mode, root):
    cells = [{"bytes": sd.png((204, 204, 204), mode), "path": None}] * 120
    sd.add_column(*sd.data_files(sd.write_skills_file(root)), sd.FRONT, cells)
    plan = ap.make_plan(ap.open_dataset(root))
    ((image,),) = ap.read_views(plan, plan.samples[:1])
    assert (image.mode, image.getpixel((5, 5))) == ("RGB", (204, 204, 204))


@pytest.mark.parametrize(
    "kind, mark",
    [
        ("video", {"info": {"is_depth_map": True}}),
        ("video", {"info": {"video.is_depth_map": True}}),
        ("video", {"video_info": {"video.is_depth_map": True}}),
        ("video", {"info": {"video.pix_fmt": "gray12le"}}),
        ("image", {"info": {"is_depth_map": True}}),
        ("image", {}),
    ],
)
def test_depth_is_no_picture(kind, mark, tmp_path):
    """Nor is it decoded: a depth camera's files may be of any kind."""
    root = sd.make(tmp_path / "dataset", cameras={DEPTH: kind, sd.FRONT: "image"})
    sd.write_skills_file(root)
    sd.declare(root, **{DEPTH: {"dtype": kind, "shape": [9, 9], "names": None} | mark})
    if kind == "image":
        cells = [{"bytes": sd.png((9, 9, 9), "I;16"), "path": None}] * 120
        sd.add_column(*sd.data_files(root), DEPTH, cells)
    for path in root.glob("videos/*/*/*"):
        path.write_bytes(b"what LeRobot's decoder knows")
    assert ap.make_plan(ap.open_dataset(root)).camera_keys == [sd.FRONT]
    code, said = dry_run(root, "--camera-keys", DEPTH)
    assert code == 2
    assert f"colour cameras: {sd.FRONT}" in said


@pytest.mark.parametrize(
    "pattern", ["meta/tasks.parquet", "meta/episodes/*/*", "data/*/*", "videos/*/*/*"]
)
def test_pointers_of_git_lfs(pattern, tmp_path):
    root = sd.make(tmp_path / "dataset", cameras={sd.FRONT: "video"})
    (path,) = root.glob(pattern)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert f"{path}: is only a pointer to the file; run `git lfs pull`" in refusal(root)


@pytest.mark.parametrize("version", ["v1.6", "v2.0", "v2.1", "v4.0", None])
def test_other_versions_of_the_format(version, root):
    sd.edit_json(root / "meta/info.json", lambda x: x.update(codebase_version=version))
    message = refusal(root)
    assert f"has format {version}, not v3.0" in message
    assert "from v2.1 with LeRobot's convert_dataset_v21_to_v30" in message
