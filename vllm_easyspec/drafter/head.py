"""`DraftHead`: the rows of the LM head for tokens that may be drafted, and the token of each row."""

import torch
from torch import nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from vllm_easyspec.drafter.architectures import DrafterShape
from vllm_easyspec.drafter.quantization import quantize_head
from vllm_easyspec.drafter.vocabulary import DraftVocabulary


class DraftHead(nn.Module):
    """Rows are sharded evenly over the ranks; the matrix product is that of `lm_head.quant_method`, as elsewhere in
    vLLM."""

    tokens: torch.Tensor | None  # [rows] int64, ascending: the token of each row; None if row i is token i

    def __init__(
        self, shape: DrafterShape, embedding: VocabParallelEmbedding, vocabulary: DraftVocabulary | None, prefix: str
    ):
        """vocabulary: None for all tokens; their rows are then the embedding's if the drafter ties the two."""
        super().__init__()
        rows = shape.vocab_size if vocabulary is None else len(vocabulary.ids)
        self.vocab_size = shape.vocab_size if vocabulary is None else vocabulary.size
        self.lm_head = ParallelLMHead(rows, shape.hidden_size, prefix=prefix)
        self.is_embedding = vocabulary is None and shape.tied_embeddings
        if self.is_embedding:
            self.lm_head = self.lm_head.tie_weights(embedding)
        self.logits_processor = LogitsProcessor(rows)
        tokens = None if vocabulary is None else torch.tensor(vocabulary.ids)
        self.register_buffer("tokens", tokens, persistent=False)
        self.checkpoint_rows = None if vocabulary is None else vocabulary.rows or vocabulary.ids

    def load(self, matrix: torch.Tensor) -> None:
        """Take this rank's rows of the checkpoint's LM head, `[vocab, hidden]`."""
        rows = matrix if self.checkpoint_rows is None else matrix[list(self.checkpoint_rows)]
        self.lm_head.weight_loader(self.lm_head.weight, rows)

    def refresh(self) -> None:
        """Compute with the weights as they are now: on a CPU, vLLM's product reads a packed copy."""
        self.lm_head.quant_method.process_weights_after_loading(self.lm_head)

    def quantize(self, quantization: str) -> None:
        """Compute with quantized weights from now on, which the embedding doesn't share. After loading."""
        quantize_head(self.lm_head, quantization)
        self.is_embedding = False

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden]` to `[tokens, vocab]`, on every rank; minus infinity for what can't be drafted."""
        logits = self.logits_processor(self.lm_head, hidden)
        if self.tokens is None:
            return logits
        everything = logits.new_full((logits.shape[0], self.vocab_size), float("-inf"))
        return everything.index_copy_(1, self.tokens, logits)

    def top_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """The arg-max of the logits, for two numbers per rank in a collective: `[tokens, hidden]` to `[tokens]`."""
        rows = self.logits_processor.get_top_tokens(self.lm_head, hidden)
        return rows if self.tokens is None else self.tokens[rows]

    def describe(self) -> str:
        """How many tokens may be drafted."""
        return "all tokens" if self.tokens is None else f"{len(self.tokens):,} of {self.vocab_size:,} tokens"
