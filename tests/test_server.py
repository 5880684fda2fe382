"""The client of a server, against one on this machine that fails on demand."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from chat_server import ChatServer, Reply, completion, dialogue_of, error, text_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import annotate_pgen as ap

QUICK = {"FIRST_PAUSE": 0.01, "LONGEST_PAUSE": 0.05, "SERVER_PATIENCE": 20.0}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.delenv(ap.KEY_VARIABLE, raising=False)
    for name, value in QUICK.items():
        monkeypatch.setattr(ap, name, value)


@pytest.fixture
def said(monkeypatch):
    """What was written to stderr."""
    lines = []
    monkeypatch.setattr(ap, "say", lines.append)
    return lines


@pytest.fixture
def chat():
    server = ChatServer()
    yield server
    server.gate.set()
    server.stop()


@pytest.fixture
def other():
    server = ChatServer()
    yield server
    server.gate.set()
    server.stop()


def connect(*args, views=1, prompt="hello", **kwargs):
    """A client whose first request has been answered."""
    pgen = ap.ServerPgen(*args, **kwargs)
    pgen.check(views, prompt)
    return pgen


def noise(width=640, height=480, seed=0):
    """A picture of blocks, unlike that of any other seed."""
    import random

    values = random.Random(seed).randbytes(3 * 20 * 15)
    return Image.frombytes("RGB", (20, 15), values).resize((width, height))


def ask_many(pgen, count, threads=64):
    prepared = [pgen.prepare([], f"sample {number}") for number in range(count)]
    with ThreadPoolExecutor(threads) as executor:
        return list(executor.map(lambda content: pgen.answer([content])[0], prepared))


def expected(prompt):
    body = {"messages": [{"role": "user", "content": prompt}]}
    return ap.parse_answer(dialogue_of(body))


# ------------------------------------------------------------------- what is sent


def test_answers_and_settings(chat):
    pgen = connect([chat.url])
    assert pgen.model == "demo"
    assert pgen.call_qwen([noise()], "hello") == expected("hello")
    body = chat.bodies[-1]
    assert body["temperature"] == 0.7
    assert body["top_p"] == 1.0
    assert body["top_k"] == -1
    assert body["max_tokens"] == ap.MAX_NEW_TOKENS
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    schema = body["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == ["user_prompt", "robot_utterance"]
    assert "seed" not in body
    assert [message["role"] for message in body["messages"]] == ["user"]
    assert "Authorization" not in chat.headers[-1]


@pytest.mark.parametrize("size", [(640, 480), (3000, 7), (448, 448), (1, 1)])
def test_pictures_are_bounded_jpegs(chat, size):
    pgen = connect([chat.url])
    content = pgen.prepare([noise(*size).convert("RGBA"), noise(*size)], "hello")
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    kind, data = content[0]["image_url"]["url"].split(",")
    assert kind == "data:image/jpeg;base64"
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert shown.format == "JPEG"
    assert shown.width * shown.height <= ap.MAX_PIXELS
    if size[0] * size[1] <= ap.MAX_PIXELS:
        assert shown.size == size
    else:
        ratio = (shown.width / shown.height) / (size[0] / size[1])
        assert 0.85 < ratio < 1.2


@pytest.mark.parametrize(
    ("text", "neutral"),
    [
        ("put <|im_end|> away", "put < |im_end|> away"),
        ("<image> and <start_of_turn>", "< image> and < start_of_turn>"),
        ("</s><<|image_pad|>>", "< /s><< |image_pad|>>"),
        ("3 < 4 and 5 > 4, <>", "3 < 4 and 5 > 4, <>"),
    ],
)
def test_special_tokens_are_broken_up(chat, text, neutral):
    assert ap.break_markers(text) == neutral
    assert connect([chat.url]).prepare([], text)[-1]["text"] == neutral


@given(st.text(alphabet="<|>/im_end \n", max_size=30))
def test_no_marker_survives(text):
    assert not re.search(r"<[^<>\s]+>", ap.break_markers(text))


def test_greedy_samples_when_asked_again(chat):
    pgen = connect([chat.url], temperature=0)
    content = pgen.prepare([], "hello")
    for tries in range(3):
        pgen.answer([content], tries)
    assert [body["temperature"] for body in chat.bodies[-3:]] == [0, 0.7, 0.7]


def test_seeds_belong_to_sample_and_try(chat):
    def seeds_of_a_run(seed):
        pgen = connect([chat.url], seed=seed)
        first = chat.count
        for prompt in ("a", "b"):
            for tries in range(2):
                pgen.answer([pgen.prepare([noise()], prompt)], tries)
        return [body["seed"] for body in chat.bodies[first:]]

    run = seeds_of_a_run(5)
    assert run == seeds_of_a_run(5)
    assert len(set(run) | set(seeds_of_a_run(6))) == 8
    assert all(0 <= seed < 2**31 for seed in run)


def test_invalid_answers_are_none(chat):
    pgen = connect([chat.url])
    content = pgen.prepare([], "hello")
    good = dialogue_of({"messages": [{"content": "x"}]})
    for text, is_valid in {
        good: True,
        f"```json\n{good}\n```": True,
        f"<think>Well.</think>\n{good}": True,
        "I am a model.": False,
        "": False,
    }.items():
        chat.answer = lambda body, text=text: text
        assert (pgen.answer([content])[0] is not None) == is_valid
    chat.answer = lambda body: None
    assert pgen.answer([content, content]) == [None, None]
    with pytest.raises(ap.RunError, match="none of 4 answers"):
        pgen.call_qwen([], "hello")


def test_choose(chat):
    pgen = connect([chat.url])
    answers = {"q1": "B", "q2": " (A", "q3": "The", "q4": "D", "q5": "", "q6": "C."}
    chat.answer = lambda body: answers[text_of(body)]
    assert pgen.choose(list(answers), [3] * 6) == [1, 0, -1, -1, -1, 2]
    body = chat.bodies[-1]
    assert body["max_tokens"] == 1
    assert body["temperature"] == 0
    assert "response_format" not in body
    chat.next_replies.append(error(400, "too long"))
    assert pgen.choose(["q1"], [3]) == [-1]


# ----------------------------------------------------------------- what is refused


def test_refused_fields_are_left_out(chat, said):
    chat.refused = {"response_format", "chat_template_kwargs"}
    pgen = connect([chat.url])
    assert chat.count == 2
    assert ask_many(pgen, 20) == [expected(f"sample {n}") for n in range(20)]
    assert chat.count == 22
    names = "chat_template_kwargs, response_format"
    assert said == [f"{chat.url}: refuses {names}; left out from now on"]


@pytest.mark.parametrize(
    "reply",
    [
        error(400, "Unrecognized request argument supplied: top_k"),
        error(400, "not here", "body.top_k"),
        Reply(422, {"detail": [{"loc": ["body", "top_k"], "msg": "extra"}]}),
        Reply(400, "no top_k, please"),
        Reply(422, {"detail": "Unexpected fields in the request: {'top_k'}"}),
    ],
)
def test_however_a_field_is_refused(chat, said, reply):
    chat.decide = lambda body: reply if "top_k" in body else None
    pgen = connect([chat.url], seed=3)
    assert pgen.servers[0].refused == {"top_k"}
    assert "seed" in chat.bodies[-1]
    sampling = json.loads(chat.bodies[-1]["generation_config"])
    assert sampling == {"do_sample": True, "top_k": 0}
    pgen.choose(["q"], [2])
    assert json.loads(chat.bodies[-1]["generation_config"])["do_sample"] is False


def test_a_server_that_refuses_most_fields(chat, said):
    chat.refused = {"max_tokens", "top_k", "generation_config", "temperature"}
    connect([chat.url])
    assert not chat.refused & set(chat.bodies[-1])
    assert "response_format" in chat.bodies[-1]


def test_structured_output_by_another_name(chat):
    message = "json_schema is not supported by this engine"
    chat.decide = lambda b: error(400, message) if "response_format" in b else None
    assert connect([chat.url]).servers[0].refused == {"response_format"}


def test_an_error_that_only_mentions_fields_changes_nothing(chat, said):
    pgen = connect([chat.url])
    message = (
        "max_tokens=128 and 9000 tokens of input are too many; top_k 1 temperature"
    )
    chat.decide = lambda body: error(400, message) if "long" in text_of(body) else None
    assert pgen.answer([pgen.prepare([], "long")]) == [None]
    assert pgen.servers[0].refused == set()
    assert pgen.answer([pgen.prepare([], "short")]) == [expected("short")]
    assert "top_k" in chat.bodies[-1]


@pytest.mark.parametrize("status", [400, 413, 422])
def test_one_bad_request_is_one_failed_sample(chat, said, status):
    pgen = connect([chat.url])
    bad = error(status, "cannot read this picture")
    chat.decide = lambda body: bad if text_of(body)[-1] in "37" else None
    answers = ask_many(pgen, 10)
    assert [n for n, answer in enumerate(answers) if answer is None] == [3, 7]
    assert len(said) == 1
    assert "cannot read this picture" in said[0]


# ----------------------------------------------------------------- the first requests


def fails(*args, **kwargs):
    """The message of the InputError with which a client begins."""
    with pytest.raises(ap.InputError) as caught:
        connect(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_server_there(chat):
    chat.stop()
    message = fails([chat.url])
    assert chat.url in message
    assert "no server answers there" in message


@pytest.mark.parametrize("key", ["", "sk-wrong-key"])
def test_wrong_key(chat, monkeypatch, key):
    chat.key = "sk-right-key"
    monkeypatch.setenv(ap.KEY_VARIABLE, key)
    message = fails([chat.url])
    assert ap.KEY_VARIABLE in message
    assert "sk-" not in message
    assert ("asks for a key" in message) == (key == "")


def test_right_key_is_never_shown(chat, said, monkeypatch, capfd):
    chat.key = "sk-right-key"
    monkeypatch.setenv(ap.KEY_VARIABLE, " sk-right-key\n")
    pgen = connect([chat.url])
    assert chat.headers[-1]["Authorization"] == "Bearer sk-right-key"
    chat.decide = lambda body: error(400, "your key sk-right-key is fine")
    assert pgen.answer([pgen.prepare([], "x")]) == [None]
    chat.decide = lambda body: error(403, "your key sk-right-key is old")
    with pytest.raises(ap.RunError, match="403 your key \\*\\*\\* is old"):
        pgen.answer([pgen.prepare([], "x")])
    assert "sk-right-key" not in "".join(said) + "".join(capfd.readouterr())


def test_key_with_strange_characters(chat, monkeypatch):
    monkeypatch.setenv(ap.KEY_VARIABLE, "sk-\u2026")
    message = fails([chat.url])
    assert ap.KEY_VARIABLE in message
    assert "\u2026" not in message


def test_models(chat, other):
    assert "serves demo, not nope; name" in fails([chat.url], "nope")
    chat.models = ["a", "b"]
    assert "serves a, b; name a served one with --model" in fails([chat.url])
    assert connect([chat.url], "b").model == "b"
    assert chat.bodies[-1]["model"] == "b"
    chat.models = []
    assert "serves no model" in fails([chat.url])
    chat.models = ["a"]
    assert f"{other.url}: serves demo, not a" in fails([chat.url, other.url])
    assert f"{other.url}: serves demo, not a" in fails([chat.url, other.url], "a")
    other.models = ["b", "a"]
    assert connect([chat.url, other.url]).model == "a"


def test_a_server_without_list_of_models(chat):
    chat.models_reply = error(404, "Not Found")
    assert "lists no models: 404 Not Found" in fails([chat.url])
    assert connect([chat.url], "demo").model == "demo"
    assert "The model `nope` does not exist" in fails([chat.url], "nope")


@pytest.mark.parametrize("body", ["<html>Welcome</html>", "[]", {"data": 3}])
def test_not_such_a_server(chat, body):
    chat.models_reply = Reply(200, body)
    assert "lists no models: unexpected reply" in fails([chat.url])


def test_wrong_path(chat):
    message = fails([chat.url.removesuffix("/v1")], "demo")
    assert "/v1" in message
    assert connect([chat.url + "/"]).servers[0].url == chat.url


def test_no_vision(chat):
    no_vision = error(400, "demo is not a multimodal model")
    chat.decide = lambda body: no_vision if "image_url" in str(body) else None
    assert "demo is not a multimodal model" in fails([chat.url])


def test_prompt_too_long(chat):
    too_long = error(400, "maximum context length is 100 tokens")
    chat.decide = lambda body: too_long if len(text_of(body)) > 100 else None
    assert "maximum context length" in fails([chat.url], prompt="x" * 101)
    connect([chat.url], views=3)
    pictures = [part["type"] for part in chat.bodies[-1]["messages"][0]["content"]]
    assert pictures == ["image_url"] * 3 + ["text"]


def test_a_model_that_only_thinks(chat):
    for text, thoughts in ((None, "Let me see"), ("<think>Let me see", "")):
        chat.decide = lambda body, t=text, r=thoughts: completion(
            body, t, reasoning_content=r
        )
        assert "thinks before it answers" in fails([chat.url])


def test_the_first_request_fails(chat):
    chat.decide = lambda body: error(500, "out of memory")
    assert "500 out of memory" in fails([chat.url])
    chat.decide = lambda body: Reply(dropped=True)
    assert "no server answers there" in fails([chat.url])


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_busy_at_the_start_is_waited_for(chat, status):
    chat.models_reply = error(status, "busy")
    chat.next_replies.extend([error(status, "busy")] * 2)
    pgen = connect([chat.url], "demo")
    assert pgen.answer([pgen.prepare([], "x")]) == [expected("x")]
    assert "busy" in fails([chat.url])


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1",
        "ftp://host/v1",
        "http://",
        "http://h\nost/v1",
        "http://host:port/v1",
        "http://host/v1?key=sk-secret",
        "http://user:sk-secret@host/v1",
        "http://sk-secret@host/v1",
        "http://user:sk-secret@host:port/v1",
    ],
)
def test_urls_that_are_none(url):
    message = fails([url])
    assert "--server" in message
    assert "sk-secret" not in message


# ------------------------------------------------------------------------ on the way


def test_many_at_once(chat):
    pgen = connect([chat.url], requests_at_once=64)
    chat.gate.clear()
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(ask_many, pgen, 200)
        chat.wait_for(1 + 64)
        assert chat.at_once == 64
        chat.gate.set()
        assert future.result() == [expected(f"sample {n}") for n in range(200)]
    assert chat.most_at_once == 64


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_passing_errors(chat, said, status):
    pgen = connect([chat.url])
    chat.next_replies.extend([error(status, "later")] * 2)
    assert pgen.answer([pgen.prepare([], "x")]) == [expected("x")]
    assert chat.count == 4
    assert said == []


@pytest.mark.parametrize(
    "reply",
    [
        Reply(dropped=True),
        Reply(200, "<html>Bad gateway</html>"),
        Reply(200, {"error": {"message": "overloaded"}}),
        Reply(200, {"choices": []}),
        Reply(200, "\udcff".encode("utf-8", "surrogatepass").decode("latin-1")),
    ],
)
def test_broken_replies(chat, reply):
    pgen = connect([chat.url])
    chat.next_replies.extend([reply] * 2)
    assert pgen.answer([pgen.prepare([], "x")]) == [expected("x")]
    assert chat.count == 4


def test_retry_after_is_honoured(chat, monkeypatch):
    monkeypatch.setattr(ap, "SERVER_PATIENCE", 1000.0)
    pgen = connect([chat.url])
    waits = []
    monkeypatch.setattr(pgen.stopped, "wait", waits.append)
    for value in ("30", "soon", "\u00b2"):
        chat.next_replies.append(error(429, "slow down", retry_after=value))
    assert pgen.answer([pgen.prepare([], "x")]) == [expected("x")]
    assert waits[0] == 30
    assert len(waits) == 3
    assert all(wait <= ap.LONGEST_PAUSE for wait in waits[1:])


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_fails_no_sample(chat, status):
    """However often it says so, and although it answers other requests."""
    pgen = connect([chat.url])
    asked = []

    def refuse_ten_times(body):
        if text_of(body) == "x":
            asked.append(body)
            return error(status, "busy") if len(asked) <= 10 else None
        return None

    chat.decide = refuse_ten_times
    assert pgen.answer([pgen.prepare([], "x")]) == [expected("x")]


def test_a_wait_beyond_patience_ends_the_run(chat):
    pgen = connect([chat.url])
    chat.next_replies.append(error(429, "quota", retry_after="86400"))
    with pytest.raises(ap.RunError, match="asks to wait 86400 s"):
        pgen.answer([pgen.prepare([], "x")])


def test_a_restart_is_waited_for(chat, said):
    pgen = connect([chat.url])
    chat.gate.clear()
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(ask_many, pgen, 64)
        chat.wait_for(1 + 64)
        chat.stop()
        chat.gate.set()
        until(lambda: any("waiting for it" in line for line in said))
        assert not future.done()
        chat.start()
        assert future.result() == [expected(f"sample {n}") for n in range(64)]
    assert len(said) == 1


def until(condition, timeout=20.0):
    """Return when a condition holds that no event tells of."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_server_that_stays_away(chat, said, monkeypatch):
    pgen = connect([chat.url])
    monkeypatch.setattr(ap, "SERVER_PATIENCE", 0.3)
    chat.stop()
    with pytest.raises(ap.RunError, match=r"no answer for .* run the same command"):
        pgen.answer([pgen.prepare([], "x")])
    assert len(said) == 1


def test_a_server_whose_engine_has_died(chat, said, monkeypatch):
    pgen = connect([chat.url])
    monkeypatch.setattr(ap, "SERVER_PATIENCE", 0.5)
    chat.decide = lambda body: error(500, "EngineCore encountered an issue")
    with pytest.raises(ap.RunError, match="EngineCore encountered an issue"):
        pgen.answer([pgen.prepare([], "x")])


def test_a_server_that_never_answers(chat, monkeypatch):
    pgen = connect([chat.url])
    monkeypatch.setattr(ap, "ANSWER_TIMEOUT", 0.2)
    monkeypatch.setattr(ap, "SERVER_PATIENCE", 0.1)
    chat.gate.clear()
    with pytest.raises(ap.RunError, match="timed out"):
        pgen.answer([pgen.prepare([], "x")])


@pytest.mark.parametrize(
    "reply", [error(500, "cannot show this"), Reply(dropped=True), Reply(200, "what?")]
)
@pytest.mark.parametrize("count", [1, 40])
def test_a_request_that_breaks_a_server_is_one_failed_sample(chat, said, reply, count):
    pgen = connect([chat.url])
    last = f"sample {count - 1}"
    chat.decide = lambda body: reply if text_of(body) == last else None
    answers = ask_many(pgen, count)
    assert answers[-1] is None
    assert None not in answers[:-1]
    assert any("no answer to a sample" in line for line in said)


@pytest.mark.parametrize("status", [301, 401, 403, 404, 405])
def test_refusals_that_hold_for_all_end_the_run(chat, status):
    pgen = connect([chat.url])
    chat.next_replies.append(error(status, "no longer"))
    with pytest.raises(ap.RunError, match=f"{status} no longer"):
        pgen.answer([pgen.prepare([], "x")])


def test_a_key_that_stops_holding(chat, monkeypatch):
    chat.key = "sk-1"
    monkeypatch.setenv(ap.KEY_VARIABLE, "sk-1")
    pgen = connect([chat.url])
    chat.key = "sk-2"
    with pytest.raises(ap.RunError, match="401"):
        pgen.answer([pgen.prepare([], "x")])


def test_the_end_of_a_run_ends_the_waiting(chat, said):
    pgen = connect([chat.url])
    executor = pgen.executor(1)
    chat.stop()
    future = executor.submit(pgen.answer, [pgen.prepare([], "x")])
    until(lambda: said)
    assert not future.done()
    executor.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(ap.RunError, match="stopped"):
        future.result(20)
    # The next run is another.
    chat.start()
    again = pgen.executor(1).submit(pgen.answer, [pgen.prepare([], "x")])
    assert again.result(20) == [expected("x")]


# -------------------------------------------------------------------- several servers


def test_servers_share_the_load(chat, other):
    pgen = connect([chat.url, other.url, chat.url])
    assert len(pgen.servers) == 2
    for server in (chat, other):
        server.gate.clear()
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(ask_many, pgen, 100, 64)
        for server in (chat, other):
            server.wait_for(1 + 32)
        assert (chat.at_once, other.at_once) == (32, 32)
        for server in (chat, other):
            server.gate.set()
        assert None not in future.result()
    assert chat.count + other.count == 102


def test_a_slow_server_holds_up_nobody(chat, other):
    pgen = connect([chat.url, other.url])
    chat.gate.clear()
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(ask_many, pgen, 100, 8)
        other.wait_for(1 + 90)
        # At most the half of the eight requests under way.
        held = chat.at_once
        chat.gate.set()
        assert None not in future.result()
    assert 1 <= held <= 4


def test_what_one_server_refuses_another_may_take(chat, other, said):
    chat.refused = {"top_k"}
    pgen = connect([chat.url, other.url])
    assert None not in ask_many(pgen, 10)
    assert "top_k" not in chat.bodies[-1]
    assert "top_k" in other.bodies[-1]


def test_a_server_that_is_down_is_skipped(chat, other, said, monkeypatch):
    pgen = connect([chat.url, other.url])

    def fail(seconds):
        raise AssertionError("nobody has to wait")

    monkeypatch.setattr(pgen.stopped, "wait", fail)
    monkeypatch.setattr(ap, "FIRST_PAUSE", 1000.0)
    monkeypatch.setattr(ap, "LONGEST_PAUSE", 1000.0)
    chat.stop()
    assert None not in ask_many(pgen, 100, threads=4)
    assert other.count == 101
    # Back, it is found again.
    chat.start()
    pgen.servers[0].rests_until = 0.0
    before = chat.count
    assert None not in ask_many(pgen, 100, threads=4)
    assert chat.count - before > 30


def test_a_run_goes_on_while_one_server_stays_away(chat, other, said, monkeypatch):
    pgen = connect([chat.url, other.url])
    monkeypatch.setattr(ap, "SERVER_PATIENCE", 0.2)
    chat.stop()
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        assert None not in ask_many(pgen, 20, threads=4)
    assert sum("waiting for it" in line for line in said) <= 1


def test_all_servers_away(chat, other, said, monkeypatch):
    pgen = connect([chat.url, other.url])
    monkeypatch.setattr(ap, "SERVER_PATIENCE", 0.3)
    chat.stop()
    other.stop()
    with pytest.raises(ap.RunError):
        pgen.answer([pgen.prepare([], "x")])


# ------------------------------------------------------------------ the surroundings


def test_localhost_is_reached_past_a_proxy(chat, monkeypatch):
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for host in ("127.0.0.1", "localhost"):
        pgen = connect([f"http://{host}:{chat.port}/v1"])
        assert pgen.answer([pgen.prepare([], "x")]) == [expected("x")]


def test_other_hosts_are_reached_through_a_proxy(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        asked = []

        def refuse():
            connection = proxy.accept()[0]
            asked.append(connection.recv(1000))
            connection.close()

        thread = threading.Thread(target=refuse)
        thread.start()
        fails(["http://models.example/v1"])
        thread.join()
    assert asked[0].startswith(b"GET http://models.example/v1/models")


def test_a_proxy_that_is_none(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "gopher://127.0.0.1")
    assert "proxy" in fails(["http://models.example/v1"])


SCRIPT = """
import sys
import annotate_pgen as ap
pgen = ap.ServerPgen([sys.argv[1]])
pgen.check(1, "hello")
sys.stdin.readline()
executor = pgen.executor(64)
prepared = [pgen.prepare([], f"sample {n}") for n in range(64)]
try:
    futures = [executor.submit(pgen.answer, [content]) for content in prepared]
    for heavy in ("torch", "transformers", "lerobot", "pandas"):
        assert heavy not in sys.modules, heavy
    futures[0].result()
except KeyboardInterrupt:
    print("interrupted", flush=True)
    executor.shutdown(wait=False, cancel_futures=True)
    sys.exit(130)
"""


def test_an_interrupted_process_ends_at_once(chat):
    program = [sys.executable, "-c", SCRIPT, chat.url]
    process = subprocess.Popen(
        program,
        cwd=Path(ap.__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    chat.wait_for(1)
    chat.gate.clear()
    # Not before, or the first requests would be answered.
    process.stdin.write("go on\n")
    process.stdin.flush()
    chat.wait_for(1 + 64)
    started = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert time.monotonic() - started < 3.0  # 0.1 s on an idle machine
    assert (process.returncode, errors) == (130, "")
    assert output == "interrupted\n"


def test_daemon_executor():
    executor = ap.DaemonExecutor(3)
    assert list(executor.map(lambda number: number**2, range(10))) == [
        number**2 for number in range(10)
    ]
    failed = executor.submit(int, "x")
    with pytest.raises(ValueError, match="invalid literal"):
        failed.result()
    gate = threading.Event()
    held = [executor.submit(gate.wait) for _ in range(3)]
    until(lambda: all(future.running() for future in held))
    with ThreadPoolExecutor(1) as other:
        fourth = other.submit(executor.submit, gate.wait)
        assert not wait([fourth], timeout=0.2).done
        gate.set()
        assert fourth.result().result()
    assert all(future.result() for future in held)
