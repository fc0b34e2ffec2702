"""Look-ahead maps: affine maps that predict the input that a layer of a group would have if layers ran in order.

In a group that starts at layer `g` with input `h`, every attention reads `h`, though layer `i` should read its own
`x_i`. Most of the difference can be predicted from features `k` that are available: `u = h / rms(h)`, absolute values
of it, and the previous token's final hidden state (`ops.group_features`). So attention `i` reads `h + k A_gi + b_gi`;
in block scope MLP `i` reads `p_i + [k, p_i / rms(p_i)] M_gi + c_gi`, where `p_i` is the sum of the group's input and
the attentions up to `i`. `vllm-easyspec fit` computes the maps in closed form (`tune/fit.py`).

A file holds, for each `g`, maps for the layers `g + 1 .. g + n`, so it serves any plan whose groups are no longer than
that. It names the drafter that it was fitted on and serves no other.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from vllm_easyspec.documents import write_whole
from vllm_easyspec.drafter.architectures import DrafterShape
from vllm_easyspec.drafter.placement import LayerPlacement
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.errors import ConfigError
from vllm_easyspec.ops import WHY_NOT_NATIVE, group_features, look_ahead

FORMAT = "vllm_easyspec look-ahead maps, 2"
KINDS = {"attention": 4, "mlp": 5}  # how many vectors of the hidden size a map reads
PARTS = ("down", "up", "bias")
EPS = 1e-6  # in the root mean square of a vector
# The drafter's identity contains this many evenly spaced samples, of this size, of each file of weights: a fine-tuned
# copy differs nearly everywhere, so reading gigabytes at every start would not be worth it.
SAMPLES, SAMPLE_BYTES = 64, 1 << 14


def drafter_identity(folder: str | Path, shape: DrafterShape) -> str:
    """Hash of the drafter's shape and of its files of weights: their sizes and samples of their bytes."""
    digest = hashlib.sha256(repr(shape).encode())
    files = sorted(Path(folder).glob("*.safetensors")) or sorted(Path(folder).glob("*.bin"))
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def checkpoint_folder(model: str, revision: str | None) -> Path | None:
    """The folder of the drafter's files on this machine; None if it has not been downloaded."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


@dataclass(frozen=True)
class LookaheadFile:
    """The metadata of a file. `reach[g]` is the last layer that has a map for groups that start at `g`."""

    path: str
    drafter: str
    reach: Mapping[int, int]
    rank: int
    hidden_size: int
    metadata: Mapping[str, Any]

    @classmethod
    def read(cls, path: str) -> "LookaheadFile":
        """Raises `ConfigError` for a file that can't be read or that `vllm-easyspec fit` did not write."""
        remedy = "Give a file that vllm-easyspec fit wrote"
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get("lookahead")
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise ConfigError(f"lookahead={path!r} can't be read: {reason}. {remedy}") from error
        metadata = json.loads(text) if text else {}
        if metadata.get("format") != FORMAT:
            raise ConfigError(
                f"lookahead={path!r} holds {metadata.get('format')!r} where {FORMAT!r} is needed. Give a file that "
                "vllm-easyspec fit wrote; maps of other versions must be fitted again"
            )
        reach = {int(start): last for start, last in metadata["reach"].items()}
        rank, hidden = metadata["rank"], metadata["hidden_size"]
        for name, size in _sizes(reach, rank, hidden).items():
            if shapes.get(name) != size:
                raise ConfigError(
                    f"lookahead={path!r}: tensor {name} has shape {shapes.get(name)} where {size} is needed. {remedy}"
                )
        return cls(path, metadata["drafter"], reach, rank, hidden, metadata)

    def check_plan(self, plan: DraftPlan) -> None:
        """Raise `ConfigError` where a group of the plan has layers without maps."""
        for group in plan.groups:
            if group[-1] > self.reach.get(group.start, group.start):
                raise ConfigError(
                    f"lookahead={self.path!r} has no maps for layers {list(group[1:])} in the group that starts at "
                    f"layer {group.start} of plan {plan.grouping}. Fit them (vllm-easyspec fit --plans "
                    f"{plan.grouping}), choose a plan that the file covers, or remove lookahead"
                )

    def check_drafter(self, folder: Path, shape: DrafterShape) -> None:
        """Raise `ConfigError` where the maps were fitted on another drafter than the one in `folder`."""
        if self.drafter != drafter_identity(folder, shape):
            raise ConfigError(
                f"lookahead={self.path!r} was fitted on another drafter than model={str(folder)!r} "
                f"({self.metadata.get('model')!r} then). Fit maps for this one: vllm-easyspec fit --drafter {folder}"
            )

    def describe(self) -> str:
        groups = ", ".join(f"{start}-{last}" for start, last in self.reach.items())
        return f"{self.path}: maps of rank {self.rank} for groups within layers {groups}"


def check_lookahead(
    path: str, model: str, revision: str | None, shape: DrafterShape, plans: Iterable[DraftPlan]
) -> LookaheadFile:
    """Raise `ConfigError` where the file can't serve this drafter and these plans.

    A drafter that is not on this machine yet is compared when its weights are loaded.
    """
    file = LookaheadFile.read(path)
    folder = checkpoint_folder(model, revision)
    if folder is not None:
        file.check_drafter(folder, shape)
    for plan in plans:
        file.check_plan(plan)
    return file


def _sizes(reach: Mapping[int, int], rank: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a file's tensors: for each kind and group start, the maps of the later layers, stacked."""
    return {
        f"{kind}.{start}.{part}": size
        for kind, inputs in KINDS.items()
        for start, last in reach.items()
        for part, size in zip(
            PARTS,
            ((last - start, inputs * hidden, rank), (last - start, rank, hidden), (last - start, hidden)),
            strict=True,
        )
    }


def write_maps(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write the file, completely or not at all. metadata: at least what `LookaheadFile.read` needs."""
    write_whole(path, save(dict(tensors), {"lookahead": json.dumps({"format": FORMAT, **metadata})}))


class StackedMaps(NamedTuple):
    """The maps of consecutive layers, each `x + features @ down @ up + bias`. A shorter group takes a prefix."""

    down: torch.Tensor  # [layers, 4 or 5 * hidden, rank]
    up: torch.Tensor  # [layers, rank, hidden]
    bias: torch.Tensor  # [layers, hidden]


class LookaheadMaps(nn.Module):
    """A rank's maps: attention maps for its own layers, MLP maps for all.

    A tensor-parallel MLP needs its whole input on every rank, so the MLP maps are replicated: sharding them would cost
    a collective per group to save a thin product. The first layer of a group reads the group's input and has no map.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        reach: Mapping[int, int],
        placement: LayerPlacement,
        rank: int,
        like: torch.Tensor,
    ):
        """tensors: those of a file; like: a tensor with the drafter's device and dtype.

        The native CPU operator reads the maps in the file's dtype: in float32 there would be twice as much to read.
        """
        super().__init__()
        self.reach = dict(reach)
        self.own_layers = placement.layers_of(rank)
        dtype = None if like.device.type == "cpu" and WHY_NOT_NATIVE is None else like.dtype
        self.attention: dict[int, StackedMaps] = {}
        self.mlp: dict[int, StackedMaps] = {}
        for start, last in reach.items():
            later = range(start + 1, last + 1)
            own = [layer - later.start for layer in self.own_layers if layer in later]
            for kind, maps, kept in (("attention", self.attention, own), ("mlp", self.mlp, list(range(len(later))))):
                stacked = [tensors[f"{kind}.{start}.{part}"][kept] for part in PARTS]
                weights = [
                    nn.Parameter(part.to(like.device, dtype or part.dtype), requires_grad=False) for part in stacked
                ]
                maps[start] = StackedMaps(*weights)
                for part, weight in zip(PARTS, weights, strict=True):
                    self.register_parameter(f"{kind}_{start}_{part}", weight)

    @classmethod
    def load(cls, file: LookaheadFile, placement: LayerPlacement, rank: int, like: torch.Tensor) -> "LookaheadMaps":
        """This rank's maps from `file`. like: a tensor with the drafter's device and dtype."""
        with safe_open(file.path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        return cls(tensors, file.reach, placement, rank, like)

    def of_group(self, start: int, h: torch.Tensor, previous: torch.Tensor) -> "GroupLookahead":
        """The maps of a group that starts at layer `start`, in one pass. h: its input, `[tokens, hidden]`; previous:
        the final hidden states of the tokens before, `[tokens, hidden]`."""
        features = group_features(h, previous, EPS)
        return GroupLookahead(self.attention[start], self.mlp[start], h, features, start in self.own_layers)


@dataclass(slots=True)
class GroupLookahead:
    """The maps of one group in one pass."""

    attention: StackedMaps
    mlp: StackedMaps
    h: torch.Tensor  # [tokens, hidden]
    features: torch.Tensor  # [tokens, 4 * hidden]
    owns_first: bool  # whether the attention of the group's first layer is on this rank

    def attention_inputs(self, layers: int) -> torch.Tensor:
        """The inputs of this rank's `layers` attentions of the group, `[layers, tokens, hidden]`."""
        if self.owns_first and layers == 1:
            return self.h.unsqueeze(0)
        return self._corrected(self.attention, self.h, layers, self.owns_first)

    def mlp_inputs(self, prefixes: torch.Tensor) -> torch.Tensor:
        """The inputs of the group's MLPs in block scope; prefixes and result: `[group, tokens, hidden]`."""
        return self._corrected(self.mlp, prefixes, prefixes.shape[0], True)

    def _corrected(self, maps: StackedMaps, x: torch.Tensor, layers: int, first: bool) -> torch.Tensor:
        return look_ahead(x, self.features, maps.down, maps.up, maps.bias, layers, first, EPS)


def input_features(h: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """The features that all maps of a group read, from its input and the previous token's final hidden state.

    h, previous: `[..., hidden]`; returns `[..., 4 * hidden]`.
    """
    return group_features(h.flatten(0, -2), previous.flatten(0, -2), EPS).unflatten(0, h.shape[:-1])


def rms_scaled(x: torch.Tensor) -> torch.Tensor:
    """`x / rms(x)` over the last dimension."""
    return F.rms_norm(x, x.shape[-1:], None, EPS)
