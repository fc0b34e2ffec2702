"""Defines operators: each `torch.ops.vllm_easyspec.<name>` with its schema and its reference in plain torch."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from vllm_easyspec.ops.choice import is_chosen

NAMESPACE = "vllm_easyspec"


_library = torch.library.Library(NAMESPACE, "DEF")


# The plain-torch reference of each operator, which tests compare the kernels with.
REFERENCES: dict[torch._ops.OpOverload, Callable[..., Any]] = {}


def reference_of(name: str) -> Callable[..., Any]:
    """The plain-torch reference of the operator `name`."""
    return REFERENCES[getattr(getattr(torch.ops, NAMESPACE), name).default]


P = ParamSpec("P")


R = TypeVar("R")


def operator(
    schema: str, fake: Callable[..., Any] | None = None, of_few_tokens: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Define `torch.ops.vllm_easyspec.<schema>`; the decorated function, which then calls it, is its reference.

    fake: as in `torch.library.register_fake`; by default the operator returns nothing. of_few_tokens: the operator
    serves few tokens, its first argument being `[..., tokens, hidden]`; all else takes the reference's parts.
    """

    def define(reference: Callable[P, R]) -> Callable[P, R]:
        name = schema.partition("(")[0]
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake or (lambda *arguments: None), lib=_library)
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        REFERENCES[overload] = reference

        @wraps(reference)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return overload(*args, **kwargs)

        @wraps(reference)
        def choose(*args: P.args, **kwargs: P.kwargs) -> R:
            return (overload if is_chosen(name, args) else reference)(*args, **kwargs)

        return choose if of_few_tokens else call

    return define
