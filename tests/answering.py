"""What answers prompts: a chat endpoint in a thread of its own, and a tiny random model."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from tests.toy import DECODERS, byte_bpe


@dataclass
class Reply:
    """A status, a body, and headers."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Endpoint:
    """Where it is, and what it was asked: path, headers and body of each call."""

    url: str
    calls: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)


def completion(text: object) -> Reply:
    return Reply(body={"choices": [{"message": {"role": "assistant", "content": text}}]})


@contextmanager
def endpoint(reply: Callable[[dict[str, Any], int], Reply]) -> Iterator[Endpoint]:
    """Serve what ``reply`` makes of a body and of the number of the call."""
    lock = Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            body = json.loads(content)
            with lock:
                number = len(served.calls)
                served.calls.append((self.path, dict(self.headers), body))
            answer = reply(body, number)
            text = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body)
            content = text if isinstance(text, bytes) else text.encode()
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            with lock:
                served.calls.append((self.path, dict(self.headers), None))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Endpoint(f"http://127.0.0.1:{server.server_port}/v1")
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def written(folder: Path, *, template: str | None = None) -> Path:
    """Write a tiny random causal model, and a tokenizer that begins texts with <s>."""
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(deepcopy(DECODERS["llama"]))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    tokenizer = byte_bpe()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
