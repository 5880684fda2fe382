"""Run the whole job in a process of its own, and kill it when its journal has grown.

The processes are forked from one that has imported the heavy libraries: a start takes no 10 s.

    python tests/survival.py 100

kills that many runs and prints what became of their dialogues.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # for the process that preloads
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["heavy"])


def work(flags, log, slow, environment, constants):
    """The process: run the command line, with output to `log`, `slow` seconds for each batch."""
    import annotate_pgen

    os.environ |= environment
    vars(annotate_pgen).update(constants)

    ask = annotate_pgen.QwenPgen.answer

    def answer(self, *args, **kwargs):
        time.sleep(slow)
        return ask(self, *args, **kwargs)

    annotate_pgen.QwenPgen.answer = answer
    with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):  # noqa: PTH123
        code = annotate_pgen.main([str(flag) for flag in flags])
    os._exit(code)


def start(dataset, model, output, *flags, slow=0.0, log=None, environment=None, **constants):
    """A started run; its output goes to `<output>.log`. `constants` are put into the script."""
    where = ("--data-dir", dataset, "--model", model, "--output-dir", output)
    flags = (*where, "--device", "cpu", "--dtype", "float32", *flags)
    log = log or f"{output}.log"
    process = context.Process(target=work, args=(flags, log, slow, environment or {}, constants))
    process.start()
    return process


def journal_lines(output):
    """The whole lines of dialogues in the journals, as bytes."""
    journals = sorted(Path(f"{output}.partial").glob("dialogues-*.jsonl"))
    lines = [line for path in journals for line in path.read_bytes().split(b"\n")[:-1]]
    return [line for line in lines if line.startswith(b'{"index"')]


def stop_when(process, condition, number, patience=120):
    """Send signal `number` as soon as `condition()`; returns the exit code."""
    give_up_at = time.monotonic() + patience
    while process.is_alive() and not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)
    process.join(patience)
    return process.exitcode


def kill_again_and_again(dataset, model, output, kills, samples, batch_size=3):
    """kill -9 `kills` runs at growing journals, each started over when it has finished.

    Returns (kills, dialogues kept over kills, dialogues lost, batches asked in vain).
    """
    kept = lost = killed = 0
    step = 0
    while killed < kills:
        before = journal_lines(output)
        goal = len(before) + 1 + step % 7
        step += 1
        run = start(dataset, model, output, "--sample-interval", 0.1, "--batch-size", batch_size)
        code = stop_when(run, lambda goal=goal: len(journal_lines(output)) >= goal, signal.SIGKILL)
        if code == -signal.SIGKILL:
            killed += 1
            after = journal_lines(output)
            lost += len(before) - len(set(before) & set(after))
            kept += len(after)
            assert len({line.split(b",")[0] for line in after}) == len(after), "generated twice"
        else:
            assert code == 0
            shutil.rmtree(output)
    before = journal_lines(output)
    run = start(dataset, model, output, "--sample-interval", 0.1, "--batch-size", 16)
    run.join(120)
    assert run.exitcode == 0
    said = Path(f"{output}.log").read_text()
    assert f"{len(before)} dialogues are there already" in said
    assert f"dialogues      {samples}, of which {samples - len(before)} generated" in said
    return killed, kept, lost


def main(kills):
    import make_demo

    make_demo.quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        dataset = make_demo.make_dataset(folder / "dataset", (45, 30, 38))
        model = make_demo.make_model(folder / "model", failure_rate=0.1)
        started = time.monotonic()
        killed, kept, lost = kill_again_and_again(dataset, model, folder / "out", kills, 113)
        print(f"{killed} runs killed in {time.monotonic() - started:.0f} s")
        print(f"{kept} dialogues were on the disk at the kills, {lost} of them lost, 0 twice")


if __name__ == "__main__":
    main(int(sys.argv[1]))
