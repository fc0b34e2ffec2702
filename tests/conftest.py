"""What `make test` runs at the same time: groups for pytest-xdist, each of which one worker runs in order."""

import pytest

# Of tests/e2e. They start ranks on all cores, so they come one after the other: ranks that share a core with others
# wait for one another.
SEVERAL_RANKS = {f"test_{name}" for name in ("lookahead_engine", "lossless", "plan_table", "platforms", "serve")}


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        group = item.path.stem  # for the fixtures of its module
        if item.path.parent.name == "e2e":
            group = "several-ranks" if group in SEVERAL_RANKS else "one-rank"
        item.add_marker(pytest.mark.xdist_group(group))
