"""Entry point of the group `vllm.general_plugins`: vLLM calls `register` in every one of its processes."""

from vllm_easyspec.versions import Support, vllm_version

DRAFTER_ARCHITECTURE = "EasySpecDrafterForCausalLM"
DRAFTER_CLASS = "vllm_easyspec.drafter.model:LayerParallelDrafter"  # imported when a drafter is built


def register() -> None:
    """Teach vLLM `method: easyspec`. Idempotent; changes nothing for engines that don't ask for it.

    On an unsupported vLLM only the refusal is installed, so that asking for easyspec gives one clear error.
    """
    supported = Support.of(vllm_version()) is not Support.UNSUPPORTED
    try:
        from vllm_easyspec import compat
    except ImportError:
        if supported:
            raise
        return  # even a vLLM that is too different for the refusal must start
    compat.apply()
    if supported:
        _register_drafter()


def _register_drafter() -> None:
    from vllm import ModelRegistry

    if DRAFTER_ARCHITECTURE not in ModelRegistry.models:
        ModelRegistry.register_model(DRAFTER_ARCHITECTURE, DRAFTER_CLASS)
