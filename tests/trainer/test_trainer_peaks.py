"""The table of peaks: shipped names find their row, near misses find none."""

import pytest

from basestone.trainer.meters.peaks import TABLE, peak_tflops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 SXM5 64GB", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA GB300", 2500),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
        ("AMD Instinct MI325X", 1307.4),
        ("AMD Instinct MI355X", 2500),
        ("AMD Instinct MI250X", 191.5),
    ],
)
def test_known_devices(name, tflops):
    value, label = peak_tflops(name, "bf16")
    assert value == tflops
    assert label.startswith("table: ") and label.endswith(" bf16 dense")
    assert peak_tflops(name, "fp16")[0] == tflops


@pytest.mark.parametrize(
    "name",
    [
        *("NVIDIA H20", "NVIDIA H800", "NVIDIA A10", "NVIDIA A100X", "NVIDIA A800-SXM4-80GB", "NVIDIA L40"),
        *(
            "NVIDIA L4",
            "NVIDIA GeForce RTX 4090 D",
            "NVIDIA GeForce RTX 4090 Laptop GPU",
            "Tesla V100-SXM2-16GB",
        ),
        *("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "AMD Instinct MI300A", "Intel(R) Xeon(R) Processor", "cpu", ""),
    ],
)
def test_unknown_devices_have_no_peak(name):
    assert peak_tflops(name, "bf16") is None


def test_other_columns():
    assert peak_tflops("NVIDIA H100 80GB HBM3", "fp8") == (1979, "table: H100 SXM fp8 dense")
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "tf32") == (156, "table: A100 tf32 dense")
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp8") is None
    assert peak_tflops("NVIDIA H100 80GB HBM3", "fp32") is None


def test_dense_figures_double_from_column_to_column():
    """A figure for structured sparsity among dense ones would be twice as large."""
    for row in TABLE:
        if row.tf32 is not None and row.bf16 is not None:
            assert row.bf16 / row.tf32 == pytest.approx(2, rel=0.03), row.label
        if row.bf16 is not None and row.fp8 is not None:
            assert row.fp8 / row.bf16 == pytest.approx(2, rel=0.03), row.label
