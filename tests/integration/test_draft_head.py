"""A drafter whose LM head has some of the rows: their logits equal the whole head's, all others are minus infinity."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from drafter_cases import CASES, PROMPTS, VOCAB, make_checkpoint

from vllm_easyspec.config import RuntimeOptions
from vllm_easyspec.drafter.vocabulary import VocabularyFile
from vllm_easyspec.engineless import EnginelessDrafter
from vllm_easyspec.ranks import run_ranks

pytestmark = pytest.mark.engine
# An untied head, and one tied to the embedding, of which the draft vocabulary takes a copy.
NAMES = ("llama3_rope", "mistral_tied")
IDS = [0, 1, 2, 7, 30, 31, 64, 90, VOCAB - 1]
FEW = 33  # on two ranks the second has only padding


@dataclass
class Seen:
    logits: np.ndarray  # [tokens, vocab]
    top: np.ndarray  # [tokens]
    rows: int  # of this rank's LM head
    description: str


def look(folder: str, wanted: list[int | str | None]) -> list[Seen]:
    return [_look(folder, value) for value in wanted]


@torch.inference_mode()
def _look(folder: str, wanted: int | str | None) -> Seen:
    drafter = EnginelessDrafter(folder, RuntimeOptions(draft_vocabulary=wanted), max_num_reqs=len(PROMPTS), max_len=128)
    hidden = drafter.read(PROMPTS)
    head = drafter.model.head
    return Seen(
        drafter.logits(hidden).numpy(),
        drafter.model.get_top_tokens(hidden).numpy(),
        head.lm_head.weight.shape[0],
        head.describe(),
    )


@pytest.fixture(scope="module", params=NAMES)
def seen(request, tmp_path_factory):
    """The whole head's and, by number of ranks, those of the lowest ids and of a file, on every rank."""
    folder = tmp_path_factory.mktemp("drafter")
    make_checkpoint(next(case for case in CASES if case.name == request.param), folder)
    path = folder / "vocabulary.json"
    VocabularyFile(tokenizer="0" * 64, vocab_size=VOCAB, ids=IDS).write(path)
    wanted = [None, FEW, str(path), VOCAB]
    by_ranks = {ranks: run_ranks(ranks, look, str(folder), wanted) for ranks in (1, 2)}
    return by_ranks[1][0][0], {ranks: [found[1:] for found in all_ranks] for ranks, all_ranks in by_ranks.items()}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("which", [0, 1], ids=["lowest", "file"])
def test_the_rows_are_the_whole_head_s(seen, ranks, which):
    whole, found = seen
    ids = [*range(FEW)] if which == 0 else IDS
    expected = np.full_like(whole.logits, -np.inf)
    expected[:, ids] = whole.logits[:, ids]
    assert len(set(expected.argmax(-1))) > 3
    assert (expected.argmax(-1) != whole.top).any(), "some of the whole head's drafts can't be drafted"
    for rank in found[ranks]:
        np.testing.assert_allclose(rank[which].logits, expected, atol=1e-4)
        assert rank[which].top.tolist() == expected.argmax(-1).tolist()
        assert (rank[which].logits == found[ranks][0][which].logits).all(), "the same bits on every rank"
        assert rank[which].rows == 64 // ranks, "cut evenly, padding included"
        assert rank[which].description == f"{len(ids)} of {VOCAB} tokens"


def test_the_whole_vocabulary_is_none(seen):
    whole, found = seen
    assert found[1][0][2].description == whole.description == "all tokens"
