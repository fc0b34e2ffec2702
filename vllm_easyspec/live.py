"""Says from a running server's `/metrics` whether speculation pays there. Imports neither vLLM nor torch."""

import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPException
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from vllm_easyspec.errors import CommandError, shown

TIMEOUT = 10.0  # seconds
LEAST_ROUNDS = 100  # for a verdict
LEAST_ACCEPTED = 0.3  # share of first drafts; with fewer the pair is suspect
MOST_DRAFTING = 1 / 3  # share of a round's time before the target verifies
LEAST_GAIN = 1.02  # tokens per second with a smaller K over those with the present one
NOTABLE = 0.05  # share of rounds that are eager or paused


def diagnose_live(url: str) -> list[str]:
    """The lines of the report. Raises `CommandError` for a server that can't be read or has too little to judge by.

    url: of vLLM's API server, http or https, with or without `/metrics`.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise CommandError(f"--live {shown(url)} is not an HTTP address. Give one such as http://localhost:8000")
    url = url.rstrip("/").removesuffix("/metrics") + "/metrics"
    return list(LiveRounds(url, _samples(url)).report())


def _samples(url: str) -> list[Sample]:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            status, text = response.status, str(response.read(), "utf-8", errors="replace")
    except urllib.error.HTTPError as error:
        status = error.code
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise CommandError(f"{url} can't be read: {reason}. Check host and port, and that the server runs") from error
    if status != 200:
        raise CommandError(f"{url} answers with HTTP status {status}, not 200. Give the address of vLLM's API server")
    try:
        found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except (ValueError, IndexError):  # a page of another kind
        found = []
    for prefix, what, remedy in [
        ("vllm:", "vLLM", "Give the address of vLLM's API server, and start it without --disable-log-stats"),
        ("vllm:easyspec_", "easyspec", "Start the server with a --speculative-config of method: easyspec"),
    ]:
        if not any(sample.name.startswith(prefix) for sample in found):
            raise CommandError(f"{url} has no metrics of {what}. {remedy}")
    return found


class LiveRounds:
    """What a server's rounds did since it started, all engines together. Times are in seconds."""

    def __init__(self, url: str, samples: list[Sample]):
        self.samples = samples
        by_plan = self._by("easyspec_rounds_total", "plan", "scope", "num_speculative_tokens")
        self.by_plan = Counter({key: count for key, count in by_plan.items() if key[2] != "0"})
        self.rounds, self.paused = self.by_plan.total(), self._total("easyspec_paused_rounds_total")
        tested = self._total("spec_decode_num_drafts_total")  # once per request and round
        times, sums = (self._by(f"easyspec_stage_seconds_{part}", "stage") for part in ("count", "sum"))
        stages = ("calibrate", "draft", "verify")
        least = min(self.rounds, tested, *(times[stage,] for stage in stages))
        if least < LEAST_ROUNDS:
            raise CommandError(
                f"{url} has counted {least:.0f} rounds with drafts and {self.paused:.0f} paused ones, too few for a "
                f"verdict. Send it requests until {LEAST_ROUNDS} have drafts"
            )
        self.seconds = {stage: sums[stage,] / times[stage,] for stage in stages}  # means
        self.round = sum(self.seconds.values())
        self.tokens = 1 + self._total("spec_decode_num_accepted_tokens_total") / tested  # the target's own included
        positions = self._by("spec_decode_num_accepted_tokens_per_pos_total", "position")
        self.acceptance = [positions[str(index),] / tested for index in range(len(positions))]
        (self.plan, self.scope, num_drafts), self.usual = self.by_plan.most_common(1)[0]
        self.num_drafts = int(num_drafts)

    def _by(self, name: str, *labels: str) -> Counter[tuple[str, ...]]:
        """Values of a series by some of its labels, summed over the others, such as the engine."""
        sums: Counter[tuple[str, ...]] = Counter()
        for sample in self.samples:
            if sample.name == f"vllm:{name}":
                sums[tuple(sample.labels[label] for label in labels)] += sample.value  # type: ignore[assignment]
        return sums

    def _total(self, name: str) -> float:
        return self._by(name)[()]

    def report(self) -> Iterator[str]:
        """A step without speculation takes at most the time of a verification, which bounds the gain from above."""
        most = self.tokens * self.seconds["verify"] / self.round
        verdict = "can save time: at best" if most > 1 else "costs time: at best"
        yield (
            f"verdict     speculation {verdict} {most:.2f} times as fast as without, with {self.tokens:.2f} tokens per "
            f"round, which takes {self.round / self.seconds['verify']:.2f} times its verification"
        )
        if most > 1:
            yield "            (less, if verifying K + 1 tokens takes longer than a step without speculation)"
        yield (
            f"rounds      {self.rounds:,.0f} with drafts since the start, {self.usual / self.rounds:.0%} of them with "
            f"plan {self.plan}, scope {self.scope}, K={self.num_drafts}; {self.paused:,.0f} paused"
        )
        yield f"acceptance  by position: {', '.join(f'{share:.0%}' for share in self.acceptance)}"
        shares = ", ".join(f"{stage} {seconds / self.round:.0%}" for stage, seconds in self.seconds.items())
        yield f"time        {1e3 * self.round:.1f} ms per round: {shares}"
        remedies = list(self._remedies())
        if most <= 1:
            remedies.append("until that helps, serve without --speculative-config")
        yield from (f"change      {remedy}" for remedy in remedies or ["nothing stands out"])

    def _remedies(self) -> Iterator[str]:
        warnings, first = self._total("easyspec_low_acceptance_total"), sum(self.acceptance[:1])
        if warnings or first < LEAST_ACCEPTED:
            warned = f" (the server's warnings: {warnings:.0f})" if warnings else ""
            yield f"{first:.0%} of first drafts are accepted{warned}: run vllm-easyspec doctor CONFIG --model TARGET"
        best = self._best_num_drafts()
        if best < self.num_drafts:
            yield f"later drafts take more time than they save: set num_speculative_tokens to about {best}"
        if 1 - self.seconds["verify"] / self.round > MOST_DRAFTING:
            yield (
                "drafting takes much of a round: vllm-easyspec tune finds a plan with more layers side by side; "
                "draft_vocabulary and, on a CPU, quantization make the drafter faster"
            )
        eager = self._total("easyspec_eager_rounds_total")
        if eager > NOTABLE * self.rounds:
            graphs = self._total("easyspec_graph_replays_total")
            where = (
                "the log names what has no graph"
                if graphs
                else "on a GPU, serve without --enforce-eager; on a CPU there are none"
            )
            yield f"{eager:,.0f} rounds drafted without a CUDA graph: {where}"
        if self.paused > NOTABLE * (self.rounds + self.paused):
            yield "K by batch size pauses many rounds: if these batches should draft, give them a K above 0"

    def _best_num_drafts(self) -> int:
        """The K up to the present one with the most tokens per second, if draft time is in proportion to K.

        A verification is taken to cost the same for every K, which favours large ones. Where K varies it is kept,
        since times are not counted by K.
        """
        if len({key[2] for key in self.by_plan}) > 1:
            return self.num_drafts
        each = self.seconds["draft"] / self.num_drafts
        fixed = self.round - self.seconds["draft"]
        speeds = {k: (1 + sum(self.acceptance[:k])) / (fixed + k * each) for k in range(1, self.num_drafts + 1)}
        best = max(speeds, key=lambda k: speeds[k])
        return best if speeds[best] > LEAST_GAIN * speeds[self.num_drafts] else self.num_drafts
