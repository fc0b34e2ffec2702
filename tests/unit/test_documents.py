"""Hostile YAML and JSON is refused at once, in one line that says what is wrong and where."""

import time

import pytest

from vllm_easyspec.config import EasySpecConfig, is_easyspec
from vllm_easyspec.documents import MOST_YAML_BYTES, read_json, read_yaml
from vllm_easyspec.errors import SHOWN, ConfigError, shown

BASE = "method: easyspec\nmodel: org/name\n"
LAUGHS = "a: &a [x, x]\n" + "\n".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
WRONG_YAML = {
    "a key given twice": ("model: a\nmodel: b", r"line 2, column 1: the key 'model' is given twice"),
    "twice, further inside": ("a: {b: {c: 1, c: 2}}", r"line 1, column 15: the key 'c' is given twice"),
    "aliases of aliases": (LAUGHS, r"line 2, column 8: the alias \*a; write the value out"),
    "an alias of itself": ("a: &a [*a]", r"the alias \*a; write the value out"),
    "nested brackets": ("a: " + "[" * 3000, "nested more than 32 levels deep"),
    "nested blocks": ("".join(" " * i + "a:\n" for i in range(200)), "nested more than 32 levels deep"),
    "a tag": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor for the tag"),
    "a tag of its own": ("a: !mine x", "could not determine a constructor for the tag"),
    "a list as a key": ("? [a, b]\n: c", "found unhashable key"),
    "a date that is none": ("a: 2026-99-99", "month must be in"),
    "too many digits": ("a: " + "9" * 5000, "Exceeds the limit"),
    "ten megabytes": (
        "a: " + "x" * (10 << 20),
        f"holds 10,485,763 characters where a configuration has at most {MOST_YAML_BYTES:,}",
    ),
}
WRONG_JSON = {
    "a key given twice": ('{"model": "a", "model": "b"}', "the key 'model' is given twice"),
    "nested brackets": ("[" * 100_000, "nested|Expecting value"),
    "no number": ('{"a": NaN}', "NaN is not a JSON number"),
    "infinity": ('{"a": -Infinity}', "-Infinity is not a JSON number"),
    "too many digits": ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
    "ten megabytes": ('"' + "x" * (10 << 20) + '"', "holds 10,485,762 characters"),
}


def one_line(call, message):
    began = time.monotonic()
    with pytest.raises(ConfigError, match=message) as error:
        call()
    assert time.monotonic() - began < 2
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert str(error.value).startswith("my file")


@pytest.mark.parametrize(("text", "message"), WRONG_YAML.values(), ids=WRONG_YAML.keys())
def test_yaml_that_is_refused(text, message):
    one_line(lambda: read_yaml(text, "my file"), message)


@pytest.mark.parametrize(("text", "message"), WRONG_JSON.values(), ids=WRONG_JSON.keys())
def test_json_that_is_refused(text, message):
    one_line(lambda: read_json(text, "my file"), message)


def test_what_is_sound_is_read():
    assert read_yaml("a: {b: [1, 2.5, x, true, ~]}\n<<: {c: 1}", "") == {"a": {"b": [1, 2.5, "x", True, None]}, "c": 1}
    assert read_json('{"a": {"b": [1, 2.5, "x", true, null]}}', "") == {"a": {"b": [1, 2.5, "x", True, None]}}


VALUES = {
    "K of 100,000": ("num_speculative_tokens: 100000", "num_speculative_tokens=100000 is not allowed: .* 256"),
    "K of 400 digits": ("num_speculative_tokens: " + "9" * 400, "num_speculative_tokens=9999"),
    "K in letters": ("num_speculative_tokens: five", "num_speculative_tokens='five' is not allowed"),
    "K true": ("num_speculative_tokens: true", "num_speculative_tokens=True is not allowed"),
    "no number": ("num_speculative_tokens: .nan", "num_speculative_tokens=nan is not allowed"),
    "infinity": ("num_speculative_tokens: .inf", "num_speculative_tokens=inf is not allowed"),
    "a plan of 10,000 groups": (
        "num_speculative_tokens: 5\nlayer_parallel: {plan: " + "-".join(["0"] * 10_000) + "}",
        "layer_parallel.plan='0-0-0",
    ),
    "group sizes without end": (
        "num_speculative_tokens: 5\nlayer_parallel: {group_sizes: [" + ", ".join(["x"] * 10_000) + "]}",
        "layer_parallel.group_sizes",
    ),
    "a table of K too large": (
        "num_speculative_tokens: 5\nlayer_parallel: {by_batch_size: [{num_speculative_tokens: " + "9" * 4000 + "}]}",
        "by_batch_size.0..num_speculative_tokens=9999.* is more than num_speculative_tokens=5",
    ),
    "a table without order": (
        "num_speculative_tokens: 5\nlayer_parallel: {by_batch_size: [{up_to: " + "9" * 4000 + "}, {up_to: 1}]}",
        "by_batch_size.1..up_to=1 is not above the 9999",
    ),
    "a table of 1,000 ranges": (
        "num_speculative_tokens: 5\nlayer_parallel:\n  by_batch_size:\n"
        + "".join(f"  - up_to: {size}\n" for size in range(1, 1001)),
        "layer_parallel.by_batch_size=.* at most 256 items",
    ),
    "a long path": ("num_speculative_tokens: 5\nlookahead: " + "x" * 10_000, "lookahead='xxx.* at most 4096"),
    "a long path from here": (
        "num_speculative_tokens: 5\nlookahead: ./" + "x" * 10_000,
        "lookahead='/.*not allowed",
    ),
    "an impossible path": ('num_speculative_tokens: 5\nlookahead: "./a\\0b"', r"lookahead='./a\\x00b' is no path"),
    "a long vocabulary": ("num_speculative_tokens: 5\ndraft_vocabulary: " + "x" * 10_000, "draft_vocabulary='xxx"),
    "an infinite length": ("num_speculative_tokens: 5\nsynthetic_acceptance_length: .inf", "length=inf is not allowed"),
    "a rate that is none": ("num_speculative_tokens: 5\nsynthetic_acceptance_rates: [.nan]", "=nan is not allowed"),
    "an unknown key": ("num_speculative_tokens: 5\nfoo: " + "x" * 50_000, "unknown key 'foo' with value 'xxx"),
}


WRONG_METHODS = {"long": "x" * 10_000, "nearly": "easyspec" + "-" * 10_000, "a list": [1] * 1000, "true": True}


@pytest.mark.parametrize("method", WRONG_METHODS.values(), ids=WRONG_METHODS.keys())
def test_a_wrong_method_is_told_in_short(method):
    with pytest.raises(ConfigError, match="method=") as error:
        _ = is_easyspec({"method": method}) or EasySpecConfig.parse({"method": method})
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("model", ["x" * 4000, "./a\ud800"], ids=["long", "a surrogate"])
def test_a_model_that_no_path_can_be(model):
    with pytest.raises(ConfigError, match="model="):
        EasySpecConfig.parse({"method": "easyspec", "model": model, "num_speculative_tokens": 5}).check_model()


@pytest.mark.parametrize(("text", "message"), VALUES.values(), ids=VALUES.keys())
def test_values_are_told_in_short(tmp_path, text, message):
    path = tmp_path / "easyspec.yaml"
    path.write_text(BASE + text)
    with pytest.raises(ConfigError, match=message) as error:
        EasySpecConfig.parse(str(path))
    assert len(str(error.value)) < 2000 and "\n" not in str(error.value)


def test_a_long_value_is_cut():
    assert shown([1, 2]) == "[1, 2]"
    assert len(shown("x" * 1000)) == SHOWN + 3
    assert len(shown(list(range(10**6)))) == SHOWN + 3
    assert shown(10**5000) == f"a number of more than {SHOWN} digits"
