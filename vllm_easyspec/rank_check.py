"""What ranks must agree on: with `check_ranks: true` the drafts, which each passes to the target; and problems."""

import torch
from vllm.distributed import get_tp_group


def assert_same_on_ranks(what: str, tensor: torch.Tensor) -> None:
    """Compare `tensor` with rank 0's, on the host. Raises RuntimeError on every rank that differs."""
    group = get_tp_group()
    mine = tensor.cpu().contiguous()
    first = mine.clone()
    torch.distributed.broadcast(first, src=group.ranks[0], group=group.cpu_group)
    if not torch.equal(first, mine):
        raise RuntimeError(
            f"{what} of tensor-parallel rank {group.rank_in_group} differ from rank 0's: {mine.tolist()} against "
            f"{first.tolist()}. Drafting would diverge; report this with the configuration"
        )


def first_problem(problem: str | None) -> str | None:
    """The problem of the first rank that has one, on every rank; None if none has. All ranks must call it."""
    group = get_tp_group()
    problems = [None] * group.world_size
    torch.distributed.all_gather_object(problems, problem, group=group.cpu_group)
    return next((each for each in problems if each is not None), None)
