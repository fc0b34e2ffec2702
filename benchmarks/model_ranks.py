"""A model of the drafter's step on 1 to 8 GPUs: nothing here is measured on several.

A kernel takes its bytes over the memory bandwidth, but at least a fixed time; a collective takes a published latency by
size and ranks. A step is the sum over kernels that wait for one another. `--measured FILE` takes bandwidth
and the fixed time from a stages file of `make gpu-check`, so that the one-GPU precise step is the measured one.
`docs/results.md` states the assumptions and discusses the tables that this prints.
"""

import argparse
import json
from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig

from vllm_easyspec.bench.results import write
from vllm_easyspec.drafter.architectures import DrafterShape
from vllm_easyspec.drafter.placement import MlpPlacement, choose_mlp
from vllm_easyspec.drafter.plan import SCOPES, DraftPlan

SHAPES = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "hf_configs"
DRAFTERS = (
    "Llama-3.2-1B-Instruct",
    "Llama-3.1-8B-Instruct",
    "Qwen2.5-0.5B-Instruct",
    "Qwen2.5-1.5B-Instruct",
    "Qwen2.5-7B-Instruct",
    "Qwen3-0.6B",
    "Qwen3-1.7B",
)
ITEM = 2  # bytes of a weight, bfloat16
DRAFTS = 5

# Kernels that wait for one another, in addition to the two matrix products of a sublayer.
ATTENTION_KERNELS = 3  # norm; RoPE with the cache write; attention
MLP_KERNELS = 2  # norm; SwiGLU
GATHER_KERNELS = 2  # zeros for the attentions' collective, and copying a rank's own part into them

# sgl-project/sglang pull request 2904, H100, its custom all-reduce: microseconds by bytes, for 2, 4 and 8 GPUs.
ALL_REDUCE_BYTES = (512, 4096, 32768, 262144, 524288, 1048576)
ALL_REDUCE_US = {
    2: (3.7, 3.9, 4.5, 7.9, 12.5, 19.9),
    4: (4.8, 3.7, 4.8, 13.9, 20.2, 31.1),
    8: (5.9, 5.7, 7.8, 16.7, 22.1, 33.8),
}


@dataclass(frozen=True)
class Hardware:
    bandwidth: float  # bytes per second that a matrix product reads from memory
    kernel_us: float  # the shortest kernel that waits for the one before it, inside a CUDA graph
    tensor_flops: float  # of a long prompt's matrix products, in 16 bits
    link: float  # bytes per second of a large all-reduce, its input's bytes over its time


# NVIDIA's data sheets: 4.8 TB/s (H200), 989 TFLOP/s dense in bfloat16, NVLink 450 GB/s per direction. Assumed: 80% of
# the bandwidth and half of the arithmetic are reached, a large all-reduce at half of a direction's bandwidth, 2.5 us.
H200 = Hardware(bandwidth=0.8 * 4.8e12, kernel_us=2.5, tensor_flops=0.5 * 989e12, link=0.5 * 450e9)


def all_reduce_us(size: float, ranks: int, hardware: Hardware) -> float:
    """Linear between the table's sizes; below them the first value, above them by the link's bandwidth."""
    if ranks == 1:
        return 0.0
    sizes, times = ALL_REDUCE_BYTES, ALL_REDUCE_US[ranks]
    if size <= sizes[0]:
        return times[0]
    if size > sizes[-1]:
        return times[-1] + 1e6 * (size - sizes[-1]) / hardware.link
    above = bisect_left(sizes, size)
    share = (size - sizes[above - 1]) / (sizes[above] - sizes[above - 1])
    return times[above - 1] + share * (times[above] - times[above - 1])


@dataclass(frozen=True)
class Model:
    """One drafter on `ranks` GPUs, `batch` requests of `context` tokens, a token each."""

    shape: DrafterShape
    ranks: int
    batch: int
    context: int
    hardware: Hardware
    mlp: MlpPlacement

    def kernel(self, size: float) -> float:
        """Microseconds of a kernel that reads `size` bytes."""
        return max(self.hardware.kernel_us, 1e6 * size / self.hardware.bandwidth)

    def reduce(self, numbers: float) -> float:
        return all_reduce_us(ITEM * numbers, self.ranks, self.hardware)

    def attention(self, group: int) -> float:
        """`group` consecutive layers: the busiest rank has ceil(group / ranks) of them, whole."""
        layers = -(-group // self.ranks)
        fixed = (ATTENTION_KERNELS - 1 + (GATHER_KERNELS if self.ranks > 1 else 0)) * self.hardware.kernel_us
        return fixed + self._attention(layers) + self.reduce(group * self.batch * self.shape.hidden_size)

    def _attention(self, layers: float) -> float:
        """Products and paged attention of `layers` layers on one rank; a fraction is a layer cut by heads."""
        shape = self.shape
        qkv = shape.hidden_size * (shape.q_size + 2 * shape.kv_size)
        keys = self.batch * self.context * 2 * shape.kv_size
        parts = (qkv, keys, shape.q_size * shape.hidden_size)
        return sum(self.kernel(ITEM * layers * numbers) for numbers in parts)

    def mlps(self, layers: int) -> float:
        """`layers` MLPs side by side."""
        shape, tensor = self.shape, self.mlp is MlpPlacement.TENSOR
        numbers = layers * shape.hidden_size * shape.intermediate_size / (self.ranks if tensor else 1)
        products = self.kernel(ITEM * 2 * numbers) + self.kernel(ITEM * numbers)
        reduced = self.reduce(self.batch * shape.hidden_size) if tensor else 0.0
        return MLP_KERNELS * self.hardware.kernel_us + products + reduced

    def ends(self) -> float:
        """Embedding (with its all-reduce), last norm, LM head, arg-max over shards (with a small all-reduce)."""
        shape = self.shape
        head = self.kernel(ITEM * shape.vocab_size * shape.hidden_size / self.ranks)
        return 3 * self.hardware.kernel_us + head + self.reduce(self.batch * shape.hidden_size) + self.reduce(1)

    def step(self, plan: DraftPlan) -> float:
        """Microseconds of one step under a plan."""
        total = self.ends()
        for group in plan.groups:
            whole = plan.scope == "block"
            total += self.attention(len(group)) + (self.mlps(len(group)) if whole else len(group) * self.mlps(1))
        return total

    def tensor_parallel_step(self) -> float | None:
        """A sequential step with every layer cut by heads, from CUDA graphs; None if the heads can't be cut.

        K/V heads are replicated if there are fewer of them than ranks.
        """
        shape = self.shape
        if shape.num_heads % self.ranks or (shape.num_kv_heads % self.ranks and self.ranks % shape.num_kv_heads):
            return None
        fixed = (ATTENTION_KERNELS - 1) * self.hardware.kernel_us
        layer = fixed + self._attention(1 / self.ranks) + self.reduce(self.batch * shape.hidden_size)
        return self.ends() + shape.num_layers * (layer + replace(self, mlp=MlpPlacement.TENSOR).mlps(1))


def make(shape: DrafterShape, ranks: int, batch: int, context: int, hardware: Hardware) -> Model:
    """With MLPs placed as by `mlp: auto`."""
    return Model(shape, ranks, batch, context, hardware, choose_mlp("auto", shape, ranks, ITEM, "cuda"))


def prompt_ms(model: Model, tokens: int) -> tuple[float, float]:
    """Milliseconds that arithmetic and large all-reduces of a prompt take: ours, and cut by heads.

    A layer's attention is on one rank, and the next layer waits for it; everything else is cut alike.
    """
    shape, ranks, hardware = model.shape, model.ranks, model.hardware
    products = 2 * tokens * shape.hidden_size * (2 * shape.q_size + 2 * shape.kv_size)
    scores = 2 * tokens * tokens * shape.q_size  # causal: half of q k^T, and half of its product with v
    attention = (products + scores) / hardware.tensor_flops
    mlp = 6 * tokens * shape.hidden_size * shape.intermediate_size / hardware.tensor_flops
    reduced = 2 * all_reduce_us(ITEM * tokens * shape.hidden_size, ranks, hardware) / 1e6
    own_mlp = mlp if model.mlp is MlpPlacement.REPLICATE else mlp / ranks
    own_reduced = reduced / 2 if model.mlp is MlpPlacement.REPLICATE else reduced
    ours = shape.num_layers * (attention + own_mlp + own_reduced)
    cut = shape.num_layers * ((attention + mlp) / ranks + reduced)
    return 1e3 * ours, 1e3 * cut


def fitted(hardware: Hardware, shape: DrafterShape, row: dict) -> Hardware:
    """Bandwidth as measured, and the fixed time at which the model's one-GPU precise step is the measured one.

    row: of the arm `precise` of a stages file. Raises ValueError where bytes alone would take longer.
    """
    low, high = 0.0, 100.0
    hardware = replace(hardware, bandwidth=1e12 * row["bandwidth_tb_s"])
    plan = DraftPlan.precise(shape.num_layers)
    for _ in range(60):
        middle = (low + high) / 2
        step = make(shape, 1, row["batch"], 256, replace(hardware, kernel_us=middle)).step(plan)
        low, high = (middle, high) if step < 1e3 * row["step_ms"] else (low, middle)
    if high < 1e-6:
        raise ValueError(f"a precise step of {row['step_ms']} ms is shorter than its bytes take; measure again")
    return replace(hardware, kernel_us=high)


def read_shape(name: str) -> DrafterShape:
    return DrafterShape.from_hf_config(AutoConfig.from_pretrained(SHAPES / name))


def rows(hardware: Hardware, batches: tuple[int, ...], context: int) -> list[dict]:
    found = []
    for drafter in DRAFTERS:
        shape = read_shape(drafter)
        plans = {"precise": DraftPlan.precise(shape.num_layers)}
        plans |= {scope: DraftPlan.grouped(shape.num_layers, 4, 1, 1, scope) for scope in SCOPES}
        for ranks in (1, 2, 4, 8):
            for batch in batches:
                model = make(shape, ranks, batch, context, hardware)
                times = {"tensor parallel": model.tensor_parallel_step()}
                times |= {name: model.step(plan) for name, plan in plans.items()}
                found.append({"drafter": drafter, "ranks": ranks, "batch": batch, "mlp": model.mlp.value} | times)
    return found


def stage(times: dict, arm: str) -> float:
    """A round's drafting: a precise pass, which reads the same weights as a step, then K-1 steps of the arm."""
    first = times["tensor parallel"] if arm == "tensor parallel" else times["precise"]
    return first + (DRAFTS - 1) * times[arm]


ARMS = ("tensor parallel", "precise", "attention", "block")


def print_steps(found: list[dict]) -> None:
    print("| drafter | ranks | batch | MLPs | " + " | ".join(ARMS) + " | shortest stage, against tensor parallel |")
    print("|---|---|---|---|" + "---|" * (len(ARMS) + 1))
    for row in found:
        times = " | ".join("-" if row[arm] is None else f"{row[arm]:.0f}" for arm in ARMS)
        stages = {arm: stage(row, arm) for arm in ARMS if row[arm] is not None}
        best = min(stages, key=lambda arm: stages[arm])
        against = f" {stages['tensor parallel'] / stages[best]:.2f}" if "tensor parallel" in stages else ""
        print(f"| {row['drafter']} | {row['ranks']} | {row['batch']} | {row['mlp']} | {times} | {best}{against} |")


def print_prompts(hardware: Hardware, tokens: int) -> None:
    print(f"\n| drafter | ranks | ours, ms for {tokens} tokens | cut by heads, ms |")
    print("|---|---|---|---|")
    for name in DRAFTERS:
        for ranks in (1, 2, 4, 8):
            model = make(read_shape(name), ranks, 1, tokens, hardware)
            ours, cut = prompt_ms(model, tokens)
            print(f"| {name} | {ranks} | {ours:.1f} | {cut:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, metavar="FILE", help="benchmarks/results/gpu-stages-DRAFTER.json")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=4000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    hardware = H200
    if args.measured:
        measured = json.loads(args.measured.read_text())["rows"]
        row = next(row for row in measured if row["arm"] == "precise" and row["batch"] == 1)
        hardware = fitted(H200, read_shape(row["drafter"]), row)
    found = rows(hardware, tuple(args.batch), args.context)
    print(f"microseconds per step; {hardware}\n")
    print_steps(found)
    print_prompts(hardware, args.prompt)
    write(args.json, {"hardware": vars(hardware), "rows": found})


if __name__ == "__main__":
    main()
