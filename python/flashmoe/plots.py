"""PNGs of benchmark records. Matplotlib is imported by what draws."""

from __future__ import annotations

from . import rank_peers
from .bench import OURS
from .bench_ranks import BESIDE, launch_us

# Phases of a launch, in order.
SPAN_COLOURS = {
    "route": "tab:grey",
    "plan": "tab:olive",
    "push": "tab:purple",
    "up": "tab:blue",
    "down": "tab:cyan",
    "weight": "tab:green",
    "return": "tab:red",
    "combine": "tab:orange",
}
SPAN_NAMES = {
    "route": "route",
    "plan": "counts and slots exchanged, plan",
    "push": "dispatch",
    "up": "up tiles",
    "down": "down tiles",
    "return": "return",
    "combine": "sums after the last tile",
}
BACKWARD_NAMES = SPAN_NAMES | {
    "up": "gradients of activations",
    "down": "gradients of inputs",
    "weight": "gradients of weights, before and after those of inputs",
}


def canvas():
    """pyplot, for files alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def newest(records):
    """The last record of each case, number of ranks and dtype."""
    return list({(one["case"], one["ranks"], one["dtype"]): one for one in records}.values())


def source_line(records):
    """What records belong to, for a title."""
    sources = ", ".join(sorted({one["source"] for one in records}))
    return f"{records[-1]['gpu'] or 'CPU engine'}, {records[-1]['dtype']}, source {sources}"


def plot_roofline(records, path):
    """A PNG: the rate of each case over its arithmetic intensity, under the measured ceilings."""
    pyplot = canvas()
    peak, bandwidth = records[-1]["peak_tflops"], records[-1]["read_gb_per_s"]
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    intensities = [2.0**step for step in range(-1, 14)]
    roof = [min(peak, intensity * bandwidth / 1e3) for intensity in intensities]
    label = f"measured: {peak:.0f} TFLOP/s, {bandwidth / 1e3:.2f} TB/s"
    axes.plot(intensities, roof, color="black", label=label)
    for record in records:
        intensity = record["tflops"] * record["us"] / record["gbytes"] / 1e3
        axes.plot(intensity, record["tflops"], "o", color="tab:blue")
        rate = record["tflops"] * record["us"] / record["reference_us"]
        axes.plot(intensity, rate, "_", color="tab:orange", markersize=14)
        axes.annotate(record["case"], (intensity, record["tflops"]), fontsize=7, rotation=20)
    axes.plot([], [], "o", color="tab:blue", label="flashmoe, whole layer")
    axes.plot([], [], "_", color="tab:orange", label=f"{records[-1]['reference']}, products alone")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{records[-1]['gpu']}, forward, {records[-1]['dtype']}", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ---- the backward -----------------------------------------------------------------------------


def plot_backward(records, path):
    """A PNG: cuBLAS's time of the four products over ours, with floor and goal."""
    pyplot = canvas()
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.6 * len(records)), layout="constrained")
    places = range(len(records))
    for name, what, offset in (
        ("Z kept", "ratio", 0.2),
        ("Z computed again", "recomputed_ratio", -0.2),
    ):
        axes.barh(
            [place - offset for place in places], [one[what] for one in records], 0.4, label=name
        )
    plot_bounds(axes, records, lambda one, what: one[what])
    axes.axvline(1.0, color="black", linewidth=0.8)
    names = [f"{one['case']}\n{one['us']:.0f} us" for one in records]
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time of cuBLAS's four bare products over the whole backward")
    axes.set_title(source_line(records), fontsize=9)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_bounds(axes, records, bound):
    """Floor and goal of records that have them, as strokes across their bars."""
    for what, colour in (("floor", "tab:red"), ("goal", "tab:green")):
        for place, one in enumerate(records):
            if one[what] is not None:
                axes.plot([bound(one, what)] * 2, [place - 0.4, place + 0.4], color=colour)
        axes.plot([], [], color=colour, label=what)


# ---- several ranks ----------------------------------------------------------------------------


def plot_ranks(records, path):
    """A PNG: each case's time on W ranks over that of one GPU, with floor and goal."""
    pyplot = canvas()
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.5 * len(records)), layout="constrained")
    places = range(len(records))
    axes.barh(places, [one["over_one_gpu"] for one in records], 0.6, color="tab:blue")
    plot_bounds(axes, records, bound_of)
    axes.axvline(1.0, color="black", linewidth=0.8)
    names = [f"{one['case']}, {one['ranks']} ranks\n{one['us']:.0f} us" for one in records]
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0.9)
    timed = "one-GPU backward" if records[0]["direction"] == "backward" else "one-GPU layer"
    axes.set_xlabel(f"time on W ranks over the {timed} with the same rows and experts")
    axes.set_title(source_line(records), fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def bound_of(record, what):
    """Floor or goal as a multiple of the one GPU's time; for decode they are microseconds more."""
    bound, alone_us = record[what], record["reference_us"]
    return bound if record["figure_unit"] == record["reference"] else 1 + bound / alone_us


def plot_scaling(records, path):
    """A PNG of the scaling study: times over the number of GPUs, tokens a rank and experts.

    Raises ValueError where no record is of the study.
    """
    pyplot = canvas()
    chosen = [one for one in newest(records) if one["case"].split("-")[0] == "seed"]
    if not chosen:
        raise ValueError("no record of the scaling study; accepted: some of --study scaling")
    figure, panels = pyplot.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    most = max(one["ranks"] for one in chosen)
    usual = {"tokens": 8192, "experts": 64, "ranks": most}
    for axes, what in zip(panels, ("ranks", "tokens", "experts"), strict=True):
        others = [(name, value) for name, value in usual.items() if name != what]
        series = [one for one in chosen if all(one[name] == value for name, value in others)]
        plot_series(axes, sorted(series, key=lambda one: one[what]), what)
        axes.set_title(", ".join(f"{value} {name}" for name, value in others), fontsize=9)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"H 2048, I 2048, k 2; {source_line(chosen)}", fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_series(axes, series, what):
    """Milliseconds of ours, the one GPU and PyTorch over one size."""
    labels = {"ranks": "GPUs", "tokens": "tokens a GPU", "experts": "experts"}
    sizes = [one[what] for one in series]
    curves = {
        OURS: [one["us"] for one in series],
        "one GPU, same rows": [one["reference_us"] for one in series],
        rank_peers.TORCH: [one["eager_peers"].get(rank_peers.TORCH) for one in series],
    }
    for name, times in curves.items():
        known = [(size, us / 1e3) for size, us in zip(sizes, times, strict=True) if us is not None]
        axes.plot(*zip(*known, strict=True) if known else ([], []), "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(labels[what])
    axes.set_ylabel("milliseconds")


def lanes_of(phases_us):
    """[(lane, [(phase, begin, end), ...]), ...] in microseconds from the phases of each rank's
    launch: what its tiles do and, where the engine tells, what rows do beside them. The ranks'
    clocks are not the same: the moment is, to a few microseconds, in which the plan ends, because
    each rank's waits for the counts of all."""
    planned = [phases.get("route", 0.0) + phases.get("plan", 0.0) for phases in phases_us]
    lanes = []
    for rank, (phases, end_of_plan) in enumerate(zip(phases_us, planned, strict=True)):
        at, tiles = max(planned) - end_of_plan, []
        for name, us in phases.items():
            if name not in BESIDE:
                tiles.append((name, at, at + us))
                at += us
        dispatch, back = (phases.get(name, 0.0) for name in BESIDE)
        rows = [("push", max(planned), max(planned) + dispatch), ("return", at - back, at)]
        lanes.append((f"rank {rank}, tiles", tiles))
        if any(name in phases for name in BESIDE):
            lanes.append((f"rank {rank}, rows", [span for span in rows if span[0] in phases]))
    return lanes


def plot_timeline(record, path):
    """A PNG of one launch: the phases of each rank, by the kernel's own clock."""
    pyplot = canvas()
    lanes = lanes_of(record["phases_us"])
    figure, axes = pyplot.subplots(figsize=(11, 2 + 0.5 * len(lanes)), layout="constrained")
    for place, (_, spans) in enumerate(lanes):
        for name, begin, end in spans:
            axes.barh(place, end - begin, 0.7, left=begin, color=SPAN_COLOURS[name])
    names = BACKWARD_NAMES if record["direction"] == "backward" else SPAN_NAMES
    seen = {name for _, spans in lanes for name, _, _ in spans}
    for name in SPAN_COLOURS:
        if name in seen:
            axes.barh(0, 0, color=SPAN_COLOURS[name], label=names[name])
    axes.set_yticks(range(len(lanes)), [lane for lane, _ in lanes])
    axes.invert_yaxis()
    axes.set_xlabel("microseconds; ranks aligned where their plans end")
    longest = max(map(launch_us, record["phases_us"]))
    title = f"{record['case']}, eager launch of {longest:.0f} us; {source_line([record])}"
    axes.set_title(title, fontsize=9)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
