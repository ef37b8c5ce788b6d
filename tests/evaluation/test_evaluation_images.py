"""Sets of images: the same pixels from a folder, an .npz and a data set, and one line for what is wrong."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from soflow_fast.data.dataset import Wanted
from soflow_fast.data.images.pixels import decode
from soflow_fast.errors import DataError
from soflow_fast.evaluation import Images, images, is_npz, open_images
from tests.evaluation.small import pictures, save_folder, save_npz


def all_of(found: Images) -> Tensor:
    batches = list(found.batches())
    assert [len(batch) for batch in batches[:-1]] == [images.BATCH] * (len(batches) - 1)
    return torch.cat(batches)


def test_a_folder_an_npz_and_a_compressed_one_are_the_same_images(tmp_path: Path) -> None:
    x = pictures(150, 0)
    flat, npz = save_folder(x, tmp_path / "flat"), save_npz(x, tmp_path / "x.npz")
    np.savez_compressed(tmp_path / "small.npz", x.permute(0, 2, 3, 1).numpy())
    Image.new("RGB", (40, 40)).save(flat / "grid.png")  # as `sample` leaves it
    (flat / "notes.txt").write_text("mine")
    for path in (flat, npz, tmp_path / "small.npz"):
        found = open_images(str(path))
        assert (len(found), found.size, found.statistics) == (150, 8, {}) and torch.equal(all_of(found), x), path


def test_folders_below_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    x = pictures(10, 0)
    found = open_images(str(save_folder(x, tmp_path / "x", into=2)))
    assert torch.equal(all_of(found), torch.cat([x[0::2], x[1::2]]))


def test_grey_images_become_colours(tmp_path: Path) -> None:
    grey = pictures(3, 0)[:, :1]
    (tmp_path / "grey").mkdir()
    for i, image in enumerate(grey):
        Image.fromarray(image[0].numpy()).save(tmp_path / "grey" / f"{i}.png")
    for path in (tmp_path / "grey", save_npz(grey, tmp_path / "grey.npz")):
        assert torch.equal(all_of(open_images(str(path))), grey.expand(-1, 3, -1, -1))


def test_a_reference_is_scaled_to_the_samples_as_the_data_of_a_run_are(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    Image.fromarray(pictures(1, 0, 64)[0].permute(1, 2, 0).numpy()).resize((40, 24)).save(folder / "a.jpg")
    found = open_images(str(folder), flag="--reference ", size=8)
    expected = decode((folder / "a.jpg").read_bytes(), Wanted(8, 3))
    assert found.size == 8 and torch.equal(all_of(found)[0], torch.tensor(expected))


def test_a_zip_is_a_reference_too(tmp_path: Path) -> None:
    x = pictures(70, 0)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for i, image in enumerate(x.permute(0, 2, 3, 1).numpy()):
            content = io.BytesIO()
            Image.fromarray(image).save(content, "PNG")
            archive.writestr(f"{i:03d}.png", content.getvalue())
    found = open_images(str(tmp_path / "x.zip"), flag="--reference ", size=8)
    assert len(found) == 70 and torch.equal(all_of(found), x)


def test_a_reference_of_adm_has_statistics_with_images_or_without(tmp_path: Path) -> None:
    mean, spread = np.arange(4.0), np.eye(4)
    given = {"mu": mean, "sigma": spread, "mu_s": mean[:2].astype(np.float32), "sigma_s": spread[:2, :2]}
    both = open_images(str(save_npz(pictures(5, 0), tmp_path / "both.npz", **given)))
    assert len(both) == 5 and both.statistics.keys() == {"mu", "mu_s"}
    np.savez(tmp_path / "alone.npz", **given)
    alone = open_images(str(tmp_path / "alone.npz"))
    assert len(alone) == 0 and np.array_equal(alone.statistics["mu"].mean, mean)
    assert alone.statistics["mu_s"].mean.dtype == np.float64


def refused(path: object, **settings: object) -> str:
    with pytest.raises(DataError) as error:
        list(open_images(str(path), flag="--reference ", **settings).batches())  # type: ignore[arg-type]
    text = str(error.value)
    assert text.startswith(f"--reference {path}") and "\n" not in text and len(text) < 400, text
    return text


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused(tmp_path / "empty")
    (tmp_path / "text").write_text("mine")
    assert "neither a folder of images nor an .npz" in refused(tmp_path / "text")
    assert refused(tmp_path / "text", size=8)
    mixed = save_folder(pictures(3, 0), tmp_path / "mixed")
    Image.new("RGB", (9, 8)).save(mixed / "00001.png")
    assert "00001.png is 9 x 8 pixels; all must be 8 x 8" in refused(mixed)
    (mixed / "00001.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert "00001.png is no readable image" in refused(mixed)
    assert "00001.png is no readable image" in refused(mixed, size=8)
    np.savez(tmp_path / "floats.npz", np.zeros((3, 8, 8, 3)))
    assert "arr_0 must be uint8 [N, H, H, 3], got float64 [3, 8, 8, 3]" in refused(tmp_path / "floats.npz")
    np.savez(tmp_path / "first.npz", np.zeros((3, 3, 8, 8), np.uint8))
    assert "got uint8 [3, 3, 8, 8]" in refused(tmp_path / "first.npz")
    np.savez(tmp_path / "skew.npz", mu=np.zeros(3), sigma=np.zeros((3, 4)))
    assert "mu and sigma are no mean and covariance" in refused(tmp_path / "skew.npz")
    np.savez(tmp_path / "code.npz", mu=np.array([print], dtype=object), sigma=np.zeros((1, 1)))
    assert "cannot be read" in refused(tmp_path / "code.npz")
    cut = bytearray(save_npz(pictures(90, 0), tmp_path / "cut.npz").read_bytes())
    cut[5000] ^= 255
    (tmp_path / "cut.npz").write_bytes(cut)
    assert "cannot be read (Bad CRC-32" in refused(tmp_path / "cut.npz")


def claiming(path: Path, shape: tuple[int, ...], name: str = "arr_0", dtype: str = "|u1") -> Path:
    """An .npz with 3 images of 8 x 8, or 3 numbers, whose header says that they are of another shape."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(576 if name == "arr_0" else 24)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.npy", content)
        if name == "mu":
            archive.writestr("sigma.npy", content)
    return path


@pytest.mark.parametrize("n", [-5, 2, 4, 10**13, 10**30])
def test_a_shape_that_the_content_is_not_of_is_refused_before_anything_is_read(n: int, tmp_path: Path) -> None:
    assert len(open_images(str(claiming(tmp_path / "right.npz", (3, 8, 8, 3))))) == 3
    line = refused(claiming(tmp_path / "wrong.npz", (n, 8, 8, 3)))
    assert f"arr_0 is said to be uint8 [{n}, 8, 8, 3], which its 576 bytes are not" in line
    line = refused(claiming(tmp_path / "mu.npz", (n,), "mu", "<f8"))
    assert f"mu is said to be float64 [{n}], which its 24 bytes are not" in line


def test_statistics_that_are_no_mean_and_covariance_are_one_line(tmp_path: Path) -> None:
    mean, spread = np.zeros(3), np.eye(3)
    skew, endless, nan = spread.copy(), spread.copy(), mean.copy()
    skew[0, 1], endless[1, 1], nan[2] = 0.1, np.inf, np.nan
    for mu, sigma, text in (
        (mean, spread * 1j, "sigma must be of floats, got complex128"),
        (mean, np.full((3, 3), "1"), "sigma must be of floats, got <U1"),
        (mean, spread.astype(int), "sigma must be of floats, got int64"),
        (mean * 1j, spread, "mu must be of floats, got complex128"),
        (mean, skew, "sigma is not symmetric"),
        (mean, endless, "sigma is not finite"),
        (nan, spread, "mu is not finite"),
    ):
        np.savez(tmp_path / "x.npz", mu=mu, sigma=sigma)
        assert text in refused(tmp_path / "x.npz"), text
    x = np.random.default_rng(0).standard_normal((500, 64)).astype(np.float32)
    covariance = (x.T @ x) / np.float32(499)
    rounded = covariance + np.triu(covariance, 1) * np.float32(3e-7)  # as sums in float32 leave it
    np.savez(tmp_path / "x.npz", mu=x.mean(0), sigma=rounded)
    assert np.array_equal(open_images(str(tmp_path / "x.npz")).statistics["mu"].covariance, rounded)


def test_what_is_called_npz_is_read_as_one(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pt")  # which is a zip as well
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "text").write_text("mine")
    assert not any(is_npz(str(tmp_path / name)) for name in ("x.pt", "folder.npz", "text", "nowhere.npz", "."))
    save_npz(pictures(5, 0), tmp_path / "x.npz").rename(tmp_path / "images")
    assert is_npz(str(tmp_path / "images")), "by its content, whatever its name"
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    assert "holds no images arr_0, and neither mu and sigma" in refused(tmp_path / "other.npz")
    whole = save_npz(pictures(5, 0), tmp_path / "whole.npz").read_bytes()
    for content in (whole[:300], whole[:-10], b"mine", b""):
        (tmp_path / "part.npz").write_bytes(content)
        assert "is a damaged .npz, or none" in refused(tmp_path / "part.npz"), content[:10]
