"""`check_ranks: true`: every rank passes its own drafts to the target, so they must agree bitwise."""

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
