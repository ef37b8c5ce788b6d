"""Root mean squares of what is known only up to noise."""

from torch import Tensor


def halves(draws: Tensor) -> tuple[Tensor, Tensor]:
    """The means of the first and of the second half of draws [n, ...], n at least 2; of an odd n the last is left
    out."""
    half = len(draws) // 2
    return draws[:half].mean(0), draws[half : 2 * half].mean(0)


def root_mean_square(a: Tensor, b: Tensor | None = None) -> tuple[float, float]:
    """The root of the mean over B points of a . b, [B, D] each, and its standard error over the points.

    a and b: the same vectors, each with noise of its own of mean 0, which then has no part in the mean of the product;
    b None: a, which is known. Where noise makes the mean of the product negative the root is 0, and its error what the
    error of the product allows.
    """
    products = (a * (a if b is None else b)).sum(-1)
    square, error = float(products.mean()), float(products.std()) / len(products) ** 0.5
    root = max(square, 0.0) ** 0.5
    return root, error / (2 * root) if root else error**0.5
