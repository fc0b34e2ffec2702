"""A drafter's files are checked by their headers, before an engine starts."""

import json
import shutil

import pytest
from tiny_models import DRAFTER, easyspec

from vllm_easyspec.cli import main
from vllm_easyspec.drafter.checkpoint import check_files
from vllm_easyspec.errors import ConfigError
from vllm_easyspec.support import read_drafter

SHAPE = read_drafter(str(DRAFTER), revision=None)


@pytest.fixture
def weights(tmp_path):
    """The safetensors file of a copy of the tiny drafter."""
    shutil.copytree(DRAFTER, tmp_path / "drafter")
    (found,) = (tmp_path / "drafter").glob("*.safetensors")
    return found


def test_the_tiny_drafter_is_sound():
    check_files(DRAFTER, SHAPE)


@pytest.mark.parametrize("kept", [0, 4, 100, -1], ids=["empty", "no length", "no header", "a byte short"])
def test_a_file_cut_short_is_named(weights, kept):
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ConfigError, match="Get the file again") as error:
        check_files(weights.parent, SHAPE)
    assert str(error.value).startswith(str(weights)) and "\n" not in str(error.value)


def test_a_tensor_of_another_shape_is_named_with_its_file(weights, capsys):
    config = weights.parent / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": ', '"intermediate_size": 1'))
    assert main(["doctor", json.dumps(easyspec(weights.parent))]) == 1
    error = capsys.readouterr().err
    assert str(weights) in error and ".mlp." in error and "config.json asks for" in error and error.count("\n") == 1
