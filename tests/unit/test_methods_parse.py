"""The text form of methods."""

import pytest
from method_points import attention, model

from costmodel.errors import ConfigError, LccostError, UnknownNameError
from costmodel.methods import method_class, method_names
from costmodel.methods.parse import parse_method, parse_methods

#: interfaces: names, parameters and defaults
_DEFAULTS = {
    "full": {},
    "fp8_kv": {},
    "flexgen": {"bits": 4, "group": 64},
    "kivi": {"bits": 2, "group": 32, "residual_tokens": 128},
    "kvquant": {"bits": 3, "outlier_fraction": 0.01},
    "h2o": {"variant": "slot", "heavy_fraction": 0.1, "recent_fraction": 0.1, "preset": None},
    "streaming_llm": {
        "sink_tokens": 4,
        "window_tokens": 1020,
        "positions": "cache",
        "preset": None,
    },
    "infllm": {
        "block_tokens": 128,
        "init_tokens": 128,
        "local_tokens": 4096,
        "topk": 16,
        "repr_topk": 4,
        "cached_blocks": 32,
        "chunk_tokens": 512,
        "preset": None,
    },
    "snapkv": {"keep_tokens": 2048, "window_tokens": 32, "kernel": 5},
    "pyramidkv": {"keep_tokens": 2048, "window_tokens": 32, "beta": 20},
    "tova": {"keep_tokens": 2048},
    "quest": {"page_tokens": 16, "keep_tokens": 2048},
    "minference": {"kept_tokens": 3004},
    "llmlingua2": {"rate": 0.5, "preset": None},
    "kv_offload": {"resident_layers": 2, "pinned": True},
}
_COST_ONLY = {"gear", "knorm", "hf_quanto", "hf_hqq"}


def test_all_methods_exist_with_their_defaults() -> None:
    assert set(method_names()) == set(_DEFAULTS) | _COST_ONLY
    for name, defaults in _DEFAULTS.items():
        assert parse_method(name).parameters == defaults
    assert {n for n in method_names() if method_class(n).COST_ONLY} == _COST_ONLY


@pytest.mark.parametrize("name", method_names())
def test_every_method_describes_itself(name: str) -> None:
    cls = method_class(name)
    assert set(cls.PARAMETERS) == set(cls().parameters)
    for text in (cls.TITLE, cls.REFERENCE, cls.ACTS, cls.DOES_NOT_SAVE, cls.STATE_FORMULA):
        assert text
    assert cls.REALISED_BY
    assert set(cls.PRESET_SETS) <= set(cls().parameters)
    assert bool(cls.PRESET_SETS) == ("preset" in cls().parameters)


@pytest.mark.parametrize(
    ("texts", "specs"),
    [
        (["kivi"], ["kivi"]),
        (["kivi,h2o"], ["kivi", "h2o"]),
        (["kivi:bits=4,group=64,h2o"], ["kivi:bits=4,group=64", "h2o"]),
        (["kivi", "full"], ["kivi", "full"]),
        ([" KIVI : bits = 4 , full "], ["kivi:bits=4", "full"]),
        (["kv-offload:pinned=no"], ["kv_offload:pinned=false"]),
        (["kivi:bits=2,group=32"], ["kivi"]),
        (["snapkv:keep_tokens=4k"], ["snapkv:keep_tokens=4096"]),
        (["streaming_llm:sink_tokens=0"], ["streaming_llm:sink_tokens=0"]),
        (["h2o:preset=4x,variant=mask"], ["h2o:variant=mask,preset=4x"]),
        (["llmlingua2:rate=2.5e-1"], ["llmlingua2:rate=0.25"]),
        (["llmlingua2:rate=0.25+kivi:bits=4,full"], ["llmlingua2:rate=0.25+kivi:bits=4", "full"]),
        (["llmlingua2+kivi:bits=4,group=64"], ["llmlingua2+kivi:bits=4,group=64"]),
        # canonical order is the order in which they act
        (["kivi+snapkv+minference"], ["minference+snapkv+kivi"]),
    ],
)
def test_specs(texts: list[str], specs: list[str]) -> None:
    stacks = parse_methods(texts)
    assert [s.spec for s in stacks] == specs
    assert [parse_method(s.spec) for s in stacks] == stacks


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("kivy", UnknownNameError, "Did you mean: kivi"),
        ("kivi:bit=2", UnknownNameError, "Did you mean: bits"),
        ("kivi:bits=two", ConfigError, "kivi: bits: expected a whole number such as 128 or 4k"),
        ("kivi:bits=3", ConfigError, "expected bits of 2 or 4, got 3"),
        ("kivi:bits", ConfigError, "expected parameter=value, got 'bits'"),
        ("kivi:bits=", ConfigError, "expected parameter=value"),
        ("kivi:bits=2,bits=4", ConfigError, "bits is given twice"),
        ("kivi,", ConfigError, "got nothing"),
        ("", ConfigError, "got nothing"),
        ("bits=2", ConfigError, "expected a method name before 'bits=2'"),
        ("kivi+bits=2", ConfigError, "expected a method name before 'bits=2'"),
        ("full:bits=2", ConfigError, "full has no parameters"),
        ("h2o:variant=slots", ConfigError, "expected one of slot, real_drop, mask"),
        ("h2o:preset=3x", ConfigError, "expected one of 2x, 4x, 6x, 8x, got '3x'"),
        ("h2o:heavy_fraction=nan", ConfigError, "finite"),
        ("h2o:heavy_fraction=1.5", ConfigError, "from 0 to 1"),
        ("h2o:preset=2x,heavy_fraction=0.3", ConfigError, "leave out either the preset"),
        ("kv_offload:pinned=maybe", ConfigError, "true or false"),
        ("snapkv:keep_tokens=32", ConfigError, "keep_tokens of at least 33"),
        ("snapkv:kernel=4", ConfigError, "odd kernel"),
        ("infllm:topk=40", ConfigError, "cached_blocks of at least 40"),
        ("llmlingua2:rate=0", ConfigError, "above 0"),
        (
            "kivi:preset=2x",
            ConfigError,
            "kivi has no preset; methods with presets: h2o, infllm, llmlingua2, streaming_llm",
        ),
    ],
)
def test_errors_say_what_to_do(text: str, error: type[LccostError], words: str) -> None:
    with pytest.raises(error) as caught:
        parse_methods([text])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kivi+flexgen", "both take the stage 'store'"),
        ("minference+h2o", "both take the stage 'prefill'"),
        ("full+kivi", "full changes nothing"),
    ],
)
def test_what_does_not_compose_is_parsed_and_refused(text: str, words: str) -> None:
    """In a list the others still count; the combination is a row with the reason."""
    before, stack, after = parse_methods([f"full,{text},h2o"])
    assert (before.spec, stack.spec, after.spec) == ("full", text, "h2o")
    assert words in str(stack.refusal(model(attention())))


def test_one_method_is_one_method() -> None:
    with pytest.raises(ConfigError, match="expected one method, got 2"):
        parse_method("kivi,full")
