"""Nothing generated is lost: kills, interrupts, resuming, two runs, full outputs."""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import make_demo
import processes
import pytest
from checks import annotations, check, content, expected_samples, files
from conftest import annotate, run

import annotate_pgen as ap

pytestmark = pytest.mark.usefixtures("short_prompt")

SETTINGS = {"model": "m", "seed": 0}
DIALOGUES = {
    3: {"user_prompt": "Take the brick.", "robot_utterance": "Sure, I will."},
    7: {"user_prompt": "Nimm “den” Stein!", "robot_utterance": 'Okay, the "pink" one.'},
    9: {"user_prompt": "把积木放好。", "robot_utterance": "好的。"},
}


def add_to_journal(folder, settings, dialogues, rank=0):
    path = folder / ap.journal_name(settings, rank)
    with contextlib.closing(ap.Journal(path)) as journal:
        for index, dialogue in dialogues.items():
            journal.add({index: dialogue})


def take_up(folder, settings=SETTINGS, overwrite=False, add=None):
    """Take up a work folder, and leave further dialogues there."""
    with ap.lock_work_dir(folder):
        known = ap.take_up_work(folder, settings, overwrite)
        add_to_journal(folder, settings, add or {})
    return known


def leave_work(dataset, model, output, dialogues):
    """Leave dialogues in the work folder as an interrupted run would."""
    flags = ("--data-dir", dataset, "--model", model, "--output-dir", output)
    args = ap.parse_args([str(flag) for flag in flags])
    job = ap.prepare_job(args, quiet=True)
    take_up(job.work_dir, job.settings, add=dialogues)


def places(lines):
    return [(line["episode_id"], line["frame_index"]) for line in lines]


def rows_of(samples, lengths=(45, 30, 38)):
    """The rows of (episode, frame) in the whole dataset."""
    return [sum(lengths[:episode]) + frame for episode, frame in samples]


# ---------------------------------------------------------------- kills and interrupts


def test_kill_9(dataset, built, tmp_path):
    model = built("bad_tenth", make_demo.make_model, failure_rate=0.1)
    output = tmp_path / "out"
    killed, kept, lost, twice = processes.kill_again_and_again(
        dataset, model, output, kills=4
    )
    assert killed == 4
    assert kept >= 4
    assert lost == 0
    assert twice == 0
    lines = check(dataset, output, sampled=False)
    assert set(places(lines)) <= set(expected_samples(dataset, 0.2))
    assert not Path(f"{output}.partial").exists()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_in_a_batch_and_go_on(number, code, dataset, model, tmp_path):
    output = tmp_path / "out"
    process = processes.start(dataset, model, output, "--batch-size", 3, hold_after=2)
    ended = processes.stop_when(process, lambda: processes.is_held(output), number)
    assert ended == code
    assert not output.exists()
    kept = [json.loads(line) for line in processes.journal_lines(output)]
    assert 2 <= len(kept) <= 6
    exit_code, _, err = annotate(dataset, model, output, "--batch-size", 5)
    assert exit_code == 0, err
    lines = check(dataset, output)
    written = dict(zip(rows_of(places(lines)), lines, strict=True))
    for entry in kept:
        for key in ("user_prompt", "robot_utterance"):
            assert written[entry["index"]][key] == entry[key]


def test_interrupt_before_anything_else(monkeypatch):
    def interrupted(argv):
        # As Python's own handler does.
        raise KeyboardInterrupt

    monkeypatch.setattr(ap, "parse_args", interrupted)
    code, out, err = run("--dry-run")
    assert (code, out) == (130, "")
    assert len(err.splitlines()) == 1


def test_interrupt_while_writing(dataset, model, tmp_path, monkeypatch):
    output = tmp_path / "out"

    def write_half(source, target):
        target.write_text("{")
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(ap, "write_info", write_half)
        assert annotate(dataset, model, output)[0] == 143
    assert not output.exists()
    assert len(processes.journal_lines(output)) == 12
    assert Path(f"{output}.partial", "dataset", "meta", "info.json").is_file()
    monkeypatch.setattr(ap, "QwenPgen", None)
    code, _, err = annotate(dataset, model, output)
    assert code == 0, err
    check(dataset, output)


def test_a_second_run_is_refused(dataset, model, tmp_path):
    output = tmp_path / "out"
    process = processes.start(dataset, model, output, hold_after=0)
    processes.wait_until(lambda: processes.is_held(output), process)
    for flags in ((), ("--overwrite",)):
        code, out, err = annotate(dataset, model, output, *flags)
        assert (code, out) == (2, "")
        assert f"{output}.partial" in err.splitlines()[-1]
    processes.release(output)
    assert processes.exit_codes([process]) == [0]
    check(dataset, output)


def test_what_another_run_has_just_finished_is_not_made_again(
    dataset, model, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    lock_work_dir = ap.lock_work_dir

    def overtaken(work_dir):
        monkeypatch.setattr(ap, "lock_work_dir", lock_work_dir)
        assert annotate(dataset, model, output)[0] == 0
        return lock_work_dir(work_dir)

    monkeypatch.setattr(ap, "lock_work_dir", overtaken)
    code, _, err = annotate(dataset, model, output)
    assert code == 2
    assert str(output) in err.splitlines()[-1]
    check(dataset, output)
    # A lone lock may be left, which is nobody's.
    assert files(f"{output}.partial") <= {"lock"}


# ---------------------------------------------------------------- the journal


def test_journal_cut_at_every_byte_of_its_last_line(tmp_path):
    folder = tmp_path / "out.partial"
    take_up(folder, add=DIALOGUES)
    assert take_up(folder) == DIALOGUES
    path = folder / ap.journal_name(SETTINGS, 0)
    whole = path.read_bytes()
    more = {12: {"user_prompt": "Stop there.", "robot_utterance": "Okay, stopping."}}
    for end in range(whole.rindex(b'{"index"'), len(whole) + 1):
        path.write_bytes(whole[:end])
        expected = dict(DIALOGUES)
        if end < len(whole) - 1:
            del expected[9]
        assert take_up(folder, add=more) == expected
        expected.update(more)
        assert take_up(folder) == expected


@pytest.mark.parametrize(
    "junk", [b"\x00\x00\x00\n", b'{"index": 5}\n', b"[1]\n", b"5\n", b"\xff\n"]
)
def test_only_a_damaged_line_is_dropped(junk, tmp_path):
    folder = tmp_path / "out.partial"
    take_up(folder, add=DIALOGUES)
    path = folder / ap.journal_name(SETTINGS, 0)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], junk, *lines[2:]]))
    assert take_up(folder) == DIALOGUES


def test_journals_of_all_ranks_are_read(tmp_path):
    folder = tmp_path / "out.partial"
    take_up(folder, add={3: DIALOGUES[3]})
    add_to_journal(folder, SETTINGS, {7: DIALOGUES[7]}, rank=11)
    assert take_up(folder) == {3: DIALOGUES[3], 7: DIALOGUES[7]}


def test_skill_recovered_survives(tmp_path):
    verified = {3: dict(DIALOGUES[3], skill_recovered=False)}
    take_up(tmp_path / "out.partial", add=verified)
    assert take_up(tmp_path / "out.partial") == verified


def test_nothing_is_left_where_nothing_was_generated(tmp_path):
    folder = tmp_path / "a" / "out.partial"
    with pytest.raises(ap.InputError), ap.lock_work_dir(folder):
        ap.take_up_work(folder, SETTINGS, overwrite=False)
        add_to_journal(folder, SETTINGS, {})
        raise ap.InputError("no such model")
    assert not folder.exists()


def test_other_settings_are_refused_and_keep_the_journal(tmp_path):
    folder = tmp_path / "out.partial"
    other = {"model": "m", "seed": 1}
    take_up(folder, add=DIALOGUES)
    with pytest.raises(ap.InputError, match="seed = 0"):
        take_up(folder, settings=other)
    assert take_up(folder) == DIALOGUES
    assert take_up(folder, settings=other, overwrite=True) == {}
    assert not folder.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": 1}', "\x00" * 99])
def test_a_damaged_record_of_settings(content, tmp_path):
    """The journal's name says which settings it is of."""
    folder = tmp_path / "out.partial"
    other = {"model": "m", "seed": 1}
    take_up(folder, add=DIALOGUES)
    (folder / "run.json").write_text(content)
    with pytest.raises(
        ap.InputError, match=r"run\.json: .*cannot be read.*--overwrite"
    ):
        take_up(folder, settings=other)
    assert take_up(folder) == DIALOGUES
    (folder / "run.json").write_text(content)
    assert take_up(folder, settings=other, overwrite=True) == {}


def test_overwrite_takes_up_what_has_the_same_settings(tmp_path):
    folder = tmp_path / "out.partial"
    take_up(folder, overwrite=True, add=DIALOGUES)
    assert take_up(folder, overwrite=True) == DIALOGUES


def test_lines_of_a_process_with_other_settings_are_not_taken(tmp_path):
    """A process may outlive its launch, and write when the next one is at work."""
    folder = tmp_path / "out.partial"
    take_up(folder, add={3: DIALOGUES[3]})
    add_to_journal(folder, {"model": "other"}, {7: DIALOGUES[7]}, rank=1)
    assert take_up(folder) == {3: DIALOGUES[3]}


@pytest.mark.parametrize("names", [("lock",), ("lock", ".run.json")])
def test_what_a_kill_at_the_very_start_leaves(names, dataset, model, tmp_path):
    left = tmp_path / "out.partial"
    left.mkdir()
    for name in names:
        (left / name).touch()
    code, _, err = annotate(dataset, model, tmp_path / "out", "--sample-interval", 9)
    assert code == 0, err
    assert not left.exists()


def test_a_work_folder_of_somebody_else_is_refused(dataset, tmp_path):
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / "thesis.tex").write_text("years of work")
    (left / "lock").touch()
    for flags in ((), ("--overwrite",)):
        code, out, err = annotate(dataset, "no-model", tmp_path / "out", *flags)
        assert (code, out) == (2, "")
        assert str(left) in err.splitlines()[-1]
        assert (left / "thesis.tex").read_text() == "years of work"


# ---------------------------------------------------------------- work taken up again


def test_partial_work_is_taken_up_whatever_overwrite_says(dataset, model, tmp_path):
    output = tmp_path / "out"
    left = {0: DIALOGUES[3], 10: DIALOGUES[7]}
    leave_work(dataset, model, output, left)
    code, _, err = annotate(dataset, model, output, "--overwrite")
    assert code == 0, err
    lines = check(dataset, output)
    assert [line["user_prompt"] for line in lines[:2]] == [
        DIALOGUES[3]["user_prompt"],
        DIALOGUES[7]["user_prompt"],
    ]


def change_skills(dataset):
    path = dataset / "meta" / "skills.json"
    path.write_text(path.read_text().replace("picks up", "lifts"))


def change_video(dataset):
    path = dataset / "videos/observation.images.wrist/chunk-000/file-000.mp4"
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize(
    "setting, flags, change",
    [
        ("sample_interval", ("--sample-interval", 2), None),
        ("temperature", ("--temperature", 0.2), None),
        ("seed", ("--seed", 5), None),
        ("align_skills", ("--align-skills",), None),
        ("verify", ("--verify",), None),
        ("camera_keys", ("--camera-keys", "observation.images.wrist"), None),
        ("camera_keys", ("--num-image-views-per-sample", 2), None),
        ("model", ("--model", "another-model"), None),
        ("skills", (), change_skills),
        ("dataset", (), change_video),
    ],
)
def test_a_changed_setting_is_named(setting, flags, change, own_dataset, tmp_path):
    output = tmp_path / "out"
    model = tmp_path / "no-model"
    leave_work(own_dataset, model, output, DIALOGUES)
    if change:
        change(own_dataset)
    before = content(f"{output}.partial")
    code, out, err = annotate(own_dataset, model, output, *flags)
    last = err.splitlines()[-1]
    assert (code, out) == (2, "")
    assert f"{setting} = " in last
    assert "--overwrite" in last
    assert content(f"{output}.partial") == before
    # Now it gets as far as loading the model, which is not there.
    code, _, err = annotate(own_dataset, model, output, *flags, "--overwrite")
    assert code == 2
    assert "--model" in err.splitlines()[-1]
    assert not Path(f"{output}.partial").exists()


def test_the_line_of_the_prompt_that_differs_is_named(dataset, tmp_path, monkeypatch):
    output = tmp_path / "out"
    monkeypatch.setattr(ap, "PROMPT", "First line.\nDo {skill}.\nLast line.")
    leave_work(dataset, "no-model", output, DIALOGUES)
    monkeypatch.setattr(ap, "PROMPT", "First line.\nPlease do {skill}.\nLast line.")
    code, _, err = annotate(dataset, "no-model", output)
    last = err.splitlines()[-1]
    assert code == 2
    assert "'Do {skill}.'" in last
    assert "'Please do {skill}.'" in last
    assert "First line" not in last
    assert "Last line" not in last


def test_what_may_change(own_dataset, model, tmp_path):
    """Batch size and precision, and notes beside the dataset."""
    output = tmp_path / "out"
    leave_work(own_dataset, model, output, {0: DIALOGUES[3]})
    (own_dataset / "README.md").write_text("# better")
    flags = ("--batch-size", 1, "--dtype", "bfloat16")
    code, _, err = annotate(own_dataset, model, output, *flags)
    assert code == 0, err
    assert annotations(output)[0]["user_prompt"] == DIALOGUES[3]["user_prompt"]


def test_what_has_failed_is_tried_again(own_dataset, built, model, tmp_path):
    """Here no episode can borrow a dialogue: all have skills of their own."""
    skills = make_demo.skills_of((45, 30, 38))
    for index, episode in skills["episodes"].items():
        for skill in episode["skills"]:
            skill["name"] += f" in episode {index}"
    make_demo.write_skills(own_dataset, skills)
    own = Path(shutil.copytree(model, tmp_path / "model"))
    bad = built("bad", make_demo.make_model, failure_rate=1.0)
    output = tmp_path / "out"
    leave_work(own_dataset, own, output, {0: DIALOGUES[3]})
    shutil.copy(bad / "model.safetensors", own)
    code, _, err = annotate(own_dataset, own, output)
    assert code == 1, err
    assert "[1, 2]" in err.splitlines()[-1], "the episodes without a dialogue"
    assert not output.exists()
    assert len(processes.journal_lines(output)) == 1
    shutil.copy(model / "model.safetensors", own)
    code, _, err = annotate(own_dataset, own, output)
    assert code == 0, err
    assert len(check(own_dataset, output)) == 12


# ---------------------------------------------------------------- finished outputs


def test_finished_output(dataset, model, tmp_path):
    output = tmp_path / "out"
    assert annotate(dataset, model, output)[0] == 0
    before = content(output)
    code, _, err = annotate(dataset, model, output, "--batch-size", 3)
    assert code == 0, err
    assert content(output) == before
    code, out, err = annotate(dataset, model, output, "--seed", 1)
    assert (code, out) == (2, "")
    assert "seed = 0" in err.splitlines()[-1]
    assert "--overwrite" in err.splitlines()[-1]
    assert content(output) == before
    (output / ap.RECORD).write_text("{")
    code, out, err = annotate(dataset, model, output)
    assert (code, out) == (2, "")
    assert str(ap.RECORD) in err.splitlines()[-1]
    code, _, err = annotate(dataset, model, output, "--seed", 1, "--overwrite")
    assert code == 0, err
    check(dataset, output)
    assert content(output) != before
    assert not Path(f"{output}.partial").exists()


def test_overwrite_makes_a_finished_output_again(dataset, model, tmp_path):
    output = tmp_path / "out"
    assert annotate(dataset, model, output)[0] == 0
    record = output / ap.RECORD
    number = record.stat().st_ino
    with record.open() as file:
        code, _, err = annotate(dataset, model, output, "--overwrite")
        assert code == 0, err
        assert record.stat().st_ino != number
        # The old one is gone, also from under its other names.
        assert os.fstat(file.fileno()).st_nlink == 0
    check(dataset, output)


def test_a_kill_in_the_last_clean_up(dataset, model, tmp_path):
    output = tmp_path / "out"
    left = tmp_path / "out.partial"
    assert annotate(dataset, model, output)[0] == 0
    before = content(output)
    (left / "replaced-5" / "meta").mkdir(parents=True)
    (left / "run.json").write_text("{}")
    code, _, err = annotate(dataset, model, output)
    assert code == 0, err
    assert content(output) == before
    code, _, err = annotate(dataset, model, output, "--overwrite")
    assert code == 0, err
    check(dataset, output)
    assert not left.exists()


def test_a_kill_as_the_new_output_takes_the_place_of_the_old(
    dataset, model, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    left = tmp_path / "out.partial"
    leave_work(dataset, model, output, dict.fromkeys(range(0, 40, 10), DIALOGUES[3]))
    with monkeypatch.context() as patch:
        patch.setattr(ap, "put_in_place", lambda job: None)
        assert annotate(dataset, model, output)[0] == 0
    (left / "dataset").rename(left / "replaced-5")
    monkeypatch.setattr(ap, "QwenPgen", None)
    code, _, err = annotate(dataset, model, output)
    assert code == 0, err
    check(dataset, output)
    assert not left.exists()


def test_a_folder_that_appears_during_the_run_is_not_replaced(
    dataset, model, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    write_dataset = ap.write_dataset

    def write_and_be_overtaken(*args):
        write_dataset(*args)
        output.mkdir()
        (output / "thesis.tex").write_text("years of work")

    monkeypatch.setattr(ap, "write_dataset", write_and_be_overtaken)
    code, _, err = annotate(dataset, model, output)
    assert code == 1
    assert str(output) in err.splitlines()[-1]
    assert (output / "thesis.tex").read_text() == "years of work"
    assert len(processes.journal_lines(output)) == 12
