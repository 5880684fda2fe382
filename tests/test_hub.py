"""Rights, upload, card name and download, over HTTP with a stand-in for the Hub."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import make_demo
import pytest
from conftest import HOME, annotate, run
from lerobot.datasets.lerobot_dataset import LeRobotDataset

import annotate_pgen as ap

pytestmark = pytest.mark.usefixtures("short_prompt")

CPU = ("--device", "cpu", "--dtype", "float32")
TARGET = "somebody/target"


@pytest.fixture(autouse=True)
def home(hub, monkeypatch):
    """LeRobot's home and the Hub, empty; nobody waits between two tries."""
    hub.repos.clear()
    hub.requests.clear()
    hub.failed.clear()
    shutil.rmtree(HOME / "lerobot", ignore_errors=True)
    monkeypatch.setattr(ap, "RETRY_PAUSES", (0, 0, 0))
    fast = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time", fast)
    return HOME / "lerobot"


@pytest.fixture(scope="module")
def source(built):
    """A dataset whose images stand in the data files."""
    return built("images", make_demo.make_dataset, cameras={"up": "image"})


@pytest.fixture(scope="module")
def finished(short_prompt, source, model, tmp_path_factory):
    """An annotated dataset. Tests that change it copy it first."""
    output = tmp_path_factory.mktemp("finished") / "out"
    code, _, err = annotate(source, model, output)
    assert code == 0, err
    return output


def content(root):
    """Every file's bytes, by its name, but what the Hub puts there by itself."""
    files = [path for path in Path(root).rglob("*") if path.is_file()]
    files = [path for path in files if path.name != ".gitattributes"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def uploaded(hub, name=TARGET, revision="v3.0"):
    """The content of a repository, without what the Hub itself puts there."""
    found = hub.repos[name].files(revision)
    return {path: data for path, data in found.items() if path != ".gitattributes"}


def sent(hub):
    """The large files that were uploaded, each time that they were."""
    return [path for method, path in hub.requests if method == "PUT"]


def last_line(err):
    """The error."""
    return err.splitlines()[-1]


def push_flags(name=TARGET):
    """The flags that push the result to a repository."""
    return ("--push-to-hub", "--new-repo-id", name)


# ----------------------------------------------------------------------- there and back

ACCESS = """
from lerobot.datasets.lerobot_dataset import LeRobotDataset
import pandas as pd
dataset = LeRobotDataset(repo_id="lerobot/svla_so101_pickplace_with_high_level_tasks")
frame = dataset[100]
high_level_task_idx = frame["task_index_high_level"].item()
tasks_df = pd.read_parquet(dataset.root / "meta" / "tasks_high_level.parquet")
task_info = tasks_df.iloc[high_level_task_idx]
print(f"User prompt: {task_info['user_prompt']}")
print(f"Robot utterance: {task_info['robot_utterance']}")
print(f"Skill: {task_info['skill']}")
"""


def test_there_and_back(hub, home, source, model, tmp_path, monkeypatch, capsys):
    """From one repository to another, and read back as the specification prints it."""
    monkeypatch.setitem(hub.tokens, "hf_lerobot", "lerobot")
    monkeypatch.setenv("HF_TOKEN", "hf_lerobot")
    name = "lerobot/svla_so101_pickplace"
    target = f"{name}_with_high_level_tasks"
    output = tmp_path / "out"
    before = hub.add_repo(name, source, tag="v3.0").files()
    flags = ("--repo-id", name, "--output-dir", output, "--push-to-hub", *CPU)
    code, out, err = run(*flags, "--model", model)
    assert code == 0, err
    assert out.splitlines()[-1].endswith(f"{hub.url}/datasets/{target}")
    assert uploaded(hub, target) == content(output)
    assert hub.repos[name].files() == before
    assert not hub.repos[target].private

    shutil.rmtree(home)
    capsys.readouterr()
    exec(ACCESS, {})
    lines = (output / "meta/syn_annotations.jsonl").read_text().splitlines()
    # Frame 100 of all is frame 25 of episode 2.
    sampled = [x for x in map(json.loads, lines) if x["episode_id"] == 2]
    line = [x for x in sampled if x["frame_index"] <= 25][-1]
    assert capsys.readouterr().out.splitlines() == [
        f"User prompt: {line['user_prompt']}",
        f"Robot utterance: {line['robot_utterance']}",
        f"Skill: {line['skill_current']}",
    ]

    # The same command has nothing to do.
    commits = list(hub.repos[target].commits)
    monkeypatch.setattr(ap, "QwenPgen", None)
    code, _, err = run(*flags, "--model", model)
    assert code == 0, err
    assert list(hub.repos[target].commits) == commits


# ------------------------------------------------------------- before anything is made


@pytest.mark.parametrize(
    ("token", "target", "failure"),
    [
        (None, "somebody/a", None),
        ("hf_unknown", "somebody/a", None),
        ("hf_writer", "other/there", None),
        ("hf_reader", "somebody/a", None),
        ("hf_reader", "somebody/there", None),
        ("hf_writer", "somebody/a", ("POST", "repos/create", 503, None)),
        ("hf_writer", "somebody/a", ("GET", "whoami", "drop", None)),
    ],
)
def test_no_right_to_write(
    token, target, failure, hub, source, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(ap, "QwenPgen", None)
    for name in ("other/there", "somebody/there"):
        hub.add_repo(name)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    if failure:
        hub.fail(*failure)
    code, out, err = annotate(source, model, tmp_path / "out", *push_flags(target))
    assert (code, out) == (2, ""), err
    for word in ("--push-to-hub", target, "--new-repo-id", "hf auth login"):
        assert word in last_line(err)
    assert token is None or token not in err
    assert not list(tmp_path.iterdir())
    assert set(hub.repos) == {"other/there", "somebody/there"}


@pytest.mark.parametrize("how", [429, 500, 503, "drop"])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_busy_hub_is_asked_again(how, is_there, hub):
    if is_there:
        hub.add_repo(TARGET)
    for method, part in (
        ("GET", "whoami"),
        ("GET", f"datasets/{TARGET}$"),
        ("POST", "repos/create"),
        ("DELETE", "repos/delete"),
        ("POST", "/preupload/"),
    ):
        hub.fail(method, part, how, times=2)
    # Done, but not answered.
    hub.fail("DELETE", "repos/delete", "lose")
    assert not ap.check_target(TARGET, None, False)
    assert (TARGET in hub.repos) == is_there


@pytest.mark.parametrize(
    ("source_is", "flag", "expected"),
    [
        ("public", False, False),
        ("private", False, True),
        ("gated", False, True),
        ("not shown", False, True),
        ("public", True, True),
        (None, True, True),
    ],
)
def test_a_private_source_makes_a_private_target(
    source_is, flag, expected, hub, finished
):
    if source_is in ("public", "private", "gated"):
        repo = hub.add_repo("somebody/source", private=source_is == "private")
        repo.gated = "auto" if source_is == "gated" else False
    private = ap.check_target(TARGET, source_is and "somebody/source", flag)
    ap.push(finished, TARGET, private)
    assert hub.repos[TARGET].private == expected


def test_a_target_that_is_there_keeps_its_visibility(hub):
    repo = hub.add_repo(TARGET)
    with pytest.raises(ap.InputError, match="is public, but"):
        ap.check_target(TARGET, None, True)
    repo.private = True
    ap.check_target(TARGET, None, False)
    assert repo.private


def test_foreign_files_are_never_deleted(hub, source, model, tmp_path):
    """A copy that lacks a file, pushed to where it was copied from."""
    repo = hub.add_repo(TARGET, source, tag="v3.0")
    before = dict(repo.files())
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    code, out, err = annotate(copy, model, tmp_path / "out", *push_flags())
    assert (code, out) == (2, ""), err
    assert TARGET in last_line(err)
    assert "not this script's" in last_line(err)
    assert list(tmp_path.iterdir()) == [copy]
    assert repo.files() == before
    assert len(repo.commits) == 1


def test_an_aborted_run_leaves_no_repository(built, hub, source, tmp_path):
    broken = built("broken", make_demo.make_model, failure_rate=1.0)
    code, _, err = annotate(source, broken, tmp_path / "out", *push_flags())
    assert code == 1, err
    assert ("DELETE", "/api/repos/delete") in hub.requests, "the right was tried"
    assert not hub.repos


# ------------------------------------------------------------------------------ upload


@pytest.mark.parametrize(
    ("method", "part", "how"),
    [
        ("POST", "repos/create", "lose"),
        ("POST", "/commit/", 500),
        ("POST", "/commit/", "drop"),
        ("POST", "/commit/", "lose"),
        ("POST", "/preupload/", 500),
        ("POST", "/lfs/objects/batch", "drop"),
        ("PUT", "^/lfs/", "drop"),
        ("DELETE", "/tag/", 503),
        ("DELETE", "/tag/", "lose"),
        ("POST", "/tag/", "lose"),
    ],
)
def test_an_upload_survives(method, part, how, hub, finished):
    if part != "repos/create":
        hub.add_repo(TARGET, finished / "data", tag="v3.0")
    hub.fail(method, part, how, times=2)
    ap.push(finished, TARGET, False)
    repo = hub.repos[TARGET]
    assert uploaded(hub) == content(finished)
    assert repo.tags == {"v3.0": repo.head}
    assert hub.failed


def test_a_failed_upload_is_taken_up_again(hub, source, model, tmp_path, monkeypatch):
    output = tmp_path / "out"
    hub.fail("POST", "/commit/", 500, times=None)
    code, _, err = annotate(source, model, output, *push_flags())
    assert code == 1
    assert str(output) in last_line(err)
    assert "only uploads" in last_line(err)
    assert LeRobotDataset(TARGET, root=output, video_backend="pyav").num_frames == 113
    hub.heal()
    before = sent(hub)
    assert before
    monkeypatch.setattr(ap, "QwenPgen", None)
    code, _, err = annotate(source, model, output, *push_flags())
    assert code == 0, err
    assert sent(hub) == before, "no file is sent twice"
    assert uploaded(hub) == content(output)


def test_stale_files_go_and_bookkeeping_stays(hub, finished, tmp_path):
    """An earlier result of this script is replaced, with all its files."""
    own = Path(shutil.copytree(finished, tmp_path / "out"))
    repo = hub.add_repo(TARGET, finished, tag="v3.0")
    stale = {"data/chunk-000/file-007.parquet": b"old", "meta/old.json": b"old"}
    repo.add_commit({**repo.files(), **stale})
    for name in (".cache/huggingface/x.metadata", ".cache/notes", ".gitignore"):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text("*.parquet\n")
    assert not ap.check_target(TARGET, None, False)
    ap.push(own, TARGET, False)
    assert uploaded(hub) == content(finished)


def test_another_name(hub, source, model, finished, tmp_path):
    """A finished folder is pushed under another name, with a card for it."""
    output = Path(shutil.copytree(finished, tmp_path / "out"))
    for name in ("somebody/renamed", "somebody/again"):
        code, _, err = annotate(source, model, output, *push_flags(name))
        assert code == 0, err
        assert f'LeRobotDataset("{name}", ' in uploaded(hub, name)["README.md"].decode()
        assert uploaded(hub, name) == content(output)
    assert "somebody/renamed" not in (output / "README.md").read_text()
    changed = content(output).items() - content(finished).items()
    assert {name for name, _ in changed} == {"README.md"}


def test_an_edited_card_is_kept(hub, source, model, finished, tmp_path):
    output = Path(shutil.copytree(finished, tmp_path / "out"))
    ap.write_card(output, TARGET)
    card = output / "README.md"
    card.write_text(card.read_text() + "\nWe have checked them all.\n")
    code, _, err = annotate(source, model, output, *push_flags())
    assert code == 0, err
    assert b"We have checked them all." in uploaded(hub)["README.md"]


# ---------------------------------------------------------------------------- download


def dry_run(name, *flags):
    """The plan of a dataset on the Hub: (exit code, stdout, stderr)."""
    return run("--repo-id", name, "--dry-run", *flags)


def test_revision(hub, home, source):
    """Without --revision it is LeRobot's own copy, or else main; never written."""
    repo = hub.add_repo(TARGET, source, tag="v3.0")
    # What is there of metadata alone is no copy.
    shutil.copytree(source / "meta", home / TARGET / "meta")
    skills = (source / "meta/skills.json").read_bytes()
    changed = {"meta/skills.json": skills.replace(b"picks up", b"lifts")}
    oid = repo.add_commit({**repo.files(), **changed})
    for revision, expected in (
        ((), "lifts"),
        (("--revision", oid), "lifts"),
        (("--revision", "v3.0"), "picks up"),
    ):
        code, out, err = dry_run(TARGET, *revision)
        assert code == 0, err
        assert f"robot arm {expected} pink" in out
    shutil.copytree(source, home / TARGET, dirs_exist_ok=True)
    code, out, err = dry_run(TARGET)
    assert code == 0, err
    assert "robot arm picks up pink" in out
    assert content(home / TARGET) == content(source)


def test_what_was_downloaded_is_used_without_network(hub, home, source, monkeypatch):
    hub.add_repo(TARGET, source, tag="v3.0")
    hub.fail("GET", "/revision/", 503, times=2)
    assert dry_run(TARGET)[0] == 0, "a busy Hub is asked again"
    before = content(home)
    # Nobody listens there.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    asked = len(hub.requests)
    code, _, err = dry_run(TARGET)
    assert code == 0, err
    assert len(hub.requests) == asked
    assert content(home) == before
