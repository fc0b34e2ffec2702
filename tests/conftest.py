"""How `make test` shares its work between two pytest-xdist workers.

Ranks wait for one another in loops that never sleep. Where they share their cores with equals, every collective takes
until the scheduler's next turn, and an engine of two ranks runs at a fraction of its speed. So one worker, `LEADER`,
runs everything that starts several ranks, and the other one runs the rest at a lower priority, on what the ranks leave.
"""

import os
from pathlib import PurePath

import pytest
import warm_start  # noqa: F401 - for all tests

LEADER = "gw0"
NICENESS = 10  # of the other workers: they get a tenth of a core that a rank wants too
SEVERAL_RANKS = {
    "e2e": ("lossless", "plan_table", "serve", "platforms", "lookahead_engine", "draft_vocabulary", "quantization"),
    "integration": (
        "check_ranks",
        "draft_loop",
        "draft_head",
        "drafter",
        "fidelity",
        "fit",
        "fuzzed_rounds",
        "lookahead_drafter",
        "new_weights",
        "ranks",
    ),
}


def starts_several_ranks(path: PurePath) -> bool:
    return path.name in {f"test_{name}.py" for name in SEVERAL_RANKS.get(path.parent.name, ())}


def group(nodeid: str) -> str:
    """The tests that one worker runs in order: those of a module, or all of those that share the target's answers."""
    path = PurePath(nodeid.split("::")[0])
    return "one rank" if path.parent.name == "e2e" and not starts_several_ranks(path) else str(path)


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER", LEADER) != LEADER:
        os.nice(NICENESS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByRanks(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

        def _assign_work_unit(self, node) -> None:
            """The leader begins with several ranks; other workers leave these to it, while there is one."""
            leads = node.gateway.id == LEADER or LEADER not in {other.gateway.id for other in self.nodes}
            scopes = sorted(self.workqueue, key=lambda scope: starts_several_ranks(PurePath(scope)) is not leads)
            if leads or not starts_several_ranks(PurePath(scopes[0])):
                self.workqueue.move_to_end(scopes[0], last=False)
                super()._assign_work_unit(node)
            else:
                node.shutdown()

    return ByRanks(config, log)
