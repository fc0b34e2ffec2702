"""The report of a tuning run: one HTML file without scripts, styles or pictures from elsewhere."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from vllm_easyspec.bench.report import machine
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.tune.planner import tokens_a_round
from vllm_easyspec.tune.plot import Bar, Mark, Series, bars, scatter
from vllm_easyspec.tune.tuner import Findings

SCOPE_COLOURS = {"precise": "#555555", "attention": "#2f6db3", "block": "#d97a1f"}
STAGE_COLOURS = {"calibrate": "#6aa84f", "draft": "#d97a1f", "verify": "#2f6db3", "outside": "#bbbbbb"}
ARM_COLOURS = {"tuned": "#c0392b", "untuned": "#2f6db3", "draft_model": "#6aa84f", "none": "#555555"}
# The browser itself is told to fetch and run nothing.
POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .6rem 0; font-size: 14px; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } .plots > div { max-width: 100%; overflow-x: auto; }
.legend span { margin-right: 1.1rem; font-size: 13px; } .legend { padding-left: 62px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: .35rem; }
.grid { stroke: #e4e4e4; } .tick { font-size: 12px; fill: #444; } .label { font-size: 13px; fill: #222; }
.title { font-size: 14px; font-weight: 600; } .note { background: #fff6e0; padding: .5rem .8rem; }
pre { background: #f5f5f5; padding: .8rem; white-space: pre-wrap; font-size: 13px; }
"""


def html_report(found: Findings, run: dict[str, Any], tuned: str) -> str:
    """run: command, commit, versions and hardware (`bench/report.py`); tuned: the YAML."""
    parts = [f"<h1>easyspec tuning: {escape(run['target'])}, drafter {escape(run['drafter'])}</h1>", _about(run)]
    parts += [f'<p class="note">Not finished: {escape("; ".join(found.unfinished))}.</p>' for _ in found.unfinished[:1]]
    parts += ["<h2>Chosen</h2>", _chosen_table(found), _how_measured(found)]
    parts += ["<h2>Plans tried</h2>", '<div class="plots">', *(f"<div>{plot}</div>" for plot in _plan_plots(found))]
    parts += ["</div>", _plans_table(found), "<h2>Time of a round</h2>", _split(found)]
    if found.baselines:
        parts += ["<h2>Compared with</h2>", _arms_plot(found), _arms_table(found)]
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
    """What the figures are, and what they are not."""
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


def _family(plan: DraftPlan) -> str:
    return "precise" if plan.is_precise else plan.scope


def _by_family(found: Findings, marks: dict[DraftPlan, Mark]) -> list[Series]:
    return [
        Series(name, colour, [mark for plan, mark in marks.items() if _family(plan) == name])
        for name, colour in SCOPE_COLOURS.items()
        if any(_family(plan) == name for plan in marks)
    ]


def _plan_plots(found: Findings) -> Iterable[str]:
    chosen = found.chosen()
    plans = {point.plan for point in chosen.values() if point.num_drafts}
    untuned = {point.plan for point in found.untuned.values()}
    max_drafts = max(len(acceptance) for acceptance in found.acceptance.values())
    means = {plan: sum(acceptance) / max_drafts for plan, acceptance in found.acceptance.items()}
    marks = {plan: _mark(plan, mean, f"{mean:.3f}", plan in plans, plan in untuned) for plan, mean in means.items()}
    title = f"Acceptance, mean of positions 1 to {max_drafts}"
    yield scatter(title, "sequential steps of a fuzzy step", "acceptance", _by_family(found, marks))
    for size in found.times:
        best: dict[DraftPlan, tuple[float, int]] = {}
        for point, rate in found.predicted(size).items():
            if point.num_drafts:
                best[point.plan] = max(best.get(point.plan, (0.0, 0)), (rate, point.num_drafts))
        marks = {
            plan: _mark(plan, rate, f"K={k}, {rate:.1f} tokens/s", plan == chosen[size].plan, plan in untuned)
            for plan, (rate, k) in best.items()
        }
        title = f"Tokens per second, batch size {size}"
        yield scatter(title, "sequential steps of a fuzzy step", "tokens per second", _by_family(found, marks))


def _mark(plan: DraftPlan, y: float, figures: str, chosen: bool, untuned: bool) -> Mark:
    return Mark(plan.sequential_steps, y, f"{plan}: {figures}", chosen, "untuned" if untuned else "")


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


def _split(found: Findings) -> str:
    rows = []
    for size, point in found.chosen().items():
        for name, one in (("untuned", found.untuned[size]), ("chosen", point)):
            seen = found.confirmed.get(size, {}).get(one)
            if seen is not None:
                stages = [(stage, STAGE_COLOURS[stage], took) for stage, took in seen.stage_ms.items()]
                outside = max(0.0, seen.wall_ms - sum(seen.stage_ms.values()))
                stages.append(("outside the stages", STAGE_COLOURS["outside"], outside))
                rows.append(Bar(f"batch {size}, {name} (K={one.num_drafts})", stages))
    return bars("Stages of a round, medians", "milliseconds", rows) if rows else "<p>Not measured.</p>"


def _arms_plot(found: Findings) -> str:
    series = [
        Series(
            name,
            ARM_COLOURS[name],
            [Mark(size, rate, f"{name}, batch {size}: {rate:.1f}") for size, rate in rates.items()],
            line=True,
        )
        for name, rates in found.baselines.items()
    ]
    return scatter("Engines in turn, wall-clock", "batch size", "tokens per second", series, from_zero=True)


def _arms_table(found: Findings) -> str:
    names = list(found.baselines)
    rows = [[size, *(f"{found.baselines[name][size]:.1f}" for name in names)] for size in found.times]
    failed = "".join(f"<p>{escape(name)}: {escape(why)}</p>" for name, why in found.failed.items())
    return _table(["batch size", *(f"{name}, tokens/s" for name in names)], rows) + failed


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], text: Sequence[int] = ()) -> str:
    """text: columns of words, set to the left."""

    def cells(tag: str, values: Sequence[Any]) -> str:
        kinds = (' class="text"' if column in text else "" for column in range(len(values)))
        return "".join(f"<{tag}{kind}>{escape(str(value))}</{tag}>" for kind, value in zip(kinds, values, strict=True))

    lines = [f"<tr>{cells('th', head)}</tr>", *(f"<tr>{cells('td', row)}</tr>" for row in rows)]
    return f"<table>{''.join(lines)}</table>"
