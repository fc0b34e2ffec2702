"""What `make test` runs at the same time: groups for pytest-xdist, each of which one worker runs in order."""

from pathlib import PurePath

import pytest

# Of tests/e2e. They start ranks on all cores, so they come one after the other: ranks that share a core with others
# wait for one another.
SEVERAL_RANKS = {f"test_{name}.py" for name in ("lookahead_engine", "lossless", "plan_table", "platforms", "serve")}


def group(nodeid: str) -> str:
    path = PurePath(nodeid.split("::")[0])
    if path.parent.name != "e2e":
        return str(path)  # for the fixtures of its module
    return "several ranks" if path.name in SEVERAL_RANKS else "one rank"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return ByGroup(config, log)
