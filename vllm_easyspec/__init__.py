"""Layer-parallel speculative decoding for vLLM: EasySpec (arXiv 2502.02493) as a plugin."""

__version__ = "0.1.0"
