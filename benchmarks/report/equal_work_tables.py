"""A record of benchmarks.equal_work as Markdown: quality after equal work, by network calls, costs, learning rates."""

from benchmarks.report.tables import markdown, number, spread

FIGURES = {
    "digits": {"Frechet distance": ("frechet", 1), "classified as their label": ("accuracy", 4)},
    "photographs": {"FD, random features": ("fd_random", 3), "FD, coarse pixels": ("fd_pixels", 2)},
}
"""By problem the figures of its judge: their names in tables, in rows, and their digits. The first chose the rates."""


def ranged(values: list[float], digits: int) -> str:
    """Mean (lowest to highest); of one value the value alone."""
    return spread(values, digits) if len(values) > 1 else f"{values[0]:.{digits}f}"


def trainings(run: dict, kind: str, problem: str) -> dict[str, list[dict]]:
    """The rows of trainings by method, the diverged ones left out. kind: "work", "steps" or "rate"."""
    found: dict[str, list[dict]] = {}
    for row in run["rows"]:
        if (row["kind"], row["problem"]) == (kind, problem) and "diverged" not in row:
            found.setdefault(row["method"], []).append(row)
    return found


def diverged(run: dict) -> str:
    """A sentence on trainings whose samples were not finite."""
    rows = [row for row in run["rows"] if "diverged" in row]
    named = "; ".join(f"{row['problem']}, {row['method']}, rate {row['lr']:g}, seed {row['seed']}" for row in rows)
    return f" Diverged and left out: {named}." if rows else ""


def quality_table(run: dict, problem: str) -> str:
    """A line per method: figures of its usual samples after two thirds and all of the work, and after equal steps where
    it took others; mean and range over the seeds."""
    figures = FIGURES[problem]
    first, *_ = figures
    key, digits = figures[first]
    same = trainings(run, "steps", problem)
    head = ["method", "calls", "learning rate", "steps", "seeds", f"{first}, two thirds of the work", *figures]
    head += [f"{first}, SoFlow's steps"] * bool(same)
    lines = []
    for method, rows in trainings(run, "work", problem).items():
        points = [row["points"] for row in rows]
        cells = [method, str(rows[0]["nfe"]), f"{rows[0]['lr']:g}", str(rows[0]["steps"]), str(len(rows))]
        cells.append(ranged([each[-2:][0][key] for each in points], digits))
        cells += [ranged([each[-1][name] for each in points], places) for name, places in figures.values()]
        if same:
            after = [row["points"][-1][key] for row in same.get(method, [])]
            cells.append(ranged(after, digits) if after else "")
        lines.append(cells)
    for row in run["rows"]:
        if (row["kind"], row["problem"]) == ("floor", problem):
            at_end = [f"{row[name]:.{places}f}" for name, places in figures.values()]
            lines.append(["other real images", *[""] * 5, *at_end])
    return markdown(head, len(head) - 1, lines)


def calls_table(run: dict) -> str:
    """A line per method and number of network calls of a sample, after equal work."""
    head = ["method", "network calls", *(f"{problem}: {name}" for problem in FIGURES for name in FIGURES[problem])]
    lines: dict[tuple[str, int], list[str]] = {}
    for column, problem in enumerate(FIGURES):
        for method, rows in trainings(run, "work", problem).items():
            for nfe in sorted(map(int, rows[0]["samples"])):
                cells = lines.setdefault((method, nfe), ["", ""] * len(FIGURES))
                each = [row["samples"][str(nfe)] for row in rows if str(nfe) in row["samples"]]
                figures = FIGURES[problem].values()
                cells[2 * column : 2 * column + 2] = [ranged([one[key] for one in each], n) for key, n in figures]
    order = list(dict.fromkeys(method for method, _ in lines))
    ordered = sorted(lines, key=lambda at: (order.index(at[0]), at[1]))
    return markdown(head, len(head) - 1, [[method, str(nfe), *lines[method, nfe]] for method, nfe in ordered])


def costs_table(run: dict) -> str:
    """A line per problem and method: FLOPs and seconds of training, and what a sample costs."""
    head = ["problem", "method", "GFLOP a step", "forwards an image", "steps", "TFLOP of training", "CPU seconds"]
    head += ["CPU ms a step", "calls of a sample", "MFLOP of a sample"]
    costs = {(row["problem"], row["method"]): row for row in run["rows"] if row["kind"] == "cost"}
    lines = []
    for problem in FIGURES:
        for method, rows in trainings(run, "work", problem).items():
            cost, steps = costs[problem, method], rows[0]["steps"]
            seconds = [row["points"][-1]["cpu_seconds"] for row in rows]
            step, call = cost["flops_per_step"], cost["flops_per_call"]
            cells = ["" if lines and lines[-1][-1] == problem else problem, method, number(step / 1e9)]
            cells += [f"{step / (call * cost['batch']):.2f}", str(steps), number(steps * step / 1e12)]
            cells += [ranged(seconds, 0), ranged([1e3 * value / steps for value in seconds], 1)]
            lines.append([*cells, str(rows[0]["nfe"]), number(rows[0]["nfe"] * call / 1e6), problem])
    return markdown(head, len(head) - 2, [line[:-1] for line in lines])


def rates_table(run: dict) -> str:
    """A line per problem and method: the figure by learning rate, the best in bold."""
    searched = [row for row in run["rows"] if row["kind"] == "rate"]
    rates = sorted({row["lr"] for row in searched})
    failed = {(row["problem"], row["method"], row["lr"]) for row in searched if "diverged" in row}
    lines = []
    for problem, figures in FIGURES.items():
        first, *_ = figures
        key, digits = figures[first]
        for method, rows in trainings(run, "rate", problem).items():
            found = {row["lr"]: row["points"][-1][key] for row in rows}
            best = min(found, key=lambda rate: found[rate])
            shown = {rate: f"{value:.{digits}f}" for rate, value in found.items()}
            shown[best] = f"**{shown[best]}**"
            for rate in rates:
                shown.setdefault(rate, "diverged" if (problem, method, rate) in failed else "not measured")
            cells = [shown[rate] for rate in rates]
            lines.append([f"{problem}: {first}", method, str(rows[0]["steps"]), *cells])
    head = ["problem and figure", "method", "steps", *(f"rate {rate:g}" for rate in rates)]
    return markdown(head, 1 + len(rates), lines)


def about(run: dict) -> str:
    """A note on what the tables are of."""
    return f"Mean (lowest to highest) over the seeds; averaged weights.{diverged(run)} `{run['command']}`."
