"""Runs of the whole job in processes of their own, to hold, interrupt and kill them.

They are forked from a process that has imported the heavy libraries, so that a start
does not take ten seconds.

    python tests/processes.py 100

kills that many runs and prints what became of their dialogues.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import annotate_pgen  # noqa: E402

# For the process that preloads.
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["preload"])


def hold_model(after, released):
    """Let the model answer `after` batches, then wait for the file `released`."""
    answer = annotate_pgen.QwenPgen.answer
    answered = []

    def answer_or_wait(self, *args, **kwargs):
        while len(answered) >= after and not released.exists():
            waiting_file(released).touch()
            time.sleep(0.01)
        answered.append(True)
        return answer(self, *args, **kwargs)

    annotate_pgen.QwenPgen.answer = answer_or_wait


def waiting_file(released):
    """What a model leaves that waits: a file for each rank."""
    rank = os.environ.get("RANK", "0")
    return Path(f"{released}.awaited-{rank}")


def work(flags, log, environment, prompt, hold_after, released):
    """What the process does: run the command line, with all that it says in `log`."""
    os.environ.update(environment)
    annotate_pgen.PROMPT = prompt
    if hold_after is not None:
        hold_model(hold_after, released)
    with (
        Path(log).open("w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        code = annotate_pgen.main([str(flag) for flag in flags])
    os._exit(code)


def start(dataset, model, output, *flags, hold_after=None, log=None, environment=None):
    """Start a run.

    Args:
        dataset: folder.
        model: folder.
        output: folder.
        flags: further ones.
        hold_after: how many batches the model answers until release(output).
        log: where all goes that the run says, else `<output>.log`.
        environment: variables to set.

    Returns:
        The process.
    """
    given = ("--data-dir", dataset, "--model", model, "--output-dir", output)
    flags = (*given, "--device", "cpu", "--dtype", "float32", *flags)
    log = log or f"{output}.log"
    prompt = annotate_pgen.PROMPT
    arguments = (flags, log, environment or {}, prompt, hold_after, released(output))
    process = context.Process(target=work, args=arguments)
    process.start()
    return process


def released(output):
    """The file that sets the models of these runs free."""
    return Path(f"{output}.released")


def release(output):
    """Let the models of these runs go on."""
    released(output).touch()


def is_held(output, rank=0):
    """Whether the model of a run, or of its rank, waits to be released."""
    return Path(f"{released(output)}.awaited-{rank}").exists()


def journal_lines(output):
    """The whole lines of dialogues in the journals, as bytes."""
    lines = []
    for path in sorted(Path(f"{output}.partial").glob("dialogues-*.jsonl")):
        with contextlib.suppress(FileNotFoundError):
            lines += path.read_bytes().split(b"\n")[:-1]
    return [line for line in lines if line.endswith(b"}")]


def indices(lines):
    """The frames that lines of a journal are about."""
    return [json.loads(line)["index"] for line in lines]


def wait_until(condition, *processes, patience=120):
    """Wait until a condition holds, or one of the processes has ended."""
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        if processes and not all(process.is_alive() for process in processes):
            return
        time.sleep(0.002)


def stop_when(process, condition, number, patience=120):
    """Send signal `number` as soon as `condition()` holds; returns the exit code."""
    wait_until(condition, process, patience=patience)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)
    process.join(patience)
    return process.exitcode


def exit_codes(processes, patience=120):
    """Wait until all have ended."""
    for process in processes:
        process.join(patience)
    return [process.exitcode for process in processes]


def kill_again_and_again(dataset, model, output, kills, batch_size=3):
    """Kill `kills` runs with SIGKILL while their journal grows.

    Each run goes on where the one before was killed, and is started over when all is
    done. In the end the last one is finished.

    Returns:
        Kills that hit a run at work, dialogues that were on the disk at them, dialogues
        of these that were lost, and those that were generated twice.
    """
    flags = ("--sample-interval", 0.2, "--batch-size", batch_size)
    killed = 0
    kept = 0
    lost = 0
    twice = 0
    while killed < kills:
        before = journal_lines(output)
        goal = len(before) + 1 + killed % 7
        process = start(dataset, model, output, *flags)
        code = stop_when(
            process,
            lambda goal=goal: len(journal_lines(output)) >= goal,
            signal.SIGKILL,
        )
        if code == -signal.SIGKILL:
            killed += 1
            after = journal_lines(output)
            kept += len(after)
            lost += len(set(before) - set(after))
            twice += len(after) - len(set(indices(after)))
        else:
            assert code == 0, Path(f"{output}.log").read_text()
            shutil.rmtree(output)
    assert exit_codes([start(dataset, model, output, *flags)]) == [0]
    return killed, kept, lost, twice


def main(kills):
    import make_demo

    make_demo.quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = make_demo.make_dataset(folder / "dataset", (45, 30, 38))
        model = make_demo.make_model(folder / "model", failure_rate=0.1)
        started = time.monotonic()
        output = folder / "out"
        killed, kept, lost, twice = kill_again_and_again(dataset, model, output, kills)
        print(f"{killed} runs killed in {time.monotonic() - started:.0f} s")
        print(f"dialogues on the disk at the kills: {kept}")
        print(f"lost: {lost}, generated twice: {twice}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
