"""The documentation: links resolve, files that it names exist, and the README stays on one page."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "examples" / "tiny-pair" / "README.md"]
FOLDERS = "tests|benchmarks|tools|vllm_easyspec|configs|examples|cpu|docs|csrc"

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_resolve(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not path.startswith("http") and not (target.exists() and (not anchor or anchor in anchors(target))):
            broken.append(link)
    assert not broken


@pages
def test_named_files_exist(page):
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", page.read_text())
    placeholders = ("NAME", "PART")
    missing = [path for path in named if not (ROOT / path).exists() and not any(part in path for part in placeholders)]
    assert not missing


def test_modules_are_in_the_architecture():
    text = (ROOT / "docs" / "architecture.md").read_text()
    folders = [ROOT / "vllm_easyspec", ROOT / "vllm_easyspec" / "drafter"]
    modules = [path.name for folder in folders for path in folder.glob("*.py") if path.stem != "__init__"]
    assert not [name for name in modules if f"`{name}`" not in text and f"/{name}`" not in text]


def test_result_files_and_results_name_each_other():
    text = (ROOT / "docs" / "results.md").read_text()
    listed = subprocess.run(
        ["git", "ls-files", "benchmarks/results"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    kept = {Path(path).name for path in listed.stdout.split()}
    named = set(re.findall(r"`([\w-]+\.json)`|results/([\w-]+\.json)", text))
    assert {one or other for one, other in named} == kept


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
