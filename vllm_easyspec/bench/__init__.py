"""`vllm-easyspec bench`: timing, apart from tests."""

from vllm_easyspec.errors import CommandError


class BenchmarkError(CommandError):
    """A benchmark can't run as asked, or found what must not be."""
