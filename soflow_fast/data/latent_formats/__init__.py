"""Latents as others have stored them: read as they are, and converted by `python -m soflow_fast.encode --from`.

Each module names the public code whose files it reads. Nothing in a file is ever run: what is pickled is looked at by
`pickled`, or by torch with weights_only.
"""

from pathlib import Path

from ...errors import DataError
from ..dataset import Format, Wanted
from ..latents import Latents
from . import dataset_json, fast_dit, hdf5, lmdb_entries, one_file_each, safetensor_shards
from .foreign import checksum_of

FORMATS: tuple[Format, ...] = (hdf5, safetensor_shards, dataset_json, lmdb_entries, fast_dit, one_file_each)


def recognises(place: Path) -> bool:
    """Whether a path holds latents in one of the formats."""
    return any(form.recognises(place) for form in FORMATS)


def load(place: Path, wanted: Wanted) -> Latents:
    """The latents at a path. Raises DataError.

    The channels that are wanted tell mean || std from a sample where a format leaves it open. 0 of them, and a size of
    0, stand for any: there it is mean || std if no number of the second half is negative, as is so by chance of none.
    """
    for form in FORMATS:
        if form.recognises(place):
            found = form.load(place, wanted)
            assert isinstance(found, Latents)
            found.contents.checksum = checksum_of(found)
            return found
    raise DataError(f"--data {place}: holds no latents in a known format")
