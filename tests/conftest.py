"""Fixtures: drawn datasets and checkpoints, built once with tests/make_demo.py."""

import contextlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from hub_server import HubServer  # noqa: E402

# On a loaded machine 200 ms pass by chance.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
HOME = Path(tempfile.mkdtemp(prefix="annotate_pgen_"))
HUB = HubServer()
# Read by the libraries when they are imported.
os.environ.update(
    HF_HOME=str(HOME / "hf"),
    HF_LEROBOT_HOME=str(HOME / "lerobot"),
    HF_ENDPOINT=HUB.url,
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    SVT_LOG="1",
    CUDA_VISIBLE_DEVICES="",
    # Models this small gain nothing from threads, and processes side by side lose.
    OMP_NUM_THREADS="1",
)

import make_demo  # noqa: E402

import annotate_pgen  # noqa: E402


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Build something once a session.

    built("name", function, *arguments) returns the folder that the function filled.
    """
    folder = tmp_path_factory.mktemp("built")

    def build(name, function, *args, **kwargs):
        if not (folder / name).exists():
            function(folder / name, *args, **kwargs)
        return folder / name

    yield build
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def dataset(built):
    """Three episodes, two video cameras, 10 fps. Tests that change it copy it first."""
    return built("dataset", make_demo.make_dataset)


@pytest.fixture(scope="session")
def model(built):
    """The hand-set checkpoint, which always answers well."""
    return built("model", make_demo.make_model)


@pytest.fixture(scope="module")
def short_prompt():
    """Ask little: the demo's model reads bytes, and nothing of what it reads counts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotate_pgen, "SYSTEM", "Answer.")
        patch.setattr(annotate_pgen, "PROMPT", "{skill}, {task}, {history}: {scenario}")
        patch.setattr(annotate_pgen, "EXAMPLE_COUNT", 0)
        yield


@pytest.fixture
def hub(monkeypatch):
    """The stand-in for the Hub that all tests talk to, with somebody logged in."""
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    # Other tests ask for models that are not there.
    HUB.unknown.clear()
    yield HUB
    HUB.heal()
    assert not HUB.unknown


@pytest.fixture
def own_dataset(dataset, tmp_path):
    """A copy of `dataset` that a test may damage."""
    return Path(shutil.copytree(dataset, tmp_path / "dataset"))


def run(*flags):
    """Run the command line in this process: (exit code, stdout, stderr)."""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = annotate_pgen.main([str(flag) for flag in flags])
    return code, out.getvalue(), err.getvalue()


def annotate(dataset, model, output, *flags):
    """Run the whole job on the CPU: (exit code, stdout, stderr)."""
    given = ("--data-dir", dataset, "--model", model, "--output-dir", output)
    return run(*given, "--device", "cpu", "--dtype", "float32", *flags)
