"""Look-ahead maps without an engine: least squares, the file, the configuration, one clear error for each mistake."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import DRAFTER, TARGET, easyspec, model_folder
from transformers import AutoConfig
from vllm import EngineArgs

from vllm_easyspec import plugin
from vllm_easyspec.bench import BenchmarkError
from vllm_easyspec.bench.prompts import read_texts
from vllm_easyspec.cli import main
from vllm_easyspec.config import OPTIONS_KEY, EasySpecConfig, RuntimeOptions
from vllm_easyspec.drafter.architectures import DrafterShape
from vllm_easyspec.drafter.placement import LayerPlacement
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.errors import ConfigError
from vllm_easyspec.lookahead import LookaheadFile, LookaheadMaps, check_lookahead, drafter_identity, write_maps
from vllm_easyspec.tune.fit import _reach, cut
from vllm_easyspec.tune.least_squares import Moments, PairMoments

HIDDEN = 128  # the tiny drafter's
SHAPE = DrafterShape.from_hf_config(AutoConfig.from_pretrained(DRAFTER))
GENERATOR = torch.Generator().manual_seed(0)


def samples(count: int = 300, features: int = 12, outputs: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features with nonzero means, and outputs that are partly linear in them."""
    x = torch.randn(count, features, generator=GENERATOR) @ torch.randn(features, features, generator=GENERATOR) + 2
    y = x @ torch.randn(features, outputs, generator=GENERATOR) + 3 * torch.randn(count, outputs, generator=GENERATOR)
    return x, y + 7


def moments(x: torch.Tensor, y: torch.Tensor, parts: int = 1) -> Moments:
    found = Moments(x.shape[1], y.shape[1], x.device)
    for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
        found.add(part_x, part_y)
    return found


# ---- least squares ----


def test_the_solution_is_numpys_least_squares():
    x, y = samples()
    with_one = np.concatenate([x.numpy(), np.ones((len(x), 1))], axis=1).astype(np.float64)
    wanted = np.linalg.lstsq(with_one, y.numpy().astype(np.float64), rcond=None)[0]
    down, up, bias = moments(x, y, parts=7).solve(ridge=0.0)
    np.testing.assert_allclose(torch.cat([down @ up, bias[None]]).numpy(), wanted, atol=2e-3)


def test_the_penalty_is_a_share_of_a_features_variance():
    """The same as least squares on the samples and, for each centred feature, a further one that asks for zero."""
    x, y = samples()
    x, y = x.double().numpy(), y.double().numpy()
    ridge = 0.3
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    penalties = np.diag(np.sqrt(ridge * (centred_x**2).sum(0)))
    rows = np.concatenate([centred_x, penalties]), np.concatenate([centred_y, np.zeros((x.shape[1], y.shape[1]))])
    wanted = np.linalg.lstsq(*rows, rcond=None)[0]
    down, up, bias = moments(torch.from_numpy(x), torch.from_numpy(y)).solve(ridge)
    np.testing.assert_allclose((down @ up).numpy(), wanted, atol=2e-3)
    np.testing.assert_allclose(bias.numpy(), y.mean(0) - x.mean(0) @ wanted, atol=2e-2)


def test_a_map_of_lower_rank_is_the_best_of_that_rank():
    x, y = samples()
    whole, short = moments(x, y).solve(1e-3), moments(x, y).solve(1e-3, rank=2)
    assert [tuple(part.shape) for part in short] == [(12, 2), (2, 5), (5,)]

    def fitted(down, up, bias):
        return (x.double() @ down @ up + bias).numpy()

    mean = y.double().mean(0).numpy()
    left, values, right = np.linalg.svd(fitted(*whole) - mean, full_matrices=False)
    np.testing.assert_allclose(fitted(*short) - mean, left[:, :2] * values[:2] @ right[:2], atol=1e-2)


def test_a_map_of_full_rank_predicts_what_the_ridge_solution_does():
    x, y = samples(features=24, outputs=8)
    pair = PairMoments(moments(x, y), moments(x, y))
    fitted, _ = pair.of_kind("attention")  # the first 4 * 4 features and 4 outputs
    assert fitted.gram.shape == (17, 17) and fitted.cross.shape == (17, 4)
    fitted, _ = pair.of_kind("mlp")  # the first 5 * 4 features, the other 4 outputs
    assert fitted.gram.shape == (21, 21) and fitted.cross.shape == (21, 4)
    down, up, bias = fitted.solve(1e-3, rank=4)
    full = fitted.solve(1e-3)
    torch.testing.assert_close(down @ up, full[0] @ full[1])
    torch.testing.assert_close(bias, full[2])
    x, y = x[:, :20].double(), y[:, 4:].double()
    centred = x - x.mean(0)
    gram = centred.T @ centred
    weights = torch.linalg.solve(gram + 1e-3 * torch.diag(gram.diagonal()), centred.T @ y)
    torch.testing.assert_close(x @ down @ up + bias, centred @ weights + y.mean(0), rtol=0, atol=1e-3)


def test_r2_is_the_share_of_variance_explained():
    (x, y), (held_x, held_y) = samples(), samples(100)
    maps = moments(x, y).solve(1e-3, rank=3)
    residual = held_y.double() - (held_x.double() @ maps[0] @ maps[1] + maps[2])
    wanted = 1 - (residual**2).sum() / ((held_y.double() - held_y.double().mean(0)) ** 2).sum()
    assert moments(held_x, held_y, parts=3).r2(*maps) == pytest.approx(wanted.item(), abs=1e-4)


# ---- which maps, which text ----


def test_reach_is_what_the_plans_need():
    plans = [DraftPlan((1, 4, 4, 1)), DraftPlan((1, 2, 6, 1)), DraftPlan((3, 7))]
    assert _reach(plans, 10, longest_group=1) == {0: 2, 1: 4, 3: 9, 5: 8}
    assert _reach([], 5, longest_group=3) == {1: 3, 2: 4, 3: 4}


def test_texts_and_their_pieces(tmp_path):
    plain, lines = tmp_path / "a.py", tmp_path / "b.jsonl"
    plain.write_text("one\ntwo\n")
    lines.write_text('"three"\n\n{"text": "four"}\n{"prompt": "five", "id": 1}\n')
    assert read_texts([plain, lines]) == ["one\ntwo\n", "three", "four", "five"]
    documents = [list(range(100)), list(range(1000, 1010)), list(range(2000, 2050))]
    pieces = cut(documents, tokens=10_000, length=40)
    assert [(piece[0], len(piece)) for piece in pieces] == [(0, 40), (40, 40), (80, 20), (2000, 40)], "10 are too few"
    many = cut([[n] * 40 for n in range(320)], tokens=64 * 40, length=40)
    assert [piece[0] for piece in many] == list(range(0, 320, 5)), "spread over all documents"


@pytest.mark.parametrize("line", ["{", "3", '{"question": "?"}'])
def test_a_line_that_is_no_text(tmp_path, line):
    path = tmp_path / "text.jsonl"
    path.write_text(f'"good"\n{line}\n')
    with pytest.raises(BenchmarkError, match=r"text\.jsonl, line 2 is .*Allowed are"):
        read_texts([path])


def test_too_little_text_and_a_missing_file(tmp_path, capsys):
    path = tmp_path / "text.txt"
    arguments = ["fit", "--drafter", str(DRAFTER), "--text", str(path), "-o", str(tmp_path / "maps.safetensors")]
    assert main(arguments) == 1
    assert "can't be read" in capsys.readouterr().err
    path.write_text("import os\n" * 200)
    assert main(arguments) == 1
    assert "at least 32 are needed. Give more text" in capsys.readouterr().err
    assert not (tmp_path / "maps.safetensors").exists()
    assert main([*arguments[:-1], str(tmp_path / "nowhere" / "maps.safetensors")]) == 1
    assert "there is no folder" in capsys.readouterr().err


# ---- the file ----


def tensors(reach: dict[int, int], rank: int = 4) -> dict[str, torch.Tensor]:
    sizes = {"down": lambda n, f: (n, f, rank), "up": lambda n, f: (n, rank, HIDDEN), "bias": lambda n, f: (n, HIDDEN)}
    return {
        f"{kind}.{start}.{part}": torch.randn(size(last - start, inputs * HIDDEN), generator=GENERATOR)
        for kind, inputs in (("attention", 4), ("mlp", 5))
        for start, last in reach.items()
        for part, size in sizes.items()
    }


@pytest.fixture
def maps_file(tmp_path):
    """For the tiny drafter: 1-4-4-1, and plans with shorter groups at the same places."""
    path = tmp_path / "maps.safetensors"
    reach = {1: 4, 5: 8}
    metadata = {"drafter": drafter_identity(DRAFTER, SHAPE), "model": "it", "reach": reach, "rank": 4}
    write_maps(path, tensors(reach), metadata | {"hidden_size": HIDDEN})
    return path


def test_a_file_is_read_as_written(maps_file):
    file = LookaheadFile.read(str(maps_file))
    assert (file.reach, file.rank, file.hidden_size) == ({1: 4, 5: 8}, 4, HIDDEN)
    file.check_drafter(DRAFTER, SHAPE)
    for sizes in ([1, 4, 4, 1], [1, 3, 1, 3, 1, 1], [1] * 10):
        file.check_plan(DraftPlan(tuple(sizes)))


def test_a_group_computes_its_definition(maps_file):
    stored = load_file(maps_file)
    h, previous = torch.randn(3, HIDDEN, generator=GENERATOR), torch.randn(3, HIDDEN, generator=GENERATOR)
    prefixes = torch.randn(3, 3, HIDDEN, generator=GENERATOR)
    u = h / h.pow(2).mean(-1, keepdim=True).sqrt()
    first, second = u[:, : HIDDEN // 2], u[:, HIDDEN // 2 :]
    known = torch.cat([u, u.abs(), (first + second).abs(), (first - second).abs(), previous], -1)
    for rank, own in ((0, [6]), (1, [5, 7])):  # of the group 5, 6, 7
        maps = LookaheadMaps.load(LookaheadFile.read(str(maps_file)), LayerPlacement(10, 2), rank, torch.ones(1))
        group = maps.of_group(5, h, previous)
        for row, layer in enumerate(own):
            down, up, bias = (stored[f"attention.5.{part}"][layer - 6] for part in ("down", "up", "bias"))
            wanted = h + known @ down @ up + bias if layer > 5 else h
            torch.testing.assert_close(group.attention_inputs(len(own))[row], wanted, rtol=1e-4, atol=1e-3)
        assert torch.equal(group.mlp_inputs(prefixes)[0], prefixes[0])
        for row in (1, 2):
            down, up, bias = (stored[f"mlp.5.{part}"][row - 1] for part in ("down", "up", "bias"))
            scaled = prefixes[row] / prefixes[row].pow(2).mean(-1, keepdim=True).sqrt()
            wanted = prefixes[row] + torch.cat([known, scaled], -1) @ down @ up + bias
            torch.testing.assert_close(group.mlp_inputs(prefixes)[row], wanted, rtol=1e-4, atol=1e-3)


def test_a_failed_write_leaves_the_old_file(maps_file, monkeypatch):
    before = maps_file.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_maps(maps_file, {"x": torch.ones(1)}, {})
    assert maps_file.read_bytes() == before


def without(path, name, **changes):
    """Write the file again without a tensor, or with other metadata."""
    stored = load_file(path)
    stored.pop(name, None)
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["lookahead"])
    save_file(stored, path, {"lookahead": json.dumps(metadata | changes)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "can't be read: .*Give a file that vllm-easyspec fit wrote"),
        (lambda path: path.write_text("no maps"), "can't be read: .*Give a file that vllm-easyspec fit wrote"),
        (lambda path: save_file({"x": torch.ones(1)}, path), "holds None where '.*' is needed"),
        (lambda path: without(path, "", format="2"), "holds '2' where '.*' is needed.*must be fitted again"),
        (lambda path: without(path, "mlp.5.up"), r"tensor mlp\.5\.up has shape None where \(3, 4, 128\) is needed"),
        (lambda path: without(path, "", rank=5), r"tensor attention\.1\.down has shape .* where \(3, 512, 5\) is"),
        (lambda path: without(path, "", drafter="?"), "was fitted on another drafter than .*Fit maps for this one"),
    ],
    ids=["missing", "not-safetensors", "other-safetensors", "format", "tensor", "shape", "drafter"],
)
def test_a_file_that_cannot_serve(maps_file, spoil, message):
    spoil(maps_file)
    with pytest.raises(ConfigError, match=message):
        check_lookahead(str(maps_file), str(DRAFTER), None, SHAPE, [DraftPlan((1, 4, 4, 1))])


@pytest.mark.parametrize("sizes", [(1, 8, 1), (5, 5), (1, 2, 2, 2, 2, 1)])
def test_a_plan_without_maps(maps_file, sizes):
    with pytest.raises(ConfigError, match=r"has no maps for layers \[.*Fit them \(vllm-easyspec fit --plans"):
        check_lookahead(str(maps_file), str(DRAFTER), None, SHAPE, [DraftPlan(sizes)])


def test_another_drafter_has_another_identity(tmp_path):
    other = model_folder(tmp_path / "other")
    weights = bytearray((DRAFTER / "model.safetensors").read_bytes())
    (other / "model.safetensors").write_bytes(weights)
    assert drafter_identity(other, SHAPE) == drafter_identity(DRAFTER, SHAPE)
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert drafter_identity(other, SHAPE) != drafter_identity(DRAFTER, SHAPE)


# ---- the configuration ----


def test_the_path_counts_from_the_file_it_is_written_in(tmp_path, maps_file):
    path = tmp_path / "easyspec.yaml"
    path.write_text(yaml.safe_dump(easyspec(lookahead="./maps.safetensors")))
    config = EasySpecConfig.parse(path)
    assert config.lookahead == str(maps_file.resolve())
    _, options = config.to_vllm()
    before = options["lookahead_sha256"]
    assert RuntimeOptions.from_json(json.loads(json.dumps(options))).lookahead == config.lookahead
    without(maps_file, "", model="written again")
    assert config.to_vllm()[1]["lookahead_sha256"] != before, "vLLM would take it for the same configuration"


def engine_config(**changes):
    plugin.register()
    return EngineArgs(model=str(TARGET), speculative_config=easyspec(**changes)).create_engine_config()


def test_an_engine_takes_it_up(maps_file):
    options = engine_config(lookahead=str(maps_file)).additional_config[OPTIONS_KEY]
    assert options["lookahead"] == str(maps_file)


def test_an_engine_refuses_it_before_anything_is_loaded(maps_file, tmp_path):
    with pytest.raises(ConfigError, match="no maps for layers"):
        engine_config(lookahead=str(maps_file), layer_parallel={"plan": "1-8-1"})
    with pytest.raises(ConfigError, match="can't be read: No such file.*or remove it"):
        engine_config(lookahead=str(tmp_path / "none.safetensors"))
    without(maps_file, "", drafter="?")
    with pytest.raises(ConfigError, match="another drafter"):
        engine_config(lookahead=str(maps_file))


def test_doctor_reads_it(maps_file, capsys):
    assert main(["doctor", json.dumps(easyspec(lookahead=str(maps_file)))]) == 0
    assert "maps of rank 4 for groups within layers 1-4, 5-8" in capsys.readouterr().out
    without(maps_file, "", drafter="?")
    assert main(["doctor", json.dumps(easyspec(lookahead=str(maps_file)))]) == 1
    assert "another drafter" in capsys.readouterr().err
