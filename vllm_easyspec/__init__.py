"""Layer-parallel speculative decoding for vLLM: EasySpec (arXiv 2502.02493) as a plugin."""

from vllm_easyspec.versions import installed

__version__ = installed("vllm-easyspec")  # from pyproject.toml; "not installed" in a bare copy of the sources
