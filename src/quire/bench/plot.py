"""Pictures of a run: the distributions of latencies, and a timeline of the requests.

matplotlib is the extra `bench`, and is imported only here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.bench.metrics import RequestTimes, output_rate
from quire.errors import ConfigError

if TYPE_CHECKING:
    from quire.bench.serve import ServeRun

ENDINGS = (".png", ".svg", ".pdf")
MAX_BARS = 400
"""Most requests that are drawn; of more, an even selection is drawn."""
WAIT, PREFILL, DECODE, FAILED, RATE = "#c9c9c9", "#e3a857", "#4878a8", "#c0392b", "#2d6a4f"


def require_matplotlib(path: str) -> None:
    """Raises `ConfigError` before the run if the picture could not be drawn after it."""
    if Path(path).suffix.lower() not in ENDINGS:
        raise ConfigError(f"plot must end in one of {', '.join(ENDINGS)}, got {path!r}.")
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError:
        raise ConfigError('plot needs matplotlib: pip install "quire[bench]"') from None


def plot_run(run: ServeRun, path: str, *, title: str) -> None:
    """Latency distributions on the left, the timeline on the right."""
    done = [times for times in run.times if not times.error]
    figure = _figure(13, 7.5)
    grid = figure.add_gridspec(3, 2, width_ratios=[1, 1.9], height_ratios=[1, 1, 1])
    left = [figure.add_subplot(grid[row, 0]) for row in range(3)]
    _cdf(left[0], "Time to first token", [t.ttft for t in done])
    _cdf(left[1], "Gap between tokens (ITL)", [gap for t in done for gap in t.itl])
    _cdf(left[2], "End to end", [t.e2el for t in done])
    left[2].set_xlabel("milliseconds")
    bars = figure.add_subplot(grid[:2, 1])
    _timeline(bars, run.times)
    rate = figure.add_subplot(grid[2, 1], sharex=bars)
    _rates(rate, run.times)
    bars.tick_params(labelbottom=False)
    num_failed = len(run.times) - len(done)
    failed = f", {num_failed} failed" if num_failed else ""
    figure.suptitle(f"{title}: {len(done)} requests{failed}", fontsize=12)
    _save(figure, path)


def plot_sweep(points: Sequence[dict[str, object]], path: str, *, title: str, axis: str) -> None:
    """points: figures of each run, with their `load` ("8" or "inf"); axis: the name of the load."""
    figure = _figure(12, 4.2)
    names = [str(point["load"]) for point in points]
    x = list(range(len(points)))
    panels: list[tuple[str, list[tuple[str, str]]]] = [
        ("output tokens per second", [("output_throughput", "output")]),
        ("TTFT, ms", [("median_ttft_ms", "median"), ("p99_ttft_ms", "p99")]),
        ("TPOT, ms", [("median_tpot_ms", "median"), ("p99_tpot_ms", "p99")]),
    ]
    for place, (text, lines) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 3, place)
        for (key, label), colour in zip(lines, (DECODE, PREFILL), strict=False):
            shown = [(at, point[key]) for at, point in zip(x, points, strict=True) if key in point]
            axes.plot(*zip(*shown, strict=True), "o-", color=colour, label=label)
        axes.set_xticks(x, names)
        axes.set_xlabel(axis)
        axes.set_title(text, loc="left", fontsize=10)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=12)
    _save(figure, path)


def _cdf(axes: Any, title: str, seconds: Sequence[float]) -> None:
    """Share of values up to x, with the usual quantiles."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.5, 0.9, 1])
    axes.grid(alpha=0.3)
    if not seconds:
        axes.text(0.5, 0.5, "no values", ha="center", transform=axes.transAxes, color="#777777")
        return
    import numpy as np

    values = np.sort(np.asarray(seconds)) * 1e3
    axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", color=DECODE)
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    axes.axvline(p50, color="#777777", linewidth=0.8, linestyle="--")
    axes.axvline(p99, color=FAILED, linewidth=0.8, linestyle="--")
    axes.set_xlim(0, max(p99 * 1.25, 1e-3))
    quantiles = {"p50": p50, "p90": p90, "p99": p99, "max": values[-1]}
    text = "\n".join(f"{name} {_short(value)}" for name, value in quantiles.items())
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2}
    axes.text(
        0.98, 0.08, text, ha="right", va="bottom", fontsize=8, bbox=box, transform=axes.transAxes
    )


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"


def _timeline(axes: Any, requests: Sequence[RequestTimes]) -> None:
    """A bar per request, in order of due time: waiting in the client, to the first token, decoding."""
    step = -(-len(requests) // MAX_BARS)
    shown = sorted(requests, key=lambda times: times.due)[::step]
    height = 0.85 if len(shown) <= 100 else 1.0
    for colour, label, spans in (
        (WAIT, "due, not sent", [(t.due, t.sent) for t in shown]),
        (PREFILL, "sent, no token", [(t.sent, t.first) for t in shown]),
        (DECODE, "generating", [(t.first, t.end) for t in shown]),
    ):
        rows = [
            (row, start, stop - start)
            for row, (start, stop) in enumerate(spans)
            if start is not None and stop is not None
        ]
        if rows:
            at, lefts, widths = zip(*rows, strict=True)
            axes.barh(at, widths, left=lefts, height=height, color=colour, label=label)
    failed = [(row, times.sent) for row, times in enumerate(shown) if times.error]
    if failed:
        rows_at, sent = zip(*failed, strict=True)
        axes.plot(sent, rows_at, "x", color=FAILED, markersize=5, label="failed")
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(left=0)
    every = f", every {step}th" if step > 1 else ""
    axes.set_title(f"Requests, in the order they were due{every}", loc="left", fontsize=10)
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, frameon=False, fontsize=8,
        borderaxespad=0.2,
    )  # fmt: skip


def _rates(axes: Any, requests: Sequence[RequestTimes]) -> None:
    """Output tokens per second over time, and how many requests were in flight."""
    done = [times for times in requests if not times.error]
    last = max((times.end or 0.0 for times in done), default=0.0)
    width = next((w for w in (0.05, 0.1, 0.25, 0.5, 1.0) if last / w <= 120), last / 120 or 1.0)
    rates = output_rate(done, width=width)
    edges = [slot * width for slot in range(len(rates) + 1)]
    axes.stairs(rates, edges, fill=True, color=RATE, alpha=0.35)
    axes.stairs(rates, edges, color=RATE)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("output tok/s", color=RATE)
    axes.set_xlabel("seconds")
    axes.set_title(f"Output tokens per second (by {width:g} s) and requests in flight",
                   loc="left", fontsize=10)  # fmt: skip
    axes.grid(alpha=0.3)
    flight = axes.twinx()
    events = sorted([(t.sent, 1) for t in done] + [(t.end or t.sent, -1) for t in done])
    at, running, now = [0.0], [0], 0
    for moment, change in events:
        now += change
        at.append(moment)
        running.append(now)
    flight.step(at, running, where="post", color="#444444", linewidth=0.9)
    flight.set_ylim(bottom=0)
    flight.set_ylabel("in flight", color="#444444")


def _figure(width: float, height: float) -> Any:
    """A figure without pyplot, which has global state and may need a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ConfigError(f"plot {path} cannot be written: {error.strerror or error}.") from None
