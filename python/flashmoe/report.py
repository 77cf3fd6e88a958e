"""What the commands show: JSON lines, tables, bars, progress. Rich is imported by what needs it."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from contextlib import contextmanager

BAR_WIDTH = 36
BAR_ROWS = 16


def print_json(record):
    """One JSON object on one line of stdout; numbers that are not finite become null."""
    print(json.dumps(finite(record)), flush=True)


def finite(value):
    """The same plain data with null for what JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def console(stderr=False):
    """A rich console; as wide as the terminal, 100 columns where there is none."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 100, highlight=False)


def table(title, *columns):
    """A plain table; columns named with a leading ">" are right-aligned."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    result = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    for column in columns:
        right = column.startswith(">")
        result.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=right)
    return result


@contextmanager
def progress_bar(total, unit):
    """A progress bar on stderr while it takes time; yields advance(text)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
    )
    shown = console(stderr=True)
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


@contextmanager
def stage_bar(total):
    """A progress bar over named stages; yields advance(stage), called when a stage begins."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<16}"), BarColumn(), TimeElapsedColumn())
    shown = console(stderr=True)
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task("start", total=total + 1)
        yield lambda stage: bar.update(task, advance=1, description=stage)


# ---- flashmoe run -----------------------------------------------------------------------------


def print_run(report):
    """A run's `Report` for people."""
    out = console()
    print_what_ran(out, report)
    print_load(out, report)
    print_traffic(out, report)
    print_times(out, report)
    print_errors(out, report.errors)
    verdict(out, report.passed, run_verdict(report))


def print_what_ran(out, report):
    sizes = report.sizes
    scale = f"scaled down by {report.scale}" if report.scale > 1 else "full size"
    out.print(
        f"[bold]{report.model}[/bold] ({scale}): one mixture-of-experts layer, "
        f"{' and '.join(report.times)}, {report.dtype}"
    )
    out.print(
        f"tokens {sizes['tokens_per_rank']} a rank · hidden {sizes['hidden']} · intermediate "
        f"{sizes['intermediate']} · experts {sizes['experts']} "
        f"({sizes['experts_per_rank']} a rank) · top-k {sizes['top_k']}"
    )
    out.print(
        f"{report.ranks} rank{'s' * (report.ranks > 1)} as {report.launch} on {report.device} · "
        f"{report.engine}"
    )
    if report.remark:
        out.print(report.remark)


def print_load(out, report):
    """Tokens per expert as bars; experts are joined where there are more than fit."""
    counts = report.tokens_per_expert
    joined = math.ceil(len(counts) / BAR_ROWS)
    groups = [counts[first : first + joined] for first in range(0, len(counts), joined)]
    heights = [sum(group) for group in groups]
    out.print(
        f"\n[bold]Tokens per expert[/bold] (fewest {min(counts)}, mean "
        f"{sum(counts) / len(counts):.1f}, most {max(counts)}, dropped {report.dropped})"
    )
    for idx, height in enumerate(heights):
        first, last = idx * joined, min((idx + 1) * joined, len(counts)) - 1
        label = f"{first}" if first == last else f"{first}-{last}"
        length = round(BAR_WIDTH * height / max(max(heights), 1))
        out.print(f"{label:>9} [cyan]{'█' * length}[/cyan] {height}")


def print_traffic(out, report):
    if report.ranks == 1 or report.device == "cuda":  # which does not count what it sends
        return
    shown = table(
        "\nSent between ranks",
        "",
        ">rows",
        ">without dedup.",
        ">bytes",
        ">without dedup.",
        ">saved",
    )
    for direction, sent in report.traffic.items():
        saved = 1 - sent["bytes_sent"] / sent["bytes_sent_plain"] if sent["bytes_sent_plain"] else 0
        shown.add_row(
            direction,
            str(sent["rows_sent"]),
            str(sent["rows_sent_plain"]),
            size(sent["bytes_sent"]),
            size(sent["bytes_sent_plain"]),
            f"{saved:.0%}",
        )
    out.print(shown)


def print_times(out, report):
    for direction, times in report.times.items():
        if report.device == "cuda":
            out.print(f"\n[bold]{direction}[/bold]: {times['seconds'] * 1e3:.3f} ms")
            continue
        rate = times["flops"] / times["seconds"] / 1e9
        title = (
            f"{direction}: {times['seconds'] * 1e3:.2f} ms, {rate:.1f} GFLOP/s "
            f"on {times['threads']} threads"
        )
        shown = table(f"\n{title}", "phase", ">thread ms", ">share", ">GFLOP", ">GFLOP/s a thread")
        total = sum(phase["thread_seconds"] for phase in times["phases"].values())
        for name, phase in times["phases"].items():
            seconds, flops = phase["thread_seconds"], phase["flops"]
            shown.add_row(
                name,
                f"{seconds * 1e3:.2f}",
                f"{seconds / total:.0%}",
                f"{flops / 1e9:.3f}" if flops else "",
                f"{flops / seconds / 1e9:.1f}" if flops else "",
            )
        out.print(shown)


def print_errors(out, errors):
    shown = table(
        "\nError against the fp64 reference (relative, norm-wise)",
        "output",
        ">FlashMoE",
        ">plain PyTorch",
        ">ratio",
        ">bar",
        "",
    )
    for name, one in errors.items():
        within = one["ratio"] <= one["bar"]
        shown.add_row(
            name,
            f"{one['error']:.2e}",
            f"{one['yardstick']:.2e}",
            f"{one['ratio']:.2f}",
            f"{one['bar']:.2f}",
            "[green]ok[/green]" if within else "[red]above[/red]",
        )
    out.print(shown)


def run_verdict(report):
    """The last line of a run."""
    if not report.passed:
        return "; ".join(report.reasons)
    flips = f", {report.flips} near-tied choices rounded otherwise" if report.flips else ""
    return (
        f"all {len(report.errors)} outputs and gradients are as exact as plain PyTorch, "
        f"repeated runs gave the same bits{flips}"
    )


def verdict(out, passed, text):
    """The verdict line."""
    from rich.markup import escape

    word = "[bold green]passed[/bold green]" if passed else "[bold red]FAILED[/bold red]"
    out.print(f"{word}: {escape(text)}")


def size(num_bytes):
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


# ---- flashmoe check ---------------------------------------------------------------------------


def print_checks(records):
    """Records of `flashmoe check` for people: a line a group of cases, then what failed."""
    out = console()
    shown = table("", "cases", ">passed", ">failed", ">skipped", ">nearest to its bar", ">seconds")
    for group in dict.fromkeys(record.case.split("/")[0] for record in records):
        members = [record for record in records if record.case.split("/")[0] == group]
        numbers = [
            sum(one.status == status for one in members)
            for status in ("passed", "failed", "skipped")
        ]
        ratios = [(one.error_ratio, one.bar) for one in members if one.bar]
        nearest = max(ratios, key=lambda pair: pair[0] / pair[1], default=None)
        shown.add_row(
            group,
            *(str(number) if number else "" for number in numbers),
            "{:.2f} of {:.2f}".format(*nearest) if nearest else "",
            f"{sum(one.seconds for one in members):.1f}",
        )
    out.print(shown)
    for record in records:
        if record.status == "failed":
            name = f"{record.case} {record.dtype}, {record.ranks} ranks"
            out.print(f"failed {name}: {record.reason}", markup=False)
    for reason, count in Counter(r.reason for r in records if r.status == "skipped").items():
        out.print(f"skipped {count}: {reason}", markup=False)
    summary = check_summary(records)
    text = ", ".join(f"{count} {status}" for status, count in summary.items())
    verdict(out, summary["failed"] == 0, text)


def check_summary(records):
    """{"passed":, "failed":, "skipped":} of records."""
    return {
        status: sum(record.status == status for record in records)
        for status in ("passed", "failed", "skipped")
    }


# ---- flashmoe bench ---------------------------------------------------------------------------


def print_bench(records):
    """Records of `flashmoe bench` for people: a table a case, times in milliseconds."""
    out = console()
    peers = list(dict.fromkeys(name for record in records for name in record["peers"]))
    for case in dict.fromkeys(record["case"] for record in records):
        shown = table(
            f"\n{case}",
            "dtype",
            "direction",
            ">ours ms",
            ">loop ms",
            ">loop/ours",
            *(f">{name.removeprefix('torch.')} ms" for name in peers),
            ">error",
            ">bits",
        )
        for record in records:
            if record["case"] == case:
                shown.add_row(*bench_row(record, peers))
        out.print(shown)
    if records:
        first = records[0]
        out.print(
            f"{first['cpu']}, {first['threads']} threads; medians of interleaved runs; loop: plain "
            "PyTorch, one expert after the other",
            markup=False,
        )


def bench_row(record, peers):
    """The cells of one record."""
    peer_us = record["peers"]
    return (
        record["dtype"],
        record["direction"] + (", Z saved" if record["save_z"] else ""),
        f"{record['us'] / 1e3:.1f}",
        f"{record['reference_us'] / 1e3:.1f}",
        f"{record['ratio']:.2f}",
        *(f"{peer_us[name] / 1e3:.1f}" if name in peer_us else "" for name in peers),
        f"{record['error_ratio']:.2f}",
        "same" if record["bitwise"] else "DIFFER",
    )


# ---- flashmoe run --list ----------------------------------------------------------------------


def print_models(models, as_json):
    """The table of models."""
    if as_json:
        for model in models:
            print_json(
                {
                    name: getattr(model, name)
                    for name in ("name", "hidden", "intermediate", "experts", "top_k")
                }
            )
        return
    shown = table(
        "", "model", ">hidden", ">intermediate", ">experts", ">top-k", "router", "activation"
    )
    for model in models:
        activation = model.activation if isinstance(model.activation, str) else "swiglu, clamped"
        shown.add_row(
            model.name,
            str(model.hidden),
            str(model.intermediate),
            str(model.experts),
            str(model.top_k),
            model.routing.score,
            activation,
        )
    console().print(shown)
