"""Ending a round's drafts early for the whole batch: what the drafter's confidence could save, in simulation.

Every position of held-out text drafts up to 8 tokens with the tiny pair's look-ahead maps (`lookahead_simulation.py`),
each draft with the probability that the drafter gives it. Rounds then follow one another through the text, `batch`
requests side by side: after each draft the batch goes on as long as the likeliest of its requests to be right so far
(the product of its drafts' probabilities) is above a threshold. A round takes `calibrate + (drafts - 1) * step +
verify`, medians that `tune` measured on two CPU cores (benchmarks/results/tune-cpu.json). Verify is that of the most
drafts allowed, since a worker can't tell vLLM's scheduler to test fewer; the last column has what testing just the
drafts made would give. Compared with fixed K.
"""

import argparse
import json

import numpy as np
import torch
from lookahead_simulation import NEW, PROMPT, Dense, Maps, Rows, Variant
from rounds import PAIR, ROOT, held_out_ids
from safetensors.torch import load_file

from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.lookahead import KINDS, PARTS, LookaheadFile

MOST = 8
THRESHOLDS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)


def file_maps(path: str) -> Maps:
    """The maps of a file, multiplied out."""
    file, tensors = LookaheadFile.read(path), load_file(path)
    maps: Maps = {}
    for kind in KINDS:
        for g, last in file.reach.items():
            down, up, bias = (tensors[f"{kind}.{g}.{part}"].float() for part in PARTS)
            for number, i in enumerate(range(g + 1, last + 1)):
                maps[kind, g, i] = (down[number] @ up[number], bias[number])
    return maps


def rounds(leading: np.ndarray, confidence: np.ndarray, batch: int, ends) -> tuple[float, np.ndarray]:
    """leading: `[sequences, rows]`, drafts that the text confirms; confidence: `[sequences, rows, MOST]`, of each draft
    and all before it. Mean tokens a round of a request, and the drafts of every round.
    """
    tokens, drafts = 0, []
    for first in range(0, len(leading) - batch + 1, batch):
        rows = np.zeros(batch, dtype=int)
        own = np.arange(first, first + batch)
        while rows.max() < leading.shape[1]:
            count = ends(confidence[own, rows])
            gained = 1 + np.minimum(leading[own, rows], count)
            tokens += gained.sum()
            drafts.append(count)
            rows += gained
    return tokens / (batch * len(drafts)), np.array(drafts)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args()
    target, drafter = Dense(PAIR / "target"), Dense(PAIR / "drafter")
    prompts = torch.tensor(held_out_ids(args.prompts, PROMPT))
    written = target.write(prompts, NEW + MOST + 1)
    rows = Rows(drafter, written[:, : PROMPT + NEW], torch.arange(PROMPT, PROMPT + NEW))
    plan, variant = DraftPlan((1, 8, 1)), Variant("", previous=True, bent=True)
    maps = file_maps(str(PAIR / "lookahead.safetensors"))
    tokens, seen = rows.drafts(plan, "block", variant, maps, MOST)
    states = [rows.states.inputs[-1][:, rows.newest], *(states.inputs[-1] for states, _ in seen)]
    logits = torch.stack([drafter.final(x) @ drafter.embedding.T for x in states], dim=2)
    confidence = logits.softmax(-1).amax(-1).cumprod(-1).numpy()
    wanted = torch.stack([written[:, PROMPT + 1 + j : PROMPT + 1 + j + NEW] for j in range(MOST)], dim=-1)
    leading = (tokens == wanted).long().cumprod(-1).sum(-1).numpy()

    measured = {
        t["batch_size"]: t for t in json.loads((ROOT / "benchmarks/results/tune-cpu.json").read_text())["times"]
    }
    print("| batch | drafts end | tokens a round | drafts a round | tokens/s | tokens/s, tested as many |")
    print("|---|---|---|---|---|---|")
    for batch in args.batch:
        times = measured[batch]
        step = next(s["step_ms"] for s in times["steps"] if (s["scope"], s["group_sizes"]) == ("block", [1, 8, 1]))

        def stage(which: str, k, times=times) -> np.ndarray:
            known = sorted(times[which], key=int)
            return np.interp(k, list(map(int, known)), [times[which][key] for key in known])

        def show(name: str, ends, most: int, batch=batch, step=step, stage=stage) -> None:
            gained, drafts = rounds(leading, confidence, batch, ends)
            common = (stage("calibrate_ms", drafts) + (drafts - 1) * step).mean()
            rates = [1e3 * batch * gained / (common + stage("verify_ms", k).mean()) for k in (most, drafts)]
            print(f"| {batch} | {name} | {gained:.2f} | {drafts.mean():.2f} | {rates[0]:.0f} | {rates[1]:.0f} |")

        for k in range(1, MOST + 1):
            show(f"after {k}", lambda confidence, k=k: k, k)
        for most in (5, MOST):
            for threshold in THRESHOLDS:

                def ends(confidence: np.ndarray, threshold=threshold, most=most) -> int:
                    # The first draft comes with the calibration; another is worth it while someone may need it.
                    return 1 + int((confidence.max(0)[: most - 1] > threshold).cumprod().sum())

                show(f"below {threshold}, at most {most}", ends, most)


if __name__ == "__main__":
    main()
