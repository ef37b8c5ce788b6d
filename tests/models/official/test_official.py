"""The authors' checkpoints: state dicts and files with the public keys, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from soflow_fast import DiT, DiTConfig, SolutionFlow, load_official
from soflow_fast.config.schema import Config
from soflow_fast.errors import CheckpointError
from soflow_fast.models.official import read_start

CONFIG = DiTConfig(input_size=4, patch_size=2, in_channels=1, hidden_size=8, depth=2, num_heads=2, num_classes=3)


def weights(seed: int = 0) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    state = SolutionFlow(DiT(CONFIG)).state_dict()
    return {k: v if k.endswith("pos_embed") else torch.randn(v.shape, generator=source) for k, v in state.items()}


def assert_holds(flow: SolutionFlow, expected: dict[str, Tensor]) -> None:
    state = flow.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not flow.training


@pytest.mark.parametrize(
    "wrap",
    [
        lambda ema, model: ema,
        lambda ema, model: {"ema": ema, "model": model, "step": 3},
        lambda ema, model: {"model": model, "ema": ema},
        lambda ema, model: {"model": ema},
        lambda ema, model: {"state_dict": {f"module.{k}": v for k, v in ema.items()}},
        lambda ema, model: {f"_orig_mod.{k}": v for k, v in ema.items()},
        lambda ema, model: {k.removeprefix("network."): v for k, v in ema.items()},
    ],
)
def test_a_state_dict_and_a_file_of_it_with_any_wrapper(wrap: Any, tmp_path: Path) -> None:
    ema = weights()
    content = wrap(ema, weights(1))
    assert_holds(load_official(content, CONFIG), ema)
    torch.save(content, tmp_path / "checkpoint.pt")
    assert_holds(load_official(tmp_path / "checkpoint.pt", CONFIG), ema)
    assert_holds(load_official(str(tmp_path / "checkpoint.pt"), CONFIG), ema)


def test_the_caller_keeps_its_weights() -> None:
    given = weights()
    kept = {k: v.clone() for k, v in given.items()}
    flow = load_official(given, CONFIG)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.zero_()
    assert all(torch.equal(given[name], kept[name]) for name in kept)


def test_positions_may_be_missing() -> None:
    expected = weights()
    given = {k: v for k, v in expected.items() if not k.endswith("pos_embed")}
    assert_holds(load_official(given, CONFIG), expected)


def test_a_public_size_is_read_off_the_weights() -> None:
    config = DiTConfig.named("S/2", input_size=8, in_channels=3, num_classes=5)
    state = SolutionFlow(DiT(config)).state_dict()
    with pytest.raises(CheckpointError, match="label table has 6 rows: 6 classes, or 5 and the null label"):
        load_official(state)
    flow = load_official(state, path="trig", coefficients="trig", num_classes=5)
    assert flow.network.config == config
    assert (flow.path, flow.coefficients) == ("trig", "trig")


def test_norms_of_queries_and_keys_are_recognised() -> None:
    """By their names in timm and LightningDiT, whether a configuration speaks of them or not."""
    for config in (DiTConfig.named("S/2", input_size=4, in_channels=1, num_classes=10), CONFIG):
        normed = replace(config, qk_norm=True)
        state = SolutionFlow(DiT(normed)).state_dict()
        for given in (config, normed, *([None] if config is not CONFIG else [])):
            flow = load_official(state, given)
            assert flow.network.config == normed
            assert_holds(flow, state)
        assert load_official(SolutionFlow(DiT(config)).state_dict(), config).network.config == config


def test_norms_of_another_kind_or_of_one_of_both_are_refused() -> None:
    state = SolutionFlow(DiT(replace(CONFIG, qk_norm=True))).state_dict()
    name = "network.blocks.1.attn.k_norm"
    message = r"blocks\.1\.attn\.k_norm\.bias is of a LayerNorm of queries or keys; the DiT here has RMSNorm"
    with pytest.raises(CheckpointError, match=message):
        load_official({**state, f"{name}.bias": torch.zeros(4)}, CONFIG)
    with pytest.raises(CheckpointError, match=rf"{name}\.weight is missing"):
        load_official({key: value for key, value in state.items() if key != f"{name}.weight"}, CONFIG)


def test_a_run_says_whether_it_has_norms_of_queries_and_keys(tmp_path: Path) -> None:
    for qk_norm, said in ((True, "has norms of queries and keys"), (False, "has no norms of queries and keys")):
        model = replace(CONFIG, qk_norm=qk_norm)
        state = SolutionFlow(DiT(model)).state_dict()
        torch.save({"ema_model": state}, tmp_path / "x.pt")
        start = read_start(str(tmp_path / "x.pt"), Config(model=model))
        assert all(torch.equal(start.network[name], value) for name, value in state.items())
        asked = rf"{said}; give --set model\.qk_norm={str(qk_norm).lower()}$"
        with pytest.raises(CheckpointError, match=asked):
            read_start(str(tmp_path / "x.pt"), Config(model=replace(CONFIG, qk_norm=not qk_norm)))


def test_weights_that_do_not_fit_are_named() -> None:
    def without(name: str) -> dict[str, Tensor]:
        return {k: v for k, v in weights().items() if k != name}

    bias = "network.blocks.1.attn.qkv.bias"
    cases: list[tuple[Any, DiTConfig | None, str]] = [
        (without(bias), CONFIG, f"{bias} is missing"),
        ({**weights(), "network.extra": torch.zeros(1)}, CONFIG, "network.extra has no place in the model"),
        ({**weights(), bias: torch.zeros(5)}, CONFIG, rf"{bias} is \[5\], the model's is \[24\]"),
        (weights(), None, "depth 2 and hidden size 8 are no public size"),
        ({**weights(), "network.x_embedder.proj.weight": torch.zeros(3)}, None, "not the weights of a DiT"),
        (
            {**weights(), "network.y_embedder.embedding_table.weight": torch.tensor(1.0)},
            None,
            "not the weights of a DiT",
        ),
        (without("network.pos_embed"), None, "not the weights of a DiT"),
        ({"ema": {"a": torch.zeros(1)}}, CONFIG, "no DiT weights"),
        ({}, CONFIG, "no DiT weights"),
    ]
    for source, config, message in cases:
        with pytest.raises(CheckpointError, match=message) as error:
            load_official(source, config)
        assert str(error.value).startswith("the state dict: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 junk"])
def test_a_file_of_junk_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt") as error:
        load_official(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


def test_a_missing_file_a_folder_and_other_content_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.pt: No such file"):
        load_official(tmp_path / "nowhere.pt")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_official(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_official(tmp_path / "list.pt")
