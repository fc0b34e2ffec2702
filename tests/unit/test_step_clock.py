"""The clock that `bench engine` puts into workers."""

import pytest
import torch

from vllm_easyspec.bench.step_clock import StepClock
from vllm_easyspec.compat import remove_worker_extension


class Speculator:
    model = torch.nn.Linear(1, 1)

    def propose(self, batch):
        return batch + 1


class Runner:
    device = torch.device("cpu")

    def __init__(self, speculator):
        self.speculator = speculator

    def execute_model(self, batch, dummy_run=False):
        return batch * 2


@pytest.fixture
def worker():
    """Steps pass through unchanged and are timed; no engine."""
    worker = StepClock()
    worker.model_runner = Runner(Speculator())
    worker._time_steps(worker.model_runner)
    return worker


def test_steps_pass_through_and_are_timed_until_asked(worker):
    runner = worker.model_runner
    assert runner.execute_model(3, dummy_run=True) == 6
    assert runner.speculator.propose(3) == 4
    times = worker.bench_times()
    assert times["draft"] > 0 and times["verify"] > 0
    assert worker.bench_times() == {"draft": None, "verify": None}


def test_a_target_alone_has_no_times():
    worker = StepClock()
    worker.model_runner = Runner(None)
    assert worker.bench_times() == {"draft": None, "verify": None}


def test_a_worker_class_is_freed_of_an_extension():
    class Worker(Runner):
        pass

    class EasySpecWorker(Worker):
        pass

    class Extension(StepClock):
        pass

    Worker.__bases__ += (StepClock,)  # as vLLM does
    assert hasattr(EasySpecWorker, "bench_times")
    remove_worker_extension(StepClock)
    assert not hasattr(EasySpecWorker, "bench_times") and not hasattr(Worker, "bench_times")
    assert Extension.__bases__ == (StepClock,)
