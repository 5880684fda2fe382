"""Several processes share the work, started by torchrun or as torchrun starts them."""

import json
import os
import signal
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import make_demo
import processes
import pytest
from checks import annotations, check, content, expected_samples
from conftest import run
from hypothesis import given
from hypothesis import strategies as st

import annotate_pgen as ap

pytestmark = pytest.mark.usefixtures("short_prompt")

INTERVAL = 0.5
# Of episodes with 45, 30 and 38 frames at 10 fps.
SAMPLES = 9 + 6 + 8


@given(st.lists(st.integers(), unique=True), st.integers(1, 20))
def test_all_is_dealt_once_in_order_and_evenly(items, world_size):
    shares = [ap.share(items, rank, world_size) for rank in range(world_size)]
    assert list(chain(*shares)) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# ------------------------------------------------------------- what torchrun says


@pytest.fixture
def serve():
    """Run a key-value store as torchrun does.

    serve(world_size) returns the variables that torchrun sets for each process.
    """
    from torch.distributed import TCPStore

    stores = []

    def start(world_size):
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        stores.append(store)
        return [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            for rank in range(world_size)
        ]

    yield start
    stores.clear()


@pytest.mark.parametrize(
    "name, value",
    [
        ("RANK", "abc"),
        ("RANK", "2"),
        ("RANK", "-1"),
        ("WORLD_SIZE", ""),
        ("WORLD_SIZE", "0"),
        ("LOCAL_RANK", "x"),
        ("MASTER_ADDR", ""),
    ],
)
def test_variables_that_make_no_sense(name, value, serve, dataset, monkeypatch):
    for variable in serve(2)[0].items():
        monkeypatch.setenv(*variable)
    monkeypatch.setenv(name, value)
    code, out, err = run("--data-dir", dataset, "--dry-run")
    assert (code, out) == (2, "")
    assert "torchrun" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (0, 1, 0)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, (0, 1, 0)),
        # A job of SLURM without torchrun is a process of its own.
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "8", "SLURM_LOCALID": "2"}, (0, 1, 0)),
    ],
)
def test_a_single_process_needs_no_store(environment, expected, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launch = ap.Launch()
    assert (launch.rank, launch.world_size, launch.local_rank) == expected


@pytest.mark.parametrize(
    "gpus, local_rank, expected", [(4, 2, 2), (4, 5, 1), (1, 3, 0)]
)
def test_each_rank_has_its_gpu(gpus, local_rank, expected, monkeypatch):
    import torch

    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(ap, "QwenPgen", lambda model, device, *_: asked.append(device))
    job = SimpleNamespace(args=ap.parse_args(["--repo-id", "a/b"]))
    launch = SimpleNamespace(rank=9, world_size=12, local_rank=local_rank)
    ap.load_model(job, launch, resumed=False)
    assert asked == [f"cuda:{expected}"]


def test_a_store_that_has_gone_is_an_error(serve, monkeypatch):
    (environment,) = serve(2)[1:]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launch = ap.Launch()
    launch.send("part-1", {"settings": {"name": "“a”"}, "indices": [1]})
    assert launch.receive("part-1") == {"settings": {"name": "“a”"}, "indices": [1]}
    assert not launch.has("report-1")

    class Gone:
        def check(self, keys):
            raise RuntimeError("Connection reset by peer")

    launch.store = Gone()
    with pytest.raises(ap.RunError, match="Connection reset by peer"):
        launch.receive("report-1")


# ------------------------------------------------------------- forked processes


def start_rank(dataset, model, output, environment, *flags, hold_after=None):
    """Start one process of a launch; `<output>.<rank>.log` has what it says."""
    return processes.start(
        dataset,
        model,
        output,
        *("--sample-interval", INTERVAL, "--batch-size", 2, *flags),
        hold_after=hold_after,
        log=f"{output}.{environment['RANK']}.log",
        environment=environment,
    )


def start_launch(dataset, model, output, environments, *flags, hold_after=None):
    """Start all processes of a launch."""
    return [
        start_rank(dataset, model, output, variables, *flags, hold_after=hold_after)
        for variables in environments
    ]


def said(output, rank):
    return Path(f"{output}.{rank}.log").read_text()


def samples_of(output):
    lines = annotations(output)
    return [(line["episode_id"], line["frame_index"]) for line in lines]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_do_the_job_together(world_size, serve, dataset, model, tmp_path):
    output = tmp_path / "out"
    launch = start_launch(dataset, model, output, serve(world_size))
    assert processes.exit_codes(launch) == [0] * world_size
    check(dataset, output)
    assert samples_of(output) == expected_samples(dataset, INTERVAL)
    assert f" {SAMPLES}/{SAMPLES} " in said(output, 0), "one progress bar for all"
    for rank in range(1, world_size):
        assert said(output, rank) == ""
    assert not Path(f"{output}.partial").exists()


def test_a_launch_with_nothing_to_do(serve, dataset, model, tmp_path):
    output = tmp_path / "out"
    launch = start_launch(dataset, model, output, serve(2), "--dry-run")
    assert processes.exit_codes(launch) == [0, 0]
    assert said(output, 1) == ""
    assert not output.exists()
    alone = processes.start(dataset, model, output, "--sample-interval", INTERVAL)
    assert processes.exit_codes([alone]) == [0]
    before = content(output)
    launch = start_launch(dataset, model, output, serve(3))
    assert processes.exit_codes(launch) == [0, 0, 0]
    assert said(output, 1) == said(output, 2) == ""
    assert content(output) == before


def test_more_ranks_than_samples(serve, dataset, model, tmp_path):
    output = tmp_path / "out"
    flags = ("--sample-interval", 9)
    launch = start_launch(dataset, model, output, serve(4), *flags)
    assert processes.exit_codes(launch) == [0] * 4
    assert len(check(dataset, output)) == 3


def test_what_other_ranks_failed_is_counted(serve, dataset, built, tmp_path):
    """Half of the answers are bad, so that one sample in sixteen fails."""
    model = built("bad_half", make_demo.make_model, failure_rate=0.5)
    output = tmp_path / "out"
    flags = ("--sample-interval", 0.2)
    launch = start_launch(dataset, model, output, serve(2), *flags)
    assert processes.exit_codes(launch) == [0, 0]
    check(dataset, output, sampled=False)
    missing = set(expected_samples(dataset, 0.2)) - set(samples_of(output))
    assert missing
    for episode, frame in missing:
        assert f"failed: episode {episode}, frame {frame}:" in said(output, 0)
    assert said(output, 0).count("failed: ") == len(missing)


def test_a_killed_rank_and_another_number_of_ranks(serve, dataset, model, tmp_path):
    output = tmp_path / "out"
    launch = start_launch(dataset, model, output, serve(3), hold_after=1)
    for rank in range(3):
        processes.wait_until(lambda rank=rank: processes.is_held(output, rank))
    code = processes.stop_when(launch[1], lambda: True, signal.SIGKILL)
    assert code == -signal.SIGKILL
    # Torchrun ends the others.
    for other in (launch[0], launch[2]):
        assert processes.stop_when(other, lambda: True, signal.SIGTERM) == 143
    assert said(output, 2) == ""
    assert not output.exists()
    kept = processes.journal_lines(output)
    assert 3 <= len(kept) < SAMPLES
    processes.release(output)
    launch = start_launch(dataset, model, output, serve(2))
    assert processes.exit_codes(launch) == [0, 0]
    check(dataset, output)
    assert samples_of(output) == expected_samples(dataset, INTERVAL)
    assert f" {SAMPLES}/{SAMPLES} " in said(output, 0)
    assert_kept(kept, output)


def assert_kept(lines, output):
    """What stood in journals stands in the result."""
    written = {
        (line["user_prompt"], line["robot_utterance"]) for line in annotations(output)
    }
    for line in lines:
        entry = json.loads(line)
        assert (entry["user_prompt"], entry["robot_utterance"]) in written


def test_a_rank_with_other_settings_is_refused(serve, dataset, model, tmp_path):
    output = tmp_path / "out"
    first, second = serve(2)
    lead = start_rank(dataset, model, output, first)
    odd = start_rank(dataset, model, output, second, "--seed", 3)
    assert processes.exit_codes([odd]) == [1]
    assert "seed = 0" in said(output, 1).splitlines()[-1]
    assert processes.stop_when(lead, lambda: True, signal.SIGTERM) == 143
    assert not output.exists()


def test_bad_input_is_said_once(serve, dataset, model, tmp_path):
    output = tmp_path / "out"
    launch = start_launch(tmp_path / "nothing", model, output, serve(2))
    processes.wait_until(Path(f"{output}.1.log").exists, launch[1])
    assert processes.exit_codes(launch[:1]) == [2]
    assert str(tmp_path / "nothing") in said(output, 0).splitlines()[-1]
    # The other waits for its part until torchrun ends it, at the latest.
    code = processes.stop_when(launch[1], lambda: True, signal.SIGTERM)
    assert code in (143, -signal.SIGTERM)
    assert said(output, 1) == ""


def test_a_rank_that_outlives_its_launch_does_no_harm(serve, dataset, model, tmp_path):
    """On another machine, for example, when only one of the two is lost."""
    output = tmp_path / "out"
    first, orphan = start_launch(dataset, model, output, serve(2), hold_after=1)
    processes.wait_until(lambda: processes.is_held(output, 1), orphan)
    processes.wait_until(lambda: processes.is_held(output, 0), first)
    processes.stop_when(first, lambda: True, signal.SIGKILL)
    kept = processes.journal_lines(output)
    again = start_launch(dataset, model, output, serve(2), hold_after=1)
    processes.release(output)
    assert processes.exit_codes([*again, orphan]) == [0, 0, 0]
    check(dataset, output)
    assert samples_of(output) == expected_samples(dataset, INTERVAL)
    assert_kept(kept, output)


def test_without_torchrun_rank_0_runs_the_store(serve, dataset, model, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environments = serve(2)
    for environment in environments:
        del environment["TORCHELASTIC_USE_AGENT_STORE"]
        environment["MASTER_PORT"] = port
    output = tmp_path / "out"
    launch = start_launch(dataset, model, output, environments)
    assert processes.exit_codes(launch) == [0, 0]
    assert len(check(dataset, output)) == SAMPLES


# ------------------------------------------------------------- torchrun itself

HELD = """
import os, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import annotate_pgen, processes
annotate_pgen.PROMPT = {prompt!r}
Path({output!r} + ".pid-" + os.environ["RANK"]).write_text(str(os.getpid()))
processes.hold_model(2, processes.released({output!r}))
sys.exit(annotate_pgen.main())
"""


def torchrun(script, dataset, model, output, options, *flags):
    """The command of a launch. Each process that it starts imports for ten seconds."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", *options, str(script)),
        *("--data-dir", str(dataset), "--model", str(model)),
        *("--device", "cpu", "--dtype", "float32"),
        *("--output-dir", str(output), "--batch-size", "2", *flags),
    ]


def test_a_kill_under_torchrun_and_another_number_of_processes(
    serve, dataset, model, tmp_path
):
    output = tmp_path / "out"
    script = tmp_path / "annotate_held.py"
    text = HELD.format(
        tests=str(Path(processes.__file__).parent),
        root=str(Path(ap.__file__).parent),
        prompt=ap.PROMPT,
        output=str(output),
    )
    script.write_text(text)
    options = ("--nproc-per-node=2", "--standalone")
    flags = ("--sample-interval", str(INTERVAL))
    command = torchrun(script, dataset, model, output, options, *flags)
    log = tmp_path / "log"
    with log.open("w") as file:
        launch = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        for rank in range(2):
            processes.wait_until(
                lambda rank=rank: (
                    processes.is_held(output, rank) or launch.poll() is not None
                )
            )
        assert launch.poll() is None, log.read_text()
        os.kill(int(Path(f"{output}.pid-1").read_text()), signal.SIGKILL)
        assert launch.wait(120) != 0
    finally:
        launch.terminate()
    assert not output.exists()
    kept = processes.journal_lines(output)
    assert 2 <= len(kept) < SAMPLES
    assert len(set(processes.indices(kept))) == len(kept)
    # The same command in a launch of three goes on.
    launch = start_launch(dataset, model, output, serve(3))
    assert processes.exit_codes(launch) == [0, 0, 0]
    check(dataset, output)
    assert samples_of(output) == expected_samples(dataset, INTERVAL)
    assert_kept(kept, output)
    assert f" {SAMPLES}/{SAMPLES} " in said(output, 0), "one progress bar for all"
    assert said(output, 1) == said(output, 2) == ""


def test_two_launches_are_one_job(dataset, model, tmp_path):
    """As on two machines that share a disk."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    output = tmp_path / "out"
    options = (
        *("--nnodes=2", "--nproc-per-node=1", "--rdzv-id=job"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"),
    )
    flags = ("--sample-interval", "4")
    command = torchrun(ap.__file__, dataset, model, output, options, *flags)
    launches = []
    for number in range(2):
        with (tmp_path / f"log-{number}").open("w") as log:
            launches.append(subprocess.Popen(command, stdout=log, stderr=log))
    codes = [launch.wait(300) for launch in launches]
    logs = [(tmp_path / f"log-{number}").read_text() for number in range(2)]
    assert codes == [0, 0], logs
    check(dataset, output)
    assert samples_of(output) == expected_samples(dataset, 4)
    summaries = [log.count("from lerobot") for log in logs]
    assert sorted(summaries) == [0, 1]
