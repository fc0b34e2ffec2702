"""`method: easyspec` on its way through vLLM's arguments, with vLLM's real parser and configurations, no engine."""

import json
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from tiny_models import CONFIGS, DRAFTER, HF_CONFIGS, TARGET, easyspec, model_folder
from vllm.config import ModelConfig, SpeculativeConfig
from vllm.config.utils import replace
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_easyspec import compat
from vllm_easyspec.config import RuntimeOptions
from vllm_easyspec.errors import ConfigError

OURS = "vllm_easyspec.worker.SpeculativeWorker"


@pytest.fixture(scope="module", autouse=True)
def plugins():
    load_general_plugins()


@pytest.fixture(autouse=True)
def no_binding_left_over(monkeypatch):
    monkeypatch.delenv(compat.OMP_BINDING, raising=False)
    yield
    compat._unbind_cpus()


@pytest.fixture(scope="module")
def parser(plugins):
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm serve"))


def engine_args(speculative_config, target=TARGET, **arguments):
    return EngineArgs(model=str(target), **{"max_model_len": 256, "speculative_config": speculative_config} | arguments)


def engine_config(speculative_config, target=TARGET, **arguments):
    return engine_args(speculative_config, target, **arguments).create_engine_config()


def test_easyspec_becomes_vllms_own_terms():
    written = easyspec(layer_parallel={"scope": "block"}, draft_sample_method="probabilistic", max_model_len=128)
    config = engine_config(written)
    speculative = config.speculative_config
    assert type(speculative) is compat.EasySpecSpeculativeConfig
    assert (speculative.method, speculative.num_speculative_tokens) == ("draft_model", 4)
    assert (speculative.draft_sample_method, speculative.draft_model_config.max_model_len) == ("probabilistic", 128)
    assert speculative.draft_parallel_config.tensor_parallel_size == 1
    assert config.parallel_config.worker_cls == OURS
    assert config.use_v2_model_runner
    assert RuntimeOptions.from_vllm(config).layer_parallel.scope == "block"
    assert written == easyspec(
        layer_parallel={"scope": "block"}, draft_sample_method="probabilistic", max_model_len=128
    )


@pytest.mark.parametrize("form", ["path", "str", "json", "dict"])
def test_llm_takes_every_form(tmp_path, form):
    path = tmp_path / "easyspec.yaml"
    path.write_text(yaml.safe_dump(easyspec(calibration="never")))
    value = {"path": path, "str": str(path), "json": json.dumps(easyspec(calibration="never"))}
    config = engine_config(value.get(form, easyspec(calibration="never")))
    assert RuntimeOptions.from_vllm(config).calibration == "never"


def serve(parser, *arguments):
    return AsyncEngineArgs.from_cli_args(
        parser.parse_args(["--model", str(TARGET), "--max-model-len", "256", *arguments])
    )


@pytest.mark.parametrize("flag", ["--speculative-config", "-sc", "--speculative_config"])
def test_vllm_serve_takes_a_path(parser, flag):
    args = serve(parser, flag, str(CONFIGS / "tiny-pair.yaml"))
    assert args.create_engine_config().speculative_config.model == str(DRAFTER)


@pytest.mark.parametrize("join", ["=", None])
def test_vllm_serve_takes_inline_json(parser, join):
    text = json.dumps(easyspec())
    arguments = [f"-sc={text}"] if join else ["-sc", text]
    assert serve(parser, *arguments).create_engine_config().speculative_config.num_speculative_tokens == 4


def test_vllm_serve_takes_dotted_arguments(parser):
    arguments = {"method": "easyspec", "model": DRAFTER, "num_speculative_tokens": 2, "layer_parallel.scope": "block"}
    written = [part for name, value in arguments.items() for part in (f"--speculative-config.{name}", str(value))]
    config = serve(parser, *written).create_engine_config()
    assert RuntimeOptions.from_vllm(config).layer_parallel.scope == "block"


@pytest.mark.parametrize("nested", [False, True], ids=["a path", "nested fields"])
def test_vllm_serve_takes_a_config_file(parser, tmp_path, nested):
    value = easyspec(layer_parallel={"plan": "1-8-1"}) if nested else str(CONFIGS / "tiny-pair.yaml")
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump({"speculative-config": value, "dtype": "float32"}))
    config = serve(parser, "--config", str(path)).create_engine_config()
    assert RuntimeOptions.from_vllm(config).layer_parallel.draft_plan(10).grouping == ("1-8-1" if nested else "1-4-4-1")


def test_a_file_of_another_method_reaches_vllm_unchanged(parser, tmp_path):
    written = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    path = tmp_path / "ngram.yaml"
    path.write_text(yaml.safe_dump(written))
    args = serve(parser, "-sc", str(path))
    assert args.speculative_config == written
    for config in (args.create_engine_config(), engine_config(str(path))):
        assert type(config.speculative_config) is SpeculativeConfig
        assert (config.speculative_config.method, config.speculative_config.prompt_lookup_max) == ("ngram", 4)
        assert config.parallel_config.worker_cls != OURS and not config.additional_config


@pytest.mark.parametrize("value", ["", "None", "null"])
def test_no_speculation_stays_so(parser, value):
    assert serve(parser, "-sc", value).speculative_config is None


BAD_ARGUMENTS = {
    "missing file": ("nowhere.yaml", "speculative_config='nowhere.yaml' can't be read: No such file or directory"),
    "a method's name": ("easyspec", "speculative_config='easyspec' can't be read"),
    "broken JSON": ('{"method": easyspec}', "is not valid JSON: line 1, column 12"),
    "K = 0": (json.dumps(easyspec(num_speculative_tokens=0)), "num_speculative_tokens=0 is not allowed"),
    "no drafter": (json.dumps(easyspec("./nowhere")), "model='./nowhere' does not exist"),
    "misspelt": (json.dumps({"method": "Easyspec"}), "method='Easyspec' is unknown"),
}


@pytest.mark.parametrize(("text", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments_end_with_one_line(parser, capsys, text, message):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["-sc", text])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("vllm serve: error: argument --speculative-config/-sc: ") and message in last


def test_arguments_may_be_turned_into_a_configuration_again():
    """vLLM does so for every API server, and `LLM.from_engine_args` copies the arguments first."""
    args = engine_args(easyspec())
    first = args.create_engine_config()
    again = args.create_engine_config()
    copied = EngineArgs(**vars(args)).create_engine_config()
    for config in (again, copied):
        assert type(config.speculative_config) is compat.EasySpecSpeculativeConfig
        assert config.additional_config == first.additional_config


def test_the_configuration_survives_the_way_to_a_worker():
    config = engine_config(easyspec())
    carried = pickle.loads(pickle.dumps(config))
    for other in (carried, replace(config, cache_config=config.cache_config)):
        assert type(other.speculative_config) is compat.EasySpecSpeculativeConfig
        assert other.compute_hash() == config.compute_hash()
    assert repr(carried.speculative_config).startswith("SpeculativeConfig(method='draft_model'"), "vLLM's own repr"


def test_a_drafter_with_a_shorter_context_does_not_shorten_the_targets(tmp_path):
    config = engine_config(easyspec(model_folder(tmp_path / "short", max_position_embeddings=64)))
    assert config.speculative_config.draft_model_config.max_model_len == 64
    assert config.model_config.max_model_len == 256
    assert config.speculative_config.draft_shares_target_positions(), "what vLLM 0.33 asks before it cuts"


def test_different_options_hash_differently():
    hashes = {
        engine_config(easyspec(layer_parallel={"scope": scope})).compute_hash() for scope in ("attention", "block")
    }
    assert len(hashes) == 2


def test_the_users_additional_config_is_kept():
    theirs = {"mine": 1}
    config = engine_config(easyspec(), additional_config=theirs)
    assert set(config.additional_config) == {"mine", "easyspec"}
    assert theirs == {"mine": 1}


CONFLICTS = {
    "worker_cls": (
        {"worker_cls": "my.Worker"},
        "worker_cls='my.Worker' is not allowed with method: easyspec.*Remove worker_cls",
    ),
    "additional_config.easyspec": (
        {"additional_config": {"easyspec": {"scope": "block"}}},
        r"additional_config\['easyspec'\]={'scope': 'block'} is not allowed",
    ),
    "additional_config": ({"additional_config": object()}, "additional_config=.* is not a dict"),
    "spec_tokens": ({"spec_tokens": 3}, "spec_tokens=3 is given together with speculative_config.*Remove it"),
    "spec_model": ({"spec_model": "x"}, "spec_model='x' is given together with speculative_config"),
    "pipeline": ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2 is not supported with method: easyspec"),
    "fp8": ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8' is not supported.*--kv-cache-dtype auto"),
}


@pytest.mark.parametrize(("arguments", "message"), CONFLICTS.values(), ids=CONFLICTS.keys())
def test_conflicts_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        engine_config(easyspec(), **arguments)


def test_our_own_worker_may_be_named():
    assert engine_config(easyspec(), worker_cls=OURS).parallel_config.worker_cls == OURS


def test_the_v1_runner_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ConfigError, match="needs vLLM's Model Runner V2.*VLLM_USE_V2_MODEL_RUNNER=0 is set. Unset it"):
        engine_config(easyspec())


def refusal(drafter, target=TARGET, **changes):
    with pytest.raises(ConfigError) as error:
        engine_config(easyspec(drafter, **changes), target)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_plan_that_does_not_add_up():
    message = refusal(DRAFTER, layer_parallel={"plan": "1-4-4"})
    assert message.startswith("layer_parallel.plan=1-4-4: the group sizes add up to 9, but the drafter has 10 layers")


def test_an_unsupported_architecture(tmp_path):
    drafter = model_folder(tmp_path / "phi", architectures=["GraniteForCausalLM"], model_type="granite")
    message = refusal(drafter)
    assert message.startswith(f"model='{drafter}': architectures=['GraniteForCausalLM'] is not a drafter")
    assert "Supported are LlamaForCausalLM" in message


def test_an_architecture_that_vllm_does_not_know(tmp_path):
    drafter = model_folder(tmp_path / "odd", architectures=["OddForCausalLM"], model_type="odd")
    assert f"model='{drafter}' can't be read: " in refusal(drafter)


def test_a_drafter_quantized_in_another_format(tmp_path):
    quantized = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemv"}
    message = refusal(model_folder(tmp_path / "awq", quantization_config=quantized))
    assert "version 'gemm'" in message and "Use the drafter's unquantized checkpoint" in message


def test_a_quantized_drafter_whose_config_does_not_say_so(tmp_path):
    """vLLM reads the earlier name of the field too."""
    earlier = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}}
    message = refusal(model_folder(tmp_path / "earlier", compression_config=earlier))
    assert "is quantized (compressed-tensors) without a quantization_config" in message


@pytest.mark.parametrize("name", ["eagle-drafter", "my-EAGLE3", "a-dflash-drafter"])
def test_a_path_that_vllm_takes_for_another_method(tmp_path, name):
    message = refusal(model_folder(tmp_path / name))
    assert name in message and "by a name or path that contains none of eagle-, eagle3, dflash, dspark" in message


def test_a_field_that_vllm_refuses():
    assert "synthetic_acceptance_rates must be non-increasing" in refusal(
        DRAFTER, rejection_sample_method="synthetic", synthetic_acceptance_rates=[0.1, 0.9, 0.1, 0.1]
    )
    assert "NO_SUCH_BACKEND" in refusal(DRAFTER, attention_backend="no_such_backend")


@pytest.fixture(scope="module")
def padded_target(tmp_path_factory):
    """The tokenizer has 512 ids, the model 640 rows."""
    return model_folder(tmp_path_factory.mktemp("padded") / "target", like=TARGET, vocab_size=640)


def test_a_vocabulary_less_padding_is_accepted(padded_target):
    config = engine_config(easyspec(), padded_target)
    assert config.speculative_config.draft_model_config.get_vocab_size() == 512
    assert config.model_config.get_vocab_size() == 640
    assert pickle.loads(pickle.dumps(config)).speculative_config.num_speculative_tokens == 4
    draft_model = {"method": "draft_model", "model": str(DRAFTER), "num_speculative_tokens": 4}
    with pytest.raises(ValueError, match="same vocabulary size"):
        engine_config(draft_model, padded_target)


def test_a_vocabulary_that_lacks_tokens_is_refused(padded_target, tmp_path):
    drafter = model_folder(tmp_path / "drafter", vocab_size=511)
    message = refusal(drafter, padded_target)
    assert "vocab_size=511, the target's vocab_size=640, and the target's tokenizer has 512 token ids" in message
    assert "choose a drafter of the target's family" in message


def test_a_larger_vocabulary_is_refused(tmp_path):
    message = refusal(model_folder(tmp_path / "drafter", vocab_size=576))
    assert "vocab_size=576, the target's vocab_size=512, and it must not be larger" in message


def test_without_a_tokenizer_little_padding_is_accepted(tmp_path):
    near = model_folder(tmp_path / "near", like=TARGET, tokenizer=False, vocab_size=512 + 511)
    far = model_folder(tmp_path / "far", like=TARGET, tokenizer=False, vocab_size=512 + 512)
    assert engine_config(easyspec(), near, skip_tokenizer_init=True).model_config.get_vocab_size() == 1023
    with pytest.raises(ConfigError, match="Without a tokenizer, fewer than 512 missing tokens"):
        engine_config(easyspec(), far, skip_tokenizer_init=True)
    with pytest.raises(ConfigError, match="Without a tokenizer, fewer than 512 missing tokens"):
        engine_config(easyspec(), far)


def test_a_target_of_a_family_with_a_padded_vocabulary(tmp_path):
    """Qwen2.5's published sizes, without a tokenizer."""
    small = str(HF_CONFIGS / "Qwen2.5-0.5B-Instruct")
    config = engine_config(easyspec(small), HF_CONFIGS / "Qwen2.5-72B-Instruct", skip_tokenizer_init=True)
    assert config.speculative_config.draft_model_config.get_vocab_size() == 151936


on_cpu = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")


@on_cpu
def test_cpus_are_bound_for_two_ranks_and_only_with_easyspec():
    from vllm.platforms import current_platform
    from vllm.utils.cpu_resource_utils import get_visible_memory_node

    if not current_platform.is_cpu() or len(get_visible_memory_node()) >= 2:
        pytest.skip("vLLM binds by itself here")
    engine_config(None, tensor_parallel_size=2)
    assert compat.OMP_BINDING not in os.environ
    engine_config(easyspec(), tensor_parallel_size=2)
    assert len(os.environ[compat.OMP_BINDING].split("|")) == 2
    engine_config(easyspec(), tensor_parallel_size=1)
    assert compat.OMP_BINDING not in os.environ, "one rank needs none, and two lists would stop it"
    engine_config(easyspec(), tensor_parallel_size=2)
    engine_config(None, tensor_parallel_size=4)
    assert compat.OMP_BINDING not in os.environ


@on_cpu
def test_a_users_binding_is_left_alone(monkeypatch):
    monkeypatch.setenv(compat.OMP_BINDING, "nobind")
    engine_config(easyspec(), tensor_parallel_size=2)
    assert os.environ[compat.OMP_BINDING] == "nobind"
    engine_config(None)
    assert os.environ[compat.OMP_BINDING] == "nobind"


@pytest.mark.parametrize(
    ("ranks", "cpus", "lists"),
    [
        (2, [0, 1], "0|1"),
        (2, [0, 1, 2, 3, 4], "0,1|2,3,4"),
        (4, [3, 5], "3|5|3|5"),
        (3, [7], "7|7|7"),
        (1, [2, 4], "2,4"),
    ],
)
def test_cpu_lists(ranks, cpus, lists):
    assert compat.cpu_lists(ranks, cpus) == lists


@on_cpu
def test_usable_cpus_are_this_process_s_own():
    mine = os.sched_getaffinity(0)
    assert set(compat.usable_cpus(1)) <= mine
    assert set(compat.usable_cpus(10_000)) == mine


def test_a_models_own_speculator_is_not_mixed_with_ours():
    """`vllm serve` on a speculators checkpoint replaces the method; ours must not run with it."""
    args = engine_args(easyspec())
    compat.translate(args)
    args.speculative_config["method"] = "ngram"
    with pytest.raises(ConfigError, match="vLLM takes it for a drafter of its method ngram"):
        args.create_engine_config()


def test_the_next_vllm_is_used_with_a_warning(monkeypatch, caplog):
    import vllm.version

    monkeypatch.setattr(vllm.version, "__version__", "0.33.0")
    assert type(engine_config(easyspec()).speculative_config) is compat.EasySpecSpeculativeConfig
    assert "easyspec on vLLM 0.33.0: checked against its sources, not run." in caplog.text


def test_a_model_config_has_what_the_checks_ask():
    """So that a vLLM that renames one breaks a test before it breaks a user's engine."""
    for name in ("is_hybrid", "is_attention_free", "is_encoder_decoder", "get_sliding_window", "get_vocab_size"):
        assert hasattr(ModelConfig, name)


def test_a_speculator_is_put_in_after_the_runners_own_has_gone():
    """Both hold buffers of the size of the vocabulary."""
    runner = SimpleNamespace(speculator="vLLM's")

    def build() -> str:
        assert runner.speculator is None
        return "ours"

    compat.install_speculator(runner, build)
    assert runner.speculator == "ours"


def test_the_lora_state_counts_drafts():
    runner = SimpleNamespace(lora_state=None)
    compat.install_lora_state(runner, 3)
    runner.lora_state.drafts = {"a": [1, 2]}
    runner.lora_state.add_request("a", 0, None)
    runner.lora_state.add_request("b", 1, None)
    of_logits, of_tokens, _ = runner.lora_state.make_lora_inputs(["a", "b"], np.array([0, 1]), np.array([3, 1]))
    assert (len(of_logits), len(of_tokens)) == (3 + 1, 3 + 1)


def test_what_tune_writes_is_what_the_scheduler_reads():
    lookup = [0, 5, 3]
    core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=SimpleNamespace(dynamic_sd_lookup=lookup)))
    assert compat.scheduled_drafts(SimpleNamespace(engine_core=core)) is lookup
