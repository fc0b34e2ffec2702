"""Plain implementations in place of interpreted kernels: their table, and the hook that launches them.

Ownership: `plain_batch`, `plain_sampling`, `plain_logits` and `plain_rejection` define implementations and register
them, with `stands_for`, in `IMPLEMENTATIONS`, by the kernel's full name. `install` makes every launch of an interpreted
kernel look there first. Kernels that are not in the table stay interpreted.

Invariants:
- An implementation takes the launch grid, then exactly the kernel's own parameters, in the same order and with the same
  names. A kernel whose parameters are no longer those its implementation was written for is interpreted, with a
  warning.
- It writes to its arguments exactly what the interpreted kernel would write, and nothing else.
- For a launch that it does not cover it returns `NotImplemented` before it writes anything; the launch is then
  interpreted.

Why a hook at launch and not `vllm.triton_utils.dispatcher.register_kernels`: that imports every kernel's module and
scans all loaded modules, also in processes that never launch one (the API server, the engine core and the process that
inspects the model), slowly and with a deprecation warning; its wrapper does not pass the grid, on which
`_gather_block_tables_kernel` depends; and it passes launch options such as `num_warps` to the implementation.
"""

import ctypes
import functools
import inspect
import logging
from collections.abc import Callable

import numpy as np
import torch
from triton.runtime.interpreter import InterpretedFunction

logger = logging.getLogger("vllm.triton_interpreter")

# Full name of a kernel -> its implementation.
IMPLEMENTATIONS: dict[str, Callable[..., object]] = {}

_V2 = "vllm.v1.worker.gpu."


def stands_for(kernel: str) -> Callable:
    """Register the decorated function as implementation of `kernel`, by full name or inside `vllm.v1.worker.gpu`."""
    name = kernel if kernel.startswith("vllm.") else _V2 + kernel

    def enter(implementation: Callable[..., object]) -> Callable[..., object]:
        if name in IMPLEMENTATIONS:
            raise ValueError(f"{name} already has a plain implementation: {IMPLEMENTATIONS[name]}")
        IMPLEMENTATIONS[name] = implementation
        return implementation

    return enter


def parameters(implementation: Callable[..., object]) -> list[str]:
    """The kernel's parameters, from the implementation's own: all but the grid."""
    grid, *names = inspect.signature(implementation).parameters
    if grid != "grid":
        raise TypeError(f"{implementation} must take the launch grid first, as `grid`; it takes `{grid}`")
    return names


@functools.cache
def _implementation(kernel: InterpretedFunction) -> Callable[..., object] | None:
    name = f"{kernel.fn.__module__}.{kernel.fn.__qualname__}"
    implementation = IMPLEMENTATIONS.get(name)
    if implementation is not None and parameters(implementation) != kernel.arg_names:
        logger.warning(
            "%s stays interpreted: its plain implementation was written for the parameters %s, and it has %s.",
            name, parameters(implementation), kernel.arg_names,
        )  # fmt: skip
        return None
    return implementation


def install() -> None:
    """Launch the plain implementation of a kernel, where there is one, in place of the interpreter. Idempotent."""
    interpret = InterpretedFunction.run
    if getattr(interpret, "_plain_first", False):
        return

    @functools.wraps(interpret)
    def run(self: InterpretedFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> object:
        implementation = None if warmup or callable(grid) else _implementation(self)
        if implementation is not None:
            # Like the interpreter, drop launch options such as num_warps.
            named = {name: value for name, value in kwargs.items() if name in self.arg_names}
            if implementation(grid, *args, **named) is not NotImplemented:
                return None
        return interpret(self, *args, grid=grid, warmup=warmup, **kwargs)

    run._plain_first = True
    InterpretedFunction.run = run


# --- Shared by the implementations ---


def flat(tensor: torch.Tensor) -> np.ndarray:
    """The elements of a contiguous tensor in a row, as a kernel's pointer sees them. Shares memory."""
    return tensor.view(-1).numpy()


def at_address(address: int, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
    """The array that starts at a raw address, for kernels which are given tensors of pointers. Shares memory.

    The caller must keep the memory valid for as long as it uses the array.
    """
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * num_bytes).from_address(int(address)), dtype).reshape(shape)


def floats(tensor: torch.Tensor) -> np.ndarray:
    """The values in float32. Shares memory with a float32 tensor, copies any other."""
    return tensor.float().numpy()


def in_blocks(values: np.ndarray, block_size: int, fill: float) -> np.ndarray:
    """[..., n] -> [..., ceil(n / block_size), block_size], filled up with what a masked load puts there.

    Sums over full blocks add in the order in which the interpreter adds, so results are the same to the bit.
    """
    *rows, n = values.shape
    num_blocks = -(-n // block_size)
    if n == num_blocks * block_size:
        return values.reshape(*rows, num_blocks, block_size)
    padded = np.full((*rows, num_blocks * block_size), fill, values.dtype)
    padded[..., :n] = values
    return padded.reshape(*rows, num_blocks, block_size)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """arange(starts[i], starts[i] + lengths[i]) for each i, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
