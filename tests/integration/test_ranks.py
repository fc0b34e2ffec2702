"""`run_ranks` ends in one clear error, and leaves nothing behind, whatever a rank does."""

import multiprocessing
import os
import re
import time
from pathlib import Path

import pytest
import torch
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_reduce

from vllm_easyspec.ranks import RankError, run_ranks

pytestmark = pytest.mark.engine


def fail_on_rank_one() -> None:
    """Rank 0 meanwhile waits for rank 1 in a collective, and would wait forever."""
    if get_tensor_model_parallel_rank() == 1:
        raise KeyError(f"no layer in {os.environ['VLLM_DIST_IDENT']}")
    tensor_model_parallel_all_reduce(torch.ones(4))


def die() -> None:
    os._exit(3)


def sleep() -> None:
    time.sleep(600)


def test_a_failing_rank_gives_its_traceback_and_ends_the_others():
    with pytest.raises(
        RankError, match="(?s)^rank 1 of 2 failed:.*in fail_on_rank_one.*KeyError: 'no layer in "
    ) as error:
        run_ranks(2, fail_on_rank_one)
    assert multiprocessing.active_children() == []
    (identity,) = re.findall(r"KeyError: 'no layer in (\w+)'", str(error.value))
    assert list(Path("/dev/shm").glob(f"*{identity}*")) == []


def test_a_rank_that_dies_is_named():
    with pytest.raises(RankError, match="^rank 0 of 1 died before it returned a result$"):
        run_ranks(1, die)


def test_time_runs_out():
    began = time.monotonic()
    with pytest.raises(RankError, match=r"^ranks \[0\] of 1 did not finish within 2 seconds$"):
        run_ranks(1, sleep, timeout_s=2)
    assert time.monotonic() - began < 60
    assert multiprocessing.active_children() == []
