"""``experts_implementation="flashmoe"`` in Hugging Face transformers.

Small models with random weights, each against the library's own eager experts. FLASHMOE_TEST_DEVICE
names another device than the CPU to run them on.
"""

import contextlib
import copy
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_as_exact_as_plain
from flashmoe import _core, reference
from flashmoe.config import ACTIVATIONS, Activation
from flashmoe.errors import RoutingError, UnsupportedError
from torch import nn

tf = pytest.importorskip(
    "transformers",
    minversion="5.17",
    reason="transformers 5.17 or newer is not installed",
)
from flashmoe.integrations import transformers as integration  # noqa: E402
from huggingface_hub.errors import StrictDataclassError  # noqa: E402

DEVICE = torch.device(os.environ.get("FLASHMOE_TEST_DEVICE", "cpu"))
DOCS = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
VOCABULARY = 64

SIZES = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=VOCABULARY,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
FIRST_DENSE = dict(
    intermediate_size=40,
    moe_intermediate_size=24,
    n_routed_experts=8,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)

# model -> (class of its configuration, options, experts that the options give it)
MODELS = {
    "Mixtral": ("MixtralConfig", dict(intermediate_size=24, num_local_experts=6)),
    "Qwen3-MoE": (
        "Qwen3MoeConfig",
        dict(
            intermediate_size=40,
            moe_intermediate_size=24,
            num_experts=8,
            num_experts_per_tok=3,
            head_dim=8,
        ),
    ),
    "OLMoE": ("OlmoeConfig", dict(intermediate_size=24, num_experts=8, num_experts_per_tok=4)),
    "DeepSeek-V3": ("DeepseekV3Config", {**FIRST_DENSE, **LATENT, "n_group": 4, "topk_group": 2}),
    "GLM-4-MoE": ("Glm4MoeConfig", {**FIRST_DENSE, "n_group": 1, "topk_group": 1}),
    "gpt-oss": (
        "GptOssConfig",
        dict(
            intermediate_size=24,
            num_local_experts=8,
            head_dim=8,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=8,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
    "Llama-4": (
        "Llama4TextConfig",
        dict(
            intermediate_size=24,
            intermediate_size_mlp=40,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
            attention_chunk_size=64,
            head_dim=8,
        ),
    ),
    "PhiMoE": ("PhimoeConfig", dict(intermediate_size=24, num_local_experts=6)),
}
GPT_OSS = integration.Layout(ACTIVATIONS["gpt_oss"], interleaved=True, transposed=True, bias=True)
LLAMA_4 = integration.Layout(Activation(), interleaved=False, transposed=True, bias=False)
PLAIN = integration.Layout(Activation(), interleaved=False, transposed=False, bias=False)
LAYOUTS = {"gpt-oss": GPT_OSS, "Llama-4": LLAMA_4}


@pytest.fixture(scope="module", autouse=True)
def registered():
    integration.register()


def make_config(name):
    kind, options = MODELS[name]
    return getattr(tf, kind)(**{**SIZES, **options})


def make_model(name, implementation="eager"):
    """The model of a name with random weights under which no term of a layer is small."""
    model = tf.AutoModelForCausalLM.from_config(
        make_config(name), experts_implementation=implementation
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(draw * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(draw * 0.3)
        for key, buffer in model.named_buffers():
            if "correction_bias" in key:
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model.eval().to(DEVICE)


def make_tokens(rows=3, length=17):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator).to(DEVICE)


def with_implementation(model, implementation):
    """A copy of the model that uses another implementation."""
    model = copy.deepcopy(model)
    model.set_experts_implementation(implementation)
    assert model.get_experts_implementation()[""] == implementation
    return model


def run(model, tokens):
    """Logits, then the gradients of all parameters: the experts' by name, the others together."""
    model.zero_grad()
    logits = model(tokens, use_cache=False).logits
    direction = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device=DEVICE)
    (logits * direction.cos().view_as(logits)).sum().backward()
    results, others = {"logits": logits.detach()}, []
    for name, parameter in model.named_parameters():
        if "experts." in name and "shared" not in name:
            results[name] = parameter.grad
        elif parameter.grad is not None:
            others.append(parameter.grad.flatten())
    results["others"] = torch.cat(others)
    return results


class Seen:
    """The compiled engine; keeps (operation, tensors by name) of every call."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.engine = _core.engine()
        monkeypatch.setattr(_core, "_module", self)

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def forward(self, group, layer, tensors, *others):
        self.calls.append(("forward", tensors))
        return self.engine.forward(group, layer, tensors, *others)

    def backward(self, group, layer, tensors, *others):
        self.calls.append(("backward", tensors))
        return self.engine.backward(group, layer, tensors, *others)

    def of(self, operation):
        return [tensors for name, tensors in self.calls if name == operation]


def experts_of(model):
    return [model.get_submodule(name) for name in integration.check(model)]


# ---- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name, monkeypatch):
    """As close to fp64 as the library's own experts, for the logits and every gradient."""
    eager, tokens = make_model(name), make_tokens()
    plain, exact = run(eager, tokens), run(copy.deepcopy(eager).double(), tokens)
    seen = Seen(monkeypatch)
    ours = run(with_implementation(eager, "flashmoe"), tokens)
    assert len(seen.of("forward")) == len(seen.of("backward")) == len(experts_of(eager))
    assert ours.keys() == plain.keys() == exact.keys() and len(ours) > 3
    for key in ours:
        # A choice of experts that rounding had turned would excuse any error of ours.
        assert (plain[key] - exact[key]).norm() < 2.0**-12 * exact[key].norm()
        assert_as_exact_as_plain(key, ours[key], plain[key], exact[key])


@pytest.mark.parametrize("name", MODELS)
def test_bf16_experts(name, monkeypatch):
    """The experts of a model in bf16 on the rows that reached them, ids pinned."""
    dtype = torch.bfloat16
    model = make_model(name, "flashmoe")
    seen = Seen(monkeypatch)
    with torch.no_grad():
        model(make_tokens(), use_cache=False)
    module, given = experts_of(model)[-1], seen.of("forward")[-1]
    x, ids, weights = (given[key].clone() for key in ("x", "topk_ids", "topk_weights"))
    results = {}
    for key, width in (("ours", dtype), ("plain", dtype), ("exact", torch.float64)):
        experts = copy.deepcopy(module).to(dtype).to(width)
        rows, scale = (tensor.to(dtype).to(width).requires_grad_() for tensor in (x, weights))
        if key == "ours":
            y = integration._run(experts, rows, ids, scale, name == "Llama-4")
        else:
            y = eager_experts(name, experts, rows, ids, scale)
        y.backward(torch.linspace(-1, 1, y.numel(), device=DEVICE).cos().to(y).view_as(y))
        results[key] = {"y": y.detach(), "x": rows.grad, "weights": scale.grad} | {
            parameter_name: parameter.grad
            for parameter_name, parameter in experts.named_parameters()
        }
    for key, ours in results["ours"].items():
        assert_as_exact_as_plain(key, ours, results["plain"][key], results["exact"][key])


def eager_experts(name, module, x, ids, weights):
    """The library's own experts on rows whose experts are chosen."""
    if name != "Llama-4":
        module.config = copy.copy(module.config)
        module.config._experts_implementation = "eager"
        return module(x, ids, weights)
    scores = x.new_zeros(x.shape[0], module.num_experts).scatter(1, ids, weights)
    copies = x.repeat(module.num_experts, 1) * scores.T.reshape(-1, 1)
    return module(copies).view(module.num_experts, *x.shape).sum(0)


@pytest.mark.parametrize("name", MODELS)
def test_generation(name):
    """The same tokens: greedy, sampled and by beams, with the library's own cache."""
    eager, prompt = make_model(name), make_tokens(2, 6)
    ours = with_implementation(eager, "flashmoe")
    for options in (dict(), dict(do_sample=True, top_k=8), dict(num_beams=3)):
        said = []
        for model in (eager, ours):
            torch.manual_seed(3)
            said.append(model.generate(prompt, max_new_tokens=6, **options))
        assert torch.equal(*said)
        assert said[0].shape == (2, 12)


# ---- weights in place -------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_used_in_place(name, monkeypatch):
    """What reaches the engine lies where the parameters lie: views and strides, no copy."""
    model = make_model(name, "flashmoe")
    seen = Seen(monkeypatch)
    run(model, make_tokens())
    modules = experts_of(model)
    for module, forward, backward in zip(
        modules, seen.of("forward"), reversed(seen.of("backward")), strict=True
    ):
        transposed = LAYOUTS.get(name, PLAIN).transposed
        for operand, parameter in {
            "w_up": module.gate_up_proj,
            "w_down": module.down_proj,
            "b_up": getattr(module, "gate_up_proj_bias", None),
            "b_down": getattr(module, "down_proj_bias", None),
        }.items():
            for tensors in (forward, backward):
                assert (operand in tensors) == (parameter is not None)
                if parameter is None:
                    continue
                swapped = parameter.mT if transposed and parameter.dim() == 3 else parameter
                assert tensors[operand].data_ptr() == parameter.data_ptr()
                assert tensors[operand].shape == swapped.shape
                assert tensors[operand].stride() == swapped.stride()


def test_checkpoint_is_loaded_and_used_in_place(tmp_path, monkeypatch):
    """Through a file: from_pretrained with the implementation by name; nothing is converted."""
    saved = make_model("Qwen3-MoE")
    saved.save_pretrained(tmp_path)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="flashmoe")
    model.eval().to(DEVICE)
    pointers = {key: value.data_ptr() for key, value in model.named_parameters()}
    seen, tokens = Seen(monkeypatch), make_tokens()
    ours = run(model, tokens)
    assert pointers == {key: value.data_ptr() for key, value in model.named_parameters()}
    used = {tensors["w_up"].data_ptr() for tensors in seen.of("forward")}
    assert used == {pointers[key] for key in pointers if key.endswith("gate_up_proj")}
    again = run(with_implementation(saved, "flashmoe"), tokens)
    assert all(torch.equal(ours[key], again[key]) for key in ours)


# ---- with the rest of transformers ------------------------------------------------------------


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss", "Llama-4"])
def test_compiles_without_a_graph_break(name):
    model, tokens = make_model(name, "flashmoe"), make_tokens()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(tokens).logits, model(tokens).logits)
    torch._dynamo.reset()


def test_gradient_checkpointing_gives_the_same_bits():
    model, tokens = make_model("Qwen3-MoE", "flashmoe"), make_tokens()
    expected = run(model, tokens)
    model.train()
    model.gradient_checkpointing_enable()
    recomputed = run(model, tokens)
    assert all(torch.equal(recomputed[key], expected[key]) for key in expected)


def test_llama4_inside_a_model_of_images():
    """The choice reaches the text model by name, by text_config, and back."""
    text = make_config("Llama-4")
    vision = tf.Llama4VisionConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vision_output_dim=16,
        image_size=28,
        patch_size=14,
        projector_input_dim=16,
        projector_output_dim=16,
    )
    config = tf.Llama4Config(
        text_config=text,
        vision_config=vision,
        boi_token_index=60,
        eoi_token_index=61,
        image_token_index=62,
    )
    model = tf.Llama4ForConditionalGeneration(config).eval().to(DEVICE)
    for chosen in ("flashmoe", "eager", {"text_config": "flashmoe"}):
        model.set_experts_implementation(chosen)
        expected = chosen if isinstance(chosen, str) else "flashmoe"
        assert model.get_experts_implementation()["text_config"] == expected
    assert len(integration.check(model)) == 2


def test_slots_of_other_ranks_are_skipped():
    """Expert parallelism of transformers: ids that are not here arrive as the number of experts."""
    module = experts_of(make_model("Mixtral", "flashmoe"))[0]
    generator = torch.Generator().manual_seed(4)
    x = torch.randn((9, 32), generator=generator).to(DEVICE)
    ids = torch.randint(0, module.num_experts + 1, (9, 2), generator=generator).to(DEVICE)
    elsewhere = ids == module.num_experts
    assert elsewhere.any() and not elsewhere.all()
    weights = torch.rand((9, 2), generator=generator).to(DEVICE).requires_grad_()
    y = module(x, ids, weights)
    plain = reference_experts(module, x, ids, weights)
    exact = reference_experts(copy.deepcopy(module).double(), x.double(), ids, weights.double())
    assert_as_exact_as_plain("y", y, plain, exact)
    y.sum().backward()
    assert not weights.grad[elsewhere].any() and weights.grad[~elsewhere].all()


def test_hidden_states_of_another_dtype_are_converted():
    """As ``grouped_mm`` does under autocast, where a norm may leave fp32 rows for bf16 weights."""
    module = experts_of(make_model("Mixtral", "flashmoe"))[0].to(torch.bfloat16)
    x = torch.randn(5, 32, device=DEVICE)
    ids, weights = torch.tensor([[0, 1]] * 5, device=DEVICE), torch.rand(5, 2, device=DEVICE)
    y = module(x, ids, weights)
    assert y.dtype == torch.float32
    assert torch.equal(y, module(x.bfloat16(), ids, weights).float())


def test_errors_name_the_layer():
    """By the order in which the layers ran first."""
    model = make_model("Mixtral", "flashmoe")
    model(make_tokens(), use_cache=False)
    ids, weights = torch.full((5, 2), -2, device=DEVICE), torch.rand(5, 2, device=DEVICE)
    named = []
    for module in experts_of(model):
        with pytest.raises(RoutingError, match=r"topk_ids") as raised:
            module(torch.randn(5, 32, device=DEVICE), ids, weights)
        named.append(int(re.search(r"\(layer (\d+)\)$", str(raised.value))[1]))
    assert named == [named[0], named[0] + 1]


# ---- what is not served -----------------------------------------------------------------------


@pytest.mark.slow
def test_import_registers_nothing():
    code = """
import sys
import flashmoe
flashmoe.integrations.transformers
print("transformers" in sys.modules)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
print("flashmoe" in ALL_EXPERTS_FUNCTIONS)
flashmoe.integrations.transformers.register()
print("flashmoe" in ALL_EXPERTS_FUNCTIONS)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["False", "False", "True"], result.stderr


def test_older_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(integration.metadata, "version", lambda name: "5.16.1")
    with pytest.raises(UnsupportedError, match=r"transformers is 5\.16\.1; accepted: 5\.17"):
        integration.register()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(act_fn=nn.Mish()), "MixtralExperts: its gate is no activation.*act_fn Mish"),
        (dict(has_post_expert_norm=True), "MixtralExperts: it normalises the output of each"),
        (dict(down_proj=nn.Parameter(torch.zeros(3, 4))), "no down_proj of 3 dimensions"),
        (
            dict(down_proj=nn.Parameter(torch.zeros(6, 32, 24).to(torch.float8_e4m3fn), False)),
            "down_proj is quantised",
        ),
        (dict(act_fn=None), "MixtralExperts: its gate cannot be evaluated"),
    ],
)
def test_experts_that_are_not_served_say_why(change, text):
    model = make_model("Mixtral", "flashmoe")
    module = model.model.layers[1].mlp.experts
    for key, value in change.items():
        setattr(module, key, value)
    with pytest.raises(UnsupportedError, match=f"MixtralForCausalLM: model.layers.1.*{text}"):
        integration.check(model)
    with pytest.raises(UnsupportedError, match=f"{text}.*use another experts_implementation"):
        model(make_tokens())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JetMoeConfig", dict(num_hidden_layers=1, hidden_size=32, kv_channels=8)),
        ("SwitchTransformersConfig", dict(d_model=32, d_ff=40, num_layers=2)),
        ("DbrxConfig", dict(d_model=32, n_heads=4, n_layers=1)),
    ],
    ids=["JetMoe", "SwitchTransformers", "Dbrx"],
)
def test_models_without_the_interface_are_refused(kind, options):
    config = getattr(tf, kind)(**options)
    model = getattr(tf, tf.models.auto.modeling_auto.MODEL_MAPPING_NAMES[config.model_type])
    with torch.device("meta"), pytest.raises(UnsupportedError, match="do not go through"):
        model._from_config(config, experts_implementation="flashmoe")


def test_dense_models_have_nothing_to_serve():
    config = tf.LlamaConfig(**SIZES, intermediate_size=40)
    model = tf.AutoModelForCausalLM.from_config(config, experts_implementation="flashmoe")
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM: it has no experts"):
        integration.check(model)


def test_fp8_experts_are_refused():
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    with pytest.raises(UnsupportedError, match="Linear: its weights are quantised to fp8"):
        ALL_FP8_EXPERTS_FUNCTIONS["flashmoe"](nn.Linear(2, 2), None, None, None)


# ---- gates and the table ----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_layout_is_recognised(name):
    model = make_model(name, "flashmoe")
    found = {integration.layout(module) for module in experts_of(model)}
    assert found == {LAYOUTS.get(name, PLAIN)}
    assert table_line(name, *found) in DOCS.read_text()


def table_line(name, found):
    """The line of a model in docs/integrations.md."""
    act = found.activation
    gate = (
        "SwiGLU"
        if act == Activation()
        else (f"SwiGLU, alpha {act.alpha:g}, limit {act.limit:g}, up + {act.up_offset:g}")
    )
    up, down = ("[E, H, 2I]", "[E, I, H]") if found.transposed else ("[E, 2I, H]", "[E, H, I]")
    order = "interleaved" if found.interleaved else "gate first"
    bias = "yes" if found.bias else "no"
    return f"| {name} | {gate} | {up}, {order}; {down} | {bias} |"


def experts_classes():
    """Every class of the installed transformers that goes through its experts interface."""
    decorated = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)
    for path in sorted(Path(tf.models.__file__).parent.glob("*/modeling_*.py")):
        for name in decorated.findall(path.read_text(encoding="utf-8")):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            yield path.parent.name, module, getattr(module, name)


def small_experts(module, kind):
    """An instance of an experts class, by whichever configuration of its module it takes."""
    small = dict.fromkeys(("hidden_size", "moe_hidden_size", "moe_latent_size"), 8)
    small |= dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 6)
    small |= dict.fromkeys(("num_experts", "num_local_experts", "moe_num_experts"), 4)
    kinds = [getattr(member, "config_class", member) for member in vars(module).values()]
    for config_kind in dict.fromkeys(one for one in kinds if hasattr(one, "model_type")):
        config = config_kind()
        for key, value in small.items():
            with contextlib.suppress(StrictDataclassError):  # a field of another type
                setattr(config, key, value)
        with contextlib.suppress(AttributeError, TypeError):
            experts = kind(config)
            experts.config._experts_implementation = "flashmoe"
            return experts
    raise AssertionError(f"no configuration of {module.__name__} makes a {kind.__name__}")


def reference_experts(module, x, ids, weights):
    """flashmoe's reference on the layout that was recognised: some eager forwards know no fp64."""
    found = integration.layout(module)
    up = "gate_up_proj" if found.activation.gated else "up_proj"
    return reference.experts(
        x,
        ids,
        weights,
        getattr(module, up),
        module.down_proj,
        b_up=getattr(module, f"{up}_bias", None),
        b_down=getattr(module, "down_proj_bias", None),
        activation=found.activation,
        interleaved=found.interleaved,
        transposed=found.transposed,
    )


def test_every_experts_class_is_served_or_says_why():
    """All of transformers: the same values as each class's own experts, or a reason in the docs."""
    text, served, refused = DOCS.read_text(), [], []
    for model, module, kind in experts_classes():
        experts = small_experts(module, kind).to(DEVICE)
        try:
            integration.layout(experts)
        except UnsupportedError as error:
            refused.append(f"| {model} | {str(error).split('; ')[0]} |")
            continue
        assert model in text, model
        served.append(kind.__name__)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        x = torch.randn((512, 8), generator=generator).to(DEVICE)
        weights = torch.rand((512, 2), generator=generator).to(DEVICE)
        ids = torch.rand((512, 4), generator=generator).topk(2, dim=-1).indices.to(DEVICE)
        ours = experts(x, ids, weights)
        plain = eager_experts(model, experts, x, ids, weights)
        exact = reference_experts(experts.double(), x.double(), ids, weights.double())
        assert (plain - exact).norm() < 2.0**-12 * exact.norm(), kind.__name__
        assert_as_exact_as_plain(kind.__name__, ours, plain, exact)
    assert len(served) > 50
    assert [line for line in refused if line not in text] == []


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        ("gelu", Activation("gelu")),
        ("gelu_pytorch_tanh", Activation("gelu_tanh")),
        ("relu", Activation("relu")),
        ("relu2", Activation("relu2")),
        ("quick_gelu", Activation("silu", alpha=1.702)),
        ("linear", Activation("identity")),
    ],
)
def test_activations_are_told_apart(act, expected):
    from transformers.activations import ACT2FN

    module = make_model("Mixtral").model.layers[0].mlp.experts
    module.act_fn = ACT2FN[act]
    assert integration.layout(module).activation == expected
