"""What happens to engines that serve for long, as in reinforcement learning or a fleet: data parallelism, pauses, new
weights for the drafter. Answers stay the target's, pages precise, and drafts are accepted as before."""

import asyncio
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import file_transfer
import pytest
import tiny_targets
import torch
from engines import AUDIT_LIMIT, DRAFTER, ENGINE, TARGET, easyspec, greedy, mixed_prompts, prompts_near_the_end
from prometheus_client import REGISTRY
from transformers import AutoModelForCausalLM
from vllm import AsyncEngineArgs
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.v1.engine.async_llm import AsyncLLM

pytestmark = pytest.mark.engine
RANKS = 2


class Serving:
    """Two data-parallel engines behind one client, and a loop for calls to it."""

    def __init__(self, llm: AsyncLLM, loop: asyncio.AbstractEventLoop):
        self.llm, self.loop = llm, loop
        self.asked = 0

    def run(self, work: Coroutine) -> Any:
        return self.loop.run_until_complete(work)

    def rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Each engine's reply, that of its only rank."""
        return [reply for (reply,) in self.run(self.rpc_async(method, *args, **kwargs))]

    async def rpc_async(self, method: str, *args: Any, **kwargs: Any) -> list[list[Any]]:
        return await self.llm.engine_core.call_utility_all_async("collective_rpc", method, None, args, kwargs)

    def audit(self) -> list[dict]:
        return [request for engine in self.rpc("easyspec_audit") for request in engine]

    def ask(self, prompts: list[Any], tokens: int, rank: int | None = None) -> list[asyncio.Task]:
        """Requests that are on their way, by default every other one to the same engine."""
        requests = []
        for index, prompt in enumerate(prompts):
            name, self.asked = f"request-{self.asked}", self.asked + 1
            work = self._answer(prompt, tokens, name, index % RANKS if rank is None else rank)
            requests.append(self.loop.create_task(work, name=name))
        return requests

    async def _answer(self, prompt: Any, tokens: int, name: str, rank: int) -> list[int]:
        latest: list[int] = []
        async for output in self.llm.generate(prompt, greedy(tokens), name, data_parallel_rank=rank):
            latest = list(output.outputs[0].token_ids)
        return latest

    def answers(self, requests: list[asyncio.Task]) -> list[list[int]]:
        return self.run(asyncio.wait_for(asyncio.gather(*requests), 200))

    def after_rounds(self, rounds: int) -> None:
        """Let every engine go on for some rounds."""

        async def done() -> list[int]:
            return [reply["rounds"] for (reply,) in await self.rpc_async("easyspec_stats")]

        async def wait() -> None:
            before = await done()
            while any(now < first + rounds for now, first in zip(await done(), before, strict=True)):
                await asyncio.sleep(0.01)

        self.run(asyncio.wait_for(wait(), 100))

    def pause(self, mode: str, clear_cache: bool = True) -> None:
        self.run(asyncio.wait_for(self.llm.pause_generation(mode=mode, clear_cache=clear_cache), 200))

    def resume(self) -> None:
        self.run(self.llm.resume_generation())

    def accepted(self, prompts: list[Any]) -> list[int]:
        """How many drafts of each position are accepted in answers of 40 tokens, one request after the other."""
        self.rpc("easyspec_stats", reset=True)
        for prompt in prompts:
            self.answers(self.ask([prompt], 40, rank=0))
        counted = self.rpc("easyspec_stats", reset=True)[0]
        assert counted["verified"] > 0
        return counted["accepted_at"]


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    arguments = AsyncEngineArgs(
        model=str(TARGET),
        speculative_config=easyspec(num_speculative_tokens=5),
        data_parallel_size=RANKS,
        data_parallel_size_local=RANKS,
        weight_transfer_config={"backend": file_transfer.BACKEND},
        worker_extension_cls=f"{file_transfer.__name__}.{file_transfer.Extension.__name__}",
        **ENGINE | {"max_num_batched_tokens": 512},  # so much of an old prefix is read again in one round
    )
    loop = asyncio.new_event_loop()

    async def start() -> AsyncLLM:
        return AsyncLLM.from_engine_args(arguments)

    llm = loop.run_until_complete(start())
    try:
        yield Serving(llm, loop)
    finally:
        llm.shutdown()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()


@pytest.fixture(scope="module")
def nudged(tmp_path_factory) -> dict[Path, Path]:
    """Target and drafter after another step of training."""
    folder = tmp_path_factory.mktemp("nudged")
    return {TARGET: tiny_targets.nudged(folder / "target"), DRAFTER: tiny_targets.nudged(folder / "drafter", DRAFTER)}


def assert_precise(pages: list[dict]) -> None:
    assert pages and max(request["tokens"] for request in pages) > 32
    assert max(request["largest_difference"] for request in pages) < AUDIT_LIMIT


def test_every_engine_answers_as_the_target(serving, target_alone):
    prompts = mixed_prompts()
    both = [serving.ask(prompts, 40, rank) for rank in range(RANKS)]
    serving.after_rounds(4)
    serving.pause("keep", clear_cache=False)
    assert_precise(serving.audit())
    serving.resume()
    for requests in both:
        assert serving.answers(requests) == target_alone[40]
    for counted in serving.rpc("easyspec_stats"):
        assert counted["accepted_at"][0] > 0.3 * counted["verified"] > 0


def test_end_of_the_context(serving, target_alone):
    prompts = prompts_near_the_end(serving.llm)
    both = [serving.ask(prompts, 60, rank) for rank in range(RANKS)]
    for requests in both:
        assert serving.answers(requests) == target_alone["length"]


@pytest.mark.parametrize("clear_cache", [False, True], ids=["cache-kept", "cache-cleared"])
@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_pause_and_resume(serving, target_alone, mode, clear_cache):
    """Requests that come while it is paused wait; of those that are kept, some are aborted and some abandoned."""
    prompts = mixed_prompts()
    running = serving.ask(prompts, 60)
    serving.after_rounds(4)
    serving.pause(mode, clear_cache)
    assert serving.run(serving.llm.is_paused())
    late = serving.ask(prompts, 40)
    aborted, abandoned = (running[1::4], running[2::4]) if mode == "keep" else ([], [])
    if mode == "keep":
        if not clear_cache:
            assert_precise(serving.audit())
        serving.run(serving.llm.abort([request.get_name() for request in aborted]))
        for request in abandoned:
            request.cancel()
    serving.resume()
    for request, expected in zip(running, target_alone[60], strict=True):
        if request not in abandoned:
            (answer,) = serving.answers([request])
            assert answer == expected[: len(answer)]
            assert len(answer) == 60 or request in aborted or mode == "abort"
    assert serving.answers(late) == target_alone[40]


def test_reset_prefix_cache(serving, target_alone):
    """Also under running requests, which begin again."""
    running = serving.ask(mixed_prompts(), 180)
    serving.after_rounds(4)
    assert serving.run(serving.llm.reset_prefix_cache(reset_running_requests=True))
    serving.after_rounds(2)
    serving.pause("keep", clear_cache=False)
    assert_precise(serving.audit())
    serving.resume()
    assert serving.answers(running) == target_alone[180]


def transfer(serving: Serving, folder: Path, draft: bool) -> None:
    serving.run(serving.llm.start_draft_weight_update() if draft else serving.llm.start_weight_update())
    for chunk in file_transfer.chunks(folder):
        serving.run(serving.llm.update_weights(WeightTransferUpdateRequest(update_info=chunk)))
    serving.run(serving.llm.finish_weight_update())


def test_new_weights_for_the_drafter(serving, target_alone, nudged):
    """Requests go on with it, and prefix caching brings back pages that the old weights wrote."""
    prompts = mixed_prompts()
    others = prompts[1::2]  # which the first engine has not among `running`
    serving.run(serving.llm.reset_prefix_cache())
    at_first = serving.accepted(others)
    running = serving.ask(prompts, 60)
    serving.after_rounds(4)
    serving.pause("keep", clear_cache=False)
    transfer(serving, nudged[DRAFTER], draft=True)
    assert not any(request["tokens"] for request in serving.audit()), "nothing that the old weights wrote is of use"
    serving.rpc("easyspec_stats", reset=True)
    serving.resume()
    serving.after_rounds(6)
    serving.pause("keep", clear_cache=False)
    assert_precise(serving.audit())
    serving.resume()
    assert serving.answers(running) == target_alone[60]
    assert all(counted["caught_up_tokens"] > 300 for counted in serving.rpc("easyspec_stats"))

    with_old_pages = serving.accepted(others)
    serving.run(serving.llm.reset_prefix_cache())
    assert with_old_pages == serving.accepted(others) != at_first
    serving.rpc("easyspec_reload_drafter")
    assert serving.accepted(others) == at_first


def test_weights_that_can_not_be_used(serving, target_alone, nudged):
    """The drafter keeps its own, and the engine goes on."""
    first = serving.accepted(mixed_prompts()[:4])
    serving.run(serving.llm.start_draft_weight_update())
    with pytest.raises(Exception, match="keeps its present weights: .* lacks .* tensors of a LlamaForCausalLM"):
        serving.run(serving.llm.finish_weight_update())
    with pytest.raises(Exception, match="keeps its present weights: .* has num_layers=6 in place of 10"):
        serving.rpc("easyspec_reload_drafter", str(TARGET))
    assert serving.accepted(mixed_prompts()[:4]) == first


@torch.inference_mode()
def assert_greedy(folder: Path, prompts: list[list[int]], answers: list[list[int]]) -> None:
    """The answers are the first choices of the model in `transformers`.

    vLLM's CPU build computes logits from a packed copy of the LM head, which stays as it was where it is tied.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.lm_head.weight = torch.nn.Parameter(tiny_targets.embeddings().float(), requires_grad=False)
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer


def test_new_weights_for_both(serving, target_alone, nudged):
    """As a trainer does it: pause, target, drafter, go on."""
    prompts = mixed_prompts()
    for folders in ((nudged[TARGET], nudged[DRAFTER]), (TARGET, DRAFTER)):
        serving.pause("abort")
        for folder, draft in zip(folders, (False, True), strict=True):
            transfer(serving, folder, draft)
        serving.resume()
        answers = serving.answers(serving.ask(prompts, 40))
        assert (answers == target_alone[40]) == (folders[0] == TARGET)
        ids = [serving.llm.get_tokenizer()(prompt)["input_ids"] for prompt in prompts]
        assert_greedy(folders[0], ids, answers)


def test_metrics_tell_the_engines_apart(serving):
    samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
    rounds = [sample for sample in samples if sample.name == "vllm:easyspec_rounds_total"]
    for engine in range(RANKS):
        assert sum(sample.value for sample in rounds if sample.labels["engine"] == str(engine)) > 0
