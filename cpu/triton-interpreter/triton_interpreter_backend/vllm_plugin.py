"""Adapts the interpreter to vLLM's kernels, in every vLLM process, through `vllm.general_plugins`."""

import os

import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# The implementations equal this vLLM's kernels bit for bit; those of other versions may differ with the same
# parameters.
WRITTEN_FOR = "0.32."


def register() -> None:
    """Cast masks, and launch plain implementations where there are any. Idempotent.

    `TRITON_INTERPRETER_PLAIN_KERNELS=0` in the environment keeps every kernel interpreted, for comparison or
    debugging.
    """
    _cast_masks()
    import vllm.version
    from vllm.platforms import current_platform

    wanted = os.environ.get("TRITON_INTERPRETER_PLAIN_KERNELS", "1") != "0"
    if wanted and current_platform.is_cpu() and vllm.version.__version__.startswith(WRITTEN_FOR):
        from . import plain, plain_batch, plain_logits, plain_rejection, plain_sampling  # noqa: F401 (they fill its table)

        plain.install()


def _as_bool(mask: TensorHandle) -> TensorHandle:
    return mask if mask.data.dtype == bool else TensorHandle(mask.data.astype(bool), tl.int1)


def _cast_masks() -> None:
    """Allow masks of any integer type, as compiled Triton does. Idempotent.

    Cause: the interpreter fails at a masked load or store whose mask is not boolean ("mask has unsupported dtype");
    vLLM's `gumbel_sample` has one. Remove when Triton's interpreter casts masks itself.
    """
    if getattr(InterpreterBuilder, "_masks_are_cast", False):
        return
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def create_masked_load(self, ptrs, mask, *others):  # Triton 3.7 and 3.8 have one argument more than 3.9
        return load(self, ptrs, _as_bool(mask), *others)

    def create_masked_store(self, ptrs, value, mask, *others):
        return store(self, ptrs, value, _as_bool(mask), *others)

    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store
    InterpreterBuilder._masks_are_cast = True
