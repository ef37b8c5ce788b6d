"""A record of benchmarks.mixtures as Markdown, a table for each question."""

from collections.abc import Callable

from benchmarks.report.tables import markdown

NAMES = {"ring": "ring, 2-D", "scattered": "scattered, 16-D"}


def bias_table(rows: list[dict]) -> str:
    """A line per r: the distance of the fixed point f_r from the exact f, with pairs and with the marginal velocity."""
    found = {(row["problem"], row["r"]): row for row in rows if row["kind"] == "bias"}
    problems = list(dict.fromkeys(name for name, _ in found))
    lines = []
    for r in dict.fromkeys(r for _, r in found):
        cells = [f"{r:g}"]
        for name in problems:
            row = found.get((name, r))
            missing = ["not measured"] * 2
            cells += (
                [f"{row['pair']:.4f} ± {row['pair_standard_error']:.4f}", f"{row['marginal']:.4f}"] if row else missing
            )
        lines.append(cells)
    head = ["r"]
    for name in problems:
        head += [f"{NAMES.get(name, name)}: pairs", "marginal velocity"]
    return markdown(head, len(head), lines)


def long_table(rows: list[dict]) -> str:
    """A line per problem and constant r: the error early, halfway and at the end, beside the bias of f_r."""
    lines = []
    for row in sorted(
        (row for row in rows if row["kind"] == "long"), key=lambda row: (row["problem"], -row["r"], row["seed"])
    ):
        points = row["points"]
        chosen = [points[len(points) // 4 - 1], points[len(points) // 2 - 1], points[-1]]
        cells = [NAMES[row["problem"]], f"{row['r']:g}", f"{row['bias']:.3f}"]
        cells += [f"{point['judged']:.3f}" for point in chosen]
        cells += [f"{point['from_fixed_point']:.3f}" for point in chosen]
        lines.append(cells)
    shown = [
        f"{what}, {when}" for what in ("from the exact f", "from f_r") for when in ("a quarter", "half", "all steps")
    ]
    head = ["problem", "r", "f_r from the exact f", *shown]
    return markdown(head, len(head) - 1, lines)


def weight_table(rows: list[dict]) -> str:
    """A line per mixture: the error of the velocity that the weighted loss teaches, by p; below, that of networks."""
    found = [row for row in rows if row["kind"] == "weighted"]
    powers = list(dict.fromkeys(row["p"] for row in found))
    lines = []
    for name in dict.fromkeys(row["problem"] for row in found):
        at = {row["p"]: row["velocity"] for row in found if row["problem"] == name}
        lines.append([NAMES.get(name, name), *(f"{at[p]:.3f}" for p in powers)])
    head = ["mixture", *(f"p = {p:g}" for p in powers)]
    return markdown(head, len(head) - 1, lines)


def settings_table(rows: list[dict]) -> str:
    """A line per problem and setting: errors and distance of networks, mean and range over the seeds."""
    found = [row for row in rows if row["kind"] == "training"]
    lines = []
    for problem in NAMES:
        mine = [row for row in found if row["problem"] == problem]
        order = sorted(dict.fromkeys((row["factor"], row["setting"]) for row in mine), key=lambda key: _FACTORS[key[0]])
        for k, (factor, setting) in enumerate(order):
            each = [row for row in mine if (row["factor"], row["setting"]) == (factor, setting)]
            cells = [NAMES[problem] if k == 0 else "", f"{factor}: {setting}"]
            solves = factor != "flow matching"
            for what in ("one_step", "within", "velocity", "distance"):
                cells.append(_spread(each, what) if solves or what == "velocity" else "")
            lines.append([*cells, str(len(each)), f"{_mean(each, 'cpu_seconds'):.1f}"])
    head = ["problem", "setting", "f(x_1, 1, 0)", "f(x_t, t, s)", "velocity", "distance", "seeds", "CPU seconds"]
    return markdown(head, len(head) - 2, lines)


_FACTORS = {
    name: k
    for k, name in enumerate(("base", "r", "p", "flow matching", "lambda", "teacher", "precision", "difference"))
}
"""The order of the factors in a table."""


def slope_table(rows: list[dict]) -> str:
    """A line per problem and distance: the error of the derivative by both differences, in both precisions."""
    found = [row for row in rows if row["kind"] == "slope"]
    columns = list(dict.fromkeys((row["way"], row["precision"]) for row in found))
    lines = []
    for problem in dict.fromkeys(row["problem"] for row in found):
        mine = {(row["r"], row["way"], row["precision"]): row["error"] for row in found if row["problem"] == problem}
        for k, r in enumerate(dict.fromkeys(r for r, _, _ in mine)):
            errors = [f"{mine[r, way, precision]:.1e}" for way, precision in columns]
            lines.append([NAMES[problem] if k == 0 else "", f"{r:g}", *errors])
    head = ["problem", "r", *(f"{way}, {precision}" for way, precision in columns)]
    return markdown(head, len(head) - 1, lines)


def calls_table(rows: list[dict]) -> str:
    """A line per problem, training, method and number of calls."""
    found = [row for row in rows if row["kind"] == "calls"]
    lines, before = [], ("", "")
    for problem in NAMES:
        for key in dict.fromkeys(
            (row["factor"], row["setting"], row["method"], row["calls"]) for row in found if row["problem"] == problem
        ):
            each = [
                row
                for row in found
                if (row["problem"], row["factor"], row["setting"], row["method"], row["calls"]) == (problem, *key)
            ]
            factor, setting, method, calls = key
            trained = f"{factor}: {setting}"
            first = NAMES[problem] if before[0] != problem else ""
            second = trained if before != (problem, trained) else ""
            before = problem, trained
            error = _spread(each, "error") if "error" in each[0] else ""
            lines.append([first, second, method, str(calls), _spread(each, "distance"), error])
    head = ["problem", "trained with", "method", "calls", "distance to the data", "error against the exact end"]
    return markdown(head, 3, lines)


def floors(rows: list[dict]) -> str:
    """The distance between exact samples, in words."""
    found = [f"{NAMES[row['problem']]} {row['distance']:.4f}" for row in rows if row["kind"] == "floor"]
    return f"two sets of exact samples are {', '.join(found)} apart" if found else ""


TABLES: dict[str, Callable[[list[dict]], str]] = {
    "bias": bias_table,
    "long": long_table,
    "weights": weight_table,
    "settings": settings_table,
    "slopes": slope_table,
    "calls": calls_table,
}
"""By the question that each answers."""


def _bias_note(rows: list[dict]) -> str:
    first = next(row for row in rows if row["kind"] == "bias")
    chains = ", ".join(
        f"{row['chains']} at {row['r']:g}"
        for row in rows
        if (row["kind"], row["problem"]) == ("bias", first["problem"])
    )
    return (
        f"Root mean square over {first['points']} noises of f(x_1, 1, 0), in units of the data's deviation, ± one "
        f"standard error; chains of each noise: {chains}."
    )


def _long_note(rows: list[dict]) -> str:
    steps = next((row["steps"] for row in rows if row["kind"] == "long"), 0)
    return f"{steps} steps at a constant rate, p = 0, one seed; the averaged weights, at noises of which f_r is known."


def _weight_note(rows: list[dict]) -> str:
    return "Root mean square distance from the exact velocity, over that of the exact velocity itself; eps = 0.01."


def _settings_note(rows: list[dict]) -> str:
    steps = next(row["steps"] for row in rows if row["kind"] == "training")
    return (
        f"{steps} steps each; mean (lowest to highest). Errors of f in units of the data's deviation, that of the "
        f"velocity over the exact one; distance: sliced Wasserstein-1 of one-step samples, {floors(rows)}."
    )


def _slope_note(rows: list[dict]) -> str:
    return (
        "Error of (t - s) dN/dt along the pair's velocity, relative to forward mode in float64, after the base's steps."
    )


def _calls_note(rows: list[dict]) -> str:
    return (
        "Mean (lowest to highest) over the seeds. Distance: sliced Wasserstein-1 in units of the data's deviation, "
        f"{floors(rows)}. Error: where the first noise decides alone."
    )


NOTES: dict[str, Callable[[list[dict]], str]] = {
    "bias": _bias_note,
    "long": _long_note,
    "weights": _weight_note,
    "settings": _settings_note,
    "slopes": _slope_note,
    "calls": _calls_note,
}
"""What a table shows, in words."""


def _mean(rows: list[dict], what: str) -> float:
    return sum(row[what] for row in rows) / len(rows)


def _spread(rows: list[dict], what: str) -> str:
    values = [row[what] for row in rows]
    mean = f"{_mean(rows, what):.3f}"
    return f"{mean} ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else mean
