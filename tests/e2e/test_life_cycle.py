"""What happens to engines that serve for long, as in reinforcement learning or a fleet: data parallelism, pauses.
Answers stay the target's, and pages precise."""

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from engines import AUDIT_LIMIT, ENGINE, TARGET, easyspec, greedy, mixed_prompts, prompts_near_the_end
from prometheus_client import REGISTRY
from vllm import AsyncEngineArgs
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


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    arguments = AsyncEngineArgs(
        model=str(TARGET),
        speculative_config=easyspec(num_speculative_tokens=5),
        data_parallel_size=RANKS,
        data_parallel_size_local=RANKS,
        **ENGINE,
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
    running = serving.ask(mixed_prompts(), 60)
    serving.after_rounds(4)
    assert serving.run(serving.llm.reset_prefix_cache(reset_running_requests=True))
    serving.after_rounds(2)
    serving.pause("keep", clear_cache=False)
    assert_precise(serving.audit())
    serving.resume()
    assert serving.answers(running) == target_alone[60]


def test_metrics_tell_the_engines_apart(serving):
    samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
    rounds = [sample for sample in samples if sample.name == "vllm:easyspec_rounds_total"]
    for engine in range(RANKS):
        assert sum(sample.value for sample in rounds if sample.labels["engine"] == str(engine)) > 0
