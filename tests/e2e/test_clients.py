"""What clients may ask of the API, of a server with easyspec and of one without: the same answers, field by field.

Both are `vllm serve`; the requests go through the `openai` package. Sampled answers can't be the same text, since which
sample is drawn depends on the drafts, but must have the same form.
"""

import asyncio
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from engines import DRAFTER, ROOT, SOURCES, TARGET

sys.path.insert(0, str(ROOT / "examples"))
serving = importlib.import_module("serving")

pytestmark = pytest.mark.engine
CONFIG = {"method": "easyspec", "model": str(DRAFTER), "num_speculative_tokens": 4}
ENGINE = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16", "--max-num-batched-tokens", "256"]
ENGINE += ["--kv-cache-memory-bytes", "64M", "--enforce-eager", "--reasoning-parser", "qwen3"]
ENGINE += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
ENGINE += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']

PROMPT, LONG = SOURCES[1], SOURCES[2] * 8
CHAT = [{"role": "user", "content": "def __repr__(self):\n        return "}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["first", "second"]}, "on": {"type": "boolean"}},
    "required": ["name", "on"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "switch", "description": "A switch.", "parameters": SCHEMA}}
GREEDY = {"temperature": 0, "max_tokens": 24}
SAMPLED = {"temperature": 1, "seed": 5, "max_tokens": 24, "extra_body": {"ignore_eos": True}}

COMPLETIONS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "two-prompts": GREEDY | {"prompt": [PROMPT, LONG]},
    "token-ids": GREEDY | {"prompt": [5, 6, 7, 8]},
    "stream-with-usage": GREEDY | {"stream": True, "stream_options": {"include_usage": True}},
    "logprobs": GREEDY | {"logprobs": 3},
    "echo": GREEDY | {"echo": True, "logprobs": 2, "max_tokens": 5},
    "echo-alone": GREEDY | {"echo": True, "max_tokens": 1},
    "prompt-logprobs": GREEDY | {"extra_body": {"prompt_logprobs": 2}},
    "stop": GREEDY | {"stop": ["self", "\n\n"]},
    "stop-kept": GREEDY | {"stop": ["\n"], "extra_body": {"include_stop_str_in_output": True}},
    "stop-token": GREEDY | {"extra_body": {"stop_token_ids": [200, 222], "min_tokens": 4}},
    "penalties": GREEDY
    | {"presence_penalty": 0.6, "frequency_penalty": 0.4, "extra_body": {"repetition_penalty": 1.2}},
    "bad-words": GREEDY | {"extra_body": {"bad_words": ["self", "import"]}},
    "allowed-tokens": GREEDY | {"extra_body": {"allowed_token_ids": list(range(200, 260))}},
    "regex": GREEDY | {"extra_body": {"structured_outputs": {"regex": "[a-c]{3}-[0-9]{2}"}}},
    "choice": GREEDY | {"extra_body": {"structured_outputs": {"choice": ["north", "south"]}}},
    "json": GREEDY | {"max_tokens": 60, "extra_body": {"structured_outputs": {"json": SCHEMA}}},
    "to-the-limit": GREEDY | {"prompt": [7] * 500, "max_tokens": 12, "extra_body": {"ignore_eos": True}},
    "per-request-ids": GREEDY | {"extra_body": {"return_token_ids": True}},
    "sampled": SAMPLED,
    "sampled-n": SAMPLED | {"n": 3, "logprobs": 1},
    "sampled-stream": SAMPLED | {"stream": True, "n": 2},
    # Refused, with and without easyspec.
    "too-long": GREEDY | {"prompt": [7] * 600},
    "no-prompt": GREEDY | {"prompt": ""},
    "bad-temperature": GREEDY | {"temperature": -1},
    "bad-regex": GREEDY | {"extra_body": {"structured_outputs": {"regex": "["}}},
    "bad-token": GREEDY | {"extra_body": {"allowed_token_ids": [10**9]}},
}
CHATS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "stream-with-usage": GREEDY | {"stream": True, "stream_options": {"include_usage": True}},
    "logprobs": GREEDY | {"logprobs": True, "top_logprobs": 2},
    "json-schema": GREEDY
    | {"max_tokens": 60, "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
    "tool-named": GREEDY
    | {"max_tokens": 60, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "switch"}}},
    "tool-required": GREEDY | {"max_tokens": 90, "tools": [TOOL], "tool_choice": "required"},
    "tool-required-stream": GREEDY | {"max_tokens": 90, "tools": [TOOL], "tool_choice": "required", "stream": True},
    "tool-auto": GREEDY | {"tools": [TOOL], "tool_choice": "auto"},
    "no-thinking": GREEDY | {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
    "sampled-n": SAMPLED | {"n": 2},
    "no-messages": GREEDY | {"messages": []},
}
CASES = [("completions", name) for name in COMPLETIONS] + [("chat", name) for name in CHATS]
TIME_OF_DAY = re.compile(r"\d\d:\d\d:\d\d")
OF_THE_REQUEST = {"id", "created", "system_fingerprint", "request_id"}


def ask(client: openai.OpenAI, kind: str, name: str) -> tuple[int, Any]:
    """HTTP status and body; of a stream, the chunks put together."""
    body = {"model": serving.Server.model} | (COMPLETIONS if kind == "completions" else CHATS)[name]
    body = {"prompt": PROMPT} | body if kind == "completions" else {"messages": CHAT} | body
    create = client.completions.create if kind == "completions" else client.chat.completions.create
    try:
        answer = create(**body)
    except openai.APIStatusError as error:
        return error.status_code, error.body | {"message": TIME_OF_DAY.sub("", error.body["message"])}
    return 200, joined(answer) if body.get("stream") else comparable(answer.model_dump())


def comparable(value: Any) -> Any:
    """Without what differs from request to request."""
    if isinstance(value, dict):
        return {key: comparable(part) for key, part in value.items() if key not in OF_THE_REQUEST}
    if isinstance(value, list):
        return [comparable(part) for part in value]
    return value


def joined(stream: Iterator[Any]) -> dict[str, Any]:
    """Each choice's text, tool calls and reason of its end, the usage, and the names of all fields."""
    found: dict[str, Any] = {"text": {}, "ended": {}, "fields": set(), "usage": None}
    for chunk in stream:
        part = chunk.model_dump()
        found["fields"] |= set(part)
        found["usage"] = part.get("usage") or found["usage"]
        for choice in part["choices"]:
            found["text"][choice["index"]] = found["text"].get(choice["index"], "") + text_of(choice)
            found["ended"][choice["index"]] = choice["finish_reason"] or found["ended"].get(choice["index"])
    return found


def text_of(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return choice["text"]
    delta = choice["delta"]
    calls = [call["function"] for call in delta.get("tool_calls") or []]
    pieces = [delta.get("content"), delta.get("reasoning")]
    return "".join(filter(None, pieces + [call.get(key) for call in calls for key in ("name", "arguments")]))


def form(value: Any) -> Any:
    """What remains of a sampled answer: fields and kinds of values."""
    if isinstance(value, dict):
        return {key: "by token" if key == "top_logprobs" else form(part) for key, part in value.items()}
    if isinstance(value, list):
        return [form(part) for part in value[:1]]
    return "number" if isinstance(value, int | float) else type(value).__name__


def assert_close(ours: Any, theirs: Any, path: str = "") -> None:
    """Equal, log-probabilities up to what float32 leaves open."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key in theirs:
            assert_close(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(theirs, list) and isinstance(ours, list):
        assert len(ours) == len(theirs), path
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(one, other, f"{path}[{index}]")
    elif isinstance(theirs, float) and isinstance(ours, float):
        assert ours == pytest.approx(theirs, abs=1e-3), path
    else:
        assert ours == theirs, path


async def ask_at_once(server: Any) -> list[str]:
    """The texts of 64 clients, each with a stream."""

    async def one(client: openai.AsyncOpenAI, index: int) -> str:
        prompt = SOURCES[index % len(SOURCES)] * (1 + index // len(SOURCES) % 4)
        stream = await client.completions.create(
            model=server.model, prompt=prompt, temperature=0, max_tokens=8 + index % 9, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async with server.async_client() as client:
        return await asyncio.gather(*(one(client, index) for index in range(64)))


def bench_serve(server: Any) -> str:
    """What vLLM's own load generator prints."""
    command = [Path(sys.executable).with_name("vllm"), "bench", "serve", "--backend", "openai", "--model", server.model]
    command += ["--base-url", f"http://127.0.0.1:{server.port}", "--tokenizer", TARGET, "--dataset-name", "random"]
    command += ["--random-input-len", "32", "--random-output-len", "16", "--num-prompts", "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def answers(*arguments: str, bench: bool = False) -> dict[Any, Any]:
    """Of one server, to everything."""
    with serving.serve(TARGET, *ENGINE, *arguments) as server:
        found = {case: ask(server.client(), *case) for case in CASES}
        found["at once"] = asyncio.run(ask_at_once(server))
        if bench:
            found["bench"] = bench_serve(server)
            found["stats"] = server.rpc("easyspec_stats")
    return found


@pytest.fixture(scope="module")
def plain() -> dict[Any, Any]:
    return answers()


@pytest.fixture(scope="module")
def ours(plain) -> dict[Any, Any]:
    return answers("--speculative-config", json.dumps(CONFIG), bench=True)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_same_answer(ours, plain, kind, name):
    (our_status, our_body), (status, body) = ours[kind, name], plain[kind, name]
    assert our_status == status
    if name.startswith("sampled"):
        our_body, body = (
            {key: form(part) for key, part in found.items() if key != "text"} for found in (our_body, body)
        )
    assert_close(our_body, body)


@pytest.mark.parametrize("name", ["too-long", "bad-temperature", "bad-regex", "bad-token"])
def test_these_are_refused(plain, name):
    assert plain["completions", name][0] == 400


def test_64_clients_at_once(ours, plain):
    assert ours["at once"] == plain["at once"]
    assert len(set(plain["at once"])) > 20


def test_vllm_bench_serve(ours):
    assert "Successful requests:                     12" in ours["bench"]


def test_drafts_were_verified(ours):
    assert ours["stats"][0]["accepted_at"][0] > 100
