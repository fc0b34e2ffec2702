"""The report of a tuning run in a real browser: it draws, and neither fetches nor runs anything."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from tune_findings import ABOUT, PLANS, SIZES, findings

from vllm_easyspec.tune.report import html_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr"
).split()


def browse(page: Path, *flags: str) -> tuple[str, list[str]]:
    """The page as the browser built it, and its console."""
    profile = page.parent / "profile"
    done = subprocess.run(
        [str(BROWSER), *FLAGS, f"--user-data-dir={profile}", *flags, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def assert_whole(page: str) -> None:
    """It has its plots, and refers to nothing outside."""
    assert page.count("<svg") == 3, "plans, stages of a round, engines"
    assert page.count("<use ") > (1 + len(SIZES)) * len(PLANS)
    assert "<script" not in page and not re.search(r"(src|href)=\"[^#]|url\([^#]|@import", page)


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the path")
class TestInABrowser:
    def test_report(self, tmp_path):
        page = tmp_path / "report.html"
        page.write_text(html_report(findings(), ABOUT, "method: easyspec\n"))
        built, console = browse(page)
        assert console == []
        assert_whole(built)

    def test_a_page_that_fetches_and_fails_is_told_apart(self, tmp_path):
        """The check above can fail: failing scripts and forbidden images appear on the console."""
        page = tmp_path / "broken.html"
        page.write_text("<script>nothing.here()</script>")
        assert "nothing is not defined" in browse(page)[1][0]
        page.write_text(html_report(findings(), ABOUT, "").replace("</body>", '<img src="picture.png"></body>'))
        assert "Content Security Policy" in browse(page)[1][0]


def test_it_draws_and_refers_to_nothing_outside():
    assert_whole(html_report(findings(), ABOUT, "method: easyspec\n"))


def test_text_is_escaped():
    text = html_report(findings(), ABOUT | {"target": "<script>"}, "a: <b> & c")
    assert "&lt;script&gt;" in text and "a &lt;CPU&gt;" in text and "a: &lt;b&gt; &amp; c" in text


def test_what_was_cut_is_said():
    found = findings()
    del found.confirmed[16]
    found.baselines.clear()
    found.unfinished += ["confirm: time for 2 of 3 only", "compare: interrupted"]
    text = html_report(found, ABOUT, "")
    assert "Not finished: confirm: time for 2 of 3 only; compare: interrupted." in text
    assert "Compared with" not in text
