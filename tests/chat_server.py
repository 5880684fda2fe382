"""A server on this machine that speaks OpenAI's chat completions, and fails on demand.

    python tests/chat_server.py --port 8000

serves the model "demo" at http://127.0.0.1:8000/v1, which answers every request at
once with a dialogue that its text leads to. Tests start a ChatServer in their own
process and tell it what shall go wrong: what real servers will not do on demand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Reply:
    """A reply to one request; with `dropped` the connection ends without one."""

    status: int = 200
    body: dict | str = ""
    headers: dict[str, str] = field(default_factory=dict)
    dropped: bool = False


def error(status: int, message: str, param: str | None = None, **headers: str) -> Reply:
    """An error as vLLM words it; headers are written with _ for -."""
    body = {"error": {"message": message, "param": param, "code": status}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, body, named)


def text_of(body: dict) -> str:
    """The words of a request, without its pictures."""
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def dialogue_of(body: dict) -> str:
    """A valid dialogue that belongs to the words of the request."""
    digest = hashlib.sha256(text_of(body).encode()).hexdigest()[:8]
    dialogue = {
        "user_prompt": f"Please do number {digest}.",
        "robot_utterance": f"Sure, doing number {digest} now.",
    }
    return json.dumps(dialogue)


def completion(body: dict, text: str | None, **message: str) -> Reply:
    """An answer to a request; `message` are further parts of it."""
    content = {"role": "assistant", "content": text, **message}
    choice = {"index": 0, "message": content, "finish_reason": "stop"}
    if message:
        choice["finish_reason"] = "length"
    return Reply(200, {"object": "chat.completion", "choices": [choice]})


class ChatServer:
    """The server; every attribute can be changed while it runs.

    Args:
        models: The names it serves.
        key: The key it asks for; "" for none.
        answer: The text of the answer to the body of a request.
        refused: Names of fields that it does not know: refused with 422, all named.
        port: Where to listen; 0 for a free one.
    """

    def __init__(
        self,
        models: Sequence[str] = ("demo",),
        key: str = "",
        answer: Callable[[dict], str | None] = dialogue_of,
        refused: Sequence[str] = (),
        port: int = 0,
    ):
        self.models = list(models)
        self.key = key
        self.answer = answer
        self.refused = set(refused)
        self.port = port
        # Replies to the next requests for a dialogue, one each; then it answers again.
        self.next_replies: deque[Reply] = deque()
        # Decides on the reply to a body; None for the usual answer.
        self.decide: Callable[[dict], Reply | None] = lambda body: None
        self.models_reply: Reply | None = None
        # Cleared, requests are held until it is set.
        self.gate = threading.Event()
        self.gate.set()
        self.changed = threading.Condition()
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = 0
        self.most_at_once = 0
        self.http: ThreadingHTTPServer | None = None
        self.connections: set[socket.socket] = set()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def count(self) -> int:
        """Of the requests for dialogues so far."""
        return len(self.bodies)

    def start(self) -> None:
        """Listen, again at the same port after stop()."""
        handler = type("BoundHandler", (Handler,), {"chat": self})
        self.http = Listener(("127.0.0.1", self.port), handler)
        self.port = self.http.server_address[1]
        thread = threading.Thread(
            target=self.http.serve_forever, args=(0.01,), daemon=True
        )
        thread.start()

    def stop(self) -> None:
        """Go away: refuse connections and drop those there are."""
        if self.http is None:
            return
        self.http.shutdown()
        self.http.server_close()
        self.http = None
        with self.changed:
            connections = list(self.connections)
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def wait_for(self, count: int, timeout: float = 20.0) -> None:
        """Return when `count` requests for dialogues have arrived."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.count >= count, timeout):
                raise AssertionError(f"only {self.count} of {count} requests came")

    def reply_to(self, body: dict) -> Reply:
        """What a request for a dialogue is answered."""
        with self.changed:
            if self.next_replies:
                return self.next_replies.popleft()
        decided = self.decide(body)
        if decided is not None:
            return decided
        unknown = self.refused & set(body)
        if unknown:
            detail = f"Unexpected fields in the request: {unknown}"
            return Reply(422, {"detail": detail})
        if body["model"] not in self.models:
            return error(404, f"The model `{body['model']}` does not exist.", "model")
        return completion(body, self.answer(body))


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def handle_error(self, request, client_address) -> None:
        """Connections that clients break are no news."""


class Handler(BaseHTTPRequestHandler):
    chat: ChatServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        with self.chat.changed:
            self.chat.connections.add(self.connection)

    def finish(self) -> None:
        with self.chat.changed:
            self.chat.connections.discard(self.connection)
        super().finish()

    def log_message(self, *args) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            self.send(Reply(404, {"detail": "Not Found"}))
        elif not self.has_key():
            self.send(error(401, "Unauthorized"))
        elif self.chat.models_reply is not None:
            self.send(self.chat.models_reply)
        else:
            listed = [{"id": name, "object": "model"} for name in self.chat.models]
            self.send(Reply(200, {"object": "list", "data": listed}))

    def do_POST(self) -> None:
        # The whole body is read first: else the reply arrives as a reset.
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self.send(Reply(404, {"detail": "Not Found"}))
            return
        if not self.has_key():
            self.send(error(401, "Unauthorized"))
            return
        chat = self.chat
        with chat.changed:
            chat.bodies.append(body)
            chat.headers.append(dict(self.headers))
            chat.at_once += 1
            chat.most_at_once = max(chat.most_at_once, chat.at_once)
            chat.changed.notify_all()
        try:
            # Not for ever, so that a test that fails before it opens the gate ends.
            chat.gate.wait(60)
            self.send(chat.reply_to(body))
        finally:
            with chat.changed:
                chat.at_once -= 1

    def has_key(self) -> bool:
        given = self.headers.get("Authorization", "")
        return not self.chat.key or given == f"Bearer {self.chat.key}"

    def send(self, reply: Reply) -> None:
        if reply.dropped:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        text = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
        content = text.encode()
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds an answer")
    args = parser.parse_args()

    def answer(body: dict) -> str:
        time.sleep(args.delay)
        # Without end, the bodies would fill the memory.
        server.bodies.clear()
        server.headers.clear()
        return dialogue_of(body)

    server = ChatServer(answer=answer, port=args.port)
    print(server.url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
