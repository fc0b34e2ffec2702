"""`DraftPlan`: which consecutive drafter layers run side by side, and how. `PlanTable`: a plan by batch size."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from vllm_easyspec.errors import cut, shown

Scope = Literal["attention", "block"]
SCOPES: tuple[Scope, ...] = ("attention", "block")


@dataclass(frozen=True)
class DraftPlan:
    """How one fuzzy step runs: a partition of the drafter's layers into groups of consecutive layers, and a scope.

    The layers of a group read the same input. Scope `attention` runs a group's attentions side by side and its MLPs in
    order, as in the EasySpec paper (arXiv 2502.02493); scope `block`, which is not in the paper, runs its MLPs side by
    side too. A plan of groups of one layer is the precise pass, for which the scope makes no difference: it is always
    set to `attention`, so that there is only one precise plan.

    group_sizes: layers of each group, in order. Raises ValueError for an empty group or another scope.
    """

    group_sizes: tuple[int, ...]
    scope: Scope = "attention"

    def __post_init__(self) -> None:
        if not self.group_sizes or min(self.group_sizes) < 1:
            raise ValueError(f"plan={shown(self.grouping)} must hold at least one group, each of at least 1 layer")
        if self.scope not in SCOPES:
            raise ValueError(f"scope={self.scope!r} is not one of {', '.join(SCOPES)}")
        if self.is_precise:
            object.__setattr__(self, "scope", "attention")

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

    @property
    def sequential_steps(self) -> int:
        """Sublayers that run one after another in a step: per group of N layers `1 + N`, in block scope 2."""
        return sum(1 + (size if self.scope == "attention" else 1) for size in self.group_sizes)

    @property
    def grouping(self) -> str:
        """The group sizes as a user writes them, such as `1-4-4-1`."""
        return "-".join(map(str, self.group_sizes))

    def __str__(self) -> str:
        return "precise" if self.is_precise else f"{self.scope} {self.grouping}"

    @classmethod
    def precise(cls, num_layers: int) -> "DraftPlan":
        """One layer after another."""
        return cls((1,) * num_layers)

    @classmethod
    def grouped(
        cls, num_layers: int, group_size: int, precise_head: int, precise_tail: int, scope: Scope = "attention"
    ) -> "DraftPlan":
        """Groups of `group_size` between single layers at either end; the last group may be smaller.

        A drafter with fewer layers than `precise_head + precise_tail` gets the precise plan.
        """
        middle = max(0, num_layers - precise_head - precise_tail)
        if middle == 0:
            return cls.precise(num_layers)
        sizes = [group_size] * (middle // group_size)
        if middle % group_size:
            sizes.append(middle % group_size)
        return cls((1,) * precise_head + tuple(sizes) + (1,) * precise_tail, scope)

    @classmethod
    def of_sizes(
        cls, num_layers: int, group_sizes: Sequence[int], scope: Scope = "attention", name: str = "plan"
    ) -> "DraftPlan":
        """Raises ValueError if the sizes, called `name` in the message, don't add up to `num_layers`."""
        plan = cls(tuple(group_sizes), scope)
        if plan.num_layers != num_layers:
            raise ValueError(
                f"{name}={cut(plan.grouping)}: the group sizes add up to {plan.num_layers}, but the drafter has "
                f"{num_layers} layers. Make them add up to {num_layers}, or give group_size instead"
            )
        return plan


def parse_grouping(text: str) -> tuple[int, ...]:
    """The group sizes of a plan as a user writes it, such as `1-4-4-1`. Raises ValueError for any other text."""
    parts = text.split("-")
    if not all(part.isascii() and part.isdigit() and len(part) < 6 and int(part) > 0 for part in parts):
        raise ValueError(f"plan={shown(text)} is not a plan. Give the sizes of all groups in order, such as 1-4-4-1")
    return tuple(map(int, parts))


@dataclass(frozen=True)
class PlanRange:
    """The plan for batch sizes above those of the range before, up to `up_to`; None: for all of them."""

    up_to: int | None
    plan: DraftPlan


@dataclass(frozen=True)
class PlanTable:
    """A plan for every batch size. Ranges ascend, and the last one has no end."""

    ranges: tuple[PlanRange, ...]

    def __post_init__(self) -> None:
        *bounded, last = [entry.up_to for entry in self.ranges]
        ascending = all(end is not None for end in bounded) and sorted(set(bounded)) == bounded  # type: ignore[type-var]
        if not ascending or last is not None:
            raise ValueError(f"ranges up to {[*bounded, last]} don't ascend to one without an end")

    @classmethod
    def of(cls, beyond: DraftPlan, ranges: Iterable[tuple[int | None, DraftPlan]] = ()) -> "PlanTable":
        """ranges: `(up_to, plan)`, ascending; larger batches take `beyond` unless the last range has no end."""
        entries = [PlanRange(up_to, plan) for up_to, plan in ranges]
        if not entries or entries[-1].up_to is not None:
            entries.append(PlanRange(None, beyond))
        return cls(tuple(entries))

    def at(self, batch_size: int) -> DraftPlan:
        """The plan of a round of `batch_size` requests."""
        return next(entry.plan for entry in self.ranges if entry.up_to is None or batch_size <= entry.up_to)

    @property
    def largest(self) -> DraftPlan:
        """The plan of the largest batches; of all batches if there is one range."""
        return self.ranges[-1].plan

    @property
    def plans(self) -> tuple[DraftPlan, ...]:
        """Each plan once."""
        return tuple(dict.fromkeys(entry.plan for entry in self.ranges))

    def __str__(self) -> str:
        return ", ".join(
            f"{entry.plan} up to batch size {entry.up_to}" if entry.up_to else str(entry.plan) for entry in self.ranges
        )
