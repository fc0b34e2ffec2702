"""A `vllm serve` process for a demo or a test: on a free port, waited for until it answers, always stopped."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai


class ServerError(RuntimeError):
    """The server didn't start, or failed later; the message contains the last lines of its log."""


class Server:
    """A running server. `model` is its model name in requests."""

    model = "served"

    def __init__(self, process: subprocess.Popen, port: int, log: Path):
        self.process = process
        self.port = port
        self.log = log

    def client(self) -> openai.OpenAI:
        """A client that ignores proxies in the environment."""
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key="none",
            max_retries=0,
            http_client=openai.DefaultHttpxClient(trust_env=False),
        )

    def async_client(self) -> openai.AsyncOpenAI:
        """The same for many requests at once, with a new connection for each: the server closes one that was idle for
        five seconds, perhaps just when it is used again."""
        return openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key="none",
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(
                trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)
            ),
        )

    def get(self, path: str) -> str:
        return self._request("GET", path)

    def rpc(self, method: str, **arguments: Any) -> list[Any]:
        """Call a method of every rank's worker; one reply per rank. vLLM offers this only in its development mode."""
        return json.loads(self._request("POST", "/collective_rpc", {"method": method, "kwargs": arguments}))["results"]

    def is_healthy(self) -> bool:
        try:
            self.get("/health")
        except (OSError, http.client.HTTPException):
            return False
        return True

    def last_lines(self, count: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])

    def _request(self, verb: str, path: str, body: Any = None) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(verb, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        if response.status != 200:
            raise http.client.HTTPException(f"{verb} {path}: status {response.status}: {text[:1000]}")
        return text


@contextmanager
def serve(
    model: str | Path, *arguments: str, environment: dict[str, str] | None = None, patience: float = 480
) -> Iterator[Server]:
    """Run `vllm serve MODEL ARGUMENTS` for the length of a `with` block.

    Raises `ServerError` if the server ends or doesn't answer within `patience` seconds, or fails a request of the
    block.
    """
    port = _free_port()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", Server.model]
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    grace = 1  # seconds to wait after each signal; while vLLM starts, it ignores them
    with tempfile.NamedTemporaryFile("w", prefix="vllm-serve-", suffix=".log") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | settings | (environment or {}),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a process group of its own, so that its workers can be reached too
        )
        try:
            server = Server(process, port, Path(log.name))
            _wait_until_healthy(server, patience)
            grace = 10
            yield server
        except (openai.APIConnectionError, openai.InternalServerError) as error:
            raise ServerError(f"vllm serve failed a request: {error}\n{server.last_lines()}") from error
        finally:
            _stop(process, grace)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait_until_healthy(server: Server, patience: float) -> None:
    deadline = time.monotonic() + patience
    while not server.is_healthy():
        if server.process.poll() is not None:
            raise ServerError(f"vllm serve ended with code {server.process.returncode}:\n{server.last_lines()}")
        if time.monotonic() > deadline:
            raise ServerError(f"vllm serve did not answer within {patience:.0f} s:\n{server.last_lines()}")
        time.sleep(0.2)


def _stop(process: subprocess.Popen, grace: float) -> None:
    """Terminate the server, then all of its processes, `grace` seconds each, then kill what is left."""
    group = process.pid
    try:
        for ask in (process.terminate, lambda: os.killpg(group, signal.SIGTERM)):
            ask()
            if _has_ended(process, grace):
                return
    except ProcessLookupError:
        pass  # the last process has just ended
    finally:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        process.wait()


def _has_ended(process: subprocess.Popen, seconds: float) -> bool:
    """Whether the server and its process group end in time. Python's resource trackers, which clean up, end last."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            process.poll()
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
