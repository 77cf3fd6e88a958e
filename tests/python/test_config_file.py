"""The published configuration file: its keys, their meaning, and what a wrong file says."""

from __future__ import annotations

import json
import random
from pathlib import Path

import flashmoe
import numpy as np
import pytest
from flashmoe import cli, config_file

# The file that the published code ships, with the values of its fork that trains.
PUBLISHED = {
    "capacity_factor": 1,
    "drop_tokens": 1,
    "expert_top_k": 2,
    "global_batch": 256,
    "is_training": 1,
    "hidden_act": 0,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "mini_batch": 1,
    "moe_frequency": 1,
    "num_experts": 64,
    "num_layers": 1,
    "sequence_len": 8192,
    "torch_dtype": 1,
    "vocab_size": 32000,
}
SMALL = PUBLISHED | {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_experts": 8,
    "sequence_len": 16,
    "mini_batch": 2,
    "global_batch": 8,
    "num_layers": 6,
    "moe_frequency": 2,
}


def parsed(**changes):
    return config_file.parse(json.dumps(SMALL | changes), "file.json")


@pytest.fixture
def written(tmp_path):
    def write(**changes):
        path = tmp_path / "file.json"
        path.write_text(json.dumps(SMALL | changes))
        return str(path)

    return write


def test_the_published_file_is_read():
    config = config_file.parse(json.dumps(PUBLISHED), "file.json")
    assert sorted(PUBLISHED) == list(config_file.KEYS)
    assert {key: getattr(config, key) for key in PUBLISHED} == PUBLISHED
    assert (config.tokens, config.dtype, config.activation) == (8192, "fp32", "relu")
    assert config.step() == {
        "micro_batches": 256,
        "moe_layers": 1,
        "launches": 512,
        "dense_parameters": 2048 * (12 * 2048 + 13 + 32000 + 2048),
    }


def test_the_example_has_every_key():
    path = Path(__file__).parents[2] / "examples" / "flashmoe_config.json"
    assert json.loads(path.read_text()).keys() == PUBLISHED.keys()
    assert config_file.load(path).step()["launches"] == 2 * 256 * 4


def test_sizes_alone_are_enough():
    sizes = {key: PUBLISHED[key] for key in config_file.NEEDED}
    assert config_file.parse(json.dumps(sizes), "file.json") == config_file.parse(
        json.dumps(PUBLISHED), "file.json"
    )


def test_numbers_mean_types():
    assert [parsed(torch_dtype=n).dtype for n in range(4)] == ["fp32", "fp32", "bf16", "fp16"]
    assert [parsed(hidden_act=n).activation for n in range(2)] == ["relu", "gelu"]
    assert parsed(is_training=0).step()["launches"] == 4 * 3


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("factor", [1, 2, 1.25])
def test_the_capacity_is_the_published_one(tokens, factor):
    """ceil(T / E) * capacity_factor * k slots of an expert, counted on a layer all of whose tokens
    choose the same experts."""
    experts, top_k = 7, 2
    config = parsed(capacity_factor=factor)
    kept = -(-tokens // experts) * factor * top_k
    capacity = config.capacity(tokens, experts, top_k)
    assert capacity == np.ceil(kept)
    y = flashmoe.experts(
        np.ones((tokens, 4)),
        np.tile([0, 1], (tokens, 1)),
        np.ones((tokens, top_k)),
        np.ones((experts, 3, 4)),
        np.ones((experts, 4, 3)),
        activation="relu",
        capacity_factor=config.factor(tokens, experts, top_k),
    )
    assert (y.sum(1) > 0).sum() == min(tokens, capacity)


def test_nothing_is_dropped_without_drop_tokens():
    assert parsed(drop_tokens=0).capacity(100, 8, 2) is None
    assert parsed(drop_tokens=0).factor(100, 8, 2) is None


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("{", "is no JSON: Expecting"),
        (b"\xff\xfe\xff", "is no JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ("[1]", "is a list; accepted: an object of capacity_factor, drop_tokens"),
        ('{"hidden_size": 1, "hidden_size": 2}', "a key is there twice"),
        ("{}", "missing expert_top_k, hidden_size, intermediate_size, num_experts, sequence_len"),
        (json.dumps(SMALL | {"num_expert": 8}), "unknown key 'num_expert'; known are capacity_f"),
        (json.dumps(SMALL | {"hidden_size": 0}), "hidden_size is 0; accepted: an integer of 1.."),
        (json.dumps(SMALL | {"hidden_size": 64.0}), "hidden_size is 64.0; accepted: an integer"),
        (json.dumps(SMALL | {"is_training": True}), "is_training is true; accepted: an integer"),
        (json.dumps(SMALL | {"torch_dtype": 4}), "torch_dtype is 4; accepted: an integer of 0..3"),
        (json.dumps(SMALL | {"hidden_act": "relu"}), 'hidden_act is "relu"; accepted'),
        (json.dumps(SMALL | {"capacity_factor": 0}), "capacity_factor is 0; accepted: a number"),
        (json.dumps(SMALL | {"capacity_factor": float("nan")}), "capacity_factor is NaN"),
        (json.dumps(SMALL | {"moe_frequency": 7}), "moe_frequency is 7, so none of num_layers 6"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "is no JSON"),
    ],
)
def test_a_wrong_file_is_named(text, mentions):
    with pytest.raises(ValueError, match=r"^file\.json") as raised:
        config_file.parse(text, "file.json")
    assert mentions in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_damaged_files_raise_value_error_and_nothing_else():
    """A seeded walk around a good file; what is still good has good values."""
    draw = random.Random(1)
    good = json.dumps(SMALL).encode()
    still_good = 0
    for _ in range(3000):
        text = bytearray(good)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(text))
            part = draw.choice([b"", b"-", b"9", b"\x00", b'"', b"[", b"e9", b"null", b"\xc3"])
            text[place : place + draw.randint(0, 2)] = part
        try:
            config = config_file.parse(bytes(text), "file.json")
        except ValueError:
            continue
        still_good += 1
        assert config.tokens >= 1 and config.capacity(config.tokens, config.num_experts, 1) != 0
    assert 0 < still_good < 1500


# ---- flashmoe run --config ----------------------------------------------------------------------


def run_json(capsys, *arguments):
    code = cli.main(["run", *arguments, "--repeat", "1", "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else captured.err


def test_run_takes_its_sizes_from_the_file(capsys, written):
    pytest.importorskip("torch")
    code, report = run_json(capsys, "--config", written(), "--ranks", "2")
    assert code == 0 and report["passed"] is True
    assert report["sizes"] == {
        "tokens_per_rank": 32,
        "hidden": 64,
        "intermediate": 64,
        "experts": 8,
        "experts_per_rank": 4,
        "top_k": 2,
    }
    assert report["dtype"] == "fp32" and report["scale"] == 1 and report["model"] == "file.json"
    assert report["step"]["micro_batches"] == 4 and report["step"]["moe_layers"] == 3
    assert {"grad_w_up", "grad_b_up"} <= report["errors"].keys()
    assert "grad_w_gate" not in report["errors"]
    assert report["dropped"] == sum(report["tokens_per_expert"]) - kept_of(report)


def kept_of(report):
    """Slots under the capacity of 4 * 1 * 2 for each rank and expert: at most 16 an expert."""
    kept = sum(report["tokens_per_expert"]) - report["dropped"]
    assert kept <= sum(min(count, 16) for count in report["tokens_per_expert"])
    assert report["dropped"] > 0
    return kept


def test_inference_has_no_backward(capsys, written):
    pytest.importorskip("torch")
    path = written(is_training=0, drop_tokens=0, hidden_act=1, torch_dtype=2)
    code, report = run_json(capsys, "--config", path, "--ranks", "1", "--tokens", "20")
    assert code == 0 and report["passed"] is True
    assert report["dtype"] == "bf16" and report["sizes"]["tokens_per_rank"] == 20
    assert report["times"].keys() == {"forward"} and report["dropped"] == 0
    assert report["errors"].keys() == {"y", "topk_weights", "logits"}


def test_people_are_told_what_the_file_means(capsys, written):
    pytest.importorskip("rich", reason="rich is not installed")
    assert cli.main(["run", "--config", written(is_training=0), "--repeat", "1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "one mixture-of-experts layer, forward, fp32" in shown
    assert "4 micro-batches x 3 MoE layers, 12 such launches a rank" in shown
    assert "capacity 8 slots of a rank for an expert" in shown


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"experts": 4}, "unknown key 'experts'; known are capacity_factor, drop_tokens, expert_"),
        ({"num_experts": 7}, "experts is 7; accepted: a multiple of 2 ranks"),
        ({"expert_top_k": 9}, "top_k is 9"),
        ({"hidden_size": 2**20, "intermediate_size": 2**20}, "GiB, this machine has"),
    ],
)
def test_a_file_that_can_not_run_is_one_line(capsys, written, changes, mentions):
    pytest.importorskip("torch")
    code, err = run_json(capsys, "--config", written(**changes))
    assert code == 2 and err.startswith("flashmoe: ") and err.count("\n") == 1
    assert mentions in err


def test_a_file_that_is_not_there(capsys):
    pytest.importorskip("torch")
    code, err = run_json(capsys, "--config", "no/such.json")
    assert code == 2 and "no/such.json" in err
