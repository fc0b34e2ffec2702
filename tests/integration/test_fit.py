"""`vllm-easyspec fit` on the tiny drafter in real ranks: few tokens, but everything from text to file."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vllm_easyspec.errors import ConfigError
from vllm_easyspec.lookahead import LookaheadFile
from vllm_easyspec.ranks import RankError
from vllm_easyspec.tune.fit import BATCH, FitSettings, fit

DRAFTER = Path(__file__).parents[2] / "examples" / "tiny-pair" / "drafter"
SETTINGS = FitSettings(
    plans=((1, 4, 4, 1),), longest_group=2, tokens=2 * BATCH * 64, length=64, ridge=0.1, dtype="float32"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    sources = sorted(Path(json.__file__).parent.glob("*.py"))
    path.write_text("\n".join(json.dumps({"prompt": source.read_text()}) for source in sources))
    return path


@pytest.fixture(scope="module")
def fitted(text, tmp_path_factory):
    """From a rank count to the file and the report."""
    folder = tmp_path_factory.mktemp("maps")
    reports = {}
    for ranks in (1, 2):
        path = folder / f"{ranks}.safetensors"
        reports[ranks] = (path, fit(str(DRAFTER), [text], path, ranks, SETTINGS))
    return reports


@pytest.mark.engine
def test_the_file_serves_its_plans_and_says_how_it_was_made(fitted):
    path, report = fitted[1]
    file = LookaheadFile.read(str(path))
    assert file.reach == {1: 4, **{start: start + 1 for start in (2, 3, 4)}, 5: 8, 6: 7, 7: 8, 8: 9}
    assert file.metadata["settings"]["tokens"] == SETTINGS.tokens
    assert [text["name"] for text in file.metadata["text"]] == ["text.jsonl"]
    assert set(report["r2"]) == {
        f"{kind}.{g}.{i}"
        for kind in ("attention", "mlp")
        for g, last in file.reach.items()
        for i in range(g + 1, last + 1)
    }


@pytest.mark.engine
def test_maps_win_own_rate(fitted):
    """On held-out sequences. Block scope loses more, so few tokens are enough."""
    block = next(row for row in fitted[1][1]["own_rate"] if row["scope"] == "block")
    assert 0.2 < block["without"] < block["with"] < 1


@pytest.mark.engine
def test_two_ranks_find_what_one_finds(fitted):
    (one, report), (two, other) = fitted[1], fitted[2]
    assert report["rank"] == other["rank"]
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    for name in (name.removesuffix(".down") for name in first if name.endswith(".down")):
        # Components may come in another order or with another sign: compare their product.
        products = [(part[f"{name}.down"].float() @ part[f"{name}.up"].float()) for part in (first, second)]
        assert torch.linalg.norm(products[0] - products[1]) < 0.05 * torch.linalg.norm(products[0])


@pytest.mark.engine
def test_a_fit_that_fails_leaves_no_file(text, tmp_path):
    settings = FitSettings(plans=((1, 4, 4, 1),), tokens=BATCH * 64, length=4096, dtype="float32")
    with pytest.raises(RankError, match="4128"):
        fit(str(DRAFTER), [text] * 8, tmp_path / "maps.safetensors", 1, settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.engine
def test_ctrl_c_leaves_no_file(text, tmp_path):
    """Ctrl-C, which reaches the command and its ranks, in the middle of the text."""
    arguments = ["fit", "--drafter", str(DRAFTER), "--text", *[str(text)] * 40, "-o", "maps.safetensors"]
    arguments += ["--ranks", "2", "--tokens", "400000", "--length", "64", "--own", "0", "--dtype", "float32"]
    run = subprocess.Popen(
        [sys.executable, "-m", "vllm_easyspec.cli", *arguments],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # A shell's background jobs, and what they start, ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        seen = b""
        while b"fit:" not in seen or b" 1/" not in seen:  # the bar after a batch
            seen += (piece := os.read(run.stderr.fileno(), 4096))
            assert piece, seen[-3000:].decode()
        os.killpg(run.pid, signal.SIGINT)
        _, rest = run.communicate(timeout=60)  # until all processes, ranks included, have closed standard error
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 130
    assert b"vllm-easyspec fit: interrupted" in rest and b"Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_plans_of_another_drafter(text, tmp_path):
    with pytest.raises(ConfigError, match=r"^--plans=1-3: the group sizes add up to 4, but the drafter has 10 layers"):
        fit(str(DRAFTER), [text], tmp_path / "maps.safetensors", 1, FitSettings(plans=((1, 3),)))


def test_sequences_too_short_to_draft_in(text, tmp_path):
    with pytest.raises(ConfigError, match="--length 20 is too short to draft in: give 21 tokens or more"):
        fit(str(DRAFTER), [text], tmp_path / "maps.safetensors", 1, FitSettings(length=20))


def test_plans_without_groups(text, tmp_path):
    with pytest.raises(ConfigError, match="no map to fit: groups of one layer need none. Give --plans"):
        fit(str(DRAFTER), [text], tmp_path / "maps.safetensors", 1, FitSettings(plans=((1,) * 10,)))


def test_a_folder_without_a_tokenizer(text, tmp_path):
    (tmp_path / "config.json").write_text((DRAFTER / "config.json").read_text())
    with pytest.raises(ConfigError, match="has no tokenizer"):
        fit(str(tmp_path), [text], tmp_path / "maps.safetensors", 1, SETTINGS)
