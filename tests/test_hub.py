"""Download, upload, card and the way back, over HTTP with a stand-in for the Hub."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import make_demo
import pytest
from checks import check, content, files
from conftest import HOME, annotate, run
from huggingface_hub import DatasetCard

import annotate_pgen as ap

CPU = ("--device", "cpu", "--dtype", "float32")
CARD = """\
---
license: cc-by-nc-4.0
pretty_name: Bricks
tags:
- LeRobot
- so101
dataset_info:
  features:
  - name: index
    dtype: int64
---
# Bricks

Recorded in our kitchen.
"""


@pytest.fixture
def home(monkeypatch):
    """LeRobot's home, empty before and after. Neither we nor the client wait between tries."""
    shutil.rmtree(HOME / "lerobot", ignore_errors=True)
    monkeypatch.setattr(ap, "RETRY_AFTER", (0.01,) * 5)
    monkeypatch.setattr(
        "huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None)
    )
    yield HOME / "lerobot"
    shutil.rmtree(HOME / "lerobot", ignore_errors=True)


@pytest.fixture(scope="module")
def finished(dataset, model, tmp_path_factory):
    """An annotated dataset. Tests that change it copy it first."""
    output = tmp_path_factory.mktemp("finished") / "out"
    assert annotate(dataset, model, output)[0] == 0
    return output


def uploaded(hub, name, revision="main"):
    found = hub.repos[name].files(revision)
    return {path: data for path, data in found.items() if path != ".gitattributes"}


def requests(hub, method, part):
    return [path for verb, path in hub.requests if verb == method and part in path]


# ---------------------------------------------------------------- there and back

ACCESS = """
from lerobot.datasets.lerobot_dataset import LeRobotDataset
import pandas as pd
# Load modified dataset
dataset = LeRobotDataset(repo_id="lerobot/svla_so101_pickplace_with_high_level_tasks")
# Access frame with high-level task
frame = dataset[100]
high_level_task_idx = frame["task_index_high_level"].item()
# Load high-level tasks
tasks_df = pd.read_parquet(dataset.root / "meta" / "tasks_high_level.parquet")
task_info = tasks_df.iloc[high_level_task_idx]
print(f"User prompt: {task_info['user_prompt']}")
print(f"Robot utterance: {task_info['robot_utterance']}")
print(f"Skill: {task_info['skill']}")
"""


def test_round_trip(hub, home, built, model, tmp_path, monkeypatch):
    """From a repository on the Hub to another, and the specification's code from an empty cache."""
    monkeypatch.setitem(hub.tokens, "hf_lerobot", "lerobot")
    monkeypatch.setenv("HF_TOKEN", "hf_lerobot")
    source = built("images_hub", make_demo.make_dataset, cameras={"up": "image", "side": "image"})
    (source / "README.md").write_text(CARD)
    name = "lerobot/svla_so101_pickplace"
    hub.add_repo(name, source, tag="v3.0")
    before = hub.repos[name].files()
    flags = ("--repo-id", name, "--model", model, *CPU, "--output-dir", tmp_path / "out")
    code, out, err = run(*flags, "--push-to-hub")
    target = f"{name}_with_high_level_tasks"
    assert code == 0, err
    assert f"pushed to {target}" in err
    assert out.splitlines()[-1] == f"pushed to      {hub.url}/datasets/{target}"
    lines = check(source, tmp_path / "out")
    assert hub.repos[target].files("v3.0") == content(tmp_path / "out")
    assert hub.repos[name].files() == before and not hub.repos[target].private

    empty = {"HF_HOME": str(tmp_path / "hf"), "HF_LEROBOT_HOME": str(tmp_path / "lerobot")}
    command = [sys.executable, "-c", ACCESS]
    result = subprocess.run(command, env=os.environ | empty, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    line = [n for n in lines if n["episode_id"] == 2 and n["frame_index"] <= 100 - 45 - 30][-1]
    assert result.stdout.splitlines() == [
        f"User prompt: {line['user_prompt']}",
        f"Robot utterance: {line['robot_utterance']}",
        f"Skill: {line['skill_current']}",
    ]

    commits = len(hub.repos[target].commits)
    monkeypatch.setattr(ap, "QwenPgen", None)
    code, out, err = run(*flags, "--push-to-hub")
    assert code == 0 and "finished already" in out and f"/datasets/{target}" in out, err
    assert len(hub.repos[target].commits) == commits


# ---------------------------------------------------------------- before the model is loaded


@pytest.mark.parametrize(
    "token, target, failure",
    [
        (None, "somebody/a", None),
        ("hf_unknown", "somebody/a", None),
        ("hf_writer", "other/a", None),
        ("hf_writer", "other/there", None),
        ("hf_reader", "somebody/a", None),
        ("hf_reader", "somebody/there", None),
        ("hf_writer", "somebody/a", ("POST", "repos/create", 403)),
        ("hf_writer", "somebody/a", ("POST", "repos/create", 503)),
        ("hf_writer", "somebody/a", ("GET", "whoami", "drop")),
    ],
)
def test_no_right_to_write(token, target, failure, hub, home, dataset, tmp_path, monkeypatch):
    for name in ("other/there", "somebody/there"):
        if name not in hub.repos:
            hub.add_repo(name)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    if failure:
        hub.fail(*failure, times=None)
    output = tmp_path / "out"
    flags = ("--push-to-hub", "--new-repo-id", target)
    code, out, err = annotate(dataset, tmp_path / "no-model", output, *flags)
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith(f"error: --push-to-hub: cannot write to {target}: "), err
    assert "--new-repo-id" in last and "hf auth login" in last
    assert token is None or token not in out + err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", [429, 500, 503, "drop"])
def test_a_busy_hub_is_asked_again(how, hub, home):
    for method, part in (("GET", "whoami"), ("POST", "repos/create"), ("POST", "/preupload/")):
        hub.fail(method, part, how, times=2)
    ap.open_target(f"somebody/busy_{how}", None, False)
    assert f"somebody/busy_{how}" in hub.repos


@pytest.mark.parametrize(
    "source, flag, expected",
    [
        ("public", False, False),
        ("private", False, True),
        ("gated", False, True),
        ("public", True, True),
        ("unknown", False, True),
        (None, True, True),
    ],
)
def test_private_targets(source, flag, expected, hub, home):
    if source not in (None, "unknown"):
        repo = hub.add_repo(f"somebody/is_{source}", private=source == "private")
        repo.gated = "auto" if source == "gated" else False
    target = f"somebody/of_{source}_{flag}"
    ap.open_target(target, source and f"somebody/is_{source}", flag)
    assert hub.repos.pop(target).private == expected
    hub.repos.pop(f"somebody/is_{source}", None)


def test_an_existing_target_keeps_its_visibility(hub, home):
    hub.add_repo("somebody/shown")
    ap.open_target("somebody/shown", None, False)
    assert not hub.repos["somebody/shown"].private
    with pytest.raises(ap.InputError, match="is public, but"):
        ap.open_target("somebody/shown", None, True)


def test_the_source_is_no_target(dataset):
    code, _, err = run("--data-dir", dataset, "--repo-id", "a/b", "--new-repo-id", "A/B")
    assert code == 2 and "is the source" in err


# ---------------------------------------------------------------- upload


@pytest.mark.parametrize(
    "method, part, how",
    [
        ("POST", "/commit/", 500),
        ("POST", "/commit/", 429),
        ("POST", "/commit/", "drop"),
        ("POST", "/commit/", "lose"),
        ("POST", "/preupload/", 500),
        ("POST", "/preupload/", "drop"),
        ("POST", "/lfs/objects/batch", 503),
        ("POST", "/lfs/objects/batch", "drop"),
        ("PUT", "^/lfs/", 500),
        ("PUT", "^/lfs/", 429),
        ("PUT", "^/lfs/", "cut"),
        ("DELETE", "/tag/", 503),
        ("DELETE", "/tag/", "lose"),
        ("POST", "/tag/", 502),
        ("POST", "/tag/", "lose"),
    ],
)
def test_upload_survives(method, part, how, hub, home, finished, capsys):
    repo = hub.add_repo("somebody/target", tag="v3.0")
    hub.fail(method, part, how, times=2)
    ap.push(finished, "somebody/target")
    assert uploaded(hub, "somebody/target", "v3.0") == content(finished)
    assert repo.tags["v3.0"] == repo.branches["main"]
    assert "pushed to" in capsys.readouterr().out
    hub.repos.pop("somebody/target")


def test_a_failed_upload_is_taken_up_again(hub, home, dataset, model, tmp_path, monkeypatch):
    output, flags = tmp_path / "out", ("--push-to-hub", "--new-repo-id", "somebody/late")
    hub.fail("POST", "/commit/", 500, times=None)
    code, _, err = annotate(dataset, model, output, *flags)
    last = err.splitlines()[-1]
    assert code == 1 and str(output) in last and "only uploads" in last
    check(dataset, output)
    hub.heal()
    sent = requests(hub, "PUT", "/lfs/")
    assert sent
    monkeypatch.setattr(ap, "QwenPgen", None)
    code, out, err = annotate(dataset, model, output, *flags)
    assert code == 0 and "finished already" in out, err
    assert requests(hub, "PUT", "/lfs/") == sent, "no file is sent twice"
    assert uploaded(hub, "somebody/late", "v3.0") == content(output)


def test_a_refused_upload_is_not_repeated(hub, home, finished):
    hub.add_repo("somebody/refused")
    hub.fail("POST", "/commit/", 403, times=None)
    with pytest.raises(ap.RunError, match="403"):
        ap.push(finished, "somebody/refused")
    assert len([f for f in hub.failed if f[1].startswith("/api/datasets/somebody/refused")]) == 1


def test_stale_files_go_and_bookkeeping_stays(hub, home, finished, tmp_path):
    own = Path(shutil.copytree(finished, tmp_path / "out"))
    for target in ("somebody/first", "somebody/second"):
        stale = tmp_path / target.replace("/", "_")
        for name in ("data/chunk-000/file-007.parquet", "meta/old.json"):
            (stale / name).parent.mkdir(parents=True, exist_ok=True)
            (stale / name).write_bytes(b"stale")
        hub.add_repo(target, stale, tag="v3.0")
        for name in (".cache/huggingface/x.metadata", ".cache/notes", ".git/config", ".gitignore"):
            (own / name).parent.mkdir(parents=True, exist_ok=True)
            (own / name).write_text("*.mp4\n")
        ap.push(own, target)
        assert uploaded(hub, target, "v3.0") == content(finished)


# ---------------------------------------------------------------- the card


def test_card(hub, home, own_dataset, model, tmp_path):
    (own_dataset / "README.md").write_text(CARD)
    output = tmp_path / "out"
    code, _, err = annotate(own_dataset, model, output, "--repo-id", "lab/bricks")
    assert code == 0, err
    card = DatasetCard.load(output / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "cc-by-nc-4.0" and data["pretty_name"] == "Bricks"
    assert data["tags"] == ["LeRobot", "synthetic", "so101"]
    assert data["source_datasets"] == ["lab/bricks"]
    assert data["configs"] == [{"config_name": "default", "data_files": "data/*/*.parquet"}]
    assert "dataset_info" not in data, "it describes the columns that were"
    text = card.text
    lines = check(own_dataset, output)
    for part in (
        "synthetic",
        "https://huggingface.co/datasets/lab/bricks",
        f"| generating model | {model.name} |",
        "| sample_interval | 1.0 |",
        "| dialogues | 12 |",
        'LeRobotDataset("lab/bricks_with_high_level_tasks", ',
        "arxiv.org/abs/2502.19417",
        "**License:** cc-by-nc-4.0",
        "# Bricks\n\nRecorded in our kitchen.",
        "task_index_high_level",
        "merge",
    ):
        assert part in text, part
    for kind in ("scenario_type", "response_type"):
        for name in {line[kind] for line in lines}:
            count = sum(line[kind] == name for line in lines)
            assert f"| {name} | {count} |" in text
    shown = [line for line in lines if f"| {line['user_prompt']} |" in text]
    assert len(shown) >= 3


@pytest.mark.parametrize(
    "text",
    [
        "no metadata",
        "---\n: [broken\n---\nwords",
        "---\nlicense: 5\n---\nno metadata",
        "",
        "---\ntags: 5\n---\na",
        "---\ntags: robotics\n---\nb",
        "---\ntags: [{a: b}, c]\n---\nc",
    ],
)
def test_odd_cards_are_kept_as_text(text, finished, own_dataset, tmp_path):
    (own_dataset / "README.md").write_text(text)
    output = Path(shutil.copytree(finished, tmp_path / "out"))
    settings = json.loads((output / ap.RECORD).read_text())
    lines = [json.loads(n) for n in (output / "meta/syn_annotations.jsonl").open(encoding="utf-8")]
    lines[0] |= {"skill_current": "a | b\n\n# c <script>"}
    import pandas as pd

    tasks = pd.read_parquet(output / "meta/tasks_high_level.parquet")
    ap.write_card(own_dataset, ap.open_dataset(output), (tasks, range(113), lines), settings)
    card = DatasetCard.load(output / "README.md")
    assert text.split("---\n")[-1] in card.text and "LeRobot" in card.data.tags
    assert "| a \\| b # c <script> |" in card.text


def test_a_new_name_replaces_whole_names_only(finished, tmp_path):
    output = Path(shutil.copytree(finished, tmp_path / "out"))
    card, record = output / "README.md", json.loads((output / ap.RECORD).read_text())
    card.write_bytes(b'from [me/ds-raw](x/me/ds-raw) "me/ds" ?path=me/ds"\n \xe9')
    for name in ("me/ds", "me/ds_v2", "me/ds_v2", "you/a"):
        ap.rename_dataset(output, record | {"name": record["name"]}, name)
        record = json.loads((output / ap.RECORD).read_text()) | (
            {"name": "me/ds"} if name == "me/ds" else {}
        )
    assert card.read_bytes() == b'from [me/ds-raw](x/me/ds-raw) "you/a" ?path=you/a"\n \xe9'
    card.unlink()
    ap.rename_dataset(output, record, "you/b")


def test_an_edited_card_is_kept_under_another_name(
    hub, home, own_dataset, model, finished, tmp_path
):
    output = Path(shutil.copytree(finished, tmp_path / "out"))
    record = json.loads((output / ap.RECORD).read_text())
    card = (output / "README.md").read_text().replace("Nobody said", "We checked; nobody said")
    (output / "README.md").write_text(card)
    flags = ("--data-dir", own_dataset, "--output-dir", output, "--model", record["model"])
    code, _, err = run(*flags, "--push-to-hub", "--new-repo-id", "somebody/renamed")
    assert code == 0, err
    pushed = hub.repos["somebody/renamed"].files()["README.md"].decode()
    assert "We checked" in pushed and 'LeRobotDataset("somebody/renamed", ' in pushed
    assert record["name"] not in pushed
    assert run(*flags, "--push-to-hub", "--new-repo-id", "somebody/again")[0] == 0
    pushed = hub.repos["somebody/again"].files()["README.md"].decode()
    assert 'LeRobotDataset("somebody/again", ' in pushed and "somebody/renamed" not in pushed


# ---------------------------------------------------------------- download


def dry_run(*flags):
    return run("--dry-run", *flags)


def without_skills(dataset, folder):
    shutil.copytree(dataset, folder)
    (folder / "meta/skills.json").unlink()
    return folder


def test_skills_that_only_main_has(hub, home, dataset, tmp_path):
    repo = hub.add_repo("somebody/later", without_skills(dataset, tmp_path / "old"), tag="v3.0")
    skills = {"meta/skills.json": (dataset / "meta/skills.json").read_bytes()}
    code, _, err = dry_run("--repo-id", "somebody/later")
    assert code == 2 and "has no meta/skills.json; run annotate.py first" in err
    assert not requests(hub, "GET", "somebody/later/resolve/main/data"), "nothing else is fetched"
    repo.add_commit(repo.files() | skills, "skills", "somebody", "main")
    code, out, err = dry_run("--repo-id", "somebody/later")
    assert code == 0 and "samples        12" in out, err


def test_a_copy_of_lerobot_that_is_older_than_the_skills(hub, home, dataset, tmp_path):
    repo = hub.add_repo("somebody/copied", dataset, tag="v3.0")
    local = home / "somebody" / "copied"
    without_skills(dataset, local)
    code, out, err = dry_run("--repo-id", "somebody/copied")
    assert code == 0 and "samples        12" in out, err
    assert files(local) == files(dataset)
    assert not [path for path in requests(hub, "GET", "somebody/copied/") if ".mp4" in path]
    del repo


def test_a_local_recording_that_is_not_on_the_hub(hub, home, dataset):
    without_skills(dataset, home / "somebody" / "recorded")
    code, _, err = dry_run("--repo-id", "somebody/recorded")
    assert code == 2 and "skills.json: not found; run annotate.py first" in err


def test_revision(hub, home, dataset, tmp_path):
    repo = hub.add_repo("somebody/versions", dataset, tag="v3.0")
    shutil.copytree(dataset, home / "somebody" / "versions")
    changed = (dataset / "meta/skills.json").read_bytes().replace(b"picks up", b"lifts")
    new = repo.files() | {"meta/skills.json": changed}
    commit = repo.add_commit(new, "better words", "somebody", "main")
    for revision, expected in (("main", "lifts"), (commit.oid, "lifts"), ("v3.0", "picks up")):
        code, out, err = dry_run("--repo-id", "somebody/versions", "--revision", revision)
        assert code == 0 and f"robot arm {expected} pink" in out, err
    code, _, err = dry_run("--repo-id", "somebody/versions", "--revision", "v9")
    assert code == 2 and err.splitlines()[-1].startswith("error: --repo-id somebody/versions: ")
    assert "has no meta/skills.json at --revision v9" in err


def test_what_was_downloaded_is_used_without_network(hub, home, dataset):
    hub.add_repo("somebody/cached", dataset, tag="v3.0")
    assert dry_run("--repo-id", "somebody/cached")[0] == 0
    code = textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{str(Path(ap.__file__).parent)!r}]
        import annotate_pgen
        sys.exit(annotate_pgen.main(["--dry-run", "--repo-id", "somebody/cached"]))
        """)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "samples        12" in result.stdout, result.stderr


def test_a_busy_hub_is_asked_again_for_downloads(hub, home, dataset):
    hub.add_repo("somebody/busy", dataset, tag="v3.0")
    hub.fail("GET", "/revision/", 503, times=2)
    code, out, err = dry_run("--repo-id", "somebody/busy")
    assert code == 0 and "samples        12" in out, err


def test_a_copy_with_nothing_but_metadata_is_no_copy(hub, home, dataset):
    hub.add_repo("somebody/partly", dataset, tag="v3.0")
    shutil.copytree(dataset / "meta", home / "somebody" / "partly" / "meta")
    code, out, err = dry_run("--repo-id", "somebody/partly")
    assert code == 0 and "samples        12" in out, err


def test_no_such_repository(hub, home):
    code, _, err = dry_run("--repo-id", "somebody/nowhere")
    assert code == 2 and "--repo-id somebody/nowhere: no download" in err
