"""`vllm-easyspec bench`: timing, apart from tests."""
