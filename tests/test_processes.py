"""Nothing generated is lost: kills, interrupts, launches of several, full disks."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import make_demo
import processes
import pytest
from checks import check, content, expected_samples, files, samples_of
from conftest import annotate, run
from processes import assert_kept, journal_lines
from torch.distributed import TCPStore

import annotate_pgen as ap

pytestmark = pytest.mark.usefixtures("short_prompt")

SETTINGS = {"model": "m", "seed": 0}
DIALOGUES = {
    3: {"user_prompt": "Take the brick.", "robot_utterance": "Sure, I will."},
    7: {"user_prompt": "Nimm “den” Stein!", "robot_utterance": 'Okay, the "pink" one.'},
    9: {"user_prompt": "把积木放好。", "robot_utterance": "好的。"},
}
INTERVAL = 0.5
SAMPLES = 9 + 6 + 8  # Of episodes with 45, 30 and 38 frames at 10 fps.


@pytest.fixture(scope="module")
def dataset(built):
    """The demo with a single skill: no sentence can stand for two, so none fails."""
    skills = (("robot arm picks up pink lego brick", 0.0, 60.0),)
    content = make_demo.skills_of((45, 30, 38), skills=skills)
    return built("one_skill", make_demo.make_dataset, skills=content)


@pytest.fixture
def output(tmp_path):
    """Where the new dataset will be."""
    return tmp_path / "out"


def finish(kept, dataset, model, output, *flags):
    """Go on in this process; what was kept is in the result. Returns what is said."""
    code, _, err = annotate(dataset, model, output, *flags)
    assert code == 0, err
    check(dataset, output)
    assert_kept(kept, output)
    return err


def add_to_journal(folder, dialogues, settings=SETTINGS, rank=0):
    """Leave dialogues as a run would, one call each."""
    journal = ap.Journal(folder / ap.journal_name(settings, rank))
    for index, dialogue in dialogues.items():
        journal.add({index: dialogue})
    journal.close()
    return folder / ap.journal_name(settings, rank)


def test_journal_cut_at_every_byte_of_its_last_line(tmp_path):
    path = add_to_journal(tmp_path, DIALOGUES)
    whole = path.read_bytes()
    more = {12: {"user_prompt": "Stop there.", "robot_utterance": "Okay, stopping."}}
    for end in range(whole.rindex(b"\n", 0, -1) + 1, len(whole) + 1):
        path.write_bytes(whole[:end])
        expected = dict(DIALOGUES)
        if end < len(whole) - 1:
            del expected[9]
        assert ap.read_journals(tmp_path, SETTINGS) == expected
        # The next run's first line does not stick to the torn one.
        add_to_journal(tmp_path, more)
        assert ap.read_journals(tmp_path, SETTINGS) == expected | more


def test_only_damaged_lines_are_dropped(tmp_path):
    path = add_to_journal(tmp_path, DIALOGUES)
    whole = path.read_bytes()
    for junk in (b"\x00\x00\x00\n", b'{"index": 5}\n', b"[1]\n", b"5\n", b"\xff\n"):
        path.write_bytes(junk + whole.replace(b"\n{", b"\n" + junk + b"{"))
        assert ap.read_journals(tmp_path, SETTINGS) == DIALOGUES


def test_the_disk_is_waited_for_once_a_second_at_most(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    journal = ap.Journal(tmp_path / "journal")
    for now in (1e9, 1e9 + 0.4, 1e9 + 0.9, 1e9 + 1.1, 1e9 + 1.9, 1e9 + 2.2):
        monkeypatch.setattr(ap.time, "monotonic", lambda now=now: now)
        journal.add(DIALOGUES)
    assert len(synced) == 3, "at 0.0, 1.1 and 2.2"


def test_journals_of_all_ranks_and_of_no_other_settings(tmp_path):
    """A process may outlive its launch, and write when the next one is at work."""
    add_to_journal(tmp_path, {3: DIALOGUES[3]})
    add_to_journal(tmp_path, {7: DIALOGUES[7]}, rank=11)
    add_to_journal(tmp_path, {9: DIALOGUES[9]}, {"model": "other"}, rank=1)
    known = ap.read_journals(tmp_path, SETTINGS)
    assert known == {3: DIALOGUES[3], 7: DIALOGUES[7]}


@pytest.fixture(scope="module")
def previewed(short_prompt, dataset, model, tmp_path_factory):
    """A work folder with two dialogues of the demo."""
    output = tmp_path_factory.mktemp("previewed") / "out"
    code, _, err = annotate(dataset, model, output, "--preview", 2)
    assert code == 0, err
    return Path(f"{output}.partial")


@pytest.fixture
def begun(previewed, output):
    """Where a run goes on from these two dialogues, with its work folder."""
    return output, Path(shutil.copytree(previewed, f"{output}.partial"))


@pytest.mark.parametrize(
    "named, flags, changed_file",
    [
        ("sample_interval = 1.0, but this run has 2.0", ("--sample-interval", 2), ""),
        ("temperature = 0.7, but", ("--temperature", 0.2), ""),
        ("seed = 0, but this run has 5", ("--seed", 5), ""),
        ("camera_keys = ", ("--camera-keys", "observation.images.wrist"), ""),
        ("frames, skills and tasks = ", (), "meta/skills.json"),
        ("files with images = ", (), "videos/{}.front/chunk-000/file-000.mp4"),
    ],
)
def test_a_changed_setting_is_named(
    named, flags, changed_file, begun, own_dataset, model
):
    output, left = begun
    if changed_file:
        path = own_dataset / changed_file.format("observation.images")
        path.write_bytes(path.read_bytes().replace(b"picks up", b"lifts") + b"\n")
    before = content(left)
    code, out, err = annotate(own_dataset, model, output, *flags)
    assert (code, out) == (2, "")
    assert f"run.json: made with {named}" in err.splitlines()[-1]
    assert "--overwrite" in err.splitlines()[-1]
    assert content(left) == before


def test_another_prompt_and_model(begun, dataset, model, tmp_path, monkeypatch):
    output, left = begun
    another = shutil.copytree(model, tmp_path / "another")
    before = content(left)
    with monkeypatch.context() as patch:
        patch.setattr(ap, "PROMPT", "Do {skill}.")
        assert "another prompt (PROMPT); undo" in annotate(dataset, model, output)[2]
    err = annotate(dataset, another, output)[2]
    assert f"made with model = '{model.name} (" in err.splitlines()[-1]
    assert content(left) == before
    err = finish([], dataset, another, output, "--overwrite")
    assert "0 of 12 dialogues are there already" in err


def test_what_may_change(begun, own_dataset, model):
    """Notes, batch size and precision, and info.json with the same content."""
    output, _ = begun
    (own_dataset / "README.md").write_text("# better")
    info = own_dataset / "meta" / "info.json"
    info.write_text(json.dumps(json.loads(info.read_text())))
    flags = ("--batch-size", 1, "--dtype", "bfloat16", "--overwrite")
    err = finish(journal_lines(output), own_dataset, model, output, *flags)
    assert "2 of 12 dialogues are there already" in err


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
@pytest.mark.parametrize("name", ["thesis.tex", "run.json"])
def test_a_folder_of_somebody_else_is_refused(name, flags, dataset, model, tmp_path):
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / name).write_text('{"name": "years of work"}')
    (left / "lock").touch()
    code, out, err = annotate(dataset, model, tmp_path / "out", *flags)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"error: {left}: holds ")
    assert (left / name).read_text() == '{"name": "years of work"}'


def test_kill_9_in_the_middle_of_writing(dataset, model, output, tmp_path, monkeypatch):
    left = tmp_path / "out.partial"
    process = processes.start(dataset, model, output, held=("write_card", 0))
    assert processes.stop_when_held(process, output, signal.SIGKILL) == -signal.SIGKILL
    assert not output.exists()
    assert (left / "dataset" / "meta" / "info.json").is_file()
    kept = journal_lines(output)
    assert len(kept) == 12
    # As of a kill when a former output had just been moved away.
    (left / "replaced" / "meta").mkdir(parents=True)
    (left / "note.txt").write_text("somebody else's")
    monkeypatch.setattr(ap, "QwenPgen", None)
    finish(kept, dataset, model, output)
    assert files(left) - {"lock"} == {"note.txt"}


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_in_a_batch_and_go_on(number, code, dataset, model, output):
    flags = ("--batch-size", 3)
    process = processes.start(dataset, model, output, *flags, held=("answer", 2))
    assert processes.stop_when_held(process, output, number) == code
    said = Path(f"{output}.log").read_text().splitlines()
    assert said[-1] == "error: interrupted; the same command goes on from here"
    assert not output.exists()
    kept = journal_lines(output)
    assert 2 <= len(kept) <= 6
    finish(kept, dataset, model, output, "--batch-size", 5)


def test_a_second_run_is_refused(dataset, model, output):
    process = processes.start(dataset, model, output, held=("answer", 0))
    processes.wait_until(lambda: processes.is_held(output), process)
    for flags in ((), ("--overwrite",), ("--preview", 1)):
        code, out, err = annotate(dataset, model, output, *flags)
        assert (code, out) == (2, "")
        assert f"{output}.partial: another run is at work" in err.splitlines()[-1]
    processes.release(output)
    assert processes.exit_codes([process]) == [0]
    check(dataset, output)


STORES = []


def serve(world_size):
    """The variables that torchrun sets for each process, and the store that it runs."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    STORES.append(store)
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost"}
    common |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return [common | {"RANK": str(x), "LOCAL_RANK": str(x)} for x in range(world_size)]


SENSELESS = "RANK=abc RANK=2 RANK=-1 WORLD_SIZE= WORLD_SIZE=0 LOCAL_RANK=x MASTER_ADDR="


@pytest.mark.parametrize("variable", SENSELESS.split())
def test_variables_that_make_no_sense(variable, dataset, monkeypatch):
    name, _, value = variable.partition("=")
    for pair in (serve(2)[0] | {name: value}).items():
        monkeypatch.setenv(*pair)
    code, out, err = run("--data-dir", dataset, "--dry-run")
    assert (code, out) == (2, "")
    assert "torchrun" in err.splitlines()[-1]


def start_launch(dataset, model, output, environments, *flags, held=None):
    """Start the processes of a launch; `<output>.<rank>.log` has what each says."""
    flags = ("--sample-interval", INTERVAL, "--batch-size", 2, *flags)
    started = []
    for variables in environments:
        log = f"{output}.{variables['RANK']}.log"
        more = {"held": held, "log": log, "environment": variables}
        started.append(processes.start(dataset, model, output, *flags, **more))
    return started


def said(output, rank):
    """What a rank has said."""
    return Path(f"{output}.{rank}.log").read_text()


def test_a_launch_does_the_job_and_finds_it_done(dataset, built, output, monkeypatch):
    """Many answers are bad, so that some samples fail, with any rank."""
    monkeypatch.setattr(ap, "MAX_TRIES", 2)
    model = built("bad_third", make_demo.make_model, failure_rate=1 / 3)
    launch = start_launch(dataset, model, output, serve(3))
    assert processes.exit_codes(launch) == [0, 0, 0], said(output, 0)
    check(dataset, output, sampled=False)
    missing = set(expected_samples(dataset, INTERVAL)) - set(samples_of(output))
    assert missing
    for episode, frame in missing:
        assert f"failed: episode {episode}, frame {frame}:" in said(output, 0)
    assert f"{'generated in this run':38} {SAMPLES - len(missing)} " in said(output, 0)
    assert said(output, 1) == said(output, 2) == ""
    before = content(output)
    launch = start_launch(dataset, model, output, serve(2))
    assert processes.exit_codes(launch) == [0, 0], said(output, 0)
    assert content(output) == before


def test_a_rank_with_other_settings_is_refused(dataset, model, output):
    first, second = serve(2)
    (lead,) = start_launch(dataset, model, output, [first])
    (odd,) = start_launch(dataset, model, output, [second], "--seed", 3)
    assert processes.exit_codes([odd]) == [1]
    assert "rank 1: rank 0 has seed = 0, but" in said(output, 1).splitlines()[-1]
    assert processes.stop_when(lead, lambda: True, signal.SIGTERM) == 143


def test_bad_input_is_said_once(dataset, model, output, tmp_path):
    launch = start_launch(tmp_path / "nothing", model, output, serve(2))
    processes.wait_until(Path(f"{output}.1.log").exists, launch[1])
    assert processes.exit_codes(launch[:1]) == [2]
    assert str(tmp_path / "nothing") in said(output, 0).splitlines()[-1]
    # The other waits for its part until torchrun ends it, at the latest.
    code = processes.stop_when(launch[1], lambda: True, signal.SIGTERM)
    assert code in (143, -signal.SIGTERM)
    assert said(output, 1) == ""


def test_a_kill_under_torchrun_and_another_number_of_processes(
    dataset, model, output, tmp_path
):
    command = (
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc-per-node=2", "--standalone", processes.__file__),
        *(json.dumps(processes.tables()), json.dumps(("answer", 2)), output),
        *("--data-dir", dataset, "--model", model, "--output-dir", output),
        *("--device", "cpu", "--dtype", "float32"),
        *("--batch-size", 2, "--sample-interval", INTERVAL),
    )
    with (tmp_path / "log").open("w") as log:
        launch = subprocess.Popen(map(str, command), stdout=log, stderr=log)
    try:
        processes.wait_until(
            lambda: launch.poll() or all(processes.is_held(output, x) for x in (0, 1))
        )
        assert launch.poll() is None, (tmp_path / "log").read_text()
        os.kill(int(Path(f"{output}.pid-1").read_text()), signal.SIGKILL)
        assert launch.wait(120) != 0
    finally:
        launch.terminate()
    assert not output.exists()
    kept = journal_lines(output)
    assert 2 <= len(kept) < SAMPLES
    # The same command in a launch of three goes on.
    launch = start_launch(dataset, model, output, serve(3))
    assert processes.exit_codes(launch) == [0, 0, 0], said(output, 0)
    assert len(check(dataset, output)) == SAMPLES
    assert_kept(kept, output)
    assert f"{len(kept)} of {SAMPLES} dialogues are there" in said(output, 0)
    assert said(output, 1) == said(output, 2) == ""


@pytest.fixture
def small_disk(tmp_path):
    """A real disk in memory, with room for the demo."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(mounted)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    yield mounted
    subprocess.run(["umount", "-l", str(mounted)], capture_output=True)


@pytest.mark.parametrize(
    "owner, name, place",
    [(ap, "write_dataset", "dataset"), (ap.QwenPgen, "answer", "dialogues-")],
)
def test_a_disk_that_fills_up(
    owner, name, place, dataset, model, small_disk, monkeypatch
):
    """While the new dataset is written, and while the journal is."""
    output, filler = small_disk / "out", small_disk / "filler"
    call = getattr(owner, name)

    def fill_and_call(*args, **kwargs):
        if journal_lines(output):
            with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
                while True:
                    file.write(bytes(512))
        return call(*args, **kwargs)

    # So many that the journal grows beyond its first page, which it has.
    flags = ("--batch-size", 4, "--sample-interval", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fill_and_call)
        code, _, err = annotate(dataset, model, output, *flags)
    assert code == 1
    assert f"{output}.partial/{place}" in err.splitlines()[-1]
    assert "check the disk" in err.splitlines()[-1]
    kept = journal_lines(output)
    assert len(kept) >= 4
    filler.unlink()
    finish(kept, dataset, model, output, *flags)
