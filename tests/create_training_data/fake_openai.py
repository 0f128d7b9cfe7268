"""A server on 127.0.0.1 that speaks OpenAI's chat completions, files and batches, and fails when told to.

    with FakeOpenAI() as server:
        client = LLMClient("m", server.url)
        server.next("429", "half")   # what becomes of the next two requests; then it answers

`sent` holds every request; `answered` those whose answer was written whole; `authorization` their keys; `headers`
those of all requests, of files too. A kind "307" redirects to `elsewhere`.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HALF = '{"choices": [{"message": {"content": "Ye'


def last_user_text(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


def echo(body: dict[str, Any]) -> str:
    return f"You said: {last_user_text(body)} Final Decision: [[ Yes ]]"


def key_of(body: dict[str, Any]) -> str:
    return json.dumps(body, sort_keys=True)


class FakeOpenAI:
    """answer: text from the request's body. worst_usage: counts the most tokens that a prompt and answer can have.
    rejects: fields that give 400. delay_s: of each answer. key: the only one accepted, where there is one.
    `hold(n)`: after n answers the others wait for `go_on`."""

    def __init__(self, answer: Callable[[dict[str, Any]], str] = echo, key: str | None = None) -> None:
        self.answer, self.key = answer, key
        self.worst_usage = False
        self.without_usage = False
        self.rejects: dict[str, str] = {}
        self.delay_s = 0.0
        self.retry_after = "0.2"
        self.always: str | None = None
        self.sent: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.answered: list[dict[str, Any]] = []
        self.authorization: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.elsewhere = ""
        self.tokens = 0
        self.running = self.most_running = 0
        self.files: dict[str, str] = {}
        self.batches: dict[str, str] = {}
        self._next: deque[str] = deque()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._held_after, self._free = 0, threading.Event()
        self._free.set()

    def hold(self, after: int) -> None:
        self._held_after = after
        self._free.clear()

    def go_on(self) -> None:
        self._free.set()

    def next(self, *kinds: str) -> None:
        self._next.extend(kinds)

    def __enter__(self) -> "FakeOpenAI":
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None: ...

            def do_POST(self) -> None:
                fake.headers.append({name.lower(): value for name, value in self.headers.items()})
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                fake._post(self, self.path, raw)

            def do_GET(self) -> None:
                fake.headers.append({name.lower(): value for name, value in self.headers.items()})
                if (fake.always or "").startswith("3"):
                    return _write(self, int(fake.always or 0), "", {"Location": f"{fake.elsewhere}/files"})
                return fake._get(self, self.path)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False  # joined at the end, so that no socket is left
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._free.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _post(self, handler: BaseHTTPRequestHandler, path: str, raw: bytes) -> None:
        if path == "/v1/files":
            return self._upload(handler, raw)
        if path == "/v1/batches":
            return self._run_batch(handler, json.loads(raw))
        body = json.loads(raw)
        with self._lock:
            self.sent.append(body)
            self.times.append(time.monotonic())
            self.authorization.append(handler.headers.get("Authorization", ""))
            kind = self._next.popleft() if self._next else self.always
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            return self._respond(handler, body, kind)
        except (BrokenPipeError, ConnectionResetError):
            return None
        finally:
            with self._lock:
                self.running -= 1

    def idle(self) -> bool:
        """Whether all requests are done with, waited for: a client has its answer before the server counts it."""
        deadline = time.monotonic() + 10
        while self.running and time.monotonic() < deadline:
            time.sleep(0.005)
        return not self.running

    def _respond(self, handler: BaseHTTPRequestHandler, body: dict[str, Any], kind: str | None) -> None:
        self._closing.wait(self.delay_s)
        if len(self.answered) >= self._held_after:
            self._free.wait(60)
        given = handler.headers.get("Authorization", "")
        if kind == "401" or (self.key is not None and given != f"Bearer {self.key}"):
            return _write(handler, 401, _error(f"Incorrect API key provided: {given}", "invalid_api_key"))
        if path_error := {"403": "no access", "404": "no such model", "500": "it broke", "503": "busy"}.get(
            kind or ""
        ):
            return _write(handler, int(kind or 0), _error(path_error))
        if kind in ("301", "302", "307", "308"):
            return _write(handler, int(kind), "", {"Location": f"{self.elsewhere}/chat/completions"})
        if kind == "429":
            return _write(handler, 429, _error("slow down"), {"Retry-After": self.retry_after})
        if kind == "quota":
            return _write(handler, 429, _error("pay first", "insufficient_quota"))
        if kind == "400":
            return _write(handler, 400, _error("the prompt is too long"))
        for name, message in self.rejects.items():
            if name in body:
                return _write(handler, 400, _error(message))
        if kind == "timeout":
            self._closing.wait(3)
            return None
        if kind == "half":
            return _write(handler, 200, HALF)
        if kind == "cut":  # fewer bytes than announced
            return _write(handler, 200, HALF, {"Content-Length": "1000"})
        if kind == "html":
            return _write(handler, 200, "<html>Sign in</html>", {"Content-Type": "text/html"})
        completion = self.completion(body, kind)
        with self._lock:
            usage = completion.get("usage") or {}
            self.tokens += sum(usage.values())
        _write(handler, 200, completion)
        with self._lock:
            self.answered.append(body)
        return None

    def completion(self, body: dict[str, Any], kind: str | None = None) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.answer(body), "refusal": None}
        finish = "stop"
        if kind == "refusal":
            message.update(content=None, refusal="I cannot help with that.")
        elif kind == "filter":
            message["content"], finish = None, "content_filter"
        elif kind == "wrong label":
            message["content"] = "Final Decision: [[ Absolutely ]]"
        elif kind == "blank":
            message["content"] = ""
        elif kind == "length":
            message["content"], finish = "", "length"
        choices = [] if kind == "no choices" else [{"index": 0, "message": message, "finish_reason": finish}]
        completion = {"id": "c", "object": "chat.completion", "created": 0, "model": body["model"], "choices": choices}
        prompt = sum(len(message["content"].encode()) for message in body["messages"])
        usage = {
            "prompt_tokens": prompt if self.worst_usage else prompt // 4 + 1,
            "completion_tokens": body.get("max_tokens", 0) if self.worst_usage else 10,
        }
        return completion if self.without_usage else {**completion, "usage": usage}

    def _upload(self, handler: BaseHTTPRequestHandler, raw: bytes) -> None:
        content = raw.decode()
        lines = [line for line in content.splitlines() if line.startswith('{"custom_id"')]
        name = f"file-{len(self.files)}"
        self.files[name] = "\n".join(lines)
        _write(handler, 200, {"id": name, "object": "file", "purpose": "batch", "filename": "f", "bytes": 1})

    def _run_batch(self, handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        lines = []
        for line in self.files[asked["input_file_id"]].splitlines():
            request = json.loads(line)
            response = {"status_code": 200, "request_id": "r", "body": self.completion(request["body"])}
            lines.append(
                json.dumps({"id": "b", "custom_id": request["custom_id"], "response": response, "error": None})
            )
        name, output = f"batch_{len(self.batches)}", f"file-{len(self.files)}"
        self.files[output] = "\n".join(lines[::-1])  # in any order
        self.batches[name] = output
        _write(handler, 200, {"id": name, "object": "batch", "status": "validating"})

    def _get(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        parts = path.split("/")
        if parts[2] == "files":
            return _write(handler, 200, self.files[parts[3]])
        batch = {"id": parts[3], "object": "batch", "status": "completed", "output_file_id": self.batches[parts[3]]}
        return _write(handler, 200, batch)


def _error(message: str, code: str = "x") -> dict[str, Any]:
    return {"error": {"message": message, "type": "t", "param": None, "code": code}}


def _write(
    handler: BaseHTTPRequestHandler, status: int, body: dict[str, Any] | str, headers: dict[str, str] | None = None
) -> None:
    raw = (body if isinstance(body, str) else json.dumps(body)).encode()
    handler.send_response(status)
    all_headers = {"Content-Type": "application/json", "Content-Length": str(len(raw)), **(headers or {})}
    for name, value in all_headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(raw)
    handler.wfile.flush()
