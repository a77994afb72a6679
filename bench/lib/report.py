"""Rounds, medians and tables.

Everything that is compared is measured in turns, A B C then C B A, so that what
drifts does so for all.  A figure is the median of the rounds; a ratio is the
median of the rounds' ratios, each of two neighbours in time.
"""
import os
import pathlib
import re
import statistics

from lib import options, summary
from lib.server import sql

BENCH = pathlib.Path(__file__).parent.parent


def measure(variants):
    """variants: name -> function that returns a figure.  name -> its figures."""
    figures = {name: [] for name in variants}
    for number in range(options.ROUNDS):
        names = list(variants)
        if number % 2:
            names.reverse()
        for name in names:
            figures[name].append(variants[name]())
    return figures


def ratio(figures, name, base):
    return statistics.median(a / b for a, b in zip(figures[name], figures[base]))


def thousands(value):
    return f"{value:,.0f}"


def median(figures, name):
    return thousands(statistics.median(figures[name]))


def verdict(figure, is_met):
    """A figure as it stands beside its target."""
    return figure if is_met else f"{figure} (missed)"


def against(figures, name, base, target):
    """A ratio beside its target."""
    reached = ratio(figures, name, base)
    return verdict(f"{reached:.2f} ×", reached >= target)


def at_least(figures, name, target):
    reached = statistics.median(figures[name])
    return verdict(f"{thousands(reached)}/s", reached >= target)


def table(header, lines):
    out = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    out += ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
    return "\n".join(out)


def machine():
    memory = re.search(r"MemTotal: +(\d+)", open("/proc/meminfo").read())[1]
    model = re.search(r"model name\s*: (.*)", open("/proc/cpuinfo").read())
    return (f"{os.cpu_count()} cores{f' ({model[1]})' if model else ''}, "
            f"{int(memory) // 1024 ** 2} GiB, {sql('SHOW server_version')}")


def settings():
    names = ["shared_buffers", "max_wal_size", "checkpoint_timeout", "fsync",
             "synchronous_commit", "wal_sync_method", "full_page_writes"]
    return "; ".join(f"{name} {sql('SHOW ' + name)}" for name in names)


def write(name, title, parts, targets):
    """Prints the result and writes it to its file.

    parts: paragraphs and tables; targets: (measure, reached, target).
    """
    delay = options.FLUSH_DELAY_US
    head = [f"# {title}",
            f"Machine: {machine()}  \nSettings: {settings()}  \n"
            + (f"Each flush of the log made {delay} µs slower  \n" if delay else "")
            + f"Rounds: {options.ROUNDS} of {options.SECONDS} s  \nCommand: `{options.COMMAND}`"]
    goals = [table(["measure", "reached", "target"], targets)] if targets else []
    text = "\n\n".join(head + goals + parts) + "\n"
    print(text)
    file = f"{name}-slow-flush.md" if delay else f"{name}.md"
    folder = BENCH.parent / "build/bench" if options.QUICK else BENCH / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(text)
    if not options.QUICK:
        write_readme()


def write_readme():
    """The table in README.md: the targets of all results that there are; and the project's README."""
    lines = []
    for file in sorted((BENCH / "results").glob("*.md")):
        goals = re.search(r"^\| measure \|.*\n.*\n((?:\|.*\n)*)", file.read_text(), re.M)
        for line in goals[1].splitlines() if goals else []:
            lines.append([f"[{file.stem}](results/{file.name})"]
                         + [cell.strip() for cell in line.strip("|").split("|")])
    readme = BENCH / "README.md"
    start, end = "<!-- figures: written by bench/run -->", "<!-- end of figures -->"
    before, rest = readme.read_text().split(start)
    after = rest.split(end)[1]
    filled = table(["benchmark", "measure", "reached", "target"], lines)
    readme.write_text(f"{before}{start}\n\n{filled}\n\n{end}{after}")
    summary.write()
