"""A network for a range of guidance scales beside one for each: what is trained, judged and shown."""

import json

from benchmarks.report import pages, record
from benchmarks.studies import guidance
from soflow_fast.evaluate import parser
from soflow_fast.train import configuration


def test_guidance(tmp_path, monkeypatch):
    """With commands that are not run; the flags are read as the commands read them."""
    trained = {}

    def command(name, *arguments):
        if name == "train":
            config = configuration(["digits", *arguments])[0]
            trained[config.run.run_dir] = config.model.guidance_range or config.objective.guidance_scale
            assert config.steps == 5
            return ""
        values = parser().parse(list(arguments))
        w = float(values.guidance) if isinstance(trained[values.run], tuple) else trained[values.run]
        figures = {"accuracy": w / 8, "frechet": 100 * w, "near_copies": 0.0}
        return "said before\n" + json.dumps({"samples": 4000, "seed": 0, "nfe": {"1": figures}})

    monkeypatch.setattr(guidance, "_command", command)
    rows = [row for seed in (0, 1) for name in guidance.trainings() for row in guidance.run(name, seed, 5, tmp_path)]
    assert list(trained.values()) == [(1.0, 4.0), 1.0, 2.0, 4.0] * 2
    assert [(row["trained"], row["guidance"]) for row in rows[:6]] == [
        *(("1 to 4", w) for w in (1, 2, 4)),
        *((str(w), w) for w in (1, 2, 4)),
    ]
    record.write(rows, "python -m benchmarks.guidance", tmp_path, "guidance")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "sampling.md"
    page.write_text("<!-- benchmark:guidance -->\n<!-- /benchmark:guidance -->\n")
    pages.main([], tmp_path, tmp_path)
    lines = [line for line in page.read_text().splitlines() if line.startswith(("| 1", "| 2", "| 4"))]
    assert [line.split(" | ")[:2] for line in lines] == [
        [f"| {w}", name] for w in (1, 2, 4) for name in ("1 to 4", str(w))
    ]
    assert all("0.2500 (0.2500 to 0.2500) | 200.0" in line for line in lines if line.startswith("| 2"))
