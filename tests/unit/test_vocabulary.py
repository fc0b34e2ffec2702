"""The draft vocabulary without an engine: the ids, the file, the configuration, one clear error for each mistake."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from tiny_models import DRAFTER, TARGET, easyspec, model_folder
from transformers import AutoTokenizer
from vllm import EngineArgs

from vllm_easyspec import plugin
from vllm_easyspec.cli import main
from vllm_easyspec.config import OPTIONS_KEY, EasySpecConfig, RuntimeOptions
from vllm_easyspec.drafter.vocabulary import DraftVocabulary, VocabularyFile, special_ids, tokenizer_hash, written
from vllm_easyspec.errors import ConfigError
from vllm_easyspec.tune.vocabulary import most_used

SIZE = 512  # the tiny pair's
TOKENIZER = AutoTokenizer.from_pretrained(DRAFTER)
IDS = [1, 5, 17, 300, 511]


@pytest.fixture
def file(tmp_path):
    """A vocabulary of the tiny drafter's, and what writes it anew with changes."""
    path = tmp_path / "vocabulary.json"

    def write(**changes):
        VocabularyFile(tokenizer=tokenizer_hash(TOKENIZER.get_vocab()), vocab_size=SIZE, ids=IDS).write(path)
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return path

    write.path = write()
    return write


# ---- the ids ----


def test_the_lowest_ids_and_the_special_tokens():
    vocabulary = DraftVocabulary.of(100, {0, 1, 400, SIZE + 3}, SIZE)
    assert vocabulary.ids == (*range(100), 400)
    assert DraftVocabulary.of(SIZE - 1, {SIZE - 1}, SIZE) is None, "nothing is left out"
    assert {0, 1} <= special_ids(TOKENIZER)


def test_a_file_and_the_special_tokens(file):
    assert DraftVocabulary.of(str(file.path), {0, 1}, SIZE).ids == (0, *IDS)


def test_share():
    vocabulary = DraftVocabulary((1, 2, 3), SIZE)
    assert vocabulary.share_of([[1, 2, 9], [3]]) == (0.75, 4)
    assert vocabulary.share_of([]) == (0, 0)


def test_the_hash_tells_tokens_and_ids_apart():
    vocabulary = TOKENIZER.get_vocab()
    renamed = {("other" if token == "def" else token): index for token, index in vocabulary.items()}
    first, second, *_ = vocabulary
    swapped = vocabulary | {first: vocabulary[second], second: vocabulary[first]}
    assert len({tokenizer_hash(one) for one in (vocabulary, {**renamed, "x": 3}, swapped)}) == 3
    assert tokenizer_hash(dict(reversed(vocabulary.items()))) == tokenizer_hash(vocabulary)


# ---- the file ----


def test_the_file_reads_back(file):
    assert VocabularyFile.read(str(file.path)).ids == IDS
    assert [path.name for path in file.path.parent.iterdir()] == [file.path.name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": [3, 2]}, "ids must ascend and be lower than vocab_size. Give a file that vllm-easyspec fit"),
        ({"ids": [3, 3]}, "ids must ascend"),
        ({"ids": [0, SIZE]}, "ids must ascend and be lower"),
        ({"ids": [-1, 2]}, "ids.0: Input should be greater than or equal to 0"),
        ({"ids": []}, "ids: List should have at least 1 item"),
        ({"ids": ["3"]}, "ids.0: Input should be a valid integer"),
        ({"format": "another"}, "format: Input should be 'vllm_easyspec draft vocabulary, 1'"),
        ({"tokenizer": "?"}, "tokenizer: String should match pattern"),
        ({"more": 1}, "more: Extra inputs are not permitted"),
    ],
)
def test_a_broken_file_is_one_line(file, changes, message):
    with pytest.raises(ConfigError) as error:
        VocabularyFile.read(str(file(**changes)))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_json_and_no_file(file, tmp_path):
    with pytest.raises(ConfigError, match=r"draft_vocabulary='.*none' can't be read: No such file.* Give a file that"):
        VocabularyFile.read(str(tmp_path / "none"))
    file.path.write_text("[1, 2")
    with pytest.raises(ConfigError, match="is not valid JSON: line 1"):
        VocabularyFile.read(str(file.path))
    file.path.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="Input should be a valid dictionary"):
        VocabularyFile.read(str(file.path))


def test_a_file_of_another_drafter(file):
    read = VocabularyFile.read(str(file.path))
    mine = tokenizer_hash(TOKENIZER.get_vocab())
    read.check("FILE", SIZE, mine)
    read.check("FILE", SIZE + 64, mine)  # the same tokenizer, more padding
    read.check("FILE", SIZE, None)
    with pytest.raises(ConfigError, match="draft_vocabulary='FILE' was counted with another tokenizer.*--drafter"):
        read.check("FILE", SIZE, tokenizer_hash({"a": 1}))
    for size, tokenizer in ((SIZE + 64, None), (SIZE - 1, mine)):
        with pytest.raises(ConfigError, match=f"a drafter with vocab_size=512, and this one has {size}"):
            read.check("FILE", size, tokenizer)


# ---- counting ----


def test_most_used():
    counted, text = [[3, 3, 5], [5, 3, 8]], [[7, 7, 8], [9]]
    assert most_used(counted, text, 3, 16) == [3, 5, 8]
    assert most_used(counted, text, 7, 16) == [3, 5, 8, 7, 9, 0, 1], "then as in the text, then the lowest"
    assert most_used([], [], 4, 16) == [0, 1, 2, 3]


def test_fit_counts_a_text(tmp_path, capsys):
    text, output = tmp_path / "text.py", tmp_path / "vocabulary.json"
    text.write_text(Path(yaml.__file__).read_text())
    assert main(["fit", "--vocabulary", "64", "--drafter", str(DRAFTER), "--text", str(text), "-o", str(output)]) == 0
    file, ids = VocabularyFile.read(str(output)), TOKENIZER(text.read_text())["input_ids"]
    most = {index for index, _ in Counter(ids).most_common(60)}
    assert most <= set(file.ids) and {0, 1} <= set(file.ids) and 64 <= len(file.ids) < 70
    assert file.about["counted_tokens"] == pytest.approx(len(ids), abs=2)
    assert file.about["text"][0]["name"] == "text.py"
    out = capsys.readouterr().out
    assert f"they cover {file.about['coverage']:.2%} of the" in out and 0.5 < file.about["coverage"] < 1
    assert engine_config(draft_vocabulary=str(output))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocabulary", "513"], "draft_vocabulary=513 is more than the 512 tokens"),
        (["--vocabulary", "64", "--drafter", "BARE"], "has no tokenizer. Give a folder that holds one"),
        (["--vocabulary", "64"], "holds 1 pieces, and at least 10 are needed. Give more text"),
        (["--target", "TARGET"], "--target TARGET is not allowed without --vocabulary"),
        (["--", "--dtype", "float32"], "an option after -- is not allowed without --vocabulary"),
    ],
)
def test_fit_says_what_cannot_be_counted(tmp_path, capsys, arguments, message):
    text, bare = tmp_path / "text.txt", model_folder(tmp_path / "bare", tokenizer=False)
    text.write_text("a few words")
    given = [str(bare) if argument == "BARE" else argument for argument in arguments]
    assert main(["fit", "--drafter", str(DRAFTER), "--text", str(text), *given]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "vocabulary.json").exists()


# ---- a drafter with another tokenizer ----


class Tokens:
    """A tokenizer's vocabulary, of which some tokens are special."""

    unk_token_id = None
    eos_token_id = 0

    def __init__(self, tokens: list[str], special: tuple[str, ...] = ("<end>",)):
        self.vocabulary = {token: index for index, token in enumerate(tokens)}
        self.added = {token: self.vocabulary[token] for token in special}
        self.all_special_ids: list[int] = []

    def get_vocab(self):
        return self.vocabulary

    def get_added_vocab(self):
        return self.added


# \u0120 and \u2581: a space before a word. \u00c3\u00a9: the two bytes of an e with acute accent.
BYTES = Tokens(["<end>", "\u0120the", "a", "\u00c3\u00a9", "\u010a", "\u0120of", "<chat>"], ("<end>", "<chat>"))
PIECES = Tokens(["<unk>", "<end>", "\u2581the", "\u00e9", "<0x0A>", "b", "a", "\u2581of", "<chat>"], ("<unk>", "<end>"))


def test_what_tokens_add_to_a_text():
    assert written(BYTES) == {
        (True, b"<end>"): 0,
        (False, b" the"): 1,
        (False, b"a"): 2,
        (False, "\u00e9".encode()): 3,
        (False, b"\n"): 4,
        (False, b" of"): 5,
        (True, b"<chat>"): 6,
    }
    assert written(PIECES)[False, b"\n"] == 4 and written(PIECES)[False, b"<chat>"] == 8


def test_shared_tokens():
    vocabulary = DraftVocabulary.shared(PIECES, BYTES, 9, 8)
    assert dict(zip(vocabulary.ids, vocabulary.rows, strict=True)) == {0: 1, 1: 2, 2: 6, 3: 3, 4: 4, 5: 7}
    assert vocabulary.inputs == (1, 2, 6, 3, 4, 7, 0, 0), "the drafter's end token, its id 0 here, for the others"
    assert (vocabulary.ids, vocabulary.size) == ((0, 1, 2, 3, 4, 5), 8)
    assert vocabulary.describe_shared() == (
        "another tokenizer: drafts come from the 6 tokens that it shares with the target's 8"
    )
    assert DraftVocabulary.shared(PIECES, BYTES, 7, 8).rows == (1, 2, 6, 3, 4), "rows that the drafter's head has"
    with pytest.raises(ConfigError, match="needs tokens that both tokenizers have, and there are none"):
        DraftVocabulary.shared(Tokens(["x", "<end>"]), Tokens(["y", "<fin>"], ("<fin>",)), 2, 2)


# ---- the configuration ----


@pytest.mark.parametrize("value", [0, -5, True, 1.5, "", [3], {}])
def test_neither_a_number_nor_a_path(value):
    with pytest.raises(ConfigError, match=r"draft_vocabulary=.* is not allowed: it is neither a number of at least 1"):
        EasySpecConfig.parse(easyspec(draft_vocabulary=value))


def test_it_reads_back():
    for value in (128, "file.json", None):
        config = EasySpecConfig.parse(easyspec(draft_vocabulary=value))
        assert config.draft_vocabulary == value
        assert EasySpecConfig.parse(config.to_dict()) == config
        assert "draft_vocabulary" not in config.draft_model()


def test_a_drafter_with_another_tokenizer_chooses_its_tokens_itself():
    config = EasySpecConfig.parse(easyspec(use_heterogeneous_vocab=True))
    assert EasySpecConfig.parse(config.to_dict()) == config
    fields, options = config.to_vllm()
    assert "use_heterogeneous_vocab" not in fields, "vLLM would take its V1 runner"
    assert RuntimeOptions.from_json(options).use_heterogeneous_vocab
    with pytest.raises(
        ConfigError, match="draft_vocabulary=5 is given together with use_heterogeneous_vocab=True.* Remove"
    ):
        EasySpecConfig.parse(easyspec(use_heterogeneous_vocab=True, draft_vocabulary=5))


def test_the_path_counts_from_the_file_it_is_written_in(tmp_path, file):
    path = tmp_path / "easyspec.yaml"
    path.write_text(yaml.safe_dump(easyspec(draft_vocabulary="./vocabulary.json")))
    config = EasySpecConfig.parse(path)
    assert config.draft_vocabulary == str(file.path.resolve())
    _, options = config.to_vllm()
    before = options["draft_vocabulary_sha256"]
    assert RuntimeOptions.from_json(json.loads(json.dumps(options))).draft_vocabulary == config.draft_vocabulary
    file(ids=[2, 3])
    assert config.to_vllm()[1]["draft_vocabulary_sha256"] != before, "vLLM would take it for the same configuration"


def engine_config(drafter=DRAFTER, target=TARGET, **changes):
    plugin.register()
    args = EngineArgs(model=str(target), max_model_len=256, speculative_config=easyspec(drafter, **changes))
    return args.create_engine_config()


def test_an_engine_takes_it_up(file):
    for value in (128, SIZE, str(file.path)):
        assert engine_config(draft_vocabulary=value).additional_config[OPTIONS_KEY]["draft_vocabulary"] == value


def test_an_engine_refuses_it_before_anything_is_loaded(file, tmp_path):
    for value, message in (
        (SIZE + 1, "draft_vocabulary=513 is more than the 512 tokens of the drafter. Give fewer, such as 128, or"),
        (str(tmp_path / "none"), "can't be read: No such file.*or remove it"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine_config(draft_vocabulary=value)
    for changes, message in (
        ({"ids": [5, 4]}, "ids must ascend"),
        ({"tokenizer": "0" * 64}, "counted with another tokenizer than the drafter's"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine_config(draft_vocabulary=str(file(**changes)))


def test_a_drafter_without_a_tokenizer(file, tmp_path):
    """What a file was counted with can't be asked then; the size of the vocabulary must be the same."""
    bare = model_folder(tmp_path / "bare", tokenizer=False)
    assert engine_config(bare, draft_vocabulary=str(file.path))
    with pytest.raises(ConfigError, match="a drafter with vocab_size=512, and this one has 448"):
        engine_config(
            model_folder(tmp_path / "smaller", tokenizer=False, vocab_size=448),
            model_folder(tmp_path / "target", TARGET, tokenizer=False, vocab_size=448),
            draft_vocabulary=str(file(ids=[3])),
        )


def test_doctor_tells_what_it_covers(file, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": [5, 17, 300, 6]}\n{"prompt": [1, 511, 7, 8]}\n')
    config = json.dumps(easyspec(draft_vocabulary=str(file.path)))
    assert main(["doctor", config, "--prompts", str(prompts), "--model", str(TARGET)]) == 0
    out = capsys.readouterr().out
    assert "drafts      from 6 of 512 tokens, which cover 62.5% of the 8 tokens of the prompts" in out  # and token 0
    assert main(["doctor", json.dumps(easyspec(draft_vocabulary=600))]) == 1
    assert "draft_vocabulary=600 is more than" in capsys.readouterr().err


def test_doctor_counts_the_head_s_own_rows(capsys):
    """The tiny drafter ties its head to the embedding, of which a part must be held once more."""
    sizes = []
    for value in (None, 128):
        assert main(["doctor", json.dumps(easyspec(draft_vocabulary=value)), "--dtype", "float32"]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("rank 0"))
        sizes.append(float(line.split("embedding and LM head ")[1].split(" MiB")[0]))
    assert sizes == pytest.approx([0.25, 0.25 + 128 * 128 * 4 / 2**20], abs=0.05)
