"""Rounds reach the metrics: from a worker's counters through a real socket to Prometheus' text."""

import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import REGISTRY, Counter, Histogram, generate_latest

from vllm_easyspec import round_reports, stat_logger
from vllm_easyspec.config import OPTIONS_KEY
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.metrics import DraftStatistics
from vllm_easyspec.round_reports import RoundReporter
from vllm_easyspec.stat_logger import EasySpecStatLogger
from vllm_easyspec.watch import ROUNDS

ROOT = Path(__file__).resolve().parents[2]
PLAN = DraftPlan((1, 2, 1), "block")
LABELS = 'engine="0",model_name="served"'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(round_reports.FOLDER, str(tmp_path))
    monkeypatch.setattr(round_reports, "SECONDS", 0.0)
    yield tmp_path
    for metric in stat_logger.metrics().values():
        REGISTRY.unregister(metric)
    stat_logger.metrics.cache_clear()


def config(**additional):
    return SimpleNamespace(model_config=SimpleNamespace(served_model_name="served"), additional_config=additional)


def lines() -> set[str]:
    return {line for line in generate_latest(REGISTRY).decode().splitlines() if line.startswith("vllm:easyspec_")}


def test_what_is_new_is_added_also_after_a_reset(folder):
    logger = EasySpecStatLogger(config(**{OPTIONS_KEY: {}}))
    logger.log_engine_initialized()
    assert f"vllm:easyspec_paused_rounds_total{{{LABELS}}} 0.0" in lines()
    reporter, statistics = RoundReporter(0), DraftStatistics(torch.device("cpu"), 4)
    for _ in range(2):
        statistics.clock.start("draft")
        statistics.clock.stop("draft")
        statistics.rounds_by_plan[3, PLAN] += 1
        statistics.paused_rounds += 2
        reporter.after_round(statistics)
    statistics.reset()
    statistics.paused_rounds = 1
    reporter.after_round(statistics)
    logger.record(None, None)
    plan = 'num_speculative_tokens="3",plan="1-2-1",scope="block"'
    found = lines()
    assert f'vllm:easyspec_rounds_total{{engine="0",model_name="served",{plan}}} 2.0' in found
    assert f"vllm:easyspec_paused_rounds_total{{{LABELS}}} 5.0" in found
    assert f'vllm:easyspec_stage_seconds_count{{{LABELS},stage="draft"}} 2.0' in found


def test_warnings_are_counted(folder):
    logger = EasySpecStatLogger(config(**{OPTIONS_KEY: {}}))
    reporter, statistics = RoundReporter(0), DraftStatistics(torch.device("cpu"), 4)
    for _ in range(ROUNDS):
        for stage in ("draft", "verify"):
            statistics.clock.start(stage)
            statistics.clock.stop(stage)
    statistics.warnings["not_finite"] += 1
    reporter.after_round(statistics)
    nothing_accepted = SimpleNamespace(num_drafts=1000, num_accepted_tokens=0)
    logger.record(SimpleNamespace(spec_decoding_stats=nothing_accepted), None)
    assert f"vllm:easyspec_not_finite_total{{{LABELS}}} 1.0" in lines()
    assert f"vllm:easyspec_costs_time_total{{{LABELS}}} 1.0" in lines()


def test_without_a_reader_rounds_go_on(folder):
    RoundReporter(0).after_round(DraftStatistics(torch.device("cpu"), 4))


def test_other_engines_have_no_metrics(folder):
    logger = EasySpecStatLogger(config())
    logger.log_engine_initialized()
    logger.record(None, None)
    logger.log()
    assert lines() == set() and not list(folder.iterdir())


def test_a_second_api_server_leaves_the_reports_to_the_first(folder):
    first, second = (EasySpecStatLogger(config(**{OPTIONS_KEY: {}})) for _ in range(2))
    assert first.socket is not None and second.socket is None


def test_a_socket_that_an_ended_engine_left_is_replaced(folder):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ended:
        ended.bind(round_reports.address(0))
    assert EasySpecStatLogger(config(**{OPTIONS_KEY: {}})).socket is not None


def test_the_docs_name_every_series(folder):
    text = (ROOT / "docs" / "metrics.md").read_text()
    documented = re.findall(r"^\| `(vllm:easyspec_\w+)` \|", text, re.MULTILINE)
    suffix = {Counter: "_total", Histogram: ""}
    ours = [metric.describe()[0].name + suffix[type(metric)] for metric in stat_logger.metrics().values()]
    assert sorted(documented) == sorted(ours)
