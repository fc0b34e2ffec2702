"""`check_ranks: true` finds ranks that would pass different drafts to the target."""

import pytest
import torch
from vllm.distributed import get_tensor_model_parallel_rank

from vllm_easyspec.rank_check import assert_same_on_ranks
from vllm_easyspec.ranks import RankError, run_ranks

pytestmark = pytest.mark.engine


def compare(difference: int) -> int:
    drafts = torch.tensor([[3, 4], [5, 6 + difference * get_tensor_model_parallel_rank()]])
    assert_same_on_ranks("draft ids", drafts)
    return int(drafts.sum())


def test_equal_drafts_pass():
    assert run_ranks(2, compare, 0) == [18, 18]


def test_other_drafts_raise():
    with pytest.raises(
        RankError, match=r"draft ids of tensor-parallel rank 1 differ from rank 0's: \[\[3, 4\], \[5, 7"
    ):
        run_ranks(2, compare, 1)
