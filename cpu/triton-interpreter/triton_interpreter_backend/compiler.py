"""The compiler half of the backend. The interpreter never compiles, so every stage refuses."""

from triton.backends.compiler import BaseBackend, GPUTarget


class InterpreterBackend(BaseBackend):
    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def _refuse(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError("kernels run in Triton's interpreter here (TRITON_INTERPRET=1); nothing is compiled")

    hash = parse_options = add_stages = load_dialects = get_module_map = _refuse
