"""Least squares from sums over samples, to fit and judge look-ahead maps."""

from dataclasses import dataclass

import torch

from vllm_easyspec.lookahead import KINDS


class Moments:
    """The sums over samples that least squares needs, in float64; each batch's products are computed in float32."""

    def __init__(self, features: int, outputs: int, device: torch.device):
        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(*size, dtype=torch.float64, device=device)

        self.gram, self.cross, self.squares = (
            zeros(features + 1, features + 1),
            zeros(features + 1, outputs),
            zeros(outputs),
        )

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """x: `[samples, features]`, y: `[samples, outputs]`."""
        x, y = x.float(), y.float()
        x = torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
        self.gram += x.T @ x
        self.cross += x.T @ y
        self.squares += (y * y).sum(0)

    @property
    def count(self) -> float:
        return self.gram[-1, -1].item()

    def part(self, features: int, outputs: slice) -> "Moments":
        """The first `features` and some of the outputs."""
        kept = [*range(features), -1]
        part = object.__new__(Moments)
        part.gram, part.cross = self.gram[kept][:, kept], self.cross[kept, outputs]
        part.squares = self.squares[outputs]
        return part

    def solve(self, ridge: float, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`y ~ x @ down @ up + bias`: `[features, rank], [rank, outputs], [outputs]`, float64.

        ridge: penalty on a feature's weights, as a share of that feature's variance. rank: the fitted values are
        reduced to their first principal components, which is the best map of that rank; None for all.
        """
        mean_x, mean_y = self.gram[-1, :-1] / self.count, self.cross[-1] / self.count
        covariance = self.gram[:-1, :-1] / self.count - torch.outer(mean_x, mean_x)
        cross = self.cross[:-1] / self.count - torch.outer(mean_x, mean_y)
        variances = covariance.diagonal().clamp(min=1e-12)
        weights = torch.linalg.solve(covariance + torch.diag(ridge * variances), cross)
        _, components = torch.linalg.eigh(weights.T @ covariance @ weights)  # ascending
        up = components.flip(1)[:, :rank].T
        down = weights @ up.T
        return down, up, mean_y - mean_x @ down @ up

    def r2(self, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor) -> float:
        """The share of these samples' variance that the map explains."""
        weights = torch.cat([down @ up, bias.unsqueeze(0)])
        left = self.squares.sum() - 2 * (weights * self.cross).sum() + (weights * (self.gram @ weights)).sum()
        total = self.squares.sum() - (self.cross[-1] ** 2).sum() / self.count
        return (1 - left / total).item()


@dataclass
class PairMoments:
    """Samples of layer `i` in a group from `g` on: features `[k, p_i / rms(p_i)]` as in `lookahead.py`; outputs: what
    the two maps must add."""

    fitted: Moments
    held_out: Moments

    @classmethod
    def empty(cls, hidden: int, device: torch.device) -> "PairMoments":
        return cls(*(Moments(KINDS["mlp"] * hidden, 2 * hidden, device) for _ in range(2)))

    def of_kind(self, kind: str) -> tuple[Moments, Moments]:
        """The fitted and the held-out moments of the attention or the MLP map."""
        outputs = self.fitted.squares.shape[0] // 2
        columns = slice(0, outputs) if kind == "attention" else slice(outputs, None)
        return tuple(m.part(KINDS[kind] * outputs, columns) for m in (self.fitted, self.held_out))  # type: ignore[return-value]
