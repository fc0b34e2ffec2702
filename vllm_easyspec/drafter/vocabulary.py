"""Which tokens may be drafted: the drafter's LM head then has only their rows.

Nothing else changes: the drafter reads every token, drafts are ordinary token ids, and the drafter gives tokens that
can't be drafted no probability.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_easyspec.documents import read_json, write_whole
from vllm_easyspec.errors import ConfigError

REMEDY = "Give a file that vllm-easyspec fit --vocabulary wrote"


def tokenizer_hash(vocabulary: Mapping[str, int]) -> str:
    """A hash of a tokenizer's tokens and their ids (`get_vocab`)."""
    digest = hashlib.sha256()
    for token, index in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index} {token}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that don't stand for text, such as those of the chat template."""
    return {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level BPE writes bytes as: themselves if printable, otherwise from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def written(tokenizer: Any) -> dict[tuple[bool, bytes], int]:
    """What each token adds to a text, and the lowest id that does: (whether it is a special token, UTF-8).

    Tokenizers write a space before a word in different ways, byte-level BPE as U+0120 and SentencePiece as U+2581.
    """
    vocabulary, special, letters = tokenizer.get_vocab(), special_ids(tokenizer), _byte_letters()
    is_byte_level = sum((token[0] == "\u0120") - (token[0] == "\u2581") for token in vocabulary if len(token) > 1) > 0
    found: dict[tuple[bool, bytes], int] = {}
    for token, index in sorted(vocabulary.items(), key=lambda item: item[1]):
        if index in special:
            text = token.encode(errors="surrogatepass")
        elif is_byte_level and all(letter in letters for letter in token):
            text = bytes(letters[letter] for letter in token)
        elif match := re.fullmatch("<0x([0-9A-F]{2})>", token):
            text = bytes.fromhex(match[1])
        else:
            text = token.replace("\u2581", " ").encode(errors="surrogatepass")
        found.setdefault((index in special, text), index)
    return found


@dataclass(frozen=True)
class DraftVocabulary:
    """The tokens that may be drafted. Ids are the target's; unless the tokenizers differ, the drafter has the same."""

    ids: tuple[int, ...]  # that may be drafted, ascending: of equal logits the lowest id wins, as with the whole head
    size: int  # of the whole vocabulary
    rows: tuple[int, ...] | None = None  # the drafter's id of each of `ids`; None if it is the same
    inputs: tuple[int, ...] | None = None  # the id that the drafter reads for each of `size`; None if it is the same

    @classmethod
    def of(cls, wanted: int | str, special: Iterable[int], size: int) -> "DraftVocabulary | None":
        """The vocabulary of the setting `draft_vocabulary`, for a drafter with `size` tokens; None if it is all of
        them.

        special: ids that are always included, if the drafter has them. Raises `ConfigError`.
        """
        counted = range(wanted) if isinstance(wanted, int) else VocabularyFile.read(wanted).ids
        ids = tuple(sorted({index for index in (*counted, *special) if index < size}))
        return None if len(ids) == size else cls(ids, size)

    @classmethod
    def shared(cls, drafters: Any, targets: Any, draft_size: int, target_size: int) -> "DraftVocabulary":
        """The tokens that two tokenizers both have. The drafter reads its unknown or end token for all others.

        Raises `ConfigError` if there are none.
        """
        own = {text: index for text, index in written(drafters).items() if index < draft_size}
        theirs = {text: index for text, index in written(targets).items() if index < target_size}
        pairs = sorted((index, own[text]) for text, index in theirs.items() if text in own)
        if not pairs:
            raise ConfigError(
                "use_heterogeneous_vocab=True needs tokens that both tokenizers have, and there are none. Choose "
                "another drafter"
            )
        named = (getattr(drafters, f"{name}_token_id", None) for name in ("unk", "eos"))
        inputs = [next((index for index in named if index is not None), 0)] * target_size
        for index, row in pairs:
            inputs[index] = row
        ids, rows = zip(*pairs, strict=True)
        return cls(ids, target_size, rows, tuple(inputs))

    def describe_shared(self) -> str:
        return (
            f"another tokenizer: drafts come from the {len(self.ids):,} tokens that it shares with the target's "
            f"{self.size:,}"
        )

    def share_of(self, documents: Iterable[Iterable[int]]) -> tuple[float, int]:
        """The share of the documents' tokens that may be drafted, and how many tokens they have."""
        known = set(self.ids)
        covered = total = 0
        for ids in documents:
            for index in ids:
                covered += index in known
                total += 1
        return covered / max(1, total), total


class VocabularyFile(BaseModel):
    """The file of `vllm-easyspec fit --vocabulary`. It serves drafters with the tokenizer that it was made with."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["vllm_easyspec draft vocabulary, 1"] = "vllm_easyspec draft vocabulary, 1"
    tokenizer: str = Field(pattern="^[0-9a-f]{64}$")
    vocab_size: int = Field(ge=1)
    ids: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    about: dict[str, Any] = {}

    @model_validator(mode="after")
    def _ids_ascend(self) -> "VocabularyFile":
        if any(a >= b for a, b in zip(self.ids, self.ids[1:], strict=False)) or self.ids[-1] >= self.vocab_size:
            raise ValueError("ids must ascend and be lower than vocab_size")
        return self

    @classmethod
    def read(cls, path: str) -> "VocabularyFile":
        """Raises `ConfigError` for a file that can't be read or that `vllm-easyspec fit` did not write."""
        source = f"draft_vocabulary={path!r}"
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ConfigError(f"{source} can't be read: {reason}. {REMEDY}") from error
        try:
            return cls.model_validate(read_json(text, source))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{source}: {place}{': ' if place else ''}{first['msg']}. {REMEDY}") from None

    def write(self, path: Path) -> None:
        """Write the file, completely or not at all."""
        write_whole(path, json.dumps(self.model_dump(), separators=(",", ":")) + "\n")

    def check(self, path: str, vocab_size: int, tokenizer: str | None) -> None:
        """Raise `ConfigError` if the file was made with another tokenizer.

        vocab_size: the drafter's; tokenizer: its `tokenizer_hash`, None without a tokenizer.
        """
        if tokenizer is not None and tokenizer != self.tokenizer:
            raise ConfigError(
                f"draft_vocabulary={path!r} was counted with another tokenizer than the drafter's. Count with this "
                "one: vllm-easyspec fit --vocabulary N --drafter DRAFTER"
            )
        if self.ids[-1] >= vocab_size or (tokenizer is None and self.vocab_size != vocab_size):
            raise ConfigError(
                f"draft_vocabulary={path!r} is of a drafter with vocab_size={self.vocab_size}, and this one has "
                f"{vocab_size}. {REMEDY} for this drafter"
            )


def check_number(tokens: int, vocab_size: int) -> None:
    """Raise `ConfigError` if the drafter has fewer tokens."""
    if tokens > vocab_size:
        raise ConfigError(
            f"draft_vocabulary={tokens} is more than the {vocab_size} tokens of the drafter. Give fewer, such as "
            f"{max(1, vocab_size // 4)}, or remove it"
        )
