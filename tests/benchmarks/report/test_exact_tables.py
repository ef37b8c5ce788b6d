"""Tables of problems with exact solutions, of rows made by hand: each figure stands where its head says."""

import pytest

from benchmarks.report import book_tables, discrete_tables, mixture_tables, tokens_tables


def cells(table: str, line: int) -> list[str]:
    """The cells of a line of a table; 0 is its head, 1 the first below the rule."""
    return [cell.strip() for cell in table.splitlines()[line + (line > 0)].strip("| ").split("|")]


def column(table: str, name: str) -> list[str]:
    """The cells below a head that is there once. Every line has as many cells as the head."""
    head, *lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
    assert all(len(line) == len(head) for line in lines) and head.count(name) == 1
    return [line[head.index(name)] for line in lines[1:]]


@pytest.mark.parametrize(
    ("figure", "error", "shown"),
    [
        (0.2279, 0.00516, "0.2279 ± 0.0052"),
        (0.6, 0.12, "0.60 ± 0.12"),
        (12.0, 3.4, "12.0 ± 3.4"),
        (0.4, 0.0, "0.4000 ± 0.0000"),
        # Mean squares 0.0001 ± 0.00012 and 0 ± 0.000049: bounds 0.0184 and 0.0099.
        (0.01, 0.006, "below 0.02"),
        (0.0, 0.007, "below 0.01"),
        # A root so small that its own error is large: 0.000001 ± 0.0001, as good as 0.
        (0.001, 0.05, "below 0.02"),
    ],
)
def test_a_bound_is_never_below_two_errors_of_the_mean_square(figure, error, shown):
    assert mixture_tables.with_error({"a": figure, "a_standard_error": error}, "a") == shown


def test_the_bias_of_each_way_stands_below_its_name():
    row = {"kind": "bias", "problem": "ring", "r": 0.1, "points": 7, "chains": 10}
    row |= {"pair": 0.5, "pair_standard_error": 0.01, "marginal": 0.25, "marginal_standard_error": 0.02}
    table = mixture_tables.bias_table([row, {**row, "problem": "wide ring", "r": 0.2}])
    assert column(table, "ring, 2-D: pairs") == ["0.500 ± 0.010", "not measured"]
    assert cells(table, 1)[2] == "0.250 ± 0.020" and cells(table, 2)[3] == "0.500 ± 0.010"


@pytest.mark.parametrize("many", [1, 2, 3, 16])
def test_long_trainings_are_shown_after_a_quarter_a_half_and_all_steps(many):
    points = [{"one_step": k / 10, "from_fixed_point": k / 100} for k in range(1, many + 1)]
    row = {"kind": "long", "problem": "ring", "r": 0.1, "seed": 0, "steps": many, "bias": 0.3, "points": points}
    table = mixture_tables.long_table([row])
    for what, unit in (("from the exact f", 10), ("from f_r", 100)):
        for when, part in (("a quarter", 4), ("half", 2), ("all steps", 1)):
            assert column(table, f"{what}, {when}") == [f"{max(1, many // part) / unit:.3f}"]
    assert column(table, "f_r from the exact f") == ["0.300"]
    more = [{**row, "r": r, "problem": name} for name in ("scattered", "ring") for r in (0.01, 0.1)]
    assert column(mixture_tables.long_table(more), "r") == ["0.1", "0.01", "0.1", "0.01"]


def trained(factor: str, seed: int, one_step: float, **more) -> dict:
    row = {"kind": "training", "problem": "ring", "factor": factor, "setting": "x", "seed": seed, "one_step": one_step}
    return {**row, "within": 0.2, "velocity": 0.3, "distance": 0.4, "cpu_seconds": 5.0, "steps": 9, **more}


def test_errors_are_taken_over_the_bases_of_the_same_seed():
    rows = [trained("p", 0, 0.6), trained("p", 1, 0.4), trained("base", 1, 0.2), trained("base", 0, 0.4)]
    table = mixture_tables.settings_table(rows)
    assert column(table, "over the base's") == ["", "1.750 (1.500 to 2.000)"]
    assert column(table, "f(x_1, 1, 0)") == ["0.300 (0.200 to 0.400)", "0.500 (0.400 to 0.600)"]
    assert [column(table, name)[1] for name in ("f(x_t, t, s)", "velocity", "distance")] == [
        f"{value:.3f} ({value:.3f} to {value:.3f})" for value in (0.2, 0.3, 0.4)
    ]


def test_a_record_without_the_base_has_a_table():
    """One that was interrupted: the other workers' rows may come before the base's."""
    assert column(mixture_tables.settings_table([trained("p", 0, 0.6)]), "over the base's") == [""]


def test_flow_matching_has_no_error_of_a_solution():
    table = mixture_tables.settings_table([trained("base", 0, 0.4), trained("flow matching", 0, 0.6)])
    assert column(table, "f(x_1, 1, 0)") == ["0.400", ""] and column(table, "velocity") == ["0.300", "0.300"]


def test_weights_are_shown_by_power_and_at_undecided_points():
    row = {"kind": "weighted", "problem": "ring", "dimensions": 2, "unknown": 0.01, "undecided": 0.25}
    rows = [{**row, "p": p, "velocity": p / 10, "velocity_undecided": p / 2} for p in (0.5, 0.75, 1.0)]
    table = mixture_tables.weight_table(rows)
    assert column(table, "p = 0.75") == ["0.075"] and column(table, "undecided") == ["25 %"]
    assert column(table, "there, p = 0.5") == ["0.250"] and column(table, "there, p = 1") == ["0.500"]
    decided = [{key: value for key, value in row.items() if key != "velocity_undecided"} for row in rows]
    assert column(mixture_tables.weight_table(decided), "there, p = 1") == [""]


def test_tokens_are_shown_at_the_end_and_by_band():
    def run(seed: int, error: float) -> dict:
        ends = [{"velocity": [v / 10] * 3, "solution": [v, v / 2, v / 4], "cpu_seconds": 8.0} for v in (0.9, error)]
        return {"kind": "run", "name": "base", "tokens": 4, "hidden": 8, "batch": 2, "steps": 3, "lr": 0.1} | {
            "seed": seed,
            "points": ends,
        }

    flat = {"kind": "reference", "name": "flat", "solution": [0.7, 0.6, 0.5]}
    table = tokens_tables.tokens_table([flat, run(0, 0.2), run(1, 0.6), {**run(1000, 0.8), "kind": "rate"}])
    assert column(table, "error of f") == ["0.400 (0.200 to 0.600)", "0.700"]
    assert column(table, "error of v") == ["0.040 (0.020 to 0.060)", ""]
    assert column(table, "f, below 4") == ["0.20", "0.60"] and column(table, "from 4") == ["0.10", "0.50"]
    assert tokens_tables.band_names(5) == ["f, below 4", "4 to 8", "8 to 16", "16 to 32", "from 32"]


def test_discrete_values_are_shown_by_code_and_calls():
    found = {"accuracy": 0.9, "frechet": 30.0, "variation": 0.1, "near": 0.8}
    row = {"kind": "digits", "code": "grey", "scale": 1.0, "patch": 4, "objective": "soflow", "seed": 0, "steps": 2}
    rows = [{**row, "calls": {"1": found, "2": {**found, "near": 0.7}}}]
    rows.append({**row, "seed": 1, "calls": {"1": {**found, "accuracy": 0.8}}})
    rows.append({**row, "code": "one-hot", "calls": {"1": {**found, "largest": 0.6, "entropy": 1.5}}})
    table = discrete_tables.discrete_table(rows)
    assert column(table, "classified as their label")[:2] == ["0.8500 (0.8000 to 0.9000)", "0.9000"]
    assert column(table, "drawn by") == ["SoFlow, 1 call", "SoFlow, 2 calls", "SoFlow, 1 call"]
    assert column(table, "near a level")[1] == "0.700" and column(table, "entropy, bits") == ["", "", "1.500"]


def test_one_pixel_is_shown_after_the_last_step():
    points = [dict.fromkeys(("near", "variation", "same_level", "error"), 0.0)]
    points.append({"near": 0.1, "variation": 0.2, "same_level": 0.3, "error": 0.4})
    row = {"kind": "pixel", "code": "bits", "p": 1.0, "exact_near": 0.9, "exact_variation": 0.8, "points": points}
    table = discrete_tables.pixel_table([row, {**row, "p": 0.0}])
    assert column(table, "p") == ["0", "1"]
    shown = {"exact: near a level": 0.9, "exact: variation": 0.8, "learned: near a level": 0.1, "variation": 0.2}
    for name, value in (shown | {"the exact level": 0.3, "error": 0.4}).items():
        assert column(table, name) == [f"{value:.3f}"] * 2


def test_the_look_ahead_is_shown_along_both_velocities():
    drawn = {"median": 0.2, "rms": 0.4, "error": 0.03}
    row = {"kind": "solution bias", "r": 0.1, "t": 1.0, "s": 0.5, "mean_velocity": {"median": 0.1, "rms": 0.9}}
    rows = [{**row, "drawn_velocity": drawn}]
    rows.append({**rows[0], "kind": "quotient bias", "drawn_velocity": {**drawn, "median": 0.5}})
    table = book_tables.look_ahead_table(rows)
    assert cells(table, 0)[1].startswith("s = 0.5: ") and cells(table, 0)[4].startswith("E[q]: ")
    assert cells(table, 1) == ["0.1", "0.1", "0.2", "0.4 ± 0.03", "0.1", "0.5", "0.4 ± 0.03"]


def test_slopes_are_shown_by_way_and_precision():
    rows = [
        {"kind": "slope", "problem": "ring", "r": r, "way": way, "precision": precision, "error": error * r}
        for r in (0.3, 0.1)
        for precision, way, error in (("fp64", "ahead", 1), ("fp64", "central", 2), ("fp32", "ahead", 3))
    ]
    table = mixture_tables.slope_table(rows)
    assert column(table, "ahead, fp64") == ["3.0e-01", "1.0e-01"]
    assert column(table, "central, fp64")[0] == "6.0e-01" and column(table, "ahead, fp32")[1] == "3.0e-01"


def test_calls_are_shown_with_what_they_have():
    row = {"kind": "calls", "problem": "ring", "factor": "base", "setting": "x", "method": "renoise", "calls": 1}
    rows = [{**row, "seed": seed, "distance": 0.1, "error": 0.2 + 0.2 * seed} for seed in (0, 1)]
    rows.append({**row, "seed": 0, "calls": 2, "distance": 0.05})
    table = mixture_tables.calls_table(rows)
    assert column(table, "error against the exact end") == ["0.300 (0.200 to 0.400)", ""]
    assert column(table, "distance to the data") == ["0.100 (0.100 to 0.100)", "0.050"]
    assert column(table, "trained with") == ["base: x", ""] and column(table, "calls") == ["1", "2"]


def test_the_books_samples_and_weights():
    row = {"kind": "samples", "objective": "soflow", "way": "1 call", "on_the_ring": 0.75, "distance_to_exact": 0.25}
    table = book_tables.samples_table([row, {**row, "distance_to_exact": None}])
    assert column(table, "share on the ring") == ["0.750"] * 2
    assert column(table, "rms distance to the exact flow's end") == ["0.250", ""]
    rows = [{"kind": "weights", "dimensions": 2, "t": 0.5, "p": p, "relative": p / 4} for p in (0.0, 0.5, 1.0)]
    assert [column(book_tables.weights_table(rows), f"p = {p}") for p in ("0", "0.5", "1")] == [
        ["0"],
        ["0.12"],
        ["0.25"],
    ]
