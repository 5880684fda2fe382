"""Runs of the whole job in processes of their own, to hold, interrupt and kill them.

They are forked from a process that has imported the heavy libraries, so that a start
does not take ten seconds.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from checks import annotations  # noqa: E402

import annotate_pgen  # noqa: E402

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "jinja2",
        "qwen_vl_utils",
        "lerobot.datasets.lerobot_dataset",
        "torch.distributed",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.processing_auto",
        "transformers.models.qwen2_vl.modeling_qwen2_vl",
        "transformers.models.qwen2_vl.processing_qwen2_vl",
    ]
)


def tables():
    """What this process asks the model, for another one that shall ask the same."""
    names = ("SYSTEM", "PROMPT", "EXAMPLE_COUNT", "MAX_TRIES")
    return {name: getattr(annotate_pgen, name) for name in names}


def hold(name, after, released):
    """Let a function run `after` times, then wait for the file `released`.

    `name` is one of annotate_pgen, or "answer" for the model's.
    """
    owner = annotate_pgen.QwenPgen if name == "answer" else annotate_pgen
    call = getattr(owner, name)
    called = []

    def call_or_wait(*args, **kwargs):
        while len(called) >= after and not released.exists():
            waiting_file(released).touch()
            time.sleep(0.01)
        called.append(True)
        return call(*args, **kwargs)

    setattr(owner, name, call_or_wait)


def waiting_file(released, rank=None):
    """What a run leaves that is held: a file for each rank."""
    rank = os.environ.get("RANK", "0") if rank is None else rank
    return Path(f"{released}.awaited-{rank}")


def work(flags, log, environment, tables, held, released):
    """What the process does: run the command line, with all that it says in `log`."""
    os.environ.update(environment)
    for name, table in tables.items():
        setattr(annotate_pgen, name, table)
    if held:
        hold(*held, released)
    with (
        Path(log).open("w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        code = annotate_pgen.main([str(flag) for flag in flags])
    os._exit(code)


def start(dataset, model, output, *flags, held=None, log=None, environment=None):
    """Start a run, and return its process.

    Args:
        dataset: folder.
        model: folder.
        output: folder.
        flags: further ones.
        held: what it runs until release(output), such as ("answer", 2) for two batches.
        log: where all goes that the run says, else `<output>.log`.
        environment: variables to set.
    """
    given = ("--data-dir", dataset, "--model", model, "--output-dir", output)
    flags = (*given, "--device", "cpu", "--dtype", "float32", *flags)
    log = log or f"{output}.log"
    arguments = (flags, log, environment or {}, tables(), held, released(output))
    process = context.Process(target=work, args=arguments)
    process.start()
    return process


def released(output):
    """The file that sets these runs free."""
    return Path(f"{output}.released")


def release(output):
    """Let these runs go on."""
    released(output).touch()


def is_held(output, rank=0):
    """Whether a run, or one of its ranks, waits to be released."""
    return waiting_file(released(output), rank).exists()


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


def assert_kept(kept, output, lengths=(45, 30, 38)):
    """What stood in journals stands in the result, at the same frames."""
    said = {}
    for line in annotations(output):
        row = sum(lengths[: line["episode_id"]]) + line["frame_index"]
        said[row] = (line["user_prompt"], line["robot_utterance"])
    for entry in map(json.loads, kept):
        assert said[entry["index"]] == (entry["user_prompt"], entry["robot_utterance"])


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


def stop_when_held(process, output, number):
    """Send signal `number` to a run that is held; returns the exit code."""
    return stop_when(process, lambda: is_held(output), number)


def exit_codes(processes, patience=120):
    """Wait until all have ended."""
    for process in processes:
        process.join(patience)
    return [process.exitcode for process in processes]


def main(tables, held, output, *flags):
    """Be one process of torchrun's, which leaves its number in a file.

    `tables` and `held` are those of work(), as JSON.
    """
    Path(f"{output}.pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    log = f"{output}.{os.environ['RANK']}.log"
    work(flags, log, {}, json.loads(tables), json.loads(held), released(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
