"""Where the time of a step goes: kernels by name and grid, their kinds, and what is refused without a GPU."""

import pytest

from benchmarks.report import pages, record
from benchmarks.studies import timeline
from soflow_fast.errors import UserError


def test_kernels_of_one_name_and_grid_go_together():
    def event(name, grid, microseconds, cat="kernel"):
        return {"cat": cat, "name": name, "dur": microseconds, "args": {"grid": grid}}

    events = [
        event("_kernel", [4], 10),
        event("_kernel", [8], 70),
        event("_kernel", [4], 30),
        event("aten", [1], 9, "op"),
    ]
    found = timeline.by_kernel(events, steps=2)
    assert [(row["grid"], row["launches"], row["ms"]) for row in found] == [("[8]", 0.5, 0.035), ("[4]", 1.0, 0.02)]
    assert timeline.totals(found)["ours"] == pytest.approx(0.055)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_192x192_64x3_2x1_v_bz_coopB_NNN", "products"),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_tn", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("void cudnn::fusion::compute_dot_do_o<true>", "attention"),
        ("triton_red_fused_add_native_layer_norm_0", "Inductor's"),
        ("_backward_kernel", "ours"),
        ("void at::native::elementwise_kernel<128, 4>", "torch's other"),
    ],
)
def test_kinds(kernel, kind):
    assert timeline.kind(kernel) == kind and kind in timeline.KINDS


def test_refusals(monkeypatch):
    monkeypatch.setattr(timeline.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^benchmarks.timeline: needs a GPU$"):
        timeline.main([])
    with pytest.raises(UserError, match=r"^--recipes ours: there is none of that name; there are soflow-fast, "):
        timeline.main(["--recipes", "ours"])


@pytest.mark.parametrize("name", ["timeline", "choices"])
def test_the_record_of_a_gpu_is_a_table(name):
    run = record.newest(record.HOME, name)
    assert run is not None
    text = pages.BLOCKS[name].render(run)
    assert text.count("\n| ") >= 6 and run["file"] in text


def test_sums_of_the_record_are_those_of_its_kernels():
    """Kernels that were left out are short."""
    run = record.newest(record.HOME, "timeline")
    assert run is not None
    for row in run["rows"]:
        if "kernels" in row:
            kept, whole = timeline.totals(row["kernels"]), row["totals"]
            assert all(0.9 * whole[kind] - 1 <= kept[kind] <= whole[kind] + 1e-6 for kind in timeline.KINDS)
