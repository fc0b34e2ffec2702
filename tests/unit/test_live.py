"""`vllm-easyspec doctor --live`, against a real HTTP server."""

import socket
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from vllm_easyspec.cli import main

ENGINE = {"model_name": "served", "engine": "0"}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@contextmanager
def serving(text: str, status: int = 200):
    """The address of a server whose `/metrics` answers with `text`, and whose other paths do not exist."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def metrics(
    acceptance=(0.8, 0.6, 0.5, 0.4), milliseconds=(2, 8, 30), rounds=200, num_drafts=4, engines=1, **counters
) -> str:
    """A server's text. acceptance: by position; milliseconds: of calibrate, draft, verify; rounds: of each engine."""
    registry = CollectorRegistry()

    def counter(name, *labels):
        return Counter(f"vllm:{name}", "", (*ENGINE, *labels), registry=registry)

    drafts, accepted = counter("spec_decode_num_drafts"), counter("spec_decode_num_accepted_tokens")
    by_position = counter("spec_decode_num_accepted_tokens_per_pos", "position")
    by_plan = counter("easyspec_rounds", "scope", "plan", "num_speculative_tokens")
    stages = Histogram("vllm:easyspec_stage_seconds", "", (*ENGINE, "stage"), registry=registry)
    others = {name: counter(f"easyspec_{name}") for name in {"paused_rounds", *counters}}
    for engine in map(str, range(engines)):
        drafts.labels("served", engine).inc(2 * rounds)  # two requests in each
        accepted.labels("served", engine).inc(2 * rounds * sum(acceptance))
        for position, share in enumerate(acceptance):
            by_position.labels("served", engine, str(position)).inc(2 * rounds * share)
        by_plan.labels("served", engine, "block", "1-4-4-1", str(num_drafts)).inc(rounds)
        for stage, took in zip(("calibrate", "draft", "verify"), milliseconds, strict=True):
            for _ in range(rounds):
                stages.labels("served", engine, stage).observe(took / 1e3)
        for name, metric in others.items():
            metric.labels("served", engine).inc(counters.get(name, 0))
        by_plan.labels("served", engine, "block", "1-4-4-1", "0").inc(counters.get("paused_rounds", 0))
    return generate_latest(registry).decode()


def live(capsys, url: str) -> list[str]:
    """The report's lines."""
    assert main(["doctor", "--live", url]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def changes(report: list[str]) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in report if line.startswith("change ")]


@pytest.mark.parametrize("suffix", ["", "/", "/metrics", "/metrics/"])
def test_a_server_that_speculation_makes_faster(capsys, suffix):
    with serving(metrics(engines=2)) as url:
        report = live(capsys, url + suffix)
    assert report == [
        "verdict     speculation can save time: at best 2.48 times as fast as without, with 3.30 tokens per round, "
        "which takes 1.33 times its verification",
        "            (less, if verifying K + 1 tokens takes longer than a step without speculation)",
        "rounds      400 with drafts since the start, 100% of them with plan 1-4-4-1, scope block, K=4; 0 paused",
        "acceptance  by position: 80%, 60%, 50%, 40%",
        "time        40.0 ms per round: calibrate 5%, draft 20%, verify 75%",
        "change      nothing stands out",
    ]


def test_a_server_that_speculation_makes_slower(capsys):
    with serving(metrics(acceptance=(0.5, 0.2, 0.1, 0.05), milliseconds=(5, 25, 20))) as url:
        report = live(capsys, url)
    assert "speculation costs time: at best 0.74 times as fast as without, with 1.85 tokens" in report[0]
    best, drafting, without = changes(report)
    # Per 6.25 ms of another draft: 1.5 tokens in 31.25 ms, 1.7 in 37.5, 1.8 in 43.75, 1.85 in 50.
    assert "set num_speculative_tokens to about 1" in best
    assert "vllm-easyspec tune" in drafting
    assert without == "until that helps, serve without --speculative-config"


@pytest.mark.parametrize("warnings", [0, 2])
def test_low_acceptance(capsys, warnings):
    with serving(metrics(acceptance=(0.01, 0, 0, 0), low_acceptance=warnings)) as url:
        report = live(capsys, url)
    warned = " (the server's warnings: 2)" if warnings else ""
    assert (
        changes(report)[0] == f"1% of first drafts are accepted{warned}: run vllm-easyspec doctor CONFIG --model TARGET"
    )


def test_eager_and_paused_rounds(capsys):
    with serving(metrics(eager_rounds=50, paused_rounds=100)) as url:
        eager, paused = changes(live(capsys, url))
    assert eager.startswith("50 rounds drafted without a CUDA graph: on a GPU, serve without --enforce-eager")
    assert "K by batch size pauses many rounds" in paused
    with serving(metrics(eager_rounds=50, graph_replays=300)) as url:
        assert "the log names what has no graph" in changes(live(capsys, url))[0]
    with serving(metrics(eager_rounds=5, paused_rounds=5)) as url:
        assert changes(live(capsys, url)) == ["nothing stands out"]


def test_no_other_k_is_advised_where_k_varies(capsys):
    series = (
        'vllm:easyspec_rounds_total{model_name="served",engine="0",scope="block",plan="1-8-1",num_speculative_tokens='
    )
    text = metrics(acceptance=(0.5, 0.2, 0.1, 0.05), milliseconds=(1, 25, 60)) + f'{series}"2"}} 50.0\n'
    with serving(text) as url:
        report = live(capsys, url)
    assert "80% of them with plan 1-4-4-1" in report[2]
    assert changes(report) == ["nothing stands out"]


def error(capsys, *arguments: str) -> str:
    assert main(["doctor", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err.removeprefix("vllm-easyspec doctor: error: ").rstrip()


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("", 503, "answers with HTTP status 503, not 200. Give the address of vLLM's API server"),
        ("", 204, "answers with HTTP status 204, not 200."),
        ("<html>a page = {</html>", 200, "has no metrics of vLLM. Give the address of vLLM's API server"),
        ("python_info 1.0\n", 200, "start it without --disable-log-stats"),
        ("vllm:num_requests_running 1.0\n", 200, "has no metrics of easyspec. Start the server with a --speculative"),
        (metrics(rounds=99), 200, "has counted 99 rounds with drafts and 0 paused ones, too few for a verdict."),
        ("vllm:easyspec_paused_rounds_total 7.0\n", 200, "0 rounds with drafts and 7 paused ones, too few"),
    ],
)
def test_a_server_that_has_no_verdict(capsys, text, status, message):
    with serving(text, status) as url:
        told = error(capsys, "--live", url)
    assert told.startswith(f"{url}/metrics ") and message in told


def test_a_server_that_can_not_be_reached(capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert error(capsys, "--live", url).startswith(f"{url}/metrics can't be read: ")


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "ftp://127.0.0.1", "localhost:8000", "", "http://", "http://a:b"]
)
def test_what_is_no_address(capsys, url):
    told = error(capsys, "--live", url)
    assert "is not an HTTP address" in told or "can't be read: " in told
    assert ("is not an HTTP address" in told) == (not url.startswith("http"))


def test_a_configuration_or_a_server(capsys):
    for arguments in [(), ("nowhere.yaml", "--live", "http://127.0.0.1"), ("--live", "http://127.0.0.1", "-tp", "2")]:
        assert error(capsys, *arguments) == "give either CONFIG, with its options, or --live URL, which has none"


def test_neither_vllm_nor_torch_is_imported():
    code = """if True:
        import sys
        from vllm_easyspec.cli import main
        assert main(["doctor", "--live", sys.argv[1]]) == 0
        assert not {"vllm", "torch", "transformers"} & set(sys.modules)
    """
    with serving(metrics()) as url:
        done = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("verdict")
