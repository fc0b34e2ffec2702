"""The report of a tuning run: one self-contained HTML file without scripts."""

from collections.abc import Sequence
from html import escape
from typing import Any

from vllm_easyspec.bench import plot
from vllm_easyspec.bench.results import machine
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.tune.planner import tokens_a_round
from vllm_easyspec.tune.tuner import Findings

SCOPE_COLOURS = {"precise": "#555555", "attention": "#2f6db3", "block": "#d97a1f"}
STAGE_COLOURS = {"calibrate": "#6aa84f", "draft": "#d97a1f", "verify": "#2f6db3", "outside": "#bbbbbb"}
ARM_COLOURS = {"tuned": "#c0392b", "untuned": "#2f6db3", "draft_model": "#6aa84f", "none": "#555555"}
# Tells the browser to fetch and run nothing.
POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .6rem 0; font-size: 14px; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
.note { background: #fff6e0; padding: .5rem .8rem; } svg { max-width: 100%; height: auto; }
pre { background: #f5f5f5; padding: .8rem; white-space: pre-wrap; font-size: 13px; }
"""


def html_report(found: Findings, run: dict[str, Any], tuned: str) -> str:
    """run: command, commit, versions and hardware (`bench/results.py`); tuned: the YAML."""
    parts = [f"<h1>easyspec tuning: {escape(run['target'])}, drafter {escape(run['drafter'])}</h1>", _about(run)]
    parts += [f'<p class="note">Not finished: {escape("; ".join(found.unfinished))}.</p>' for _ in found.unfinished[:1]]
    parts += ["<h2>Chosen</h2>", _chosen_table(found), _how_measured(found)]
    parts.append("<h2>Plans tried</h2>")
    _draw_plans(found, parts)
    parts += [_plans_table(found), "<h2>Time of a round</h2>"]
    _draw_split(found, parts)
    if found.baselines:
        parts.append("<h2>Compared with</h2>")
        _draw_arms(found, parts)
        parts.append(_arms_table(found))
        parts += [f'<p class="note">Mind: {escape(warning)}.</p>' for warning in found.warnings()]
    parts += ["<h2>The configuration</h2>", f"<pre>{escape(tuned)}</pre>"]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{POLICY}<title>easyspec tuning</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _about(run: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    return f"<p>{escape(machine(run))}; {escape(versions)}.</p><pre>{escape(run['command'])}</pre>"


def _how_measured(found: Findings) -> str:
    """What the figures mean, and what they don't."""
    rates = (
        "Rates are tokens per second by wall-clock time."
        if found.by_wall
        else "Rates are tokens per second of the stages' time (calibrate, draft, verify), on which the choices rest: "
        "vLLM's own kernels are interpreted or plain PyTorch on this machine. Time outside the stages is shown apart."
    )
    answers = {
        True: " All plans gave the same answers, token for token.",
        False: " Some plans gave other answers than the first: in 16 bits near ties may fall either way.",
        None: "",
    }[found.same_answers]
    return (
        f"<p>{rates} The table shows what ran in the engine at its own plan and K, on the same prompts in turn "
        "(predictions where time was too short). The plots of plans show predictions at each plan's best K, from "
        f"acceptance by position at the largest K and from stage times; the chosen plans are ringed.{answers}</p>"
    )


def _chosen_table(found: Findings) -> str:
    rows = []
    for size, point in found.chosen().items():
        rates, untuned = found.rates(size), found.untuned[size]
        ratio = rates[point] / rates[untuned] if untuned in rates else None
        seen = found.confirmed.get(size, {}).get(point)
        rows.append(
            [
                size,
                str(point),
                f"{rates[point]:.1f}",
                str(untuned),
                f"{rates[untuned]:.1f}" if untuned in rates else "",
                f"{ratio:.2f}" if ratio else "",
                f"{seen.tokens_a_round:.2f}" if seen else "",
                f"{seen.wall_rate:.1f}" if seen else "",
            ]
        )
    head = "batch size", "chosen", "tokens/s", "untuned", "tokens/s", "ratio", "tokens per round", "wall tokens/s"
    return _table(head, rows, text=(1, 3))


def _draw_plans(found: Findings, parts: list[str]) -> None:
    """Acceptance, then tokens per second of each batch size, against the sequential steps of each plan."""
    chosen = found.chosen()
    max_drafts = max(len(acceptance) for acceptance in found.acceptance.values())
    means = {plan: sum(acceptance) / max_drafts for plan, acceptance in found.acceptance.items()}
    used = {point.plan for point in chosen.values() if point.num_drafts}
    with plot.embedded(parts, 1 + len(found.times), columns=2) as (acceptance, *rates):
        title = f"Acceptance, mean of positions 1 to {max_drafts}"
        _scatter(acceptance, title, means, used, {point.plan for point in found.untuned.values()})
        for axes, size in zip(rates, found.times, strict=True):
            best: dict[DraftPlan, float] = {}
            for point, rate in found.predicted(size).items():
                if point.num_drafts:
                    best[point.plan] = max(best.get(point.plan, 0.0), rate)
            title = f"Tokens per second, batch size {size}"
            _scatter(axes, title, best, {chosen[size].plan}, {found.untuned[size].plan})


def _scatter(
    axes: Any, title: str, values: dict[DraftPlan, float], chosen: set[DraftPlan], untuned: set[DraftPlan]
) -> None:
    for family, colour in SCOPE_COLOURS.items():
        marks = [plan for plan in values if _family(plan) == family]
        if marks:
            steps = [plan.sequential_steps for plan in marks]
            axes.scatter(steps, [values[plan] for plan in marks], color=colour, label=family, zorder=2)
    for plan, value in values.items():
        place = plan.sequential_steps, value
        if plan in chosen:
            axes.plot(*place, "o", markersize=12, markerfacecolor="none", markeredgecolor="black")
        if plan in untuned:
            axes.annotate("untuned", place, xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8)
    axes.margins(y=0.15)  # room for a note above the highest
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("sequential steps of a fuzzy step")


def _family(plan: DraftPlan) -> str:
    return "precise" if plan.is_precise else plan.scope


def _plans_table(found: Findings) -> str:
    rows = [
        [
            str(plan),
            plan.sequential_steps,
            f"{found.costs[plan]:.3f}" if plan in found.costs else "",
            " ".join(f"{share:.2f}" for share in acceptance),
            f"{tokens_a_round(acceptance, len(acceptance)):.2f}",
            *(f"{times.step[plan]:.2f}" if plan in times.step else "" for times in found.times.values()),
        ]
        for plan, acceptance in sorted(found.acceptance.items(), key=lambda item: -item[0].sequential_steps)
    ]
    steps = [f"step ms at batch {size}" for size in found.times]
    head = "plan", "steps", "score", "acceptance by position", "tokens per round", *steps
    return f"<details><summary>All plans</summary>{_table(head, rows, text=(3,))}</details>"


def _draw_split(found: Findings, parts: list[str]) -> None:
    """The stages of a round at each batch size, untuned and chosen, as far as they were confirmed."""
    rows = {}
    for size, point in found.chosen().items():
        for name, one in (("untuned", found.untuned[size]), ("chosen", point)):
            if (seen := found.confirmed.get(size, {}).get(one)) is not None:
                outside = max(0.0, seen.wall_ms - sum(seen.stage_ms.values()))
                rows[f"batch {size}, {name} (K={one.num_drafts})"] = seen.stage_ms | {"outside": outside}
    if not rows:
        parts.append("<p>Not measured.</p>")
        return
    with plot.embedded(parts, 1, columns=1, height=1 + 0.25 * len(rows)) as (axes,):
        begin = [0.0] * len(rows)
        for stage, colour in STAGE_COLOURS.items():
            took = [stages[stage] for stages in rows.values()]
            label = "outside the stages" if stage == "outside" else stage
            axes.barh(list(rows), took, left=begin, color=colour, label=label)
            begin = [sum(both) for both in zip(begin, took, strict=True)]
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("milliseconds, medians")


def _draw_arms(found: Findings, parts: list[str]) -> None:
    with plot.embedded(parts, 1, columns=1) as (axes,):
        for name, rates in found.baselines.items():
            axes.plot(list(rates), list(rates.values()), marker="o", color=ARM_COLOURS[name], label=name)
        axes.set_ylim(bottom=0)
        axes.set_title("Engines in turn, wall-clock", fontsize=9, loc="left")
        axes.set_xlabel("batch size")
        axes.set_ylabel("tokens per second")


def _arms_table(found: Findings) -> str:
    names = list(found.baselines)
    rows = [[size, *(f"{found.baselines[name][size]:.1f}" for name in names)] for size in found.times]
    failed = "".join(f"<p>{escape(name)}: {escape(why)}</p>" for name, why in found.failed.items())
    return _table(["batch size", *(f"{name}, tokens/s" for name in names)], rows) + failed


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], text: Sequence[int] = ()) -> str:
    """text: columns of words, which are left-aligned."""

    def cells(tag: str, values: Sequence[Any]) -> str:
        kinds = (' class="text"' if column in text else "" for column in range(len(values)))
        return "".join(f"<{tag}{kind}>{escape(str(value))}</{tag}>" for kind, value in zip(kinds, values, strict=True))

    lines = [f"<tr>{cells('th', head)}</tr>", *(f"<tr>{cells('td', row)}</tr>" for row in rows)]
    return f"<table>{''.join(lines)}</table>"
