"""A record of benchmarks.mixtures as Markdown, a table for each question."""

import math
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
            cells += [with_error(row, "pair"), with_error(row, "marginal")] if row else missing
        lines.append(cells)
    head = ["r"]
    for name in problems:
        head += [f"{NAMES.get(name, name)}: pairs", "marginal velocity"]
    return markdown(head, len(head), lines)


def with_error(row: dict, what: str) -> str:
    """A root mean square and its standard error, to two digits of the latter; below two errors a bound, rounded up:
    the root of the mean square and two errors of that, which are twice the root times its own, or of a root of 0 the
    square of its own (`root_mean_square`)."""
    figure, error = row[what], row[f"{what}_standard_error"]
    if figure < 2 * error:
        bound = math.sqrt(figure**2 + 2 * (2 * figure * error or error**2))
        digit = 10.0 ** math.floor(math.log10(bound))
        return f"below {math.ceil(bound / digit) * digit:.1g}"
    places = max(0, 1 - math.floor(math.log10(error))) if error else 4
    return f"{figure:.{places}f} ± {error:.{places}f}"


def long_table(rows: list[dict]) -> str:
    """A line per problem and constant r: the error early, halfway and at the end, beside the bias of f_r."""
    found = [row for row in rows if row["kind"] == "long"]
    lines = []
    for problem, r in sorted({(row["problem"], row["r"]) for row in found}, key=lambda key: (key[0], -key[1])):
        each = [row for row in found if (row["problem"], row["r"]) == (problem, r)]
        many = len(each[0]["points"])
        cells = [NAMES[problem], f"{r:g}", f"{_mean(each, 'bias'):.3f}"]
        for what in ("one_step", "from_fixed_point"):
            at = (max(1, many // 4), max(1, many // 2), many)
            cells += [_spread([row["points"][k - 1] for row in each], what) for k in at]
        lines.append(cells)
    shown = [
        f"{what}, {when}" for what in ("from the exact f", "from f_r") for when in ("a quarter", "half", "all steps")
    ]
    head = ["problem", "r", "f_r from the exact f", *shown]
    return markdown(head, len(head) - 1, lines)


def weight_table(rows: list[dict]) -> str:
    """A line per mixture: by p how far the weighted loss moves the velocity, at all points and at undecided ones."""
    found = [row for row in rows if row["kind"] == "weighted"]
    powers = list(dict.fromkeys(row["p"] for row in found))
    lines = []
    for name in dict.fromkeys(row["problem"] for row in found):
        at = {row["p"]: row for row in found if row["problem"] == name}
        row = at[powers[0]]
        cells = [NAMES.get(name, name), *(f"{at[p]['velocity']:.3f}" for p in powers), f"{row['unknown']:.3f}"]
        cells += [f"{100 * row['undecided']:.0f} %"]
        there = [at[p].get("velocity_undecided") for p in (0.5, 1.0) if p in at]  # none where every point is decided
        lines.append([*cells, *("" if value is None else f"{value:.3f}" for value in there)])
    head = ["mixture", *(f"p = {p:g}" for p in powers), "unknown", "undecided"]
    head += [f"there, p = {p:g}" for p in (0.5, 1.0) if p in powers]
    return markdown(head, len(head) - 1, lines)


def settings_table(rows: list[dict]) -> str:
    """A line per problem and setting: errors and distance of networks, mean and range over the seeds."""
    found = [row for row in rows if row["kind"] == "training"]
    lines = []
    for problem in NAMES:
        mine = [row for row in found if row["problem"] == problem]
        base = {row["seed"]: row["one_step"] for row in mine if row["factor"] == "base"}
        order = sorted(dict.fromkeys((row["factor"], row["setting"]) for row in mine), key=lambda key: _FACTORS[key[0]])
        for k, (factor, setting) in enumerate(order):
            each = [row for row in mine if (row["factor"], row["setting"]) == (factor, setting)]
            cells = [NAMES[problem] if k == 0 else "", f"{factor}: {setting}"]
            solves = factor != "flow matching"
            for what in ("one_step", "within", "velocity", "distance"):
                cells.append(_spread(each, what) if solves or what == "velocity" else "")
            cells.insert(3, _over_base(each, base) if solves and factor != "base" else "")
            lines.append([*cells, str(len(each)), f"{_mean(each, 'cpu_seconds'):.1f}"])
    head = ["problem", "setting", "f(x_1, 1, 0)", "over the base's", "f(x_t, t, s)", "velocity", "distance"]
    head += ["seeds", "CPU seconds"]
    return markdown(head, len(head) - 2, lines)


def _over_base(each: list[dict], base: dict[int, float]) -> str:
    """The one-step errors over the base's of the same seed: mean, and lowest to highest; nothing where a record that
    is not finished has none of the base."""
    ratios = [{"ratio": row["one_step"] / base[row["seed"]]} for row in each if row["seed"] in base]
    return _spread(ratios, "ratio") if ratios else ""


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
        f"Root mean square over {first['points']} noises of f(x_1, 1, 0), in units of the data's spread, ± one "
        f"standard error, or below what two errors of the mean square allow; chains of each noise: {chains}."
    )


def _long_note(rows: list[dict]) -> str:
    found = [row for row in rows if row["kind"] == "long"]
    seeds = len({row["seed"] for row in found})
    return (
        f"{found[0]['steps'] if found else 0} steps at a constant rate, p = 0, {seeds} seed{'s' * (seeds != 1)}: mean "
        "(lowest to highest); the averaged weights, in units of the data's spread."
    )


def _weight_note(rows: list[dict]) -> str:
    return (
        "Root mean square distance from the mean velocity over that of the exact velocity itself, eps = 0.01; unknown: "
        "the same of the mean of the velocities that were drawn from the exact one; undecided: the share of points "
        "with no component above 0.99, to which the last columns are restricted."
    )


def _settings_note(rows: list[dict]) -> str:
    steps = next(row["steps"] for row in rows if row["kind"] == "training")
    return (
        f"{steps} steps each; mean (lowest to highest). Errors of f in units of the data's spread, that of one step "
        "also over the base's of the same seed, that of the velocity over the exact one; distance: sliced "
        f"Wasserstein-1 of one-step samples, {floors(rows)}."
    )


def _slope_note(rows: list[dict]) -> str:
    return (
        "Error of (t - s) dN/dt along the pair's velocity, relative to forward mode in float64, after the base's steps."
    )


def _calls_note(rows: list[dict]) -> str:
    return (
        "Mean (lowest to highest) over the seeds. Distance: sliced Wasserstein-1 in units of the data's spread, "
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
