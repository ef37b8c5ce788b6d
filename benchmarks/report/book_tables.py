"""Tables of the record behind the first chapters, `benchmarks.studies.book`."""

from benchmarks.report.tables import markdown


def samples_table(rows: list[dict]) -> str:
    """A line for each way to draw samples of a trained network."""
    lines = []
    for row in (row for row in rows if row["kind"] == "samples"):
        distance = row.get("distance_to_exact")
        cells = [row["objective"], row["way"], f"{row['on_the_ring']:.3f}"]
        lines.append([*cells, "" if distance is None else f"{distance:.3f}"])
    return markdown(["trained by", "drawn in", "share on the ring", "rms distance to the exact flow's end"], 2, lines)


def look_ahead_table(rows: list[dict]) -> str:
    """A line for each r: medians along mean and drawn velocities, and of the latter the root of the mean square with
    its standard error."""
    of_r: dict[float, list[dict]] = {}
    for row in (row for row in rows if row["kind"].endswith(" bias")):
        of_r.setdefault(row["r"], []).append(row)
    head = ["r"]
    for row in next(iter(of_r.values())):
        what = f"s = {row['s']:g}" if row["kind"] == "solution bias" else "E[q]"
        head += [f"{what}: median, v(x, t)", "median, v_t", "rms, v_t"]
    lines = []
    for r, group in of_r.items():
        cells = [f"{r:g}"]
        for row in group:
            drawn = row["drawn_velocity"]
            cells += [f"{row['mean_velocity']['median']:.2g}", f"{drawn['median']:.2g}"]
            cells.append(f"{drawn['rms']:.2g} ± {drawn['error']:.1g}")
        lines.append(cells)
    return markdown(head, len(head), lines)


def weights_table(rows: list[dict]) -> str:
    """A line for each problem and time, a column for each power p."""
    found = {(row["dimensions"], row["t"], row["p"]): row for row in rows if row["kind"] == "weights"}
    powers = list(dict.fromkeys(p for *_, p in found))
    lines = []
    for D, t in dict.fromkeys((D, t) for D, t, _ in found):
        lines.append([str(D), f"{t:g}", *(f"{found[D, t, p]['relative']:.2g}" for p in powers)])
    return markdown(["dimensions", "t", *(f"p = {p:g}" for p in powers)], 2 + len(powers), lines)
