"""`vllm serve` with the tiny pair's YAML, asked by the real `openai` client.

The oracle is the target in `transformers`, float32: a greedy answer is right where every token is the target's first
choice after the tokens before it.
"""

import importlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import openai
import psutil
import pytest
import torch
import yaml
from engines import DRAFTER, ROOT, SOURCES, TARGET
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(ROOT / "examples"))
serving = importlib.import_module("serving")

pytestmark = pytest.mark.engine
RANKS = 2 if len(os.sched_getaffinity(0)) > 1 else 1
MAX_LEN = 512
CONFIG = ROOT / "configs" / "tiny-pair.yaml"
K = yaml.safe_load(CONFIG.read_text())["num_speculative_tokens"]
CHAT = [{"role": "user", "content": "def __repr__(self):\n        return "}]
# Largest difference between two float32 implementations of one model, in nats.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def server():
    arguments = ["--speculative-config", str(CONFIG), "--tensor-parallel-size", str(RANKS), "--dtype", "float32"]
    arguments += ["--max-model-len", str(MAX_LEN), "--max-num-seqs", "16", "--max-num-batched-tokens", "256"]
    arguments += ["--kv-cache-memory-bytes", "64M", "--enforce-eager"]
    # JSON may hold any amount of blank space, and the tiny target likes it. vLLM's other backend, guidance, allows one
    # way only to cut forced text into tokens, so that a grammar's first choice would not be the target's.
    arguments += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    with serving.serve(TARGET, *arguments) as server:
        yield server
        assert server.process.poll() is None, f"the server ended by itself:\n{server.last_lines()}"
    assert not processes_of_group(server.process.pid), "the server's processes outlive it"


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TARGET)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()


@torch.inference_mode()
def log_probabilities(target: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The target's alone for each token of the answer, `[tokens, vocabulary]`."""
    logits = target(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)


def assert_greedy(target: PreTrainedModel, prompt: list[int], answer: list[int]) -> None:
    log_probs = log_probabilities(target, prompt, answer)
    behind = log_probs.max(-1).values - log_probs[range(len(answer)), answer]
    assert behind.max() < CLOSE, f"token {int(behind.argmax())} of {answer} is not the target's first choice"


def complete(client: openai.OpenAI, prompt: str | list[int] = SOURCES[0], max_tokens: int = 48, **changes):
    """A greedy completion, with its token ids, that goes on to the limit unless told otherwise."""
    extra = {"return_token_ids": True, "ignore_eos": True} | changes.pop("extra_body", {})
    settings = {"temperature": 0, "model": serving.Server.model} | changes
    return client.completions.create(prompt=prompt, max_tokens=max_tokens, extra_body=extra, **settings)


def chat(client: openai.OpenAI, max_tokens: int = 64, **changes):
    settings = {"messages": CHAT, "temperature": 0, "model": serving.Server.model} | changes
    return client.chat.completions.create(max_tokens=max_tokens, **settings)


def metric(server, name: str, **labels: str) -> float:
    """Sum of a metric's samples that have the labels."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    samples = re.findall(rf"^{name}(\{{.*\}})? (\S+)$", server.get("/metrics"), re.MULTILINE)
    return sum(float(value) for found, value in samples if all(label in found for label in wanted))


def processes_of_group(group: int) -> list[psutil.Process]:
    everything = psutil.process_iter(["status"])
    living = [process for process in everything if process.info["status"] != psutil.STATUS_ZOMBIE]
    return [process for process in living if psutil.pid_exists(process.pid) and os.getpgid(process.pid) == group]


def eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_completions_are_the_targets(client, target):
    answer = complete(client, list(SOURCES), max_tokens=64)
    assert len(answer.choices) == len(SOURCES)
    for choice in answer.choices:
        assert choice.finish_reason == "length" and len(choice.token_ids) == 64
        assert_greedy(target, choice.prompt_token_ids, choice.token_ids)


def test_streamed_chat(client, target, tokenizer):
    extra = {"return_token_ids": True, "ignore_eos": True}
    whole = chat(client, extra_body=extra)
    assert whole.choices[0].message.content == tokenizer.decode(whole.choices[0].token_ids, skip_special_tokens=True)
    assert_greedy(target, whole.prompt_token_ids, whole.choices[0].token_ids)

    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, extra_body=extra))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    written = sum(bool(piece) for piece in pieces)
    assert 1 < written < 64, "a round should bring one token or several, in one piece"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 64


def test_two_answers_with_a_seed(client):
    def two(seed: int) -> list[str]:
        return [choice.text for choice in complete(client, n=2, seed=seed, temperature=0.8, max_tokens=32).choices]

    first = two(seed=7)
    assert len(first) == 2 and first[0] != first[1]
    assert two(seed=7) == first
    assert two(seed=8) != first


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 11}])
def test_logprobs(client, target, tokenizer, sampling):
    choice = complete(client, logprobs=5, **sampling).choices[0]
    expected = log_probabilities(target, choice.prompt_token_ids, choice.token_ids)
    chosen = expected[range(48), choice.token_ids]
    assert torch.tensor(choice.logprobs.token_logprobs).sub(chosen).abs().max() < CLOSE
    for row, (chosen_token, top) in enumerate(zip(choice.logprobs.tokens, choice.logprobs.top_logprobs, strict=True)):
        best = expected[row].topk(5)
        assert chosen_token in top
        for token, value in zip(best.indices, best.values, strict=True):
            assert top[tokenizer.decode([token])] == pytest.approx(value.item(), abs=CLOSE)


def test_chat_logprobs(client, target, tokenizer):
    answer = chat(client, logprobs=True, top_logprobs=2, extra_body={"return_token_ids": True})
    expected = log_probabilities(target, answer.prompt_token_ids, answer.choices[0].token_ids)
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == [tokenizer.decode([token]) for token in answer.choices[0].token_ids]
    for row, entry in enumerate(content):
        assert entry.logprob == pytest.approx(expected[row].max().item(), abs=CLOSE)
        assert entry.top_logprobs[0].logprob == entry.logprob >= entry.top_logprobs[1].logprob


def test_prompt_logprobs(client, target):
    choice = complete(client, echo=True, logprobs=1, max_tokens=8).choices[0]
    prompt = choice.prompt_token_ids
    expected = log_probabilities(target, prompt[:1], prompt[1:] + choice.token_ids)
    chosen = expected[range(len(expected)), prompt[1:] + choice.token_ids]
    assert choice.logprobs.token_logprobs[0] is None
    assert torch.tensor(choice.logprobs.token_logprobs[1:]).sub(chosen).abs().max() < CLOSE


def test_stop_string(client):
    """A stop string that ends in the middle of a token, and most likely of a round."""
    text = complete(client, max_tokens=64).choices[0].text
    stop = text[40:47]
    cut = text.index(stop)
    for included in (False, True):
        extra = {"include_stop_str_in_output": included}
        choice = complete(client, max_tokens=64, stop=[stop], extra_body=extra).choices[0]
        assert choice.text == text[: cut + len(stop) * included]
        assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    streamed = complete(client, max_tokens=64, stop=[stop], stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text[:cut]


def test_stop_token(client):
    tokens = complete(client, max_tokens=64).choices[0].token_ids
    stop = tokens[40]
    choice = complete(client, extra_body={"stop_token_ids": [stop]}).choices[0]
    assert choice.token_ids == tokens[: tokens.index(stop) + 1]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 12},
        "kind": {"enum": ["file", "folder", "link"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 9999},
        "tags": {"type": "array", "items": {"enum": ["new", "old"]}, "minItems": 2, "maxItems": 4},
        "hidden": {"type": "boolean"},
    },
    "required": ["name", "kind", "size", "tags", "hidden"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 3, "n": 4}])
def test_json_schema(client, sampling):
    wanted = {"type": "json_schema", "json_schema": {"name": "entry", "schema": SCHEMA, "strict": True}}
    answer = chat(client, max_tokens=200, response_format=wanted, **sampling)
    assert len(answer.choices) == sampling.get("n", 1)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)


def test_structured_answer_is_the_targets(client, target, tokenizer):
    """Greedy under a grammar: each token is the target's first choice among those that the grammar allows."""
    endings = ["return a list of the names", "return a list of the values", "raise an exception instead"]
    allowed = [
        f"{start} will {ending} of the {what}" for start in "xy" for ending in endings for what in ("file", "tree")
    ]
    extra = {"structured_outputs": {"choice": allowed}, "ignore_eos": False}
    choice = complete(client, max_tokens=100, extra_body=extra).choices[0]
    assert choice.text in allowed and choice.finish_reason == "stop"
    pieces = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    log_probs = log_probabilities(target, choice.prompt_token_ids, choice.token_ids)
    written = ""
    for row, token in enumerate(choice.token_ids):
        if written in allowed:
            assert token == tokenizer.eos_token_id
            break
        possible = [
            i for i, piece in enumerate(pieces) if piece and any(a.startswith(written + piece) for a in allowed)
        ]
        assert token in possible
        assert log_probs[row, token] >= log_probs[row, possible].max() - CLOSE
        written += pieces[token]


def test_parallel_clients(server, client):
    prompts = [SOURCES[i % len(SOURCES)] * (1 + i % 3) for i in range(8)]

    def answer(index: int) -> list[int]:
        return complete(client, prompts[index], max_tokens=40 + 4 * index).choices[0].token_ids

    server.rpc("easyspec_stats", reset=True)
    one_by_one = [answer(index) for index in range(8)]
    rounds_alone = server.rpc("easyspec_stats", reset=True)[0]["rounds"]
    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(answer, range(8))) == one_by_one
    # How many share a round is a matter of when they arrive; that none ever do is not.
    assert server.rpc("easyspec_stats")[0]["rounds"] < rounds_alone, "the requests were not batched"


def test_abandoned_stream(server, client):
    expected = complete(client).choices[0].token_ids
    generated = metric(server, "vllm:generation_tokens_total")
    stream = complete(client, max_tokens=450, stream=True)
    next(stream)
    stream.close()  # at once: 450 tokens take no more than a second
    assert eventually(lambda: metric(server, "vllm:num_requests_running") == 0)
    assert eventually(lambda: metric(server, "vllm:kv_cache_usage_perc") == 0)
    assert 0 < metric(server, "vllm:generation_tokens_total") - generated < 450, "it was not aborted"
    assert complete(client).choices[0].token_ids == expected


@pytest.mark.parametrize("room", [40, 3, 1])
def test_up_to_the_longest_context(client, target, room):
    """The last rounds draft past the end; vLLM cuts the answer there."""
    prompt = [token % 500 for token in range(7, 7 + MAX_LEN - room)]
    choice = complete(client, prompt, max_tokens=room + 5).choices[0]
    assert choice.finish_reason == "length" and len(choice.token_ids) == room
    assert_greedy(target, prompt, choice.token_ids)


def test_beyond_the_longest_context(server, client):
    with pytest.raises(
        openai.BadRequestError, match=f"maximum context length is {MAX_LEN}.*{MAX_LEN + 1} input tokens"
    ):
        complete(client, [5] * (MAX_LEN + 1), max_tokens=1)
    assert server.is_healthy()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"max_tokens": -1}, "max_tokens must be at least 1"),
        ({"temperature": -1}, "temperature must be non-negative"),
        ({"top_p": 2}, "top_p must be in"),
        ({"n": 0}, "n must be at least 1"),
        ({"logprobs": 99}, "greater than max allowed"),
        ({"model": "another"}, "does not exist"),
        ({"prompt": [600]}, "out of vocabulary"),
        ({"prompt": ""}, "non-empty"),
        ({"extra_body": {"structured_outputs": {"json": {"type": "nonsense"}}}}, "nonsense"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_request(server, client, changes, complaint):
    with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=complaint):
        complete(client, **changes)
    assert server.is_healthy() and len(complete(client, max_tokens=2).choices[0].token_ids) == 2


def test_metrics(server, client):
    """vLLM's counters agree with easyspec's own."""
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")

    def counters() -> list[float]:
        totals = [metric(server, f"vllm:spec_decode_{name}_total") for name in names]
        per_position = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        return totals + [metric(server, per_position, position=str(index)) for index in range(K)]

    assert eventually(lambda: metric(server, "vllm:num_requests_running") == 0)
    before = counters()
    server.rpc("easyspec_stats", reset=True)
    complete(client, SOURCES[2], max_tokens=97)
    ours = server.rpc("easyspec_stats")[0]
    # vLLM adds to its counters after it has answered.
    assert eventually(lambda: counters()[0] - before[0] == ours["verified"])
    drafts, drafted, accepted, *at_position = (now - then for now, then in zip(counters(), before, strict=True))
    assert drafts > 0 and 0 < accepted < drafted <= K * drafts
    assert at_position == ours["accepted_at"] and accepted == sum(at_position)


def test_metrics_tell_of_rounds_and_stages(server, client):
    before = metrics_of(server)
    complete(client, SOURCES[3])
    time.sleep(1.1)  # reports are a second apart
    complete(client, SOURCES[3])
    assert eventually(lambda: metrics_of(server)["rounds_total"] > before.get("rounds_total", 0))
    found = metrics_of(server)
    assert all(found[f"stage_seconds_count {stage}"] > 0 for stage in ("calibrate", "draft", "verify"))
    assert found["eager_rounds_total"] > 0 and found["paused_rounds_total"] == 0


def metrics_of(server) -> dict[str, float]:
    """easyspec's samples by name and stage, added up over other labels."""
    found: dict[str, float] = {}
    for line in server.get("/metrics").splitlines():
        if match := re.match(r'vllm:easyspec_(\w+)\{(?:.*stage="(\w+)")?.*\} (\S+)$', line):
            name = " ".join(filter(None, match.groups()[:2]))
            found[name] = found.get(name, 0.0) + float(match[3])
    return found


def test_every_rank_answers_rpcs(server):
    ranks = server.rpc("easyspec_stats")
    assert [rank["rank"] for rank in ranks] == list(range(RANKS))
    same = ("rounds", "verified", "accepted_at", "scope", "group_sizes", "num_speculative_tokens")
    assert all([rank[name] for name in same] == [ranks[0][name] for name in same] for rank in ranks)


def test_drafting_is_swapped_while_serving(server, client):
    expected = complete(client, SOURCES[2]).choices[0].token_ids
    before = server.rpc("easyspec_stats")[0]
    configured = {name: before[name] for name in ("scope", "group_sizes", "num_speculative_tokens")}
    try:
        server.rpc("easyspec_configure", scope="block", group_sizes=[1, 8, 1], num_speculative_tokens=2)
        assert complete(client, SOURCES[2]).choices[0].token_ids == expected
        assert not any(server.rpc("easyspec_stats")[0]["accepted_at"][2:])
    finally:
        server.rpc("easyspec_configure", **configured)


def test_configuration_error_ends_the_command(tmp_path):
    """One clear line at the end, before any model is loaded."""
    config = tmp_path / "easyspec.yaml"
    config.write_text(f"method: easyspec\nmodel: {DRAFTER}\nnum_speculative_tokens: 0\n")
    with pytest.raises(serving.ServerError) as caught, serving.serve(TARGET, "--speculative-config", str(config)):
        pass
    message = str(caught.value)
    assert "ended with code 2" in message
    last = message.strip().splitlines()[-1]
    assert str(config) in last and "num_speculative_tokens=0" in last and "from 1 to 256" in last


def test_an_error_of_a_worker_is_the_last_line(tmp_path):
    """An error that is found only when weights are read: other processes print tracebacks before it."""
    drafter = tmp_path / "drafter"
    shutil.copytree(DRAFTER, drafter)
    (weights,) = drafter.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, weights)
    config = tmp_path / "easyspec.yaml"
    config.write_text(f"method: easyspec\nmodel: {drafter}\nnum_speculative_tokens: 3\n")
    arguments = ["--speculative-config", str(config), "--dtype", "float32", "--enforce-eager", "--max-model-len", "64"]
    arguments += ["--kv-cache-memory-bytes", "16M"]
    with pytest.raises(serving.ServerError, match="ended with code 1") as caught, serving.serve(TARGET, *arguments):
        pass
    lines = str(caught.value).strip().splitlines()
    assert lines[-1].startswith("easyspec: error: the drafter's checkpoint holds NaN or infinity")
    assert len([line for line in lines if line.startswith("easyspec: error: ")]) == 1
