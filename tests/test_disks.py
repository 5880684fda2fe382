"""Disks that are full or fill up: real ones, in memory."""

import contextlib
import shutil
import subprocess

import processes
import pytest
from checks import check
from conftest import annotate

import annotate_pgen as ap

pytestmark = pytest.mark.usefixtures("short_prompt")


@pytest.fixture
def small_disk(tmp_path):
    """Mount a tmpfs of a given size."""
    mounted = tmp_path / "disk"
    mounted.mkdir()

    def mount(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mounted)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("may not mount a tmpfs here")
        return mounted

    yield mount
    subprocess.run(["umount", "-l", str(mounted)], capture_output=True)


def test_no_room_is_said_before_the_model_is_loaded(dataset, tmp_path, small_disk):
    output = small_disk("8m") / "out"
    code, out, err = annotate(dataset, tmp_path / "no-model", output)
    assert (code, out) == (2, "")
    assert str(output) in err.splitlines()[-1]
    assert "GB" in err.splitlines()[-1]
    assert not list(output.parent.iterdir())


def test_a_disk_that_fills_up_while_writing(dataset, model, small_disk, monkeypatch):
    output = small_disk("24m") / "out"
    write_dataset = ap.write_dataset

    def fill_and_write(*args):
        free = shutil.disk_usage(output.parent).free
        (output.parent / "filler").write_bytes(bytes(free - 60_000))
        write_dataset(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ap, "write_dataset", fill_and_write)
        code, _, err = annotate(dataset, model, output)
    last = err.splitlines()[-1]
    assert code == 1
    assert f"{output}.partial/dataset/" in last
    assert "No space left" in last
    assert not output.exists()
    assert len(processes.journal_lines(output)) == 12
    (output.parent / "filler").unlink()
    monkeypatch.setattr(ap, "QwenPgen", None)
    code, _, err = annotate(dataset, model, output)
    assert code == 0, err
    check(dataset, output)


def test_a_disk_that_fills_up_while_generating(dataset, model, small_disk, monkeypatch):
    output = small_disk("24m") / "out"
    filler = output.parent / "filler"
    answer = ap.QwenPgen.answer

    def fill_and_answer(self, *args, **kwargs):
        if len(processes.journal_lines(output)) >= 4:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(512))
        return answer(self, *args, **kwargs)

    # So many that the journal grows beyond its first page, which it has.
    flags = ("--batch-size", 4, "--sample-interval", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(ap.QwenPgen, "answer", fill_and_answer)
        code, _, err = annotate(dataset, model, output, *flags)
    last = err.splitlines()[-1]
    assert code == 1
    assert f"{output}.partial/dialogues-" in last
    kept = processes.indices(processes.journal_lines(output))
    assert len(kept) >= 4
    filler.unlink()
    code, _, err = annotate(dataset, model, output, "--sample-interval", 0.2)
    assert code == 0, err
    assert len(check(dataset, output)) == 57


def test_an_output_below_a_file(dataset, model, tmp_path):
    (tmp_path / "file").write_text("no folder")
    code, out, err = annotate(dataset, model, tmp_path / "file" / "out")
    assert (code, out) == (2, "")
    assert str(tmp_path / "file") in err.splitlines()[-1]
    assert (tmp_path / "file").read_text() == "no folder"
