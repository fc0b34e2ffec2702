"""`vllm-easyspec fit --vocabulary N`: the N tokens that a drafter needs most, counted.

Tokens are counted in the target's own greedy answers, if there is a target, since drafts have to match these. Tokens
that don't occur in answers are ordered by their count in the text, then by id, since a BPE tokenizer's lower ids are
more frequent.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from vllm import SamplingParams

from vllm_easyspec.bench import BenchmarkError
from vllm_easyspec.bench.llm import bind_cpus, parse_engine_args
from vllm_easyspec.bench.prompts import read_prompts, read_texts
from vllm_easyspec.bench.results import check_writable
from vllm_easyspec.drafter.vocabulary import (
    DraftVocabulary,
    VocabularyFile,
    check_number,
    special_ids,
    tokenizer_hash,
)
from vllm_easyspec.errors import ConfigError
from vllm_easyspec.support import read_drafter, read_tokenizer
from vllm_easyspec.tune.options import FitOptions
from vllm_easyspec.tune.requests import AskedEngine

Documents = Sequence[Sequence[int]]
PIECE = 256  # tokens of a document: long texts are cut
HELD_OUT = 5  # every fifth document is held out to judge the vocabulary


@dataclass(frozen=True)
class CountSettings:
    """tokens: of all answers of the target; answer_tokens: of one answer; prompt_tokens: of a prompt."""

    size: int
    tokens: int = 40_000
    answer_tokens: int = 128
    prompt_tokens: int = 256
    ranks: int = 1  # of the target


def count(
    drafter: str,
    texts: Sequence[Path],
    output: Path,
    settings: CountSettings,
    target: str | None = None,
    engine_arguments: Sequence[str] = (),
) -> dict[str, Any]:
    """Write a `VocabularyFile` to `output`. Returns its metadata.

    engine_arguments: vLLM's options for the target. Raises `ConfigError` or `BenchmarkError` for what can't be used.
    """
    vocab_size = read_drafter(drafter, revision=None).vocab_size
    check_number(settings.size, vocab_size)
    tokenizer = read_tokenizer(drafter, None, vocab_size)
    if tokenizer is None:
        raise ConfigError(f"--drafter {drafter} has no tokenizer. Give a folder that holds one")
    text = [ids for path in texts for ids in _pieces(path, drafter, tokenizer)]
    answers = _answers(target, text, settings, engine_arguments) if target else []
    counted = answers or text
    if len(counted) < 2 * HELD_OUT:
        raise ConfigError(f"--text holds {len(counted)} pieces, and at least {2 * HELD_OUT} are needed. Give more text")
    special = {index for index in special_ids(tokenizer) if index < vocab_size}
    judged = most_used(_others(counted), _others(text), settings.size, vocab_size)
    lowest = range(settings.size)
    held_out = counted[::HELD_OUT]
    about: dict[str, Any] = {
        "drafter": drafter,
        "target": target,
        "settings": asdict(settings),
        "text": [{"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in texts],
        "counted_tokens": sum(map(len, counted)),
        "held_out_tokens": sum(map(len, held_out)),
        "coverage": DraftVocabulary(tuple({*judged, *special}), vocab_size).share_of(held_out)[0],
        "coverage_of_lowest_ids": DraftVocabulary(tuple({*lowest, *special}), vocab_size).share_of(held_out)[0],
    }
    ids = sorted({*most_used(counted, text, settings.size, vocab_size), *special})
    hashed = tokenizer_hash(tokenizer.get_vocab())
    VocabularyFile(tokenizer=hashed, vocab_size=vocab_size, ids=ids, about=about).write(output)
    return about | {"tokens": len(ids), "vocab_size": vocab_size}


def run(options: FitOptions) -> str:
    """Count and write the vocabulary. Returns what it covers, in words."""
    assert options.vocabulary is not None
    output = options.output or Path("vocabulary.json")
    check_writable(output)
    settings = CountSettings(options.vocabulary, options.tokens, prompt_tokens=options.length, ranks=options.ranks)
    about = count(options.drafter, options.text, output, settings, options.target, options.engine_arguments)
    what = "of the target's answers" if options.target else "of text"
    return (
        f"{about['tokens']:,} of {about['vocab_size']:,} tokens, counted in {about['counted_tokens']:,} {what}.\n"
        f"Counted in four fifths of it, they cover {about['coverage']:.2%} of the {about['held_out_tokens']:,} tokens "
        f"of the rest; as many of the lowest ids cover {about['coverage_of_lowest_ids']:.2%}.\n"
        f"wrote {output}, {output.stat().st_size:,} bytes"
    )


def most_used(first: Documents, then: Documents, size: int, vocab_size: int) -> list[int]:
    """The `size` ids that occur most in `first`; ties are broken by the count in `then`, then by the lowest id."""
    counts, ties = (Counter(index for ids in documents for index in ids) for documents in (first, then))
    return sorted(range(vocab_size), key=lambda index: (-counts[index], -ties[index], index))[:size]


def _others(documents: Documents) -> Documents:
    """All but the held-out ones."""
    return [ids for number, ids in enumerate(documents) if number % HELD_OUT]


def _pieces(path: Path, model: str, tokenizer: Any) -> Iterator[Sequence[int]]:
    """A file's documents, of at most `PIECE` tokens each: prompts of a JSONL file, a plain text as a whole."""
    if path.suffix == ".jsonl":
        documents = read_prompts(path, model)
    else:
        documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in read_texts([path])]
    for ids in documents:
        for start in range(0, len(ids), PIECE):
            yield ids[start : start + PIECE]


def _answers(target: str, text: Documents, settings: CountSettings, engine_arguments: Sequence[str]) -> Documents:
    """The target's answers to prompts spread evenly over the text."""
    wanted = min(len(text), -(-settings.tokens // settings.answer_tokens))
    prompts = [list(text[number * len(text) // wanted][: settings.prompt_tokens]) for number in range(wanted)]
    arguments = parse_engine_args("fit", engine_arguments)
    arguments.model, arguments.tensor_parallel_size = target, settings.ranks
    arguments.max_model_len = arguments.max_model_len or settings.prompt_tokens + settings.answer_tokens
    arguments.disable_log_stats = True
    params = SamplingParams(temperature=0, max_tokens=settings.answer_tokens, detokenize=False)
    bind_cpus(settings.ranks)
    answers: list[list[int]] = []
    try:
        with (
            AskedEngine(arguments, in_process=False) as engine,
            tqdm(total=wanted, desc="answers", unit="prompt", file=sys.stderr) as bar,
        ):
            for start in range(0, wanted, 64):
                some = [{"prompt_token_ids": ids} for ids in prompts[start : start + 64]]
                answers += engine.answer(some, params)
                bar.update(len(some))
    except (RuntimeError, ValueError) as error:
        raise BenchmarkError(f"--target {target} can't be asked: {' '.join(str(error).split()):.300}") from error
    return [ids for ids in answers if ids]
