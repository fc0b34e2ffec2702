"""The driver half of the backend: always active, with the target `cpu`."""

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class InterpreterDriver(DriverBase):
    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 0)

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("kernels run in Triton's interpreter here; there is no launcher to generate")

    def get_benchmarker(self):
        from triton.testing import do_bench

        return do_bench
