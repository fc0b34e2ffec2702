"""`vllm-easyspec bench`: timing, apart from tests."""


class BenchmarkError(Exception):
    """A benchmark can't run as asked, or found what must not be. The message says all that a user needs."""
