"""Fills a rank's stacked weights from a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_easyspec.drafter.architectures import DrafterShape
    from vllm_easyspec.drafter.model import LayerParallelDrafter

Place = Callable[[torch.Tensor], object]
# Buffers in old checkpoints that are not needed.
_IGNORED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


def load_drafter_weights(model: LayerParallelDrafter, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Copy each checkpoint tensor, or this rank's part of it, to its place.

    Returns the names of the parameters filled. Raises ValueError for an unknown tensor, one of a wrong shape or with
    NaN or infinity, and a missing one.
    """
    places = dict(_places(model))
    shapes = dict(expected_shapes(model.shape))
    missing = set(places)
    family = model.shape.architecture
    for full_name, tensor in weights:
        name = full_name.removeprefix("model.")
        if name in places:
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(
                    f"the drafter's checkpoint holds {full_name!r} of shape {list(tensor.shape)}, but its config.json "
                    f"asks for {list(shapes[name])}. Check that both are of one model"
                )
            places[name](tensor)
            missing.discard(name)
        elif not name.endswith(_IGNORED) and not (name == "lm_head.weight" and model.shape.tied_embeddings):
            raise ValueError(f"the drafter's checkpoint holds {full_name!r}, which a {family} doesn't have")
    if missing:
        raise ValueError(
            f"the drafter's checkpoint lacks {len(missing)} tensors of a {family}, among them {sorted(missing)[:3]}. "
            "Check that all of its files are there"
        )
    _check_finite(model)
    return {name for name, _ in model.named_parameters()}


def _check_finite(model: LayerParallelDrafter) -> None:
    """Refuse NaN and infinity: answers would stay correct, but no draft would ever be accepted, and nothing would say
    why."""
    for name, parameter in model.named_parameters():
        stacked = parameter if parameter.dim() == 3 else parameter.unsqueeze(0)  # layer by layer
        for layer, part in enumerate(stacked):
            # A sum shows NaN and infinity, and needs no memory.
            if not bool(part.sum(dtype=torch.float32).isfinite()):
                raise ValueError(
                    f"the drafter's checkpoint holds NaN or infinity: in what became {name}[{layer}] on rank "
                    f"{model.rank}. Get its files again, or serve without --speculative-config"
                )


def expected_shapes(shape: DrafterShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The shape of every tensor that the checkpoint may hold, output-major as in the file."""
    hidden, width, q, kv = shape.hidden_size, shape.intermediate_size, shape.q_size, shape.kv_size
    yield "embed_tokens.weight", (shape.vocab_size, hidden)
    yield "lm_head.weight", (shape.vocab_size, hidden)
    yield "norm.weight", (hidden,)
    of_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_norm.weight": (shape.head_dim,),
        "self_attn.k_norm.weight": (shape.head_dim,),
    }
    for name, outputs, inputs in (
        ("self_attn.q_proj", q, hidden),
        ("self_attn.k_proj", kv, hidden),
        ("self_attn.v_proj", kv, hidden),
        ("self_attn.o_proj", hidden, q),
        ("mlp.gate_proj", width, hidden),
        ("mlp.up_proj", width, hidden),
        ("mlp.down_proj", hidden, width),
    ):
        of_layer |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    for layer in range(shape.num_layers):
        for name, sizes in of_layer.items():
            yield f"layers.{layer}.{name}", sizes


def _places(model: LayerParallelDrafter) -> Iterator[tuple[str, Place]]:
    """Every tensor that the checkpoint must contain, and what to do with it on this rank."""
    embedding, head = model.embed_tokens.weight, model.head
    load_embedding = partial(embedding.weight_loader, embedding)
    if head.is_embedding or not model.shape.tied_embeddings:
        yield "embed_tokens.weight", load_embedding
    else:
        yield "embed_tokens.weight", partial(_each, load_embedding, head.load)
    if not model.shape.tied_embeddings:
        yield "lm_head.weight", head.load
    yield "norm.weight", model.final_norm.copy_
    for layer in range(model.shape.num_layers):
        for name, place in _attention_places(model, layer):
            yield f"layers.{layer}.{name}", place
        for name, place in _mlp_places(model, layer):
            yield f"layers.{layer}.{name}", place


def _attention_places(model: LayerParallelDrafter, layer: int) -> Iterator[tuple[str, Place]]:
    """A layer's attention: whole on its owner, skipped on the other ranks."""
    shape = model.shape
    q_end, k_end = shape.q_size, shape.q_size + shape.kv_size
    columns = {"q": slice(0, q_end), "k": slice(q_end, k_end), "v": slice(k_end, None)}
    local = layer // model.num_ranks
    mine = layer in model.local_layers

    def place(stacked: torch.Tensor, *index: slice) -> Place:
        return stacked[local][index].copy_ if mine else _pass_over

    def transposed(stacked: torch.Tensor, *index: slice) -> Place:
        return partial(_copy_transposed, stacked[local][index]) if mine else _pass_over

    yield "input_layernorm.weight", place(model.attention_norms)
    for p in "qkv":
        yield f"self_attn.{p}_proj.weight", transposed(model.wqkv, slice(None), columns[p])
        if model.bqkv is not None:
            yield f"self_attn.{p}_proj.bias", place(model.bqkv, columns[p])
    yield "self_attn.o_proj.weight", transposed(model.wo)
    if model.bo is not None:
        yield "self_attn.o_proj.bias", place(model.bo)
    if model.q_norms is not None and model.k_norms is not None:
        yield "self_attn.q_norm.weight", place(model.q_norms)
        yield "self_attn.k_norm.weight", place(model.k_norms)


def _mlp_places(model: LayerParallelDrafter, layer: int) -> Iterator[tuple[str, Place]]:
    """A layer's MLP: this rank's part of the intermediate width, gates first."""
    width = len(model.mlp_shard)
    shard = slice(model.mlp_shard.start, model.mlp_shard.stop)
    yield "post_attention_layernorm.weight", model.mlp_norms[layer].copy_
    for p, columns in (("gate", slice(0, width)), ("up", slice(width, None))):
        yield f"mlp.{p}_proj.weight", partial(_copy_transposed, model.w_gate_up[layer][:, columns], rows=shard)
        if model.b_gate_up is not None:
            yield f"mlp.{p}_proj.bias", partial(_copy_rows, model.b_gate_up[layer][columns], rows=shard)
    yield "mlp.down_proj.weight", partial(_copy_columns, model.w_down[layer], columns=shard)
    if model.b_down is not None:
        yield "mlp.down_proj.bias", model.b_down[layer].copy_


def _pass_over(tensor: torch.Tensor) -> None:
    """Another rank holds this tensor."""


def _each(first: Place, second: Place, tensor: torch.Tensor) -> None:
    first(tensor)
    second(tensor)


def _copy_rows(destination: torch.Tensor, tensor: torch.Tensor, rows: slice) -> None:
    destination.copy_(tensor[rows])


def _copy_columns(destination: torch.Tensor, tensor: torch.Tensor, columns: slice) -> None:
    destination.copy_(tensor[:, columns].t())


def _copy_transposed(destination: torch.Tensor, tensor: torch.Tensor, rows: slice = slice(None)) -> None:
    """Checkpoints are output-major, our stacks input-major."""
    destination.copy_(tensor[rows].t())
