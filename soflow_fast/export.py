"""Write a run for others: `python -m soflow_fast.export RUN OUT`; RUN is a run, a checkpoint or an exported directory.

    python -m soflow_fast.export runs/digits out                              weights and configuration, for `load`
    python -m soflow_fast.export runs/imagenet256-b4 out --format authors     for the authors' train.py and inference.py

authors: OUT/config.yaml and OUT/ckpts/STEP.pt with weights, average, optimiser and step. safetensors: the averaged
weights in ema.safetensors, with config.json and what is known of the data. hub: the same for Hugging Face's hub, with a
model card. diffusers: a pipeline of diffusers, with the VAE of latents where it is on this machine.
"""

import sys
import types
from pathlib import Path
from typing import Any

from .commands import process
from .commands.parser import Parser, user_value
from .errors import ConfigError, enough_memory, storage

FORMATS = ("authors", "safetensors", "hub", "diffusers")


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m soflow_fast.export", description=__doc__)
    p.add_argument("run", metavar="RUN", help="run directory, checkpoint, exported directory or the authors' file")
    p.add_argument("out", metavar="OUT", help="the directory to make")
    p.add_argument(
        "--format", choices=FORMATS, default="safetensors", help=f"{', '.join(FORMATS)} (default: safetensors)"
    )
    return p


def main(arguments: list[str] | None = None) -> None:
    """Parse and do. Raises UserError."""
    values = parser().parse(arguments)
    process.alone("export")
    out = Path(values.out)
    if out.exists():
        raise ConfigError(f"{out}: exists already")
    with enough_memory(f"{values.run}: does not fit into memory"), storage(f"cannot write {out}"):
        if values.format == "authors":
            print(_authors(values.run, out))
        else:
            _write(values.run, out, values.format)
            print(f"{values.format}: {out}")


def _authors(run: str, out: Path) -> str:
    """Write for the authors' code; returns what is to be said."""
    from .config.authors import unknown_to_authors
    from .runs.checkpoint import load_whole, official_file
    from .runs.checkpoint.authors import export_authors

    if official_file(Path(run)) is not None:
        raise ConfigError(f"{run}: is of the authors' trainer already")
    whole = load_whole(run)
    file = user_value(lambda: export_authors(whole, out), "--format authors")
    lines = [f"authors: {file}, step {whole.step}" + ("" if whole.moments else ", without moments of an optimiser")]
    lines += [f"  their trainer has no {what}" for what in unknown_to_authors(whole.config)]
    return "\n".join(lines)


def _write(run: str, out: Path, form: str) -> None:
    from .runs import checkpoint

    flow, config, data = checkpoint.load_with_data(run)
    if config.model.kind == "policy" and form != "safetensors":
        raise ConfigError(f"--format {form}: {run} is a policy; --format safetensors gives it away")
    if form == "safetensors":
        checkpoint.export(flow, config, out, data)
    elif form == "hub":
        flow.save_pretrained(out)
    else:
        vae: Any = None
        if data is not None and data.space is not None and data.space.vae:
            import torch

            from .runs.latents.vae import load_vae

            try:
                channels = config.image_model.in_channels
                vae = load_vae(data.space.vae, torch.device("cpu"), local=True, channels=channels).model
            except ConfigError as error:
                print(f"without a VAE, so of latents: {str(error).removeprefix('--vae ')}")
        from .pipeline import SoFlowPipeline

        SoFlowPipeline(flow=flow, vae=vae).save_pretrained(out)


class _Callable(types.ModuleType):
    """The package's public function `export` would be hidden by importing this module: so it can be called too."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        from .runs.checkpoint import export

        return export(*arguments, **settings)


if __name__ == "__main__":
    process.run(lambda: main(sys.argv[1:]))
else:
    sys.modules[__name__].__class__ = _Callable
