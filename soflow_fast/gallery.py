"""Show runs: `python -m soflow_fast.gallery RUN [RUN ...]` writes one HTML page, which loads nothing from elsewhere.

    python -m soflow_fast.gallery runs/digits
    python -m soflow_fast.gallery runs/digits runs/digits-b --out compare.html

Loss curves, the quotient's diagnostics, speed and memory; sample grids over the training, with a slider; the way of
noise to images through the newest checkpoint; figures, and what differs between the configurations. A run may be
training, stopped or finished.
"""

import sys
from pathlib import Path

from .commands import process
from .commands.parser import Parser
from .errors import ConfigError, UserError, enough_memory, storage

MOST_RUNS = 16
MARK = b'<meta name="generator" content="soflow-fast'


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m soflow_fast.gallery", description=__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="run directories, side by side")
    p.add_argument("--out", default="gallery.html", metavar="FILE", help="the page (default: gallery.html)")
    p.add_argument("--device", default="auto", metavar="D", help="where ways of noise are drawn, as in train")
    return p


def main(arguments: list[str] | None = None) -> None:
    """Parse and do. Raises UserError."""
    values = parser().parse(arguments)
    process.alone("gallery")
    out = Path(values.out)
    if len(values.runs) > MOST_RUNS:
        raise ConfigError(f"{len(values.runs)} runs: a page shows {MOST_RUNS} at most")
    with storage(f"--out {out}"):
        if out.is_dir():
            raise ConfigError(f"--out {out}: is a folder")
        if out.exists() and MARK not in _beginning(out):
            raise ConfigError(f"--out {out}: is no gallery, and stays; give another name")

    from .runs.gallery.page import page
    from .runs.gallery.reading import read_run, told_apart
    from .runs.gallery.ways import Ways, ways
    from .runs.gallery.when import now
    from .training.precision import resolve_device

    device = resolve_device(values.device)
    runs = [read_run(Path(run)) for run in values.runs]
    told_apart(runs)
    drawn: list[Ways | None] = []
    for run in runs:
        try:
            with enough_memory("there is not enough memory for its network"):
                drawn.append(ways(run.folder, device))
        except UserError as error:
            reason = str(error).removeprefix(f"{run.folder}: ").removeprefix("--vae ").rstrip(".")
            run.notes.append(f"No way of noise is drawn: {reason}.")
            drawn.append(None)
    content = page(runs, drawn, now()).encode()
    from .files import make_folder, write_file

    with storage(f"--out {out}"):
        make_folder(out.resolve().parent)
        write_file(out, content, synced=False)
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
    print(f"{len(runs)} run{'s' if len(runs) > 1 else ''}, {len(content) / 1e6:.1f} MB: {out}")


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


if __name__ == "__main__":
    process.run(lambda: main(sys.argv[1:]))
