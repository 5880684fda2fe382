"""Several processes share the work: under torchrun, under srun, and when one of them dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import make_demo
import pytest
import survival
from checks import check, content
from conftest import run
from hypothesis import given
from hypothesis import strategies as st

import annotate_pgen as ap

ROOT = Path(__file__).parents[1]


@given(st.lists(st.integers(), unique=True), st.integers(1, 20))
def test_all_is_dealt_once_in_order_and_evenly(items, world):
    shares = [ap.share(items, rank, world) for rank in range(world)]
    assert list(chain(*shares)) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.fixture
def launch(monkeypatch):
    def set_environment(environment):
        for name in list(os.environ):
            if name.startswith("SLURM_") or name in TORCHRUN:
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return set_environment


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}
JOB = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "2", "SLURM_NTASKS": "8", "SLURM_LOCALID": "2"}
STEP = JOB | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (0, 1, 0)),
        (TORCHRUN, (5, 16, 1)),
        (STEP, (2, 4, 2)),
        (JOB | {"SLURM_STEP_ID": "0"}, (2, 8, 2)),
        (JOB, (0, 1, 0)),
        (JOB | TORCHRUN, (5, 16, 1)),
        (STEP | TORCHRUN, (5, 16, 1)),
        ({"RANK": "3"}, (0, 1, 0)),
    ],
)
def test_ranks_are_told_by_the_launcher(environment, expected, launch):
    launch(environment)
    assert ap.launched() == expected


@pytest.mark.parametrize(
    "wrong", [{"RANK": "abc"}, {"RANK": "16"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "0"}]
)
def test_ranks_that_make_no_sense(wrong, launch, dataset):
    launch(TORCHRUN | wrong)
    code, _, err = run("--data-dir", dataset, "--dry-run")
    assert code == 2 and err.startswith("error: ('RANK', 'WORLD_SIZE', 'LOCAL_RANK') in the")


@pytest.mark.parametrize("gpus, local_rank, expected", [(4, 2, 2), (4, 5, 1), (1, 3, 0)])
def test_each_rank_has_its_gpu(gpus, local_rank, expected, monkeypatch, tmp_path):
    import torch

    asked = []
    for name, value in {"RANK": 9, "WORLD_SIZE": 12, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(ap, "QwenPgen", lambda model, device, *rest: asked.append(device))
    monkeypatch.setattr(ap, "generate_dialogues", lambda *args: None)
    args = ap.parse_args(["--repo-id", "a/b"])
    sample = ap.Sample(0, 0, 0.0, "grasp", (), "tidy up")
    job = ap.Job(args, None, ap.Plan([sample], None, []), {}, tmp_path / "out", "a/b")
    job.unfinished.mkdir()
    run = {"parts": {"me": [0]}, "part": "me", "launches": 1}
    ap.generate_part(job, run, ap.Progress())
    assert asked == [f"cuda:{expected}"]


def start(dataset, model, output, world, ranks=None, slow=0.0, silence=60.0, flags=()):
    """Start these ranks of a launch under srun; `<output>.<rank>.log` has what they say."""
    return [
        survival.start(
            dataset,
            model,
            output,
            *("--sample-interval", 0.2, "--batch-size", 3, *flags),
            slow=slow,
            log=f"{output}.{rank}.log",
            environment={
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "SLURM_STEP_NUM_TASKS": str(world),
            },
            SILENCE=silence,
        )
        for rank in (range(world) if ranks is None else ranks)
    ]


def exit_codes(processes):
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def said(output, rank):
    return Path(f"{output}.{rank}.log").read_text()


SAMPLES = 23 + 15 + 19  # of the dataset's 45, 30 and 38 frames at 10 fps, every 0.2 s


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_do_the_same_job_together(world, dataset, model, tmp_path):
    output = tmp_path / "out"
    assert exit_codes(start(dataset, model, output, world)) == [0] * world
    lines = check(dataset, output)
    assert len(lines) == SAMPLES
    assert f"dialogues      {SAMPLES}, of which {SAMPLES} generated" in said(output, 0)
    assert f"{SAMPLES}/{SAMPLES}" in said(output, 0), "one progress bar for all"
    assert all(said(output, rank) == "" for rank in range(1, world))
    assert not Path(f"{output}.partial").exists()
    before = content(output)
    assert exit_codes(start(dataset, model, output, world)) == [0] * world
    assert "finished already" in said(output, 0) and said(output, 1) == ""
    assert content(output) == before


def test_what_other_ranks_gave_up_is_counted(dataset, built, tmp_path):
    model = built("bad_half", make_demo.make_model, failure_rate=0.5)
    output = tmp_path / "out"
    assert exit_codes(start(dataset, model, output, 3)) == [0] * 3
    lines = check(dataset, output, sampled=False)
    given_up = int(said(output, 0).split("given up ")[1].split()[0])
    assert len(lines) == SAMPLES - given_up
    assert said(output, 0).count("given up: episode") == given_up
    assert int(said(output, 0).split("asked again    ")[1].split(",")[0]) > SAMPLES // 4


def test_a_killed_rank_and_another_number_of_ranks(dataset, model, tmp_path):
    output = tmp_path / "out"
    first, second, third = start(dataset, model, output, 3, slow=0.15, silence=4)

    def has_begun():
        return any(path.stat().st_size for path in tmp_path.glob("out.partial/dialogues-1-*"))

    code = survival.stop_when(second, has_begun, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert exit_codes([first, third]) == [1, 0]
    assert "error: rank 1: no sign of life for 4 s" in said(output, 0).splitlines()[-1]
    assert said(output, 2) == "" and not output.exists()
    kept = survival.journal_lines(output)
    assert SAMPLES * 2 // 3 < len(kept) < SAMPLES
    assert exit_codes(start(dataset, model, output, 2)) == [0, 0]
    assert f"{len(kept)} dialogues are there already" in said(output, 0)
    lines = check(dataset, output)
    written = {(line["user_prompt"], line["robot_utterance"]) for line in lines}
    for line in map(json.loads, kept):
        assert (line["user_prompt"], line["robot_utterance"]) in written


def test_a_rank_that_does_not_come(dataset, model, tmp_path):
    output = tmp_path / "out"
    assert exit_codes(start(dataset, model, output, 3, ranks=[0, 2], silence=3)) == [1, 1]
    assert "error: rank [1]: not there after 3 s" in said(output, 0).splitlines()[-1]
    assert "error: rank 2: rank 0 has not begun" in said(output, 2).splitlines()[-1]
    assert exit_codes(start(dataset, model, output, 1)) == [0]
    check(dataset, output)


def test_a_slow_rank_is_waited_for(dataset, model, tmp_path):
    """Those who have finished need not show life."""
    output = tmp_path / "out"
    fast = start(dataset, model, output, 3, ranks=[0, 2], silence=3)
    slow = start(dataset, model, output, 3, ranks=[1], silence=3, slow=0.9)
    assert exit_codes(fast + slow) == [0, 0, 0]
    assert len(check(dataset, output)) == SAMPLES


def test_a_rank_that_outlives_its_launch(dataset, model, tmp_path):
    """It is not taken for one of the next launch, and what it still does is no harm."""
    output = tmp_path / "out"
    first, orphan, third = start(dataset, model, output, 3, slow=0.4)
    survival.stop_when(first, lambda: len(survival.journal_lines(output)) > 8, signal.SIGKILL)
    survival.stop_when(third, lambda: True, signal.SIGKILL)
    assert exit_codes(start(dataset, model, output, 2)) == [0, 0]
    assert len(check(dataset, output)) == SAMPLES
    assert exit_codes([orphan]) == [0] and said(output, 1) == ""
    assert not Path(f"{output}.partial").exists()


def test_an_overwrite_that_waits_for_ranks_in_vain_can_be_repeated(dataset, model, tmp_path):
    output = tmp_path / "out"
    run = survival.start(dataset, model, output, "--sample-interval", 0.2)
    survival.stop_when(run, Path(f"{output}.partial/dataset").exists, signal.SIGKILL)
    again = start(dataset, model, output, 2, ranks=[0], silence=2, flags=["--overwrite"])
    assert exit_codes(again) == [1]
    assert exit_codes(start(dataset, model, output, 1, flags=["--overwrite"])) == [0]
    assert len(check(dataset, output)) == SAMPLES


def test_a_rank_0_that_cannot_load_leaves_the_others_their_work(dataset, model, tmp_path):
    output = tmp_path / "out"
    lead = start(dataset, model, output, 2, ranks=[0], flags=["--device", "cuda"])
    other = start(dataset, model, output, 2, ranks=[1], slow=0.5)
    assert exit_codes(lead + other) == [2, 0]
    kept = len(survival.journal_lines(output))
    assert kept > SAMPLES // 3
    assert exit_codes(start(dataset, model, output, 1)) == [0]
    assert f"{kept} dialogues are there already" in said(output, 0)


def test_a_rank_with_other_settings_takes_no_part(dataset, model, built, tmp_path):
    other, output = built("bad_tenth", make_demo.make_model, failure_rate=0.1), tmp_path / "out"
    lead = start(dataset, model, output, 2, ranks=[0], silence=4)
    odd = start(dataset, other, output, 2, ranks=[1], silence=4)
    assert exit_codes(lead + odd) == [1, 1]
    assert "rank [1]: not there after 4 s, with the same settings" in said(output, 0)
    assert "rank 1: rank 0 has not begun with the same settings" in said(output, 1)
    assert not survival.journal_lines(output)


def test_a_record_of_an_earlier_launch_is_not_followed(dataset, model, tmp_path):
    """A rank that comes before rank 0 finds what the last launch dealt, and waits."""
    output = tmp_path / "out"
    runs = start(dataset, model, output, 2, slow=0.15)
    survival.stop_when(runs[0], lambda: survival.journal_lines(output), signal.SIGKILL)
    survival.stop_when(runs[1], lambda: True, signal.SIGKILL)
    kept = len(survival.journal_lines(output))
    late = start(dataset, model, output, 2, ranks=[1])
    while len(list(output.parent.glob("*/rank-1-*"))) < 2:
        time.sleep(0.1)
    time.sleep(1)
    assert len(survival.journal_lines(output)) == kept
    assert exit_codes(start(dataset, model, output, 2, ranks=[0]) + late) == [0, 0]
    check(dataset, output)


def test_bad_input_is_said_once_if_the_launcher_ends_the_others(tmp_path, dataset, model):
    missing = tmp_path / "nothing"
    runs = start(missing, model, tmp_path / "out", 2)
    runs[0].join(60)
    assert runs[0].exitcode == 2 and "no such folder" in said(tmp_path / "out", 0)
    log = Path(f"{tmp_path}/out.1.log")
    code = survival.stop_when(runs[1], log.exists, signal.SIGTERM)
    assert code in (-signal.SIGTERM, 128 + signal.SIGTERM)  # waiting to say it, or still reading
    assert said(tmp_path / "out", 1) == ""


def test_torchrun(dataset, model, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += [str(ROOT / "annotate_pgen.py"), "--data-dir", str(dataset), "--model", str(model)]
    command += ["--device", "cpu", "--dtype", "float32", "--output-dir", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "12, of which 12 generated" in result.stdout and result.stdout.count("unique") == 1
    check(dataset, output)
    shutil.rmtree(output)
