"""Download, upload, card and the way back, over HTTP with a stand-in for the Hub."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import make_demo
import pytest
from checks import annotations, check, content, files, record
from conftest import HOME, annotate, run
from huggingface_hub import DatasetCard

import annotate_pgen as ap

pytestmark = pytest.mark.usefixtures("short_prompt")

CPU = ("--device", "cpu", "--dtype", "float32")
CARD = """\
---
license: cc-by-nc-4.0
pretty_name: Bricks
tags:
- LeRobot
- so101
train-eval-index:
- config: default
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
    """LeRobot's home, empty before and after; nobody waits between two tries."""
    shutil.rmtree(HOME / "lerobot", ignore_errors=True)
    monkeypatch.setattr(ap, "RETRY_AFTER", (0.01,) * 5)
    monkeypatch.setattr(
        "huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None)
    )
    yield HOME / "lerobot"
    shutil.rmtree(HOME / "lerobot", ignore_errors=True)


@pytest.fixture(scope="module")
def finished(short_prompt, dataset, model, tmp_path_factory):
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


def test_round_trip(hub, home, built, model, tmp_path, monkeypatch, capsys):
    """From one repository to another, and read back as the specification prints it."""
    monkeypatch.setitem(hub.tokens, "hf_lerobot", "lerobot")
    monkeypatch.setenv("HF_TOKEN", "hf_lerobot")
    cameras = {"up": "image", "side": "image"}
    source = built("images_hub", make_demo.make_dataset, cameras=cameras)
    (source / "README.md").write_text(CARD)
    name = "lerobot/svla_so101_pickplace"
    hub.add_repo(name, source, tag="v3.0")
    before = hub.repos[name].files()
    flags = (
        "--repo-id",
        name,
        "--model",
        model,
        *CPU,
        "--output-dir",
        tmp_path / "out",
    )
    code, out, err = run(*flags, "--push-to-hub")
    target = f"{name}_with_high_level_tasks"
    assert code == 0, err
    assert out.splitlines()[-1].endswith(f"{hub.url}/datasets/{target}")
    lines = check(source, tmp_path / "out")
    assert hub.repos[target].files("v3.0") == content(tmp_path / "out")
    assert hub.repos[name].files() == before and not hub.repos[target].private

    shutil.rmtree(home)
    capsys.readouterr()
    exec(ACCESS, {})
    frame_index = 100 - 45 - 30
    before = [
        line
        for line in lines
        if line["episode_id"] == 2 and line["frame_index"] <= frame_index
    ]
    line = before[-1]
    assert capsys.readouterr().out.splitlines() == [
        f"User prompt: {line['user_prompt']}",
        f"Robot utterance: {line['robot_utterance']}",
        f"Skill: {line['skill_current']}",
    ]

    commits = len(hub.repos[target].commits)
    monkeypatch.setattr(ap, "QwenPgen", None)
    code, out, err = run(*flags, "--push-to-hub")
    assert code == 0, err
    assert f"/datasets/{target}" in out
    assert len(hub.repos[target].commits) == commits


# --------------------------------------------------- before the model is loaded


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
def test_no_right_to_write(
    token, target, failure, hub, home, dataset, tmp_path, monkeypatch
):
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
    assert (code, out) == (2, ""), err
    assert "--push-to-hub" in last
    assert target in last
    assert "--new-repo-id" in last
    assert "hf auth login" in last
    assert token is None or token not in out + err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", [429, 500, 503, "drop"])
def test_a_busy_hub_is_asked_again(how, hub, home):
    for method, part in (
        ("GET", "whoami"),
        ("POST", "repos/create"),
        ("POST", "/preupload/"),
    ):
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
    code, _, err = run(
        "--data-dir", dataset, "--repo-id", "a/b", "--new-repo-id", "A/B"
    )
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


def test_a_failed_upload_is_taken_up_again(
    hub, home, dataset, model, tmp_path, monkeypatch
):
    output, flags = (
        tmp_path / "out",
        ("--push-to-hub", "--new-repo-id", "somebody/late"),
    )
    hub.fail("POST", "/commit/", 500, times=None)
    code, _, err = annotate(dataset, model, output, *flags)
    last = err.splitlines()[-1]
    assert code == 1
    assert str(output) in last
    check(dataset, output)
    hub.heal()
    sent = requests(hub, "PUT", "/lfs/")
    assert sent
    monkeypatch.setattr(ap, "QwenPgen", None)
    code, _, err = annotate(dataset, model, output, *flags)
    assert code == 0, err
    assert requests(hub, "PUT", "/lfs/") == sent, "no file is sent twice"
    assert uploaded(hub, "somebody/late", "v3.0") == content(output)


def test_a_refused_upload_is_not_repeated(hub, home, finished):
    hub.add_repo("somebody/refused")
    hub.fail("POST", "/commit/", 403, times=None)
    with pytest.raises(ap.RunError, match="403"):
        ap.push(finished, "somebody/refused")
    assert [path for _, path, _ in hub.failed if "somebody/refused" in path] == [
        "/api/datasets/somebody/refused/commit/main"
    ]


def test_stale_files_go_and_bookkeeping_stays(hub, home, finished, tmp_path):
    own = Path(shutil.copytree(finished, tmp_path / "out"))
    for target in ("somebody/first", "somebody/second"):
        stale = tmp_path / target.replace("/", "_")
        for name in ("data/chunk-000/file-007.parquet", "meta/old.json"):
            (stale / name).parent.mkdir(parents=True, exist_ok=True)
            (stale / name).write_bytes(b"stale")
        hub.add_repo(target, stale, tag="v3.0")
        bookkeeping = (".cache/huggingface/x.metadata", ".cache/notes", ".git/config")
        for name in (*bookkeeping, ".gitignore"):
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
    lines = check(own_dataset, output)
    assert record(output)["source"] == "lab/bricks"
    assert record(output)["source_card"] == CARD
    card = DatasetCard.load(output / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "cc-by-nc-4.0"
    assert data["pretty_name"] == "Bricks"
    assert data["train-eval-index"] == [{"config": "default"}]
    assert data["tags"] == ["LeRobot", "synthetic", "so101"]
    assert data["source_datasets"] == ["lab/bricks"]
    files_of_data = {"config_name": "default", "data_files": "data/*/*.parquet"}
    assert data["configs"] == [files_of_data]
    assert "dataset_info" not in data, "it describes the columns that were"
    assert "https://huggingface.co/datasets/lab/bricks" in card.text
    assert 'LeRobotDataset("lab/bricks_with_high_level_tasks", ' in card.text
    assert "arxiv.org/abs/2502.19417" in card.text
    assert "cc-by-nc-4.0" in card.text
    assert "# Bricks\n\nRecorded in our kitchen." in card.text
    cells = {
        tuple(cell.strip() for cell in row.strip("|").split("|"))
        for row in card.text.splitlines()
        if row.startswith("|")
    }
    for kind in ("scenario_type", "response_type"):
        for name in {line[kind] for line in lines}:
            count = sum(line[kind] == name for line in lines)
            assert (name, str(count)) in cells
    values = {row[1] for row in cells if len(row) == 2}
    assert {"12", "113", model.name} <= values
    assert str(model) not in card.text, "a path of this machine"
    dialogues = {(row[3], row[4]) for row in cells if len(row) == 5}
    written = {(line["user_prompt"], line["robot_utterance"]) for line in lines}
    assert len(dialogues & written) >= 2


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
        "no template: {{ 7 * 7 }} {% if",
    ],
)
def test_odd_cards_are_kept_as_text(text, finished, tmp_path):
    output = Path(shutil.copytree(finished, tmp_path / "out"))
    made = record(output)
    made["source_card"] = text
    (output / ap.RECORD).write_text(json.dumps(made))
    lines = annotations(output)
    lines[0]["skill_current"] = "a | b\n\n# c <script>"
    path = output / "meta" / "syn_annotations.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ap.write_card(output, "somebody/odd")
    card = DatasetCard.load(output / "README.md")
    assert text.split("---\n")[-1] in card.text
    assert "LeRobot" in card.data.tags
    assert "| a \\| b # c &lt;script> |" in card.text


def test_a_card_that_is_no_utf_8(own_dataset, model, tmp_path):
    (own_dataset / "README.md").write_bytes(b"\xef\xbb\xbf# Caf\xe9")
    flags = ("--sample-interval", 9)
    code, _, err = annotate(own_dataset, model, tmp_path / "out", *flags)
    assert code == 0, err
    assert "# Caf" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_another_name(hub, home, dataset, finished, tmp_path):
    """The card is written again from what stands in the finished folder."""
    output = Path(shutil.copytree(finished, tmp_path / "out"))
    before = content(output)
    old_name = record(output)["name"]
    model = record(output)["settings"]["model"]
    flags = ("--data-dir", dataset, "--output-dir", output, "--model", model)
    for name in ("somebody/renamed", "somebody/again"):
        code, _, err = run(*flags, "--push-to-hub", "--new-repo-id", name)
        assert code == 0, err
        pushed = hub.repos[name].files()
        assert json.loads(pushed[str(ap.RECORD)])["name"] == name
        card = pushed["README.md"].decode()
        assert f'LeRobotDataset("{name}", ' in card
        assert old_name not in card
    assert "somebody/renamed" not in card
    assert (output / "README.md").read_text() == card
    # Nothing else has changed, and under the old name all is as it was.
    ap.rename_dataset(output, old_name)
    assert content(output) == before


def test_an_edited_card_is_kept_under_its_name(hub, home, dataset, finished, tmp_path):
    output = Path(shutil.copytree(finished, tmp_path / "out"))
    name = "somebody/edited"
    ap.rename_dataset(output, name)
    card = output / "README.md"
    card.write_text(card.read_text() + "\nWe have checked them all.\n")
    model = record(output)["settings"]["model"]
    flags = ("--data-dir", dataset, "--output-dir", output, "--model", model)
    code, _, err = run(*flags, "--push-to-hub", "--new-repo-id", name)
    assert code == 0, err
    pushed = hub.repos[name].files()["README.md"].decode()
    assert "We have checked them all." in pushed


# ---------------------------------------------------------------- download


def dry_run(*flags):
    return run("--dry-run", *flags)


def without_skills(dataset, folder):
    shutil.copytree(dataset, folder)
    (folder / "meta/skills.json").unlink()
    return folder


def test_skills_that_only_main_has(hub, home, dataset, tmp_path):
    old = without_skills(dataset, tmp_path / "old")
    repo = hub.add_repo("somebody/later", old, tag="v3.0")
    skills = {"meta/skills.json": (dataset / "meta/skills.json").read_bytes()}
    code, _, err = dry_run("--repo-id", "somebody/later")
    assert code == 2
    assert "v3.0 or main" in err.splitlines()[-1]
    assert "meta/skills.json" in err.splitlines()[-1]
    fetched = requests(hub, "GET", "somebody/later/resolve/")
    assert not [path for path in fetched if "/meta/" not in path]
    repo.add_commit(repo.files() | skills, "skills", "somebody", "main")
    code, out, err = dry_run("--repo-id", "somebody/later")
    assert code == 0, err
    assert "12 samples" in out


def test_a_local_copy_without_skills_names_the_way_out(hub, home, dataset, tmp_path):
    """Skills that were made later are on the Hub; the local copy is never written."""
    hub.add_repo("somebody/copied", dataset, tag="v3.0")
    local = without_skills(dataset, home / "somebody" / "copied")
    before = content(local)
    code, _, err = dry_run("--repo-id", "somebody/copied")
    assert code == 2
    assert str(local) in err.splitlines()[-1]
    assert "--revision main" in err.splitlines()[-1]
    assert not requests(hub, "GET", "somebody/copied/")
    code, out, err = dry_run("--repo-id", "somebody/copied", "--revision", "main")
    assert code == 0, err
    assert "12 samples" in out
    assert content(local) == before


def test_a_local_recording_that_is_not_on_the_hub(hub, home, dataset):
    local = without_skills(dataset, home / "somebody" / "recorded")
    code, _, err = dry_run("--repo-id", "somebody/recorded")
    assert code == 2
    assert str(local) in err.splitlines()[-1]


def test_the_downloaded_source_is_not_written(hub, home, dataset, model, tmp_path):
    hub.add_repo("somebody/source", dataset, tag="v3.0")
    flags = ("--repo-id", "somebody/source", "--model", model, *CPU)
    assert dry_run("--repo-id", "somebody/source")[0] == 0
    before = content(home)
    assert run(*flags, "--output-dir", tmp_path / "out")[0] == 0
    check(dataset, tmp_path / "out")
    after = content(home)
    # The client notes when it asked for a version.
    changed = {name for name in after if after[name] != before.get(name)}
    assert not [name for name in changed if "/snapshots/" in name or "/blobs/" in name]
    assert files(home) - changed == files(home) & before.keys() - changed


def test_revision(hub, home, dataset, tmp_path):
    repo = hub.add_repo("somebody/versions", dataset, tag="v3.0")
    shutil.copytree(dataset, home / "somebody" / "versions")
    skills = (dataset / "meta/skills.json").read_bytes()
    changed = {"meta/skills.json": skills.replace(b"picks up", b"lifts")}
    new = repo.files() | changed
    commit = repo.add_commit(new, "better words", "somebody", "main")
    flags = ("--repo-id", "somebody/versions", "--revision")
    for revision, expected in (
        ("main", "lifts"),
        (commit.oid, "lifts"),
        ("v3.0", "picks up"),
    ):
        code, out, err = dry_run(*flags, revision)
        assert code == 0, err
        assert f"robot arm {expected} pink" in out
    code, _, err = dry_run(*flags, "v9")
    assert code == 2
    assert "--repo-id somebody/versions" in err.splitlines()[-1]
    assert "v9" in err.splitlines()[-1]


def test_what_was_downloaded_is_used_without_network(hub, home, dataset, monkeypatch):
    hub.add_repo("somebody/cached", dataset, tag="v3.0")
    assert dry_run("--repo-id", "somebody/cached")[0] == 0
    # Nobody listens there.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    asked = len(hub.requests)
    code, out, err = dry_run("--repo-id", "somebody/cached")
    assert len(hub.requests) == asked
    assert code == 0, err
    assert "12 samples" in out


def test_a_busy_hub_is_asked_again_for_downloads(hub, home, dataset):
    hub.add_repo("somebody/busy", dataset, tag="v3.0")
    hub.fail("GET", "/revision/", 503, times=2)
    code, out, err = dry_run("--repo-id", "somebody/busy")
    assert code == 0, err
    assert "12 samples" in out


def test_a_copy_with_nothing_but_metadata_is_no_copy(hub, home, dataset):
    hub.add_repo("somebody/partly", dataset, tag="v3.0")
    shutil.copytree(dataset / "meta", home / "somebody" / "partly" / "meta")
    code, out, err = dry_run("--repo-id", "somebody/partly")
    assert code == 0, err
    assert "12 samples" in out


def test_no_such_repository(hub, home):
    code, _, err = dry_run("--repo-id", "somebody/nowhere")
    assert code == 2
    assert "--repo-id somebody/nowhere" in err.splitlines()[-1]
