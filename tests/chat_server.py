"""A server on this machine that speaks OpenAI's chat completions, and fails on demand.

    python tests/chat_server.py --port 8000

serves the model "demo" at http://127.0.0.1:8000/v1, which answers every request with a
dialogue of its own about the pink brick of the demo's dataset.
"""

import argparse
import contextlib
import json
import socket
import threading
import time
import zlib
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Reply:
    """A reply to one request; with status 0 the connection ends without one."""

    status: int
    body: dict | str = ""
    headers: dict[str, str] = field(default_factory=dict)


def error(status, message, **headers):
    """An error as vLLM words it; headers are written with _ for -."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, {"error": {"message": message, "code": status}}, named)


def text_of(body):
    """The words of a request's last message."""
    parts = body["messages"][-1]["content"]
    return "\n".join(part["text"] for part in parts if part["type"] == "text")


def pictures_of(body):
    """The data URLs of a request's last message."""
    parts = body["messages"][-1]["content"]
    return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


def dialogue_of(body):
    """A dialogue that suits any skill of the demo, another for each last message."""
    number = zlib.crc32(str(body["messages"][-1]).encode())
    said = f"Could you see to the pink brick, {number}?"
    reply = f"Sure, I'll take care of the pink brick, {number}."
    return json.dumps({"user_prompt": said, "robot_utterance": reply})


class ChatServer:
    """The server; what it does can be changed while it runs.

    Attributes:
        answer: makes a Reply to a request's body, or the answer: content or message.
        models: the names that it serves, or a Reply.
        key: the key that it asks for; "" for none.
        bodies: what it was asked so far, and `keys` with which keys.
        under_way: how many requests it has not answered yet.
        most_under_way: the largest number that it had at once.
    """

    def __init__(self, port=0, answer=dialogue_of):
        self.port = port
        self.answer = answer
        self.models = ["demo"]
        self.key = ""
        self.bodies, self.keys, self.connections = [], [], []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.start()

    @property
    def url(self):
        """What --server is given."""
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self):
        """Listen, again at the same port after stop()."""
        handler = type("BoundHandler", (Handler,), {"chat": self})
        self.http = Listener(("127.0.0.1", self.port), handler)
        self.port = self.http.server_address[1]
        serve = self.http.serve_forever
        threading.Thread(target=serve, args=(0.01,), daemon=True).start()

    def stop(self, drop=True):
        """Refuse connections, and drop those there are or leave them hanging."""
        self.http.shutdown()
        self.http.server_close()
        for connection in self.connections if drop else ():
            hang_up(connection)


def hang_up(connection):
    """End a connection at once, where the client has not done so."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class Listener(ThreadingHTTPServer):
    """Takes many connections at once."""

    request_queue_size = 256

    def handle_error(self, request, client_address):
        """Connections that clients break are no news."""


class Handler(BaseHTTPRequestHandler):
    """The requests of one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        """Print nothing."""

    def do_GET(self):
        """List the models."""
        models = self.chat.models
        if isinstance(models, list):
            models = Reply(200, {"data": [{"id": name} for name in models]})
        self.send("/v1/models", lambda: models)

    def do_POST(self):
        """Answer a request."""
        chat = self.chat
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with chat.lock:
            chat.connections.append(self.connection)
            chat.bodies.append(body)
            chat.keys.append(self.headers["Authorization"])
            chat.under_way += 1
            chat.most_under_way = max(chat.most_under_way, chat.under_way)
        try:
            self.send("/v1/chat/completions", lambda: chat.answer(body))
        finally:
            with chat.lock:
                chat.under_way -= 1

    def send(self, path, make_reply):
        """Reply, if the path and the key are right."""
        key = self.headers["Authorization"]
        if self.path != path:
            reply = Reply(404, {"detail": "Not Found"})
        elif self.chat.key and key != f"Bearer {self.chat.key}":
            reply = error(401, f"wrong key: {key}")
        else:
            reply = make_reply()
        if not isinstance(reply, Reply):
            message = reply if isinstance(reply, dict) else {"content": reply}
            reply = Reply(200, {"choices": [{"message": message}]})
        if reply.status == 0:
            hang_up(self.connection)
            return
        text = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
        self.send_response(reply.status)
        headers = {"Content-Type": "application/json", **reply.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


def main():
    """Serve until the process is killed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds an answer")
    args = parser.parse_args()

    def answer(body):
        # Kept, they would fill the memory.
        server.bodies.clear()
        time.sleep(args.delay)
        return dialogue_of(body)

    server = ChatServer(args.port, answer)
    print(server.url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
