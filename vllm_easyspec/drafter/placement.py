"""`LayerPlacement`: which tensor-parallel rank holds the attention and the K/V pages of which drafter layer."""

from dataclasses import dataclass
from enum import Enum

from vllm_easyspec.drafter.architectures import DrafterShape


@dataclass(frozen=True)
class LayerPlacement:
    """The whole attention of layer `l` is on rank `l mod num_ranks`.

    Consecutive layers are on different ranks, so a group is spread evenly, and a rank's share of any group is one
    contiguous slice of its own layers. A rank's own layers are numbered from 0 in the order of the model.
    """

    num_layers: int
    num_ranks: int

    def owner(self, layer: int) -> int:
        return layer % self.num_ranks

    def layers_of(self, rank: int) -> range:
        """The model's layers whose attention is on `rank`; empty for ranks beyond the number of layers."""
        return range(rank, self.num_layers, self.num_ranks)

    def local_slice(self, rank: int, group: range) -> slice:
        """The share of `group` (consecutive layers) that `rank` holds, as a slice of the rank's own layers."""
        return slice(self._layers_before(rank, group.start), self._layers_before(rank, group.stop))

    def _layers_before(self, rank: int, layer: int) -> int:
        return max(0, -(-(layer - rank) // self.num_ranks))

    def __str__(self) -> str:
        return "; ".join(f"rank {rank}: layers {list(self.layers_of(rank))}" for rank in range(self.num_ranks))


class MlpPlacement(Enum):
    """How a layer's MLP is distributed over the ranks."""

    TENSOR = "tensor"  # the width is cut over the ranks; one all-reduce per MLP, or per group in block scope
    REPLICATE = "replicate"  # whole on every rank; no collective

    def shard(self, width: int, rank: int, num_ranks: int) -> range:
        """The part of the intermediate width on `rank`. Any width at any rank count; parts differ by at most one."""
        if self is MlpPlacement.REPLICATE:
            return range(width)
        return range(width * rank // num_ranks, width * (rank + 1) // num_ranks)


# Replicating an MLP costs reading the other ranks' shares from memory and saves one all-reduce. The break-even is the
# number of bytes that a rank reads in the time of one small all-reduce. On a CPU it is measured (docs/results.md,
# "Draft steps"); on a GPU it is assumed: about 8 us, vLLM's custom all-reduce over NVLink, at 3 TB/s.
REPLICATE_BELOW_BYTES = {"cuda": 24_000_000, "cpu": 75_000}


def choose_mlp(mode: str, shape: DrafterShape, num_ranks: int, itemsize: int, device_type: str) -> MlpPlacement:
    """Resolve `mlp: auto | tensor | replicate` for this drafter."""
    if mode != "auto":
        return MlpPlacement(mode)
    others_share = shape.mlp_parameters() * itemsize * (num_ranks - 1) // num_ranks
    cheap = others_share < REPLICATE_BELOW_BYTES.get(device_type, 0)
    return MlpPlacement.REPLICATE if num_ranks == 1 or cheap else MlpPlacement.TENSOR
