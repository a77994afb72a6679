"""Pictures of the results: what was reached, as a multiple of the target, a picture for each benchmark.

`make bench` draws them when it has measured; so does `python3 bench/plot.py`, with matplotlib.
A measure whose target is not one number (a median and a 99th percentile) is not drawn.
"""
import pathlib
import re

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

RESULTS = pathlib.Path(__file__).parent / "results"
INCHES_PER_BAR, REACHED, MISSED = 0.32, "#2a7f62", "#c1666b"


def number(text):
    """The one number in it; None where there are more, or none."""
    found = re.findall(r"\d[\d,]*\.?\d*", text.split(" × ")[0] if " × " in text else text)
    return float(found[0].replace(",", "")) if len(found) == 1 else None


def multiple(reached, target):
    """How many times the target; of a time, or an upper bound, how many times better."""
    ours, wanted = number(reached.replace(" (missed)", "")), number(target)
    if not ours or not wanted:
        return None
    less_is_more = "at most" in target or re.fullmatch(r"[\d.,]+ m?s", target)
    return wanted / ours if less_is_more else ours / wanted


def targets(path):
    """(measure, target, multiple) of the first table of a result."""
    lines = path.read_text().splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("| measure |")), None)
    if start is None:
        return
    for line in lines[start + 2:]:
        if not line.startswith("|"):
            return
        measure, reached, target = (cell.strip() for cell in line.strip("|").split("|"))
        times = multiple(reached, target)
        if times is not None:
            yield measure, target, times


def draw(path):
    bars = list(targets(path))
    if not bars:
        return
    figure, axes = pyplot.subplots(figsize=(9, 0.9 + INCHES_PER_BAR * len(bars)), layout="constrained")
    places = range(len(bars))
    axes.barh(places, [bar[2] for bar in bars], color=[REACHED if bar[2] >= 1 else MISSED for bar in bars])
    axes.set_yticks(places, [f"{measure}  [{target}]" for measure, target, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    for place, bar in enumerate(bars):
        axes.text(bar[2], place, f" {bar[2]:.2f}", va="center", fontsize=7)
    axes.set_xlabel("reached, in multiples of the target", fontsize=8)
    axes.set_title(path.read_text().splitlines()[0].lstrip("# "), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path.with_suffix(".png"), dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    for path in sorted(RESULTS.glob("*.md")):
        draw(path)
