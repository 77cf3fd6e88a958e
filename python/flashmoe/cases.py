"""The case table: which layers are checked, on which dtypes and ranks, and for what.

One table drives four modes: `values` (forward against the reference, `flashmoe check`),
`gradients` (`flashmoe check --gradients`), `speed` (`flashmoe bench`) and `support` (calls that
must be refused, part of `flashmoe check`). Shapes are ugly by default. Cases of state (epoch wrap,
several forwards in flight), concurrency and failure (killed, late or stopped peers) are not data:
they are in tests/python/test_ranks*.py, test_torch_ops*.py and the C++ tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property

from .config import ACTIVATIONS, Activation, Routing, resolve_activation

COMPARED = ("values", "gradients")
ALL_DTYPES = ("fp64", "fp32", "bf16", "fp16")
MAIN_DTYPES = ("fp64", "fp32", "bf16")
WORK_DTYPES = ("fp32", "bf16")
CUDA_DTYPES = ("bf16", "fp16")
# Clamp limits, halfway between two numbers of fp16: rounding takes no pre-activation of fp16 across
# them, which would change its gradient. Just above a number of bf16, where PyTorch takes the limit
# for that number, so that rounding decides for it as for us.
LIMIT = 2881 / 4096
TIGHT_LIMIT = 2049 / 4096
CUDA_SIZE_UNIT = 64  # the CUDA engine takes multiples of it as hidden and intermediate size


@dataclass(frozen=True)
class Case:
    """One layer and how it is called. T, H, I, E, k are the words of docs/architecture.md."""

    name: str  # "group/what"
    # one entry a step on the same group: T of every rank, or a tuple with T of each rank in turn
    tokens: tuple[int | tuple[int, ...], ...] = (37,)
    hidden: int = 64
    intermediate: int = 64
    experts: int = 8
    top_k: int = 2
    dtypes: tuple[str, ...] = WORK_DTYPES
    ranks: tuple[int, ...] = (1,)
    modes: tuple[str, ...] = COMPARED
    # "router*": the layer chooses (inputs.add_router); else the generator of external ids
    ids: str = "router"
    rows: tuple[int, ...] = ()  # rows per expert, for ids="rows"; gives T
    routing: Routing = field(default_factory=Routing)
    router_bias: bool = False
    selection_bias: bool = False
    wide_router: bool = False  # router weight and bias in fp32 beside a 16-bit layer
    narrow_slots: bool = False  # external ids in int32, their weights in the layer's dtype
    aux_gradients: bool = False  # gradients also arrive at the returned weights and logits
    activation: str | Activation = "swiglu"
    bias: bool = False
    layout: str = "concatenated"
    weight_on_input: bool = False
    capacity_factor: float | None = None
    save_z: bool = False
    probe: str = "compare"  # "compare", or "isolated_nan": NaN and inf stay in their tokens
    defect: str = ""  # support: what is wrong with the call (check.DEFECTS)
    refused: tuple[str, ...] = ()  # support: exception classes that may answer
    mentions: tuple[str, ...] = ()  # support: words of the message of at least one rank

    @property
    def fused_router(self):
        """Whether the layer makes ids and weights itself."""
        return self.ids.startswith("router")

    @property
    def exact_ids(self):
        """Whether the logits are bit-equal by construction, so that ids must match exactly."""
        return self.ids in ("router_equal", "router_tied")

    @cached_property
    def activation_spec(self):
        """The `Activation`, resolved from its name."""
        return resolve_activation(self.activation)

    def steps(self, ranks):
        """T of every rank for each step: a tuple of tuples of length `ranks`."""
        if self.ids == "rows":
            share, rest = divmod(sum(self.rows), ranks)
            return (tuple(share + (rank < rest) for rank in range(ranks)),)
        each = (t if isinstance(t, tuple) else (t,) for t in self.tokens)
        return tuple(tuple(t[rank % len(t)] for rank in range(ranks)) for t in each)

    def on_ranks(self, ranks):
        """The case with as many more experts as it takes to divide them over `ranks`."""
        unit = math.lcm(ranks, self.routing.num_groups)
        experts = math.ceil(self.experts / unit) * unit
        if self.refused or experts == self.experts:
            return self
        rows = (*self.rows, *(0,) * (experts - self.experts)) if self.rows else ()
        return replace(self, experts=experts, rows=rows)

    def on_cuda(self):
        """The case with hidden and intermediate sizes that the CUDA engine takes."""
        hidden = math.ceil(self.hidden / CUDA_SIZE_UNIT) * CUDA_SIZE_UNIT
        intermediate = math.ceil(self.intermediate / CUDA_SIZE_UNIT) * CUDA_SIZE_UNIT
        return replace(self, hidden=hidden, intermediate=intermediate)

    def key(self, dtype, ranks):
        """What `--case` matches: name, dtype and ranks."""
        return f"{self.name}:{dtype}:w{ranks}"


def select(pattern="*", mode="values", ranks=None, dtype=None):
    """(case, dtype, ranks) of every check that `pattern` (a glob on the name or on the whole key)
    names. `ranks` and `dtype` replace the case's own lists; experts are added where the ranks do
    not divide them."""
    chosen = []
    for case in CASES:
        if mode not in case.modes:
            continue
        for num_ranks in (ranks,) if ranks else case.ranks:
            for one in (dtype,) if dtype else case.dtypes:
                key = case.key(one, num_ranks)
                if fnmatchcase(case.name, pattern) or fnmatchcase(key, pattern):
                    chosen.append((case.on_ranks(num_ranks), one, num_ranks))
    return chosen


# One case in as few lines as it needs: this part is a table.
# fmt: off
def routers():
    """Every way to weights, each with a shape that takes it."""
    sigmoid = Routing(score="sigmoid")
    grouped = Routing(score="sigmoid", num_groups=4, top_groups=2, scale=2.5)
    softplus = Routing(score="sqrt_softplus", scale=1.5)
    best_of_two = Routing(num_groups=2, top_groups=1, group_top=1)
    variants = {
        "softmax": {},
        "softmax_raw": {"routing": Routing(renormalize=False)},
        "softmax_scaled": {"routing": Routing(renormalize=False, scale=2.5)},
        "softmax_selection_bias": {"selection_bias": True},
        "softmax_groups": {"routing": best_of_two, "selection_bias": True},
        "topk_softmax": {"routing": Routing(score="topk_softmax"), "router_bias": True},
        "sigmoid": {"routing": sigmoid},
        "sigmoid_raw": {"routing": Routing(score="sigmoid", renormalize=False)},
        "sigmoid_bias": {"routing": sigmoid, "selection_bias": True, "router_bias": True},
        "sigmoid_groups": {"routing": grouped, "selection_bias": True, "experts": 16},
        "sqrt_softplus": {"routing": softplus, "selection_bias": True},
        "sqrt_softplus_raw": {"routing": Routing(score="sqrt_softplus", renormalize=False)},
    }
    return [
        Case(f"router/{name}", **{"dtypes": MAIN_DTYPES, "ranks": (1, 2), "top_k": 3} | options)
        for name, options in variants.items()
    ]


def router_edges():
    """Ties, extremes, small and large k and E, gradients from outside."""
    topk = Routing(score="topk_softmax")
    sigmoid = Routing(score="sigmoid")
    grouped = Routing(num_groups=4, top_groups=2)
    return [
        Case("router/equal_logits", ids="router_equal", top_k=3, dtypes=ALL_DTYPES, ranks=(1, 2)),
        Case("router/equal_logits_groups", ids="router_equal", top_k=3, dtypes=MAIN_DTYPES,
             routing=grouped),
        Case("router/tied_logits", ids="router_tied", top_k=4, dtypes=MAIN_DTYPES, ranks=(1, 2)),
        Case("router/favour_one", ids="router_favour_one", ranks=(1, 2)),
        Case("router/favour_one_sigmoid", ids="router_favour_one", routing=sigmoid,
             dtypes=MAIN_DTYPES),
        Case("router/k1", top_k=1, routing=Routing(renormalize=False), dtypes=MAIN_DTYPES,
             ranks=(1, 2)),
        # its router gradient is 0 but for rounding, which has no yardstick: values only
        Case("router/k1_renormalized", top_k=1, ranks=(1, 2), modes=("values",)),
        Case("router/k_is_e", top_k=8, routing=topk, ranks=(1, 2)),
        Case("router/e_is_1", experts=1, top_k=1, routing=topk),
        Case("router/e_is_512", experts=512, top_k=10, hidden=32, intermediate=16, ranks=(1, 4)),
        Case("router/wide", wide_router=True, router_bias=True, dtypes=("bf16", "fp16"),
             ranks=(1, 2)),
        Case("router/aux_gradients", aux_gradients=True, dtypes=MAIN_DTYPES, ranks=(1, 2)),
        Case("router/aux_gradients_sigmoid", aux_gradients=True, routing=sigmoid, router_bias=True,
             dtypes=MAIN_DTYPES),
        Case("router/aux_gradients_topk", aux_gradients=True, routing=topk, dtypes=MAIN_DTYPES),
    ]


def external_routing():
    """Ids from outside: skew, exact row counts around the block heights, sentinels, duplicates."""
    edges = (0, 1, 63, 64, 65, 127, 128, 129)
    return [
        Case("ids/uniform", ids="uniform", dtypes=ALL_DTYPES, ranks=(1, 2, 3), experts=12),
        Case("ids/narrow", ids="sentinels", narrow_slots=True, dtypes=ALL_DTYPES, ranks=(1, 2)),
        Case("ids/one_expert", ids="one_expert", top_k=1, tokens=(130,), ranks=(1, 2, 4)),
        Case("ids/one_expert_every_slot", ids="one_expert", top_k=3, ranks=(1, 2)),
        Case("ids/one_rank", ids="one_rank", tokens=(70,), ranks=(2, 4)),
        Case("ids/sentinels", ids="sentinels", top_k=4, dtypes=ALL_DTYPES, ranks=(1, 2, 3),
             experts=6, bias=True),
        Case("ids/no_expert", ids="no_expert", ranks=(1, 2), bias=True),
        Case("ids/duplicates", ids="duplicates", top_k=3, dtypes=MAIN_DTYPES, ranks=(1, 2)),
        Case("ids/duplicates_k2", ids="duplicates", ranks=(1, 2)),
        Case("ids/k_is_e", ids="uniform", experts=4, top_k=4, ranks=(1, 2)),
        Case("ids/e_is_w", ids="uniform", experts=4, ranks=(4,)),
        Case("ids/e_is_1", ids="uniform", experts=1, top_k=1),
        Case("rows/edges", ids="rows", rows=edges, top_k=1, ranks=(1, 2)),
        Case("rows/edges_wide", ids="rows", rows=edges[::-1], top_k=1, hidden=136,
             intermediate=200),
        Case("rows/one_row", ids="rows", rows=(0, 1, 0, 0), experts=4, top_k=1, ranks=(1, 2)),
    ]


def activations():
    """Every activation, gated and plain, clamped, with and without bias."""
    variants = {
        "gated_relu2": Activation("relu2"),
        "swiglu_limit": Activation(limit=LIMIT),
        "swiglu_alpha": Activation(alpha=1.702),
        "swiglu_offset": Activation(up_offset=1.0),
        "gpt_oss_tight": Activation(alpha=1.702, limit=TIGHT_LIMIT, up_offset=1.0),
        "geglu_limit": Activation("gelu", limit=LIMIT),
        "silu_alpha": Activation(gated=False, alpha=1.702),
        "gelu_limit": Activation("gelu", gated=False, limit=LIMIT),
    }
    biased = ("gpt_oss", "relu2", "gelu")
    return [
        Case(f"activation/{name}", activation=activation, bias=name in biased, tokens=(41,),
             dtypes=MAIN_DTYPES, ranks=(1, 2) if name == "gpt_oss" else (1,))
        for name, activation in ({name: name for name in ACTIVATIONS} | variants).items()
    ]


def layouts():
    """How checkpoints hold the weights."""
    names = ("interleaved", "separate", "transposed", "interleaved_transposed",
             "separate_transposed", "strided", "transposed_view")
    return [
        *(Case(f"layout/{name}", layout=name, bias=True, dtypes=MAIN_DTYPES, ranks=(1, 2),
               hidden=72, intermediate=40) for name in names),
        Case("layout/plain_transposed", layout="transposed", activation="gelu", bias=True),
    ]


def options():
    """Biases, weight on the input, saved pre-activations, capacity."""
    raw_sigmoid = Routing(score="sigmoid", renormalize=False)
    return [
        Case("bias/gated", bias=True, dtypes=ALL_DTYPES, ranks=(1, 2)),
        Case("bias/plain", bias=True, activation="gelu", dtypes=MAIN_DTYPES, ranks=(1, 2)),
        Case("input_weight/k1", weight_on_input=True, top_k=1, dtypes=MAIN_DTYPES, ranks=(1, 2),
             routing=raw_sigmoid),
        Case("input_weight/k3_bias", weight_on_input=True, top_k=3, bias=True, dtypes=MAIN_DTYPES,
             ranks=(1, 2)),
        Case("input_weight/sentinels", weight_on_input=True, ids="sentinels", bias=True),
        Case("saved_z/gated", save_z=True, bias=True, dtypes=ALL_DTYPES),
        Case("saved_z/plain", save_z=True, activation="relu2", dtypes=MAIN_DTYPES),
        Case("saved_z/input_weight", save_z=True, weight_on_input=True),
        Case("saved_z/separate", save_z=True, layout="separate", bias=True),
        Case("saved_z/clamped", save_z=True, activation="gpt_oss", bias=True, layout="interleaved"),
        Case("capacity/half", capacity_factor=0.5, dtypes=MAIN_DTYPES, ranks=(1, 2, 3), experts=6),
        Case("capacity/bias", capacity_factor=1.0, bias=True, ranks=(1, 2)),
        # 128 slots on one expert: ceil(c * 64 * 2 / 8) = 127, one over; 1, all but one
        Case("capacity/one_over", capacity_factor=7.9375, ids="one_expert", tokens=(64,)),
        Case("capacity/all_but_one", capacity_factor=0.01, ids="one_expert", tokens=(64,),
             ranks=(1, 2)),
        Case("capacity/enough", capacity_factor=8.0, ranks=(1, 2)),
        Case("capacity/sentinels", capacity_factor=0.6, ids="sentinels", top_k=3, bias=True),
        Case("capacity/input_weight", capacity_factor=0.5, weight_on_input=True, bias=True),
        Case("capacity/saved_z", capacity_factor=0.5, save_z=True),
    ]


def sizes():
    """T = 0, 1, different on each rank and from step to step; odd H and I; many ranks."""
    alternating = ((33, 17), (0, 17), (33, 0), (0, 0), (5, 40))
    return [
        Case("tokens/1", tokens=(1,) * 12, dtypes=ALL_DTYPES, ranks=(1, 2)),
        Case("tokens/3", tokens=(3,) * 4, ranks=(1, 2)),
        Case("tokens/113", tokens=(113,), dtypes=ALL_DTYPES, ranks=(1, 2)),
        Case("tokens/none", tokens=(0,), bias=True, dtypes=MAIN_DTYPES, ranks=(1, 2)),
        Case("tokens/none_on_one_rank", tokens=((33, 0),), dtypes=MAIN_DTYPES, bias=True,
             ranks=(2, 4)),
        Case("tokens/none_on_first_rank", tokens=((0, 33),), ids="sentinels", ranks=(2,)),
        Case("tokens/alternating_with_none", tokens=alternating, ranks=(2,)),
        Case("tokens/different", tokens=((1, 127, 128, 129),), ranks=(2, 3, 4), experts=12),
        Case("tokens/very_different", tokens=((1, 8191),), hidden=8, intermediate=8, ranks=(2,)),
        Case("tokens/shrinking", tokens=(4096, 65, 1), hidden=16, intermediate=8, ranks=(1, 2)),
        Case("size/smallest", hidden=1, intermediate=1, experts=2, top_k=1, tokens=(64,),
             ids="uniform", dtypes=MAIN_DTYPES),
        Case("size/odd", hidden=24, intermediate=40, dtypes=ALL_DTYPES, ranks=(1, 2)),
        Case("size/odd_plain", hidden=7, intermediate=13, activation="gelu", bias=True,
             dtypes=MAIN_DTYPES, ranks=(1, 2)),
        Case("size/wide", hidden=520, intermediate=72, tokens=(50,), ranks=(1, 2)),
        Case("size/wide_columns", hidden=1088, intermediate=24, tokens=(70,), ranks=(2,)),
        Case(
            "size/wide_input_weight",
            hidden=1088,
            intermediate=24,
            tokens=(70, 70),
            weight_on_input=True,
            ranks=(1, 2),
        ),
        Case("size/deep", hidden=72, intermediate=520, tokens=(50,), experts=4),
        Case("ranks/many", experts=24, top_k=4, tokens=(40,), dtypes=MAIN_DTYPES,
             ranks=(1, 2, 3, 4, 8)),
        Case("ranks/one_expert_each", experts=8, top_k=3, tokens=(20,), ranks=(8,)),
        Case("ranks/more_ranks_than_tokens", tokens=((1, 0, 1, 0, 0, 2, 0, 1),) * 6, ranks=(8,),
             bias=True),
        Case("nan/isolated_token", ids="uniform", probe="isolated_nan", modes=("values",),
             dtypes=ALL_DTYPES, ranks=(1, 2)),
    ]


def refusals():
    """Calls that must be refused before anything runs, on every rank, with an error that names what
    is wrong."""
    value, typed = ("ValueError",), ("TypeError",)
    routing, mismatch = ("RoutingError",), ("RankMismatchError",)
    either = ("ValueError", "TypeError", "RankMismatchError")

    def refusal(name, refused, *mentions, **options):
        kinds = {"modes": ("support",), "dtypes": ("fp32",)}
        return Case(f"refused/{name}", refused=refused, mentions=mentions, **kinds | options)

    several = {"ranks": (2, 3), "experts": 6}
    return [
        refusal("k_over_e", value, "top_k", top_k=9),
        refusal("k_over_e_ids", value, "top_k", top_k=9, ids="uniform"),
        refusal("experts_not_divisible", value, "num_experts", experts=6, ranks=(4,)),
        refusal("groups_not_divisible", value, "num_groups", routing=Routing(num_groups=3)),
        refusal("too_few_groups_for_k", value, "top_groups", top_k=3,
                routing=Routing(num_groups=4, top_groups=1)),
        refusal("capacity_negative", value, "capacity_factor", capacity_factor=-1.0),
        refusal("saved_z_on_two_ranks", ("UnsupportedError",), "save_z", save_z=True, ranks=(2,)),
        refusal("x_hidden", value, "x", defect="x_hidden"),
        refusal("x_dtype", typed, "x", defect="x_dtype"),
        refusal("x_rank", value, "x", defect="x_rank"),
        refusal("w_up_shape", value, "w_up", defect="w_up_shape"),
        refusal("w_up_dtype", typed, "w_up", defect="w_up_dtype"),
        refusal("w_down_shape", value, "w_down", defect="w_down_shape"),
        refusal("b_up_shape", value, "b_up", defect="b_up_shape", bias=True),
        refusal("ids_dtype", typed, "topk_ids", defect="ids_dtype", ids="uniform"),
        refusal("ids_shape", value, "topk_ids", defect="ids_shape", ids="uniform"),
        refusal("id_below_minus_one", routing, "topk_ids", defect="id_low", ids="uniform"),
        refusal("nan_logits", routing, "logits", defect="nan_router"),
        refusal("infinite_logits", routing, "logits", defect="inf_router"),
        refusal("nan_logits_on_one_rank", ("RoutingError", "RankMismatchError"), "logits",
                defect="rank_nan_router", **several),
        refusal("hidden_differs_by_rank", mismatch, "hidden", defect="rank_hidden", **several),
        refusal("dtype_differs_by_rank", mismatch, "dtype", defect="rank_dtype", **several),
        refusal("one_rank_is_wrong", either, "w_up", defect="rank_w_up_shape", **several),
    ]


def speed():
    """The shapes of `flashmoe bench`."""
    return [
        Case("speed/t1024_h512_i1024_e16_k2", modes=("speed",), tokens=(1024,), hidden=512,
             intermediate=1024, experts=16, top_k=2),
        Case("speed/t512_h2048_i768_e32_k8", modes=("speed",), tokens=(512,), hidden=2048,
             intermediate=768, experts=32, top_k=8),
    ]


CASES = (
    *routers(), *router_edges(), *external_routing(), *activations(), *layouts(), *options(),
    *sizes(), *refusals(), *speed(),
)
