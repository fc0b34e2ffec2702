"""Which tokens may be drafted: the drafter's LM head then reads these rows only, a quarter of a small drafter's bytes.

Nothing else changes: the drafter reads every token, drafts carry their own ids before anything sees them, and a token
that can't be drafted is one that the drafter gives no probability.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_easyspec.documents import read_json
from vllm_easyspec.errors import ConfigError

REMEDY = "Give a file that vllm-easyspec fit --vocabulary wrote"


def tokenizer_hash(vocabulary: Mapping[str, int]) -> str:
    """Of a tokenizer's tokens and their ids (`get_vocab`)."""
    digest = hashlib.sha256()
    for token, index in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index} {token}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that text is not made of, such as those of the chat template."""
    return {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}


@dataclass(frozen=True)
class DraftVocabulary:
    """The tokens that may be drafted."""

    ids: tuple[int, ...]  # that may be drafted, ascending: of equal logits the lowest id wins, as among all tokens
    size: int  # ids of the whole vocabulary

    @classmethod
    def of(cls, wanted: int | str, special: Iterable[int], size: int) -> "DraftVocabulary | None":
        """What `draft_vocabulary` asks for, of a drafter with `size` tokens; None where that is all of them.

        special: ids that are always among them, so far as the drafter has them. Raises `ConfigError`.
        """
        counted = range(wanted) if isinstance(wanted, int) else VocabularyFile.read(wanted).ids
        ids = tuple(sorted({index for index in (*counted, *special) if index < size}))
        return None if len(ids) == size else cls(ids, size)

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
    """What `vllm-easyspec fit --vocabulary` writes. It serves drafters with the tokenizer that it was counted with."""

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
        """Whole or not at all."""
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.model_dump(), separators=(",", ":")) + "\n", encoding="utf-8")
        part.replace(path)

    def check(self, path: str, vocab_size: int, tokenizer: str | None) -> None:
        """Raise `ConfigError` where the file is not of the drafter's tokenizer.

        vocab_size: the drafter's; tokenizer: its `tokenizer_hash`, None where there is none to ask.
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
    """Raise `ConfigError` where the drafter has fewer tokens."""
    if tokens > vocab_size:
        raise ConfigError(
            f"draft_vocabulary={tokens} is more than the {vocab_size} tokens of the drafter. Give fewer, such as "
            f"{max(1, vocab_size // 4)}, or remove it"
        )
