"""`LayerPlan`: which consecutive drafter layers run side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

Scope = Literal["attention", "block"]
SCOPES: tuple[Scope, ...] = ("attention", "block")


@dataclass(frozen=True)
class LayerPlan:
    """A partition of the drafter's layers into consecutive groups; the layers of a group read one input.

    A plan of groups of one is the precise pass.
    """

    group_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.group_sizes or min(self.group_sizes) < 1:
            raise ValueError(f"group_sizes={list(self.group_sizes)} must hold at least one group, each of at least 1")

    @property
    def num_layers(self) -> int:
        return sum(self.group_sizes)

    @property
    def groups(self) -> tuple[range, ...]:
        """The layers of each group, in order."""
        ends = tuple(accumulate(self.group_sizes))
        return tuple(range(end - size, end) for size, end in zip(self.group_sizes, ends, strict=True))

    @property
    def is_precise(self) -> bool:
        return max(self.group_sizes) == 1

    def sequential_steps(self, scope: Scope) -> int:
        """Sublayers one after another in a step: 2 for a layer alone, `1 + N` for a group (2 in block scope)."""
        return sum(1 + (size if scope == "attention" else 1) for size in self.group_sizes)

    def __str__(self) -> str:
        return "-".join(map(str, self.group_sizes))

    @classmethod
    def precise(cls, num_layers: int) -> "LayerPlan":
        return cls((1,) * num_layers)

    @classmethod
    def grouped(cls, num_layers: int, group_size: int, precise_head: int, precise_tail: int) -> "LayerPlan":
        """Groups of `group_size` between layers kept alone at either end, the remainder a smaller group at the end.

        A drafter with fewer layers than `precise_head + precise_tail` gets the precise plan.
        """
        middle = max(0, num_layers - precise_head - precise_tail)
        if middle == 0:
            return cls.precise(num_layers)
        sizes = [group_size] * (middle // group_size)
        if middle % group_size:
            sizes.append(middle % group_size)
        return cls((1,) * precise_head + tuple(sizes) + (1,) * precise_tail)

    @classmethod
    def of_sizes(cls, num_layers: int, group_sizes: Sequence[int]) -> "LayerPlan":
        plan = cls(tuple(group_sizes))
        if plan.num_layers != num_layers:
            raise ValueError(
                f"group_sizes={list(group_sizes)} add up to {plan.num_layers}, but the drafter has {num_layers} "
                f"layers. Make them add up to {num_layers}, or give group_size instead"
            )
        return plan
