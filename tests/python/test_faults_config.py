"""Fuzzer over the configuration file: whatever is in it, a configuration or a ValueError that names
the file, and never anything else.

FLASHMOE_TEST_EXAMPLES: how many inputs of each kind are made up.
"""

import json
import os

import pytest
from flashmoe import cli, config_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FLASHMOE_TEST_EXAMPLES", "400"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FLASHMOE_TEST_EXAMPLES" not in os.environ,  # a plain run is the same every time
    # A busy machine draws slowly, which says nothing about the file's reader.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAME = "given.json"
GOOD = {
    "capacity_factor": 1,
    "drop_tokens": 1,
    "expert_top_k": 2,
    "global_batch": 256,
    "hidden_act": 0,
    "hidden_size": 64,
    "intermediate_size": 32,
    "is_training": 1,
    "mini_batch": 1,
    "moe_frequency": 1,
    "num_experts": 8,
    "num_layers": 2,
    "sequence_len": 128,
    "torch_dtype": 1,
    "vocab_size": 32000,
}

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.just(2**31)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)
keys = st.sampled_from(config_file.KEYS)


@st.composite
def spoiled(draw):
    """A good file with some values, keys and bytes changed."""
    config = dict(GOOD)
    for _ in range(draw(st.integers(0, 3))):
        config[draw(keys | st.text(max_size=12))] = draw(scalars | values)
    for key in draw(st.lists(keys, max_size=2)):
        config.pop(key, None)
    text = bytearray(json.dumps(config).encode())
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(text) - 1))
        text[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(text)


def read(text):
    """The configuration or None; fails on anything but a ValueError with the name of the file."""
    try:
        config = config_file.parse(text, NAME)
    except ValueError as error:
        assert NAME in str(error) and len(str(error)) < 1000
        return None
    use(config)
    return config


def use(config):
    """What the command line asks of a configuration works for each that is accepted."""
    assert config.tokens >= 1 and config.dtype and config.activation
    sizes = (config.tokens, config.num_experts, config.expert_top_k)
    factor = config.factor(*sizes)
    assert factor is None or factor > 0
    assert all(isinstance(value, int) and value >= 0 for value in config.step().values())


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes(text):
    read(text)


@FUZZ
@given(values)
def test_any_json(value):
    read(json.dumps(value))


@FUZZ
@given(spoiled())
def test_spoiled_file(text):
    read(text)


@FUZZ
@given(st.dictionaries(keys, st.integers(-1, 4) | scalars, min_size=4))
def test_any_values_of_known_keys(config):
    read(json.dumps({**GOOD, **config}))


def test_good_file_is_read():
    assert read(json.dumps(GOOD)).hidden_size == 64


@pytest.mark.parametrize("depth", [10**3, 10**5])
def test_nesting_is_refused(depth):
    assert read("[" * depth) is None
    assert read('{"a":' * depth) is None


@settings(FUZZ, max_examples=min(EXAMPLES, 40))
@given(text=spoiled())
def test_command_line_refuses_with_one_line(tmp_path, capsys, text):
    """An error of the file is one line on stderr and an exit code, not a traceback."""
    if read(text) is not None:
        return
    path = tmp_path / NAME
    path.write_bytes(text)
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(cli.main(["run", "--config", str(path)]))
    assert ended.value.code not in (0, None)
    said = capsys.readouterr()
    assert NAME in said.err and "Traceback" not in said.err + said.out
