"""An OpenAI-compatible server in a thread, which can be told to misbehave."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: What may come in place of the next completion: an HTTP status, bytes of a 200, "drop", seconds to wait, or a change.
Fault = int | bytes | str | float | Callable[[dict[str, Any]], None]


class FakeServer:
    """Samples from a hash of the prompt, the seed and the model's name: vLLM as far as our engine looks.

    `faults` are used up one a completion. While `gate` is closed no completion is answered. Whatever arrives is kept in
    `requests`, with its path.
    """

    def __init__(self, tokenizer: Any, *, model: str = "fake", port: int = 0) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.gate = threading.Event()
        self.gate.set()
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.max_model_len: int | None = 4096
        self.key = ""
        self.text_only = False  # neither ids nor unknown fields
        self.lora = True
        self.adapters: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.running = 0
        self._lock = threading.Lock()
        self._port = port
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    @property
    def completions(self) -> list[dict[str, Any]]:
        """Bodies of completions, without the two that the engine gets to know the server with."""
        return [body for path, body in self.requests if path == "/v1/completions" and body["max_tokens"] > 1]

    def start(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.handle(self, {})

            def do_POST(self) -> None:
                outer.handle(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *args: Any) -> None: ...

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def process_request(self, request: Any, client_address: Any) -> None:
                outer._connections.add(request)
                super().process_request(request, client_address)

            def handle_error(self, *args: Any) -> None: ...

        self._connections: set[socket.socket] = set()
        self._http = Quiet(("127.0.0.1", self._port), Handler)
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """As if killed: no more connections, the open ones cut, adapters forgotten."""
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.adapters.clear()

    def handle(self, http: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self._lock:
            self.requests.append((http.path, body))
        if self.key and http.headers.get("Authorization") != f"Bearer {self.key}":
            return self.reply(http, 401, {"error": {"message": "wrong key"}})
        if http.path == "/v1/models":
            base = {"id": self.model, "root": f"/models/{self.model}", "parent": None}
            if self.max_model_len:
                base["max_model_len"] = self.max_model_len  # type: ignore[assignment]
            cards = [{"id": name, "root": path, "parent": self.model} for name, path in self.adapters.items()]
            return self.reply(http, 200, {"data": [base, *cards]})
        if http.path == "/v1/load_lora_adapter" and self.lora:
            if "broken" in body["lora_path"]:
                return self.reply(http, 500, {"error": {"message": "rank 64 is greater than max_lora_rank 16"}})
            self.adapters[body["lora_name"]] = body["lora_path"]
            return self.reply(http, 200, "Success")
        if http.path == "/v1/unload_lora_adapter" and self.lora:
            self.adapters.pop(body["lora_name"], None)
            return self.reply(http, 200, "Success")
        if http.path == "/v1/completions":
            return self.complete(http, body)
        return self.reply(http, 404, {"detail": "Not Found"})

    def complete(self, http: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self._lock:
            self.running += 1
            fault = self.faults.pop(0) if self.faults and body["max_tokens"] > 1 else None
        try:
            time.sleep(fault if isinstance(fault, float) else 0.0)
            self.gate.wait(60.0)
            if isinstance(fault, int):
                return self.reply(http, fault, {"error": {"message": f"told to say {fault}"}})
            if isinstance(fault, bytes):
                return self.reply(http, 200, fault)
            if fault == "drop":
                http.close_connection = True
                http.connection.shutdown(socket.SHUT_RDWR)
                return None
            if body["model"] not in {self.model, *self.adapters}:
                return self.reply(http, 404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
            if self.text_only and (isinstance(body["prompt"], list) or "top_k" in body):
                return self.reply(http, 400, {"error": {"message": "unrecognised arguments"}})
            answer = self.answer(body)
            if callable(fault):
                fault(answer)
            return self.reply(http, 200, answer)
        finally:
            with self._lock:
                self.running -= 1

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids, finish = self.sample(prompt, body.get("seed"), body["max_tokens"], body["model"])
        choice: dict[str, Any] = {"index": 0, "text": self.tokenizer.decode(ids, skip_special_tokens=True)}
        choice["finish_reason"] = finish
        if not self.text_only:
            choice |= {
                "token_ids": ids,
                "prompt_token_ids": prompt,
                "logprobs": {
                    "tokens": [f"token_id:{i}" for i in ids],
                    "token_logprobs": [-0.5] * len(ids),
                    "top_logprobs": [{f"token_id:{i}": -0.5} for i in ids],
                },
            }
        return {"choices": [choice], "usage": {"prompt_tokens_details": {"cached_tokens": len(prompt) // 2}}}

    def sample(self, prompt: list[int], seed: int | None, max_tokens: int, model: str) -> tuple[list[int], str]:
        """What this server gives for a prompt."""
        text = hashlib.sha256(json.dumps([prompt, seed, model]).encode()).hexdigest()[:8]
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end]
        return (ids, "stop") if len(ids) <= max_tokens else (ids[:max_tokens], "length")

    def reply(self, http: BaseHTTPRequestHandler, status: int, content: object) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        http.send_response(status)
        if status == 429:
            http.send_header("Retry-After", "1")
        http.send_header("Content-Length", str(len(data)))
        http.end_headers()
        http.wfile.write(data)
