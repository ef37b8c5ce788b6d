"""Other people's layer norms, by stand-ins with the signatures that the packages have."""

import torch

from benchmarks.baselines import norms
from benchmarks.harness import operations
from benchmarks.harness.kernel_race import KernelRace
from benchmarks.harness.operations import EAGER, OURS
from tests.benchmarks.tiny import CPU
from tests.benchmarks.tiny import SIZES as TINY


def test_norms_of_others_are_raced_with_the_same_formula(monkeypatch):
    """Stand-ins with the signatures that the packages have; on a GPU the check sees the packages themselves."""

    def affine(x, weight, bias, eps):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    class Packages:
        liger_layer_norm = staticmethod(affine)
        layer_norm_fn = staticmethod(lambda x, weight, bias, residual=None, eps=1e-6: affine(x, weight, bias, eps))
        fused_layer_norm = staticmethod(lambda x, shape, eps: torch.nn.functional.layer_norm(x, shape, eps=eps))

        class LayerNorm(torch.nn.LayerNorm):  # TransformerEngine's, whose scale and shift do not learn here
            def forward(self, x):
                assert not any(p.requires_grad for p in self.parameters())
                return super().forward(x)

    monkeypatch.setattr(norms.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(norms.importlib, "import_module", lambda name: Packages)
    titles = ("liger-kernel", "apex", "flash-attn", "transformer-engine")
    assert set(norms.norms(CPU).values()) == {f"{title} needs a GPU" for title in titles}
    raced = [op for op in operations.operations(torch.device("cuda")) if "Liger" in op.others]
    assert len(raced) == 2
    for operation in raced:
        for dtype in (torch.float32, torch.bfloat16):
            race = KernelRace(operation, True, TINY, CPU, dtype)
            assert set(race.timer.calls) == {OURS, EAGER, "Liger", "apex", "flash-attn", "TransformerEngine"}

    def fail(name):
        raise ImportError("built for\nanother torch")

    monkeypatch.setattr(norms.importlib, "import_module", fail)
    why = norms.norms(torch.device("cuda"))["apex"]
    assert why == "apex cannot be imported: built for another torch"


def test_weights_of_a_norm_are_made_once_for_a_width_and_dtype():
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    norm = norms._affine(lambda x, weight, bias: given.append((weight, bias)) or x)
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        norm(torch.zeros(2, 3, dtype=dtype))
    assert all(a is b for a, b in zip(given[0], given[1], strict=True)) and given[2][0].dtype == torch.bfloat16
    assert given[0][0].tolist() == [1.0] * 3 and given[0][1].tolist() == [0.0] * 3
