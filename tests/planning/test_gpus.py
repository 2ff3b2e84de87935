"""Facts about GPUs and their names."""

from __future__ import annotations

from typing import get_args

import pytest

from storylab.planning.gpus import GPUS, GpuName, known_gpu
from storylab.planning.software import SOFTWARE, SoftwareName
from storylab.precision.formats import FORMATS


def test_every_number_of_a_gpu_has_a_source() -> None:
    for gpu in GPUS.values():
        assert "NVIDIA" in gpu.source and gpu.source.endswith("."), gpu.name
        units = {form.matrix_unit for form in FORMATS.values()} | {"bfloat16"}
        assert "bfloat16" in gpu.tflops and gpu.tflops.keys() <= units
        assert gpu.products is None or gpu.measured_by.endswith("."), gpu.name


@pytest.mark.parametrize(
    ("driver", "card"),
    [
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 5090 D", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA L40S", None),
    ],
)
def test_a_card_is_known_by_the_name_its_driver_gives(driver: str, card: str | None) -> None:
    """Names as nvidia-smi prints them; a peak that is another card's would be worse than none."""
    found = known_gpu(driver)
    assert found == (GPUS[card] if card else None)


def test_every_card_and_kind_of_software_has_a_flag() -> None:
    assert {*GPUS, "this"} == set(get_args(GpuName))
    assert set(SOFTWARE) == set(get_args(SoftwareName))
