"""The shape of a network by its weights, and whether it is the one that somebody says."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ...config.schema import DIT_SIZES, DiTConfig
from ...errors import CheckpointError
from .one_time import W_EMBEDDER
from .wrapped import FIRST

TABLE = "y_embedder.embedding_table.weight"
NORM = "blocks.0.attn.q_norm.weight"
"""Of the queries of the first block, in a network that normalises queries and keys."""
ROWS = {1001: (1000, True), 1000: (1000, False), 11: (10, True), 10: (10, False), 1: (0, True)}
"""Classes, and whether there is a null label, by the rows of the label table: of ImageNet, CIFAR-10 and no classes."""


def infer(weights: Mapping[str, Tensor], where: str, num_classes: int | None = None) -> DiTConfig:
    """The configuration of a public size from the shapes of its weights, by their names in the DiT.

    num_classes: None: by the label table, where it is of a well-known number. Raises CheckpointError for another one.
    """
    if W_EMBEDDER in weights:
        raise CheckpointError(f"{where}: sees guidance scales; give a DiTConfig with guidance_range")
    try:
        hidden_size, in_channels, patch_size, _ = weights[FIRST].shape
        depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
        rows = len(weights[TABLE])
        mlp_ratio = len(weights["blocks.0.mlp.fc1.bias"]) / hidden_size
        tokens = weights["pos_embed"].shape[1]
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"{where}: not the weights of a DiT ({error}); give a DiTConfig") from None
    heads = public_heads(depth, hidden_size)
    if heads is None:
        raise CheckpointError(
            f"{where}: depth {depth} and hidden size {hidden_size} are no public size; give a DiTConfig with num_heads"
        )
    if num_classes is not None:
        classes, null_label = num_classes, rows > num_classes
    elif rows in ROWS:
        classes, null_label = ROWS[rows]
    else:
        raise CheckpointError(
            f"{where}: its label table has {rows} rows: {rows} classes, or {rows - 1} and the null label? "
            "give num_classes, or the config.yaml of its training"
        )
    config = DiTConfig(
        input_size=round(tokens**0.5) * patch_size,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio,
        num_classes=classes,
        null_label=null_label,
        qk_norm=NORM in weights,
    )
    return fitted(config, weights, where)


def public_heads(depth: int, hidden_size: int) -> int | None:
    """The heads of the public size of a depth and hidden size, which the weights do not show; None: there is none."""
    return {(d, h): n for d, h, n, _ in DIT_SIZES.values()}.get((depth, hidden_size))


def fitted(config: DiTConfig, weights: Mapping[str, Tensor], where: str) -> DiTConfig:
    """`config` with a null label or without, as the label table has it: that of a network whose labels are never
    dropped has no row for it; with norms of queries and keys or without, as the weights have them. Raises
    CheckpointError for heads that a public size does not have, and for norms of another kind."""
    wrong = next((name for name in weights if name.endswith((".attn.q_norm.bias", ".attn.k_norm.bias"))), None)
    if wrong is not None:
        raise CheckpointError(
            f"{where}: {wrong} is of a LayerNorm of queries or keys; the DiT here has RMSNorm there, without a bias"
        )
    config = replace(config, qk_norm=NORM in weights)
    usual = public_heads(config.depth, config.hidden_size)
    if usual not in (None, config.num_heads):
        raise CheckpointError(
            f"{where}: the configuration says {config.num_heads} heads; the public DiT of depth {config.depth} and "
            f"hidden size {config.hidden_size} has {usual}, and the weights do not show it"
        )
    table = weights.get(TABLE)
    if table is None or table.dim() != 2 or len(table) - config.num_classes not in (0, 1) or not len(table):
        return config  # what differs is named with all else
    return replace(config, null_label=len(table) > config.num_classes)
