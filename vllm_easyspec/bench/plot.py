"""Plots of a benchmark's rows, as SVG, PNG or any other file type of matplotlib's."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_easyspec.bench import BenchmarkError
from vllm_easyspec.documents import write_whole

SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "vllm-easyspec",  # the same rows give the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "font.size": 9,
}


def check(path: Path | None) -> None:
    """Raise `BenchmarkError` before anything is measured if the plot can't be drawn."""
    if path is None:
        return
    require_matplotlib("--plot", path)
    from matplotlib.figure import Figure

    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".") not in known:
        raise BenchmarkError(f"--plot {path} has the ending {path.suffix!r}. Allowed are {', '.join(known)}")


def require_matplotlib(option: str, path: Path | None) -> None:
    """Raise `BenchmarkError` if `option` names a file that needs matplotlib, which isn't installed."""
    if path is None:
        return
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise BenchmarkError(
            f"{option} {path} needs matplotlib ({error}). Install vllm-easyspec[bench], or leave {option} out"
        ) from error


def engine(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second and time per output token against concurrency, one line per arm."""
    panels = {
        "tokens per second": lambda row: row["tokens_a_second"],
        "TPOT, ms (median)": lambda row: row["tpot_ms"]["median"] or 0,
    }
    ticks = sorted({row["concurrency"] for row in rows})
    with _file(path, columns=len(panels)) as columns:
        for axes, (label, value) in zip(columns, panels.items(), strict=True):
            for arm in dict.fromkeys(row["arm"] for row in rows):
                own = [row for row in rows if row["arm"] == arm]
                axes.plot([row["concurrency"] for row in own], list(map(value, own)), marker="o", label=arm)
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, list(map(str, ticks)))
            axes.set_xlabel("concurrency")
            axes.set_ylabel(label)
            axes.set_ylim(0, 1.1 * max(map(value, rows)))


def draft_step(rows: list[dict[str, Any]], path: Path) -> None:
    """A step's speed-up over the precise plan by plan and scope, one bar per batch and context."""
    plans = list(dict.fromkeys(_plan(row) for row in rows))
    series = list(dict.fromkeys((row["batch"], row["context"]) for row in rows))
    width = 0.8 / len(series)
    with _file(path, columns=1) as (axes,):
        for index, (batch, context) in enumerate(series):
            own = [row for row in rows if (row["batch"], row["context"]) == (batch, context)]
            places = [plans.index(_plan(row)) + (index - (len(series) - 1) / 2) * width for row in own]
            bars = axes.bar(places, [row["speedup"] for row in own], width, label=f"batch {batch}, context {context}")
            axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.grid(visible=False, axis="x")
        axes.set_xticks(range(len(plans)), plans)
        ranks = rows[0]["ranks"]
        axes.set_ylabel(f"speed-up over precise, {ranks} rank{'s' * (ranks > 1)}")


def _plan(row: dict[str, Any]) -> str:
    return f"{row['scope']}\n{row['plan']}"


@contextmanager
def _file(path: Path, columns: int) -> Iterator[Any]:
    """Axes to draw on; at the end the figure is written to `path`."""
    with _figure(columns=columns) as (figure, axes):
        yield axes
        _legend(figure, axes)
        image, kind = io.BytesIO(), path.suffix.removeprefix(".")
        figure.savefig(image, format=kind, metadata={"Date": None} if kind == "svg" else None)
        write_whole(path, image.getvalue())


@contextmanager
def embedded(parts: list[str], panels: int, columns: int, height: float = 3.2) -> Iterator[Any]:
    """Axes to draw on; at the end the figure, with a legend of what is named in any of them, is added to `parts` as an
    `<svg>` element. height: of a row of panels, in inches.
    """
    with _figure(-(-panels // columns), columns, height) as (figure, axes):
        yield axes[:panels]
        for unused in axes[panels:]:
            unused.remove()
        _legend(figure, axes[:panels])
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        parts.append(text.getvalue()[text.getvalue().index("<svg") :])


@contextmanager
def _figure(rows: int = 1, columns: int = 1, height: float = 3.2) -> Iterator[tuple[Any, Any]]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(8, height * rows), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False).flatten()


def _legend(figure: Any, axes: Any) -> None:
    """Place the legend above the axes; each name once."""
    found: dict[str, Any] = {}
    for one in axes:
        handles, names = one.get_legend_handles_labels()
        found |= dict(zip(names, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=len(found))
