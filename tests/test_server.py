"""--server: the whole job against servers on this machine that fail on demand."""

import base64
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chat_server
import make_demo
import pytest
from chat_server import ChatServer, Reply, dialogue_of, error, pictures_of, text_of
from checks import check, content, expected_samples, record
from conftest import run
from hypothesis import given
from hypothesis import strategies as st
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from PIL import Image
from torchvision.transforms.functional import to_pil_image

import annotate_pgen as ap

SAMPLES = 12  # one for each second of the demo's three episodes
SKILLS = [name for name, _, _ in make_demo.PICK_AND_PLACE]
TYPES = ("specific_object", "confirmation")
SAMPLE = ap.Sample(0, 0, 0.0, SKILLS[0], (), make_demo.TASK, *TYPES, 0, tuple(SKILLS))
VLLM_FIELDS = {"top_k", "chat_template_kwargs"}
FEW_FIELDS = {"model", "messages", "temperature", "top_p", "max_tokens"}
ALL_FIELDS = {*FEW_FIELDS, *VLLM_FIELDS, "response_format"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Wait for moments, not for minutes, on a machine that has a proxy."""
    for name in (ap.KEY_VARIABLE, "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")  # put back afterwards, also where there is none
        monkeypatch.delenv(name)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr(ap, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(ap, "SERVER_PATIENCE", 30.0)


@pytest.fixture
def chat():
    """A server."""
    server = ChatServer()
    yield server
    server.stop()


other = chat  # another one


@pytest.fixture
def pgen(chat):
    """A client whose first request has been answered."""
    return connect(chat)


def connect(*servers, **settings):
    """Connect to servers, as the job does."""
    client = ap.ServerPgen([server.url for server in servers], **settings)
    client.check(1, SAMPLE)
    return client


def serve(dataset, output, servers, *flags):
    """Run the job with one server or URL or a list: (exit code, stdout, stderr)."""
    servers = servers if isinstance(servers, list) else [servers]
    urls = [getattr(server, "url", server) for server in servers]
    given = ("--data-dir", dataset, "--output-dir", output, "--batch-size", 4)
    return run(*given, "--server", *urls, *flags)


def annotated(dataset, output, servers, *flags):
    """Run the job, which is to go well: (lines of annotations, stdout, stderr)."""
    code, out, err = serve(dataset, output, servers, *flags)
    assert code == 0, err
    assert re.search("failed +0\n", out), err
    return check(dataset, output), out, err


def in_turn(*replies, then=dialogue_of):
    """Reply so one after the other, then always as `then`, a function or a reply."""
    turns = iter(replies)

    def answer(body):
        reply = next(turns, then)
        return reply(body) if callable(reply) else reply

    return answer


def at_once(count):
    """Answer requests only when so many are there."""
    barrier = threading.Barrier(count)
    return lambda body: barrier.wait(60) < count and dialogue_of(body)


def ask(client, words="x"):
    """Ask for a dialogue about no picture."""
    return client.answer([client.prepare([], words)])[0]


def prompt_of(body):
    """What the person says in the dialogue that answers a request."""
    return json.loads(dialogue_of(body))["user_prompt"]


def journal(output):
    """What the person says in each dialogue in the work folder."""
    files = Path(f"{output}.partial").glob("dialogues-*.jsonl")
    text = "".join(path.read_text() for path in files)
    return set(re.findall('"user_prompt": "(.*?)"', text))


def wait_until(condition):
    """Return when a condition holds that no event tells of."""
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


def pictures_at(client, dataset, index):
    """What is sent of a frame, read as users read it."""
    source = LeRobotDataset("a/b", root=dataset, video_backend="pyav")
    image = to_pil_image(source[index]["observation.images.front"])
    return pictures_of({"messages": client.prepare([image], "")})


# -------------------------------------------------------------------- what is sent


def test_a_dataset_through_a_server(chat, dataset, tmp_path):
    """Four requests are under way at any time, and each frame gets its own answer."""
    client = connect(chat)
    chat.bodies.clear()
    chat.answer = in_turn(dialogue_of, then=at_once(4))
    output = tmp_path / "out"
    lines, _, _ = annotated(dataset, output, chat)
    assert len(chat.bodies) == 1 + len(lines) == 1 + SAMPLES
    assert chat.most_under_way == 4
    assert chat.url not in json.dumps(record(output))
    # The first request shows whether there is room for the longest prompt.
    lengths = [len(text_of(body)) for body in chat.bodies]
    assert lengths[0] == max(lengths)
    bodies = {prompt_of(body): body for body in chat.bodies}
    for line in lines:
        body = bodies[line["user_prompt"]]
        index = [0, 45, 75][line["episode_id"]] + line["frame_index"]
        assert pictures_of(body) == pictures_at(client, dataset, index)
        assert line["skill_current"] in text_of(body)
    chat.stop()
    assert "finished already" in serve(dataset, output, chat)[1]


def test_every_setting_is_sent(chat, pgen):
    """A checkpoint's own settings would hold where a request is silent."""
    assert ask(pgen) == dialogue_of(chat.bodies[-1])
    body = chat.bodies[-1]
    assert set(body) == ALL_FIELDS
    assert body["model"] == "demo"
    assert (body["temperature"], body["top_p"]) == (0.7, ap.TOP_P)
    assert (body["top_k"], body["max_tokens"]) == (ap.TOP_K, ap.MAX_NEW_TOKENS)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["response_format"]["type"] == "json_schema"
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ap.ANSWER_KEYS


def test_examples_come_first_and_are_the_same_for_many_samples(chat, dataset, tmp_path):
    """So that a server's prefix cache holds them."""
    flags = ("--num-image-views-per-sample", 2, "--sample-interval", 0.1)
    lines, _, _ = annotated(dataset, tmp_path / "out", chat, *flags)
    prefixes = set()
    for body in chat.bodies:
        *earlier, last = body["messages"]
        roles = [message["role"] for message in earlier]
        assert roles == ["system", *["user", "assistant"] * ap.EXAMPLE_COUNT]
        kinds = [part["type"] for part in last["content"]]
        assert kinds == ["image_url", "image_url", "text"]
        prefixes.add(json.dumps(earlier))
    assert "image_url" not in "".join(prefixes)
    pairs = {(line["scenario_type"], line["response_type"]) for line in lines}
    pool = max(len(examples) for examples in ap.EXAMPLES.values())
    assert len(prefixes) <= len(pairs) * pool < len(chat.bodies)


def test_bad_answers_are_asked_again_with_other_examples(chat, dataset, tmp_path):
    chat.answer = in_turn(dialogue_of, "I am a model.", "{", '{"user_prompt": 3}')
    flags = ("--batch-size", 1, "--temperature", 0)
    _, out, _ = annotated(dataset, tmp_path / "out", chat, *flags)
    assert re.search("asked again +3\n", out)
    hot = [body["temperature"] > 0 for body in chat.bodies[1:5]]
    assert hot == [False, True, True, True]
    chats = [body["messages"] for body in chat.bodies[1:5]]
    first, *others = [json.dumps(messages[-1]) for messages in chats]
    assert set(others) == {re.sub(r"Task: .*?\\n", "", first)} != {first}
    assert len({json.dumps(messages[:-1]) for messages in chats}) > 1


@pytest.mark.parametrize("size", [(640, 480), (3000, 7), (448, 448), (1, 1)])
def test_pictures_are_bounded_jpegs(pgen, size):
    url = pictures_of({"messages": pgen.prepare([Image.new("RGB", size)], "hello")})[0]
    assert url.startswith("data:image/jpeg;base64,")
    shown = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    assert shown.width * shown.height <= ap.MAX_PIXELS
    assert shown.width / shown.height == pytest.approx(size[0] / size[1], rel=0.01)


def test_special_tokens_are_broken_up(chat, pgen):
    ask(pgen, "put <|im_end|> or </s><<|image_pad|>>, 3 < 4")
    assert text_of(chat.bodies[-1]) == "put < |im_end|> or < /s><< |image_pad|>>, 3 < 4"
    pgen.choose([("<image>", ["lift"])])
    assert '"< image>"' in text_of(chat.bodies[-1])

    @given(st.text(alphabet="<|>/im_end \n", max_size=30))
    def check_text(text):
        words = text_of({"messages": pgen.prepare([], text)})
        assert not re.search(r"<[^<>\s]+>", words)
        assert words.replace("< ", "<") == text.replace("< ", "<")

    check_text()


def test_seeds_are_sent_if_one_is_given_and_repeat(chat, dataset, tmp_path):
    """--seed 0 is a seed as any other; without the flag, other tests see none sent."""

    def seeds_of_a_run(name, *flags):
        chat.bodies.clear()
        annotated(dataset, tmp_path / name, chat, *flags)
        return {prompt_of(body): body["seed"] for body in chat.bodies}

    seeds = seeds_of_a_run("a", "--seed", 0)
    assert seeds == seeds_of_a_run("b", "--seed", 0)
    others = seeds_of_a_run("c", "--seed", 1)
    assert len({*seeds.values(), *others.values()}) == 2 * (1 + SAMPLES)


@pytest.mark.parametrize(
    ("field", "reply", "left"),
    [
        ("top_k", Reply(422, {"detail": "top_k"}), ALL_FIELDS - VLLM_FIELDS),
        ("chat_template_kwargs", error(400, "unknown"), ALL_FIELDS - VLLM_FIELDS),
        ("response_format", error(400, "not supported"), FEW_FIELDS),
        ("response_format", error(500, "no grammar"), FEW_FIELDS),
        ("response_format", {"content": None, "reasoning_content": "Hm"}, FEW_FIELDS),
        ("response_format", " \n\n\n", FEW_FIELDS),
        # Content in parts is joined.
        ("messages", lambda x: [{"text": y} for y in dialogue_of(x)], ALL_FIELDS),
        # One that is only busy refuses nothing.
        ("messages", in_turn(*[error(429, ""), error(503, "")] * 2), ALL_FIELDS),
    ],
)
def test_what_a_server_takes(chat, field, reply, left, capsys):
    """It is found out by the first requests, and holds from then on."""
    spoiled = in_turn(then=reply)
    chat.answer = lambda body: (spoiled if field in body else dialogue_of)(body)
    client = connect(chat)
    assert len(chat.bodies) < 10
    for _ in range(2):
        assert ask(client) == dialogue_of(chat.bodies[-1])
        assert set(chat.bodies[-1]) == left
    assert ("requests are without" in capsys.readouterr().err) == (left != ALL_FIELDS)


# ------------------------------------------------------------------ errors at the start


def fail_at_start(dataset, tmp_path, servers, *flags):
    """The message of a run that ends before anything is generated or written."""
    code, out, err = serve(dataset, tmp_path / "out", servers, *flags)
    assert (code, out) == (2, ""), err
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in err
    return err.splitlines()[-1]


@pytest.mark.parametrize(
    ("answer", "quoted"),
    [
        ("I am a helpful model.", "I am a helpful model."),
        ({"content": None, "reasoning_content": "Let me see"}, "Let me see"),
        (error(400, "max_tokens is too large: 128"), "max_tokens is too large: 128"),
        (error(500, "out of memory"), "out of memory"),
        (Reply(200, "<html>Welcome</html>"), "first request"),
        (error(403, "not with this key"), ap.KEY_VARIABLE),
        (Reply(0), "Connection error"),
    ],
)
def test_first_requests_that_give_no_dialogue(chat, dataset, tmp_path, answer, quoted):
    chat.answer = in_turn(then=answer)
    assert quoted in fail_at_start(dataset, tmp_path, chat)
    assert len(chat.bodies) <= 9


@pytest.mark.parametrize("key", ["", "sk-wrong-key", "sk-\u2026", "sk-a\nsk-b"])
def test_wrong_key(chat, dataset, tmp_path, monkeypatch, key):
    chat.key = "sk-right-key"
    monkeypatch.setenv(ap.KEY_VARIABLE, key)
    message = fail_at_start(dataset, tmp_path, chat)
    assert ap.KEY_VARIABLE in message
    assert "sk-" not in message


def test_the_key_is_neither_printed_nor_written(chat, dataset, tmp_path, monkeypatch):
    """Not even where a server quotes it, and --debug shows tracebacks."""
    key = "sk-nobody-may-read-this"
    chat.key = key
    monkeypatch.setenv(ap.KEY_VARIABLE, f" {key}\n")
    chat.answer = in_turn(dialogue_of, error(400, f"{key} is fine, this is not"))
    code, out, err = serve(dataset, tmp_path / "a", chat, "--debug")
    assert code == 0, err
    assert set(chat.keys) == {f"Bearer {key}"}
    chat.answer = in_turn(then=error(403, f"{key} has ended"))
    *_, second = serve(dataset, tmp_path / "b", chat, "--debug")
    chat.models = error(401, f"{key} is unknown")
    *_, third = serve(dataset, tmp_path / "c", chat, "--debug")
    for said in (err, second, third):
        assert "***" in said
        assert key not in out + said
    assert not any(key.encode() in data for data in content(tmp_path).values())


@pytest.mark.parametrize(
    ("models", "flags", "expected"),
    [
        (["demo"], ["--model", "nope"], "serves demo, and not nope"),
        (["a", "b"], [], "serves a, b, .*name one with --model"),
        (error(404, "Not Found"), [], "Not Found"),
        (Reply(200, "<html>Welcome</html>"), ["--model", "demo"], "/v1"),
    ],
)
def test_models_that_do_not_fit(chat, dataset, tmp_path, models, flags, expected):
    chat.models = models
    assert re.search(expected, fail_at_start(dataset, tmp_path, chat, *flags))
    assert chat.bodies == []


@pytest.mark.parametrize(
    "url",
    ["host:80/v1", "http://host:port/v1", "http://a:secret@b/v1", "http://b?secret"],
)
def test_urls_that_are_none(dataset, tmp_path, url):
    message = fail_at_start(dataset, tmp_path, url, "--model", "demo")
    assert "--server" in message
    assert "secret" not in message


@pytest.mark.parametrize(
    "reply",
    [
        *(error(status, "later") for status in (408, 429, 500, 502, 503)),
        error(429, "later", Retry_After="soon"),
        Reply(200, "<html>Bad gateway</html>"),
        Reply(200, "<html>Back soon</html>", {"Content-Type": "text/html"}),
        Reply(200, {"error": {"message": "overloaded"}}),
        Reply(0),
    ],
)
def test_passing_errors(chat, pgen, reply):
    """A request is sent again until it is answered, and the sample does not suffer."""
    chat.answer = in_turn(reply, reply)
    assert ask(pgen) == dialogue_of(chat.bodies[-1])
    assert len(chat.bodies) == 4


def test_retry_after_is_honoured(chat, pgen):
    chat.answer = in_turn(error(429, "slow down", Retry_After="1"))
    started = time.monotonic()
    assert ask(pgen)
    assert 1 <= time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("reply", "index", "place"),
    [
        (error(400, "'max_tokens' is too large: 128; there are 4000"), 55, (1, 10)),
        (error(500, "Internal error"), 55, (1, 10)),
        (Reply(0), 105, (2, 30)),
    ],
)
def test_a_bad_sample_fails_alone(chat, pgen, dataset, tmp_path, reply, index, place):
    """Also the last one, and its error changes nothing about the others."""
    bad = pictures_at(pgen, dataset, index)
    chat.answer = lambda body: reply if pictures_of(body) == bad else dialogue_of(body)
    code, _, err = serve(dataset, tmp_path / "out", chat)
    assert code == 0, err
    lines = check(dataset, tmp_path / "out", sampled=False)
    places = {(line["episode_id"], line["frame_index"]) for line in lines}
    assert set(expected_samples(dataset)) - places == {place}
    assert "failed: episode {}, frame {}:".format(*place) in err
    assert "no answer to a sample" in err
    assert all(set(body) == ALL_FIELDS for body in chat.bodies)


# ----------------------------------------------------------------- servers that go away


def start_process(port="0"):
    """Start a server in a process of its own: (process, URL)."""
    program = [sys.executable, chat_server.__file__, "--port", port, "--delay", "0.1"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def test_a_server_killed_and_started_again_loses_nothing(dataset, tmp_path):
    output = tmp_path / "out"
    process, url = start_process()

    def kill_and_start_again():
        wait_until(lambda: len(journal(output)) >= 3)
        process.kill()
        process.communicate()
        kept = journal(output)
        time.sleep(0.5)
        again, _ = start_process(re.search(r":(\d+)/", url)[1])
        return again, kept

    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(kill_and_start_again)
        lines, out, _ = annotated(dataset, output, url, "--sample-interval", 0.5)
        again, kept = future.result()
    again.kill()
    again.communicate()
    assert 3 <= len(kept) < len(lines) == 23
    assert kept <= {line["user_prompt"] for line in lines}
    assert re.search("generated in this run +23 ", out)


@pytest.mark.parametrize("status", [0, 401, 404, 429])
def test_errors_that_stay(chat, dataset, tmp_path, monkeypatch, status):
    """What is under way is waited for, and the same command goes on from there."""
    monkeypatch.setattr(ap, "SERVER_PATIENCE", 0.5)
    output = tmp_path / "out"
    no_longer = error(status, "no longer", Retry_After="86400")
    slow = lambda body: time.sleep(0.3) or dialogue_of(body)  # noqa: E731
    chat.answer = in_turn(*[dialogue_of] * 5, slow, then=no_longer)
    code, out, err = serve(dataset, output, chat)
    assert (code, out) == (1, "")
    assert re.search(f"error: .*; check the server; {ap.RESUME_REMEDY}", err)
    assert ("no longer" in err.splitlines()[-1]) == (status > 0)
    assert not output.exists()
    kept = journal(output)
    assert len(kept) == 5
    chat.answer = dialogue_of
    chat.bodies.clear()
    annotated(dataset, output, chat)
    assert not kept & {prompt_of(body) for body in chat.bodies}


@pytest.mark.parametrize("way", ["gone", "hangs", "fails"])
def test_one_of_two_servers_may_go(chat, other, dataset, tmp_path, monkeypatch, way):
    monkeypatch.setattr(ap, "ANSWER_TIMEOUT", 0.5)
    end = threading.Event()

    def fail(body):
        if way == "hangs":
            end.wait(60)
        if way == "gone":
            threading.Thread(target=chat.stop).start()
        return error(500, "engine died") if way == "fails" else Reply(0)

    chat.answer = in_turn(dialogue_of, dialogue_of, then=fail)
    # What the one takes, the other may refuse.
    refusal = in_turn(then=error(422, "Unexpected fields: {'top_k'}"))
    other.answer = lambda body: (refusal if "top_k" in body else dialogue_of)(body)
    started = time.monotonic()
    annotated(dataset, tmp_path / "out", [chat, other])
    assert time.monotonic() - started < 20
    assert len(other.bodies) >= 3 + SAMPLES - 1
    assert "top_k" in chat.bodies[-1]
    end.set()


def test_connections_that_a_server_leaves_hanging(chat, dataset, tmp_path, monkeypatch):
    """As vLLM does when it is told to end: it takes no others, and answers nothing."""
    monkeypatch.setattr(ap, "ANSWER_TIMEOUT", 0.5)
    four = threading.Barrier(4)
    end = threading.Event()

    def hang(body):
        if four.wait(60) == 0:
            chat.stop(drop=False)
            chat.answer = dialogue_of
            chat.start()
        return end.wait(60) and ""

    chat.answer = in_turn(*[dialogue_of] * 3, then=hang)
    annotated(dataset, tmp_path / "out", chat)
    end.set()


def test_a_busy_server_gets_more_time(chat, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(ap, "ANSWER_TIMEOUT", 0.4)
    one_at_a_time = threading.Lock()

    def answer(body):
        with one_at_a_time:
            time.sleep(0.1)
            return dialogue_of(body)

    chat.answer = answer
    annotated(dataset, tmp_path / "out", chat, "--batch-size", SAMPLES)


def test_an_interrupted_process_ends_at_once(chat, dataset, tmp_path):
    """Requests that are under way do not hold it up; the same command goes on."""
    output = tmp_path / "out"
    end = threading.Event()
    chat.answer = in_turn(*[dialogue_of] * 3, then=lambda body: end.wait(120) and "")
    given = ("--data-dir", dataset, "--output-dir", output, "--batch-size", "4")
    program = [sys.executable, ap.__file__, *given, "--server", chat.url]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(program, text=True, **pipes)
    wait_until(lambda: len(journal(output)) == 2 and chat.under_way == 4)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    # 0.3 s on an idle machine.
    assert time.monotonic() - started < 5
    assert (process.returncode, out) == (130, "")
    assert err.endswith("error: interrupted; the same command goes on from here\n")
    assert "Traceback" not in err
    end.set()
    chat.answer = dialogue_of
    chat.bodies.clear()
    annotated(dataset, output, chat)
    assert len(chat.bodies) == 1 + SAMPLES - 2


@pytest.mark.parametrize("knows", [True, False])
def test_verify(chat, dataset, tmp_path, monkeypatch, knows):
    """A server that knows which skill each dialogue was for, and one that does not."""
    monkeypatch.setattr(ap, "PROMPT", "{skill}")
    monkeypatch.setattr(ap, "VERIFY_PROMPT", "{user_prompt}\n{options}")
    skill_of = {name: name for name in SKILLS}
    questions = []

    def answer(body):
        if body["max_tokens"] > 1:
            skill_of[prompt_of(body)] = text_of(body)
            return dialogue_of(body)
        questions.append(body)
        sentence, *options = text_of(body).split("\n")
        labels = dict(option.split(". ")[::-1] for option in options)
        return labels[skill_of[sentence]] if knows else "The"

    chat.answer = answer
    lines, out, _ = annotated(dataset, tmp_path / "out", chat, "--verify")
    assert {line["skill_recovered"] for line in lines} == {knows}
    tries = 1 if knows else ap.MAX_TRIES
    assert len(chat.bodies) - len(questions) == 1 + SAMPLES * tries
    assert ("--verify means little here" in out) != knows
    for body in questions:
        assert set(body) == ALL_FIELDS - {"response_format"}
        assert (body["max_tokens"], body["temperature"]) == (1, 0)
        assert not pictures_of(body)
