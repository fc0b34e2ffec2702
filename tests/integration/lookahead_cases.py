"""What each rank does for `test_lookahead_drafter.py`: fuzzy steps with random look-ahead maps."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from drafter_cases import PROMPTS, SCOPES, STEPS, Case

MAP_RANK = 7


def random_maps(hidden: int, reach: dict[int, int]) -> dict[str, torch.Tensor]:
    """The tensors of a file. Corrections are about as large as what they correct."""
    generator = torch.Generator().manual_seed(1)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    tensors = {}
    for start, last in reach.items():
        for kind, inputs in (("attention", 4), ("mlp", 5)):
            layers = last - start
            tensors[f"{kind}.{start}.down"] = noise(layers, inputs * hidden, MAP_RANK) * (inputs * hidden) ** -0.5
            tensors[f"{kind}.{start}.up"] = noise(layers, MAP_RANK, hidden) * MAP_RANK**-0.5
            tensors[f"{kind}.{start}.bias"] = 0.3 * noise(layers, hidden)
    return tensors


@dataclass
class Steps:
    logits: list[np.ndarray]  # of each step, [requests, vocab]
    counters: dict[str, int]


@dataclass
class RankResult:
    with_maps: dict[tuple[tuple[int, ...], str], Steps]
    without: dict[tuple[tuple[int, ...], str], Steps]
    precise: Steps  # the precise plan, with maps loaded
    map_parameters: int


def run_case(folder: str, case: Case, reach: dict[int, int]) -> RankResult:
    from vllm_easyspec.config import LayerParallelConfig, RuntimeOptions
    from vllm_easyspec.drafter.plan import DraftPlan
    from vllm_easyspec.engineless import EnginelessDrafter
    from vllm_easyspec.lookahead import LookaheadMaps
    from vllm_easyspec.metrics import PassCounters

    options = RuntimeOptions(layer_parallel=LayerParallelConfig(mlp=case.mlp))
    drafter = EnginelessDrafter(folder, options, max_num_reqs=len(PROMPTS), max_len=128, block_size=case.block_size)
    model = drafter.model
    tensors = random_maps(model.shape.hidden_size, reach)
    model.lookahead = LookaheadMaps(tensors, reach, model.placement, model.rank, model.final_norm)
    ends = np.cumsum([len(prompt) for prompt in PROMPTS]) - 1

    def steps(group_sizes: tuple[int, ...], scope: Any, maps: bool) -> Steps:
        drafter.rewind([0] * len(PROMPTS))
        hidden = drafter.read(PROMPTS)[ends]
        model.counters = PassCounters()
        logits = []
        for tokens in STEPS:
            hidden = drafter.read(tokens, DraftPlan(group_sizes, scope), hidden if maps else None)
            logits.append(drafter.logits(hidden).numpy())
        return Steps(logits, asdict(model.counters))

    keys = [(plan, scope) for plan in case.plans for scope in SCOPES]
    return RankResult(
        {key: steps(*key, maps=True) for key in keys},
        {key: steps(*key, maps=False) for key in keys},
        steps((1,) * case.config.num_hidden_layers, "block", maps=True),
        sum(parameter.numel() for parameter in model.lookahead.parameters()),
    )
