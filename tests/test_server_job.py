"""The whole job through --server, against a server on this machine."""

import builtins
import hashlib
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import make_demo
import processes
import pytest
from chat_server import ChatServer, Reply, error, text_of
from checks import check, content, expected_samples, record
from conftest import annotate, run
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torchvision.transforms.functional import to_pil_image

import annotate_pgen as ap

pytestmark = pytest.mark.usefixtures("short_prompt")

KEY = "sk-nobody-may-read-this"
FRONT = "observation.images.front"
# The demo has twelve samples, one for each second of its three episodes.
SAMPLES = 12


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.delenv(ap.KEY_VARIABLE, raising=False)
    monkeypatch.setattr(ap, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(ap, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(ap, "SERVER_PATIENCE", 30.0)


@pytest.fixture
def chat():
    server = ChatServer(answer=answer_of)
    yield server
    server.gate.set()
    server.stop()


@pytest.fixture
def other():
    server = ChatServer(answer=answer_of)
    yield server
    server.gate.set()
    server.stop()


def pictures_of(body):
    """The data URLs of a request."""
    parts = body["messages"][-1]["content"]
    return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


def answer_of(body):
    """A dialogue that belongs to the words and pictures of a request."""
    asked = str(body["messages"])
    number = hashlib.sha256(asked.encode()).hexdigest()[:8]
    dialogue = {
        "user_prompt": f"Please do number {number}.",
        "robot_utterance": f"Sure, doing number {number} now.",
    }
    return json.dumps(dialogue)


def serve(dataset, output, url, *flags):
    """Run the whole job in this process: (exit code, stdout, stderr)."""
    given = ("--data-dir", dataset, "--output-dir", output, "--batch-size", 4)
    return run(*given, "--server", url, *flags)


def picture_at(dataset, index):
    """What is sent of a frame, read as users read it."""
    frame = LeRobotDataset("a/b", root=dataset, video_backend="pyav")[index]
    return ap.encode_image(to_pil_image(frame[FRONT]))


def journal(output):
    return processes.indices(processes.journal_lines(output))


def events_of_messages(monkeypatch, *parts):
    """An event for each part of a message, set when it is said."""
    events = [threading.Event() for _ in parts]
    say = ap.say

    def say_and_tell(message):
        say(message)
        for part, event in zip(parts, events, strict=True):
            if part in message:
                event.set()

    monkeypatch.setattr(ap, "say", say_and_tell)
    return events


@pytest.fixture
def meanwhile():
    """Call a function in a thread, and see in the end that it did not fail."""
    started = []

    def start(function):
        failures = []

        def call():
            try:
                function()
            except BaseException as failure:
                failures.append(failure)

        thread = threading.Thread(target=call)
        thread.start()
        started.append((thread, failures))

    yield start
    for thread, failures in started:
        thread.join(60)
        assert not thread.is_alive()
        assert not failures


# ---------------------------------------------------------------------- a whole dataset


def test_a_dataset_through_a_server(chat, dataset, tmp_path, meanwhile):
    output = tmp_path / "out"
    before = content(dataset)
    chat.decide = lambda body: chat.gate.clear() if chat.count == 1 else None

    def see_four_at_once():
        try:
            chat.wait_for(1 + 4)
        finally:
            chat.gate.set()

    meanwhile(see_four_at_once)
    code, out, err = serve(dataset, output, chat.url)
    assert code == 0, err
    assert content(dataset) == before
    lines = check(dataset, output)
    places = [(line["episode_id"], line["frame_index"]) for line in lines]
    assert places == expected_samples(dataset)
    assert chat.count == 1 + SAMPLES
    assert chat.most_at_once == 4
    settings = record(output)["settings"]
    assert settings["engine"] == "server"
    assert settings["model"] == "demo"
    assert chat.url not in json.dumps(record(output))
    assert not Path(f"{output}.partial").exists()
    assert re.search("failed +0\n", out)


def test_two_views_two_servers(chat, other, dataset, tmp_path):
    flags = (other.url, "--num-image-views-per-sample", 2, "--temperature", 0)
    code, _, err = serve(dataset, tmp_path / "out", chat.url, *flags)
    assert code == 0, err
    check(dataset, tmp_path / "out")
    assert chat.count + other.count == 2 + SAMPLES
    assert chat.count > 1
    assert other.count > 1
    for body in chat.bodies + other.bodies:
        assert len(pictures_of(body)) == 2
        assert body["temperature"] == 0
        assert "seed" not in body


def test_a_seed_is_sent_only_if_it_is_named(chat, dataset, tmp_path):
    code, _, err = serve(dataset, tmp_path / "out", chat.url, "--seed", 5)
    assert code == 0, err
    assert len({body["seed"] for body in chat.bodies}) == 1 + SAMPLES


def test_the_script_itself_imports_neither_torch_nor_transformers(
    chat, dataset, tmp_path, monkeypatch
):
    """What LeRobot imports is its own affair."""
    imported = set()
    import_really = builtins.__import__

    def note(name, globals=None, locals=None, fromlist=(), level=0):
        if globals and globals.get("__name__") == ap.__name__:
            imported.add(name.partition(".")[0])
        return import_really(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", note)
    code, _, err = serve(dataset, tmp_path / "out", chat.url, "--verify")
    assert code == 0, err
    assert "httpx" in imported
    assert not imported & {"torch", "transformers", "qwen_vl_utils"}


def test_dry_run_asks_for_nothing_but_the_models_name(chat, dataset, tmp_path):
    code, _, err = serve(dataset, tmp_path / "out", chat.url, "--dry-run")
    assert code == 0, err
    assert chat.count == 0
    chat.stop()
    code, _, err = serve(
        dataset, tmp_path / "out", chat.url, "--dry-run", "--model", "demo"
    )
    assert code == 0, err


# ---------------------------------------------------------------------------- --verify


def read_question(text):
    """The user prompt of a question of --verify, and its options by label."""
    options = dict(re.findall(r"^([A-Z])\. (.*)$", text, re.MULTILINE))
    return re.search(r'"(.*number.*)"', text)[1], options


def test_verify(chat, dataset, tmp_path):
    """A server that knows which skill each of its dialogues was for."""
    skills = [name for name, _, _ in make_demo.PICK_AND_PLACE]
    skill_of = {}

    def answer(body):
        text = text_of(body)
        if body["max_tokens"] > 1:
            said = json.loads(answer_of(body))["user_prompt"]
            (skill_of[said],) = [name for name in skills if name in text] or [""]
            return answer_of(body)
        assert not pictures_of(body)
        said, options = read_question(text)
        for label, option in options.items():
            if option == skill_of[said]:
                return f"{label}."
        raise AssertionError(text)

    chat.answer = answer
    output = tmp_path / "out"
    code, _, err = serve(dataset, output, chat.url, "--verify")
    assert code == 0, err
    assert all(line["skill_recovered"] for line in check(dataset, output))
    assert chat.count == 1 + 2 * SAMPLES


def test_verify_with_a_model_that_names_no_option(chat, dataset, tmp_path):
    def answer(body):
        return answer_of(body) if body["max_tokens"] > 1 else "The"

    chat.answer = answer
    output = tmp_path / "out"
    code, _, err = serve(dataset, output, chat.url, "--verify")
    assert code == 0, err
    assert not any(line["skill_recovered"] for line in check(dataset, output))
    assert chat.count == 1 + 2 * SAMPLES * ap.MAX_TRIES


# ------------------------------------------------------------- engines and the journal


def test_a_preview_is_taken_over(chat, other, dataset, tmp_path):
    """By a run that names another URL."""
    output = tmp_path / "out"
    code, _, err = serve(dataset, output, chat.url, "--preview", 3)
    assert code == 0, err
    assert not output.exists()
    assert (tmp_path / "out.preview.html").is_file()
    assert len(journal(output)) == 3
    code, _, err = serve(dataset, output, other.url, "--model", "demo")
    assert code == 0, err
    check(dataset, output)
    assert other.count == 1 + SAMPLES - 3


def test_engines_and_models_do_not_mix(chat, dataset, model, tmp_path):
    output = tmp_path / "out"
    assert serve(dataset, output, chat.url, "--preview", 3)[0] == 0
    kept = journal(output)
    other_model = ChatServer(models=["other"])
    refused = [
        (annotate(dataset, model, output), "engine = 'server'"),
        (serve(dataset, output, other_model.url), "model = 'demo'"),
    ]
    assert journal(output) == kept
    assert serve(dataset, output, chat.url)[0] == 0
    refused += [
        (annotate(dataset, model, output), "engine = 'server'"),
        (serve(dataset, output, other_model.url), "model = 'demo'"),
    ]
    other_model.stop()
    for (code, out, err), difference in refused:
        assert (code, out) == (2, "")
        assert f"made with {difference}, but this run has" in err
    assert other_model.count == 0
    code, out, _ = serve(dataset, output, chat.url)
    assert code == 0
    assert "finished already" in out


def test_work_of_this_process_is_not_taken_over(chat, dataset, model, tmp_path):
    output = tmp_path / "out"
    assert annotate(dataset, model, output, "--preview", 2)[0] == 0
    code, out, err = serve(dataset, output, chat.url)
    assert (code, out) == (2, "")
    assert "made with engine = 'transformers', but this run has 'server'" in err
    assert len(journal(output)) == 2
    assert serve(dataset, output, chat.url, "--overwrite")[0] == 0
    check(dataset, output)


def test_the_journal_is_written_as_answers_arrive(chat, dataset, tmp_path, meanwhile):
    """A slow answer holds up nobody: all others are on the disk before it comes."""
    output = tmp_path / "out"
    slow = picture_at(dataset, 0)
    asked = threading.Event()
    release = threading.Event()

    def answer(body):
        if pictures_of(body) == [slow]:
            asked.set()
            assert release.wait(60)
        return answer_of(body)

    chat.answer = answer

    def watch():
        assert asked.wait(60)
        try:
            processes.wait_until(lambda: len(journal(output)) == SAMPLES - 1)
            assert 0 not in journal(output)
        finally:
            release.set()

    meanwhile(watch)
    code, _, err = serve(dataset, output, chat.url)
    assert code == 0, err
    lines = check(dataset, output)
    # Each frame has the answer to its own picture and words, whatever came first.
    bodies = {json.loads(answer_of(body))["user_prompt"]: body for body in chat.bodies}
    firsts = [0, 45, 75]
    for line in lines:
        body = bodies[line["user_prompt"]]
        index = firsts[line["episode_id"]] + line["frame_index"]
        assert pictures_of(body) == [picture_at(dataset, index)]
        assert line["skill_current"] in text_of(body)
        assert ap.SCENARIO_TYPES[line["scenario_type"]] in text_of(body)


# ------------------------------------------------------------------------ bad requests


@pytest.mark.parametrize(
    "reply",
    [error(400, "cannot read this"), error(500, "Internal"), Reply(dropped=True)],
)
def test_a_bad_request_is_a_failed_sample(chat, dataset, tmp_path, reply):
    output = tmp_path / "out"
    bad = picture_at(dataset, 55)
    chat.decide = lambda body: reply if pictures_of(body) == [bad] else None
    code, out, err = serve(dataset, output, chat.url)
    assert code == 0, err
    lines = check(dataset, output, sampled=False)
    places = {(line["episode_id"], line["frame_index"]) for line in lines}
    assert set(expected_samples(dataset)) - places == {(1, 10)}
    assert "failed: episode 1, frame 10" in err
    assert "no answer to a sample" in err
    assert re.search("failed +1\n", out)


def test_bad_answers_are_asked_again(chat, dataset, tmp_path):
    bad = iter(["I am a model.", "{", "", '{"user_prompt": 3}'])
    lock = threading.Lock()

    def answer(body):
        with lock:
            return next(bad, None) or answer_of(body)

    chat.answer = answer
    code, out, err = serve(dataset, tmp_path / "out", chat.url)
    assert code == 0, err
    check(dataset, tmp_path / "out")
    # The first of them answered the first request.
    assert re.search("asked again +2\n", out)


# ----------------------------------------------------------------- servers that go away


def test_a_server_that_restarts_is_waited_for(
    chat, dataset, tmp_path, monkeypatch, meanwhile
):
    (waiting,) = events_of_messages(monkeypatch, "waiting for it")
    chat.decide = lambda body: chat.gate.clear() if chat.count == 6 else None

    def restart():
        chat.wait_for(1 + 8)
        chat.stop()
        chat.gate.set()
        assert waiting.wait(60)
        chat.start()

    meanwhile(restart)
    code, _, err = serve(dataset, tmp_path / "out", chat.url)
    assert code == 0, err
    check(dataset, tmp_path / "out")
    assert err.count("waiting for it, up to") == 1


def test_a_server_that_stays_away_ends_the_run_and_the_work_is_kept(
    chat, dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(ap, "SERVER_PATIENCE", 0.5)
    output = tmp_path / "out"
    answered = []
    lock = threading.Lock()

    def answer_six(body):
        with lock:
            answered.append(body)
            return None if len(answered) <= 6 else Reply(dropped=True)

    chat.decide = answer_six
    code, out, err = serve(dataset, output, chat.url)
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert re.search(r"error: .*: no answer for \d+ s .*; check the server and", last)
    assert not output.exists()
    assert len(journal(output)) == 5
    # The run does not wait for its requests, one of which may still be under way.
    for thread in threading.enumerate():
        if thread.daemon and thread.name.startswith("request"):
            thread.join()
    chat.decide = lambda body: None
    before = chat.count
    code, _, err = serve(dataset, output, chat.url)
    assert code == 0, err
    check(dataset, output)
    assert chat.count - before == 1 + SAMPLES - 5


# ----------------------------------------------------------------- errors at the start


def fail_at_start(dataset, tmp_path, url, *flags):
    """The message of a run that ends before anything is generated or written."""
    code, out, err = serve(dataset, tmp_path / "out", url, *flags)
    assert (code, out) == (2, ""), err
    assert not list(tmp_path.iterdir())
    assert "Traceback" not in err
    return err.splitlines()[-1]


@pytest.mark.parametrize("flags", [(), ("--model", "demo")])
def test_no_server_there(flags, chat, dataset, tmp_path):
    chat.stop()
    message = fail_at_start(dataset, tmp_path, chat.url, *flags)
    assert f"error: --server {chat.url}: no server answers there" in message


@pytest.mark.parametrize("flags", [(), ("--model", "demo")])
@pytest.mark.parametrize("key", ["", "sk-wrong"])
def test_wrong_key(key, flags, chat, dataset, tmp_path, monkeypatch):
    chat.key = "sk-right"
    monkeypatch.setenv(ap.KEY_VARIABLE, key)
    message = fail_at_start(dataset, tmp_path, chat.url, *flags)
    assert ap.KEY_VARIABLE in message
    assert "sk-" not in message


def test_a_model_that_is_not_served(chat, dataset, tmp_path):
    message = fail_at_start(dataset, tmp_path, chat.url, "--model", "nope")
    assert "serves demo, not nope" in message
    chat.models = ["a", "b"]
    assert "serves a, b; name" in fail_at_start(dataset, tmp_path, chat.url)


def test_a_model_without_vision(chat, dataset, tmp_path):
    blind = error(400, "demo is not a multimodal model")
    chat.decide = lambda body: blind if pictures_of(body) else None
    message = fail_at_start(dataset, tmp_path, chat.url)
    assert "demo is not a multimodal model" in message


def test_a_prompt_without_room(chat, dataset, tmp_path):
    """The longest prompt of the plan is tried first."""
    longest = []
    chat.decide = lambda body: longest.append(len(text_of(body)))
    assert serve(dataset, tmp_path / "kept" / "out", chat.url)[0] == 0
    assert longest[0] == max(longest)
    limit = max(longest) - 1
    long = error(400, f"maximum context length is {limit}")
    chat.decide = lambda body: long if len(text_of(body)) > limit else None
    (tmp_path / "other").mkdir()
    message = fail_at_start(dataset, tmp_path / "other", chat.url)
    assert f"maximum context length is {limit}" in message


def test_a_url_with_a_password_is_not_shown(dataset, tmp_path):
    flags = ("--model", "demo")
    url = "http://me:sk-secret@127.0.0.1:9/v1"
    code, out, err = serve(dataset, tmp_path / "out", url, *flags)
    assert (code, out) == (2, "")
    assert "sk-secret" not in err


def test_the_key_is_neither_printed_nor_written(chat, dataset, tmp_path, monkeypatch):
    chat.key = KEY
    monkeypatch.setenv(ap.KEY_VARIABLE, KEY)
    bad = picture_at(dataset, 0)
    reply = error(400, f"your key {KEY} is fine, this picture is not")
    chat.decide = lambda body: reply if pictures_of(body) == [bad] else None
    output = tmp_path / "out"
    code, out, err = serve(dataset, output, chat.url, "--preview", 12, "--debug")
    assert code == 0, err
    said = out + err
    assert f"Bearer {KEY}" == chat.headers[-1]["Authorization"]
    files = content(tmp_path)
    code, out, err = serve(dataset, output, chat.url, "--debug")
    assert code == 0, err
    said += out + err
    files.update(content(tmp_path))
    chat.decide = lambda body: error(401, f"{KEY} has ended")
    code, out, err = serve(
        dataset, output, chat.url, "--debug", "--seed", 1, "--overwrite"
    )
    assert code == 2
    said += out + err
    assert "***" in said
    assert KEY not in said
    assert not any(KEY.encode() in data for data in files.values())


# --------------------------------------------------------------------------- processes


def start(chat, dataset, output):
    """Start a run in a process of its own."""
    flags = ("--server", chat.url, "--batch-size", 4)
    return processes.start(dataset, "demo", output, *flags)


def test_ctrl_c_ends_the_process_soon_and_the_same_command_goes_on(
    chat, dataset, tmp_path
):
    output = tmp_path / "out"
    chat.decide = lambda body: chat.gate.clear() if chat.count == 4 else None
    process = start(chat, dataset, output)
    chat.wait_for(1 + 4)
    processes.wait_until(lambda: chat.at_once == 4 and journal(output), process)
    started = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    assert processes.exit_codes([process]) == [130]
    # 0.3 s on an idle machine.
    assert time.monotonic() - started < 5
    log = Path(f"{output}.log").read_text()
    assert "interrupted; the same command goes on from here" in log
    assert "Traceback" not in log
    assert "Fatal" not in log
    kept = len(journal(output))
    chat.decide = lambda body: None
    chat.gate.set()
    processes.wait_until(lambda: chat.at_once == 0)
    before = chat.count
    assert processes.exit_codes([start(chat, dataset, output)]) == [0]
    check(dataset, output)
    assert chat.count - before == 1 + SAMPLES - kept


def test_kill_and_go_on(chat, dataset, tmp_path):
    output = tmp_path / "out"
    chat.decide = lambda body: chat.gate.clear() if chat.count == 7 else None
    process = start(chat, dataset, output)
    code = processes.stop_when(
        process, lambda: len(journal(output)) >= 3, signal.SIGKILL
    )
    assert code == -signal.SIGKILL
    kept = set(journal(output))
    chat.decide = lambda body: None
    chat.gate.set()
    processes.wait_until(lambda: chat.at_once == 0)
    before = chat.count
    assert processes.exit_codes([start(chat, dataset, output)]) == [0]
    check(dataset, output)
    assert chat.count - before == 1 + SAMPLES - len(kept)
