"""Builds the native operators (csrc/) if there are a compiler and torch, and puts configs/ into the package; everything
else is in pyproject.toml.

Without them the package works too, on plain torch, and says so once when it is used. Environment variables:

    CUDA_HOME, CUDA_PATH      the CUDA toolkit, if its compiler is not the first on PATH
    EASYSPEC_NVCC_ARCH        its -arch, by default all-major; native compiles only for this machine's GPU, and faster
    EASYSPEC_NATIVE=required  a build without the operators fails; none does not build them
"""

import os
import platform
import shutil
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

SOURCES = Path("csrc")
CONFIGS = sorted(path for path in Path("configs").glob("*.yaml") if not path.stem.startswith("tiny-pair"))
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11, the oldest supported torch


def torch_folder() -> Path | None:
    """The folder of torch, also in pip's isolated build, which hides the environment's packages."""
    spec = PathFinder.find_spec("torch", [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    return Path(spec.origin).parent if spec and spec.origin else None


class BuildPython(build_py):
    """Adds the configurations, except for the tiny pair's, whose checkpoints only a checkout has."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            folder = str(Path(self.build_lib, "vllm_easyspec", "configs"))
            self.mkpath(folder)
            for path in CONFIGS:
                self.copy_file(str(path), folder)


class BuildNative(build_ext):
    """Compiles with one command: nvcc if CUDA kernels can be built, else the C++ compiler."""

    def build_extension(self, ext: Extension) -> None:
        torch = torch_folder()
        if torch is None:
            raise CompileError("torch is not in this environment")
        flags = ["-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-Wall", "-Wno-psabi", *ext.extra_compile_args]
        if cuda := nvcc(torch):
            kinds, libraries = ["*.cpp", "*.cu"], ["-ltorch_cpu", "-ltorch_cuda"]
            arch = os.environ.get("EASYSPEC_NVCC_ARCH", "all-major")
            compiler = [cuda, f"-arch={arch}", "-DEASYSPEC_CUDA", "-DUSE_CUDA", f"-Xcompiler={','.join(flags)}"]
        else:
            kinds, libraries = ["*.cpp"], ["-ltorch_cpu"]
            compiler = [os.environ.get("CXX", "c++"), *flags]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [*compiler, "-shared", "-std=c++20", "-O3", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
        command += [f"-I{torch / 'include'}", *(str(path) for kind in kinds for path in sorted(SOURCES.glob(kind)))]
        command += [f"-L{torch / 'lib'}", *libraries, "-o", str(target)]
        self.spawn(command)


def nvcc(torch: Path | None) -> str | None:
    """CUDA's compiler; None if CUDA kernels can't be built.

    It is searched like torch's own extensions do: in the toolkit that the environment names, then on PATH.
    """
    if torch is None or not (torch / "lib" / "libtorch_cuda.so").exists():
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [*(os.path.join(home, "bin") for home in homes), os.environ.get("PATH", os.defpath)]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def native(name: str, *flags: str) -> Extension:
    # Optional: setuptools reports a failed build and continues. Limited API: it uses nothing of Python's API.
    optional = os.environ.get("EASYSPEC_NATIVE") != "required"
    sources = [str(path) for path in sorted(SOURCES.iterdir())]
    return Extension(name, [], depends=sources, extra_compile_args=list(flags), optional=optional, py_limited_api=True)


# ops/native.py chooses by processor. With CUDA few CPU kernels matter, so one build is enough.
if os.environ.get("EASYSPEC_NATIVE") == "none":
    extensions = []
elif platform.machine() == "x86_64":
    extensions = [native("vllm_easyspec._native", "-march=x86-64-v3")]
    if nvcc(torch_folder()) is None:
        wide = ("-march=x86-64-v4", "-mprefer-vector-width=512")
        extensions.append(native("vllm_easyspec._native_avx512", *wide))
else:
    extensions = [native("vllm_easyspec._native")]
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
