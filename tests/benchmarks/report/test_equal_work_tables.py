"""Tables of equal work, of rows made by hand."""

from benchmarks.report import equal_work_tables


def lines(table: str) -> list[dict[str, str]]:
    """The lines of a table, by the names of its head."""
    head, _, *found = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
    return [dict(zip(head, line, strict=True)) for line in found]


def training(method: str, kind: str, seed: int, *frechet: float, **more) -> dict:
    points = [{"frechet": value, "accuracy": value / 100, "cpu_seconds": 10 * value} for value in frechet]
    row = {"kind": kind, "problem": "digits", "method": method, "seed": seed, "lr": 0.1, "steps": 20, "nfe": 1}
    return {**row, "points": points, "samples": {"1": points[-1], "10": points[0]}, **more}


def run(*rows: dict) -> dict:
    return {"rows": [*rows], "command": "python -m benchmarks.equal_work"}


def test_quality_is_that_of_two_thirds_of_the_work_and_of_all_of_it():
    rows = [training("SoFlow", "work", seed, 9, 6, 3 + seed) for seed in (0, 1)]
    rows += [training("MeanFlow", "work", 0, 90, 60, 30), training("MeanFlow", "steps", 0, 20)]
    first, other = lines(equal_work_tables.quality_table(run(*rows), "digits"))
    assert first["Frechet distance, two thirds of the work"] == "6.0 (6.0 to 6.0)"
    assert first["Frechet distance"] == "3.5 (3.0 to 4.0)" and first["seeds"] == "2"
    assert first["Frechet distance, SoFlow's steps"] == "" and other["Frechet distance, SoFlow's steps"] == "20.0"
    assert other["classified as their label"] == "0.3000"


def test_what_diverged_is_left_out_and_named():
    rows = [training("SoFlow", "work", 0, 9, 6, 3), training("SoFlow", "work", 1, 9) | {"points": [], "diverged": True}]
    assert [line["seeds"] for line in lines(equal_work_tables.quality_table(run(*rows), "digits"))] == ["1"]
    assert "Diverged and left out: digits, SoFlow, rate 0.1, seed 1." in equal_work_tables.about(run(*rows))


def test_the_best_rate_is_bold_and_one_that_diverged_is_none():
    rows = [training("SoFlow", "rate", 1000, frechet, lr=lr) for lr, frechet in ((0.1, 7), (0.2, 5), (0.4, 6))]
    rows.append(training("MeanFlow", "rate", 1000, 8, lr=0.1))
    rows.append(training("MeanFlow", "rate", 1000, 1, lr=0.4) | {"points": [], "diverged": True})
    first, other = lines(equal_work_tables.rates_table(run(*rows)))
    assert [first[f"rate {lr}"] for lr in (0.1, 0.2, 0.4)] == ["7.0", "**5.0**", "6.0"]
    assert [other[f"rate {lr}"] for lr in (0.1, 0.2, 0.4)] == ["**8.0**", "not measured", "diverged"]


def test_calls_and_costs():
    cost = {"kind": "cost", "problem": "digits", "method": "SoFlow", "batch": 4}
    rows = [cost | {"flops_per_step": 36e9, "flops_per_call": 2e9}, training("SoFlow", "work", 0, 9, 6, 3, nfe=10)]
    found = lines(equal_work_tables.calls_table(run(*rows)))
    assert [(line["network calls"], line["digits: Frechet distance"]) for line in found] == [
        ("1", "3.0"),
        ("10", "9.0"),
    ]
    (line,) = lines(equal_work_tables.costs_table(run(*rows)))
    assert line["GFLOP a step"] == "36.00" and line["forwards an image"] == "4.50"
    assert line["TFLOP of training"] == "0.7200" and line["CPU seconds"] == "30"
    assert line["CPU ms a step"] == "1500.0" and line["MFLOP of a sample"] == "20000"
