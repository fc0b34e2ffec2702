"""`LayerPlacement`: which tensor-parallel rank holds the attention and the K/V pages of which drafter layer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerPlacement:
    """The attention of layer `l` lives whole on rank `l mod num_ranks`.

    Consecutive layers land on different ranks, so a group spreads evenly, and a rank's share of any group is one
    contiguous slice of its own layers. A rank's own layers are counted from 0 in the order of the model.
    """

    num_layers: int
    num_ranks: int

    def owner(self, layer: int) -> int:
        return layer % self.num_ranks

    def layers_of(self, rank: int) -> range:
        """The model's layers whose attention lives on `rank`; empty where there are more ranks than layers."""
        return range(rank, self.num_layers, self.num_ranks)

    def local_slice(self, rank: int, group: range) -> slice:
        """The share of `group` (consecutive layers) that `rank` holds, as a slice of the rank's own layers."""
        return slice(self._layers_before(rank, group.start), self._layers_before(rank, group.stop))

    def _layers_before(self, rank: int, layer: int) -> int:
        return max(0, -(-(layer - rank) // self.num_ranks))

    def __str__(self) -> str:
        return "; ".join(f"rank {rank}: layers {list(self.layers_of(rank))}" for rank in range(self.num_ranks))
