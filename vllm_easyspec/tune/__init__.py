"""`vllm-easyspec fit` and `tune`: look-ahead maps for a drafter; the plan and the K that draft fastest for a pair."""
