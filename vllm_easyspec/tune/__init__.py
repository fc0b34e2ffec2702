"""`vllm-easyspec tune`: the plan and the K that draft fastest for a pair, by batch size."""
