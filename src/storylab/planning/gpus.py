"""Limits of GPUs, every number with its source; a GPU is one entry of :data:`GPUS`.

This module does not load torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from storylab.precision.formats import MatrixUnit

# Cards of one name differ from this ratio of their measured products on.
DIFFERENT = 1.05
ML_ENGINEERING = (
    "Bekman, Machine Learning Engineering, Maximum Achievable Matmul FLOPS comparison table"
)


@dataclass(frozen=True)
class Gpu:
    """A GPU's limits.

    Rates are dense and with float32 accumulation. Published ones are often with zeros skipped (twice
    these) or with float16 accumulation (on GeForce cards twice these).

    Attributes:
        name: in tables.
        capability: CUDA's compute capability.
        tflops: peak rate of matrix products by matrix unit, TFLOP/s; a missing unit means none.
        bandwidth: of its memory, TB/s.
        memory: GB.
        watts: rated power.
        source: documents of the numbers, and which numbers are derived from them.
        products: the slowest and the fastest published measurement of large bfloat16 products on such
            cards, TFLOP/s. Both differ from the peak rate: clocks fall under load, and some cards run
            faster than their rated clock. None: nobody has measured.
        measured_by: who has measured that, on which shapes.
    """

    name: str
    capability: tuple[int, int]
    tflops: Mapping[MatrixUnit, float] = field(hash=False)
    bandwidth: float
    memory: float
    watts: float
    source: str = ""
    products: tuple[float, float] | None = None
    measured_by: str = ""

    def product_rate(self, unit: MatrixUnit) -> float:
        """Rate of large products on the middle of the measured cards, TFLOP/s; measured in bfloat16, and
        in the same proportion to the peak in other units.

        Raises:
            KeyError: the GPU lacks the unit.
        """
        if self.products is None:
            return self.tflops[unit]
        middle = math.sqrt(self.products[0] * self.products[1])
        return self.tflops[unit] * middle / self.tflops["bfloat16"]

    def limit_rate(self, unit: MatrixUnit) -> float:
        """The peak rate, or that of the fastest measured card where it is higher, TFLOP/s.

        Raises:
            KeyError: the GPU lacks the unit.
        """
        peak = self.tflops["bfloat16"]
        fastest = peak if self.products is None else max(peak, self.products[1])
        return self.tflops[unit] * fastest / peak

    def measured_cards(self) -> tuple[Gpu, Gpu] | None:
        """This GPU as the slowest and as the fastest measured card; None where they do not differ."""
        if self.products is None or self.products[1] < DIFFERENT * self.products[0]:
            return None
        slowest, fastest = (
            dataclasses.replace(self, products=(rate, rate)) for rate in self.products
        )
        return slowest, fastest


GPUS: dict[str, Gpu] = {
    "rtx4090": Gpu(
        "RTX 4090",
        (8, 9),
        {"bfloat16": 165.2, "fp8": 330.3},
        bandwidth=1.008,
        memory=24,
        watts=450,
        source="NVIDIA Ada GPU Architecture whitepaper, appendix A, GeForce RTX 4090: peak BF16 and FP8 "
        "tensor TFLOPS with FP32 accumulate, without sparsity; memory bandwidth; total graphics power.",
        products=(175.1, 175.1),
        measured_by="binbinsh/gpu-bench on GitHub: products of 8,192 x 8,192, cuBLASLt.",
    ),
    "rtx5090": Gpu(
        "RTX 5090",
        (12, 0),
        {"bfloat16": 209.5, "fp8": 419.0, "fp4": 1676.0},
        bandwidth=1.792,
        memory=32,
        watts=575,
        source="NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A, GeForce RTX 5090: peak BF16, "
        "FP8 and FP4 tensor TFLOPS with FP32 accumulate, without sparsity; memory bandwidth; total "
        "graphics power.",
        products=(172.0, 224.0),
        measured_by="gau-nernst/learn-cuda on GitHub, 02b_matmul_sm80: 172 TFLOP/s, products of 4,096 x "
        "4,096 by Triton, a card limited to 400 W; main-horse.github.io/posts/5090-mm-perf: 224, "
        "torch.matmul of 16,384 x 8,192 x 1,280.",
    ),
    "a100": Gpu(
        "A100 SXM",
        (8, 0),
        {"bfloat16": 312.0},
        bandwidth=2.04,
        memory=80,
        watts=400,
        source="NVIDIA A100 Tensor Core GPU datasheet, A100 80GB SXM: BFLOAT16 tensor core without "
        "sparsity; memory bandwidth 2,039 GB/s; maximum thermal design power.",
        products=(267.9, 271.2),
        measured_by=f"{ML_ENGINEERING}, two editions.",
    ),
    "h100": Gpu(
        "H100 SXM",
        (9, 0),
        {"bfloat16": 989.0, "fp8": 1979.0},
        bandwidth=3.35,
        memory=80,
        watts=700,
        source="NVIDIA H100 Tensor Core GPU datasheet, H100 SXM: memory bandwidth and maximum thermal "
        "design power; derived: rates are half of those it gives with sparsity (1,979 BFLOAT16, "
        "3,958 FP8).",
        products=(785.0, 795.0),
        measured_by=f"docs/gpu.md: 785 TFLOP/s; {ML_ENGINEERING}: 794.5; pranjalssh/fast.cu on GitHub: 795 "
        "by cuBLAS; products of 8,192 x 8,192, or the best shape.",
    ),
    "h200": Gpu(
        "H200",
        (9, 0),
        {"bfloat16": 989.0, "fp8": 1979.0},
        bandwidth=4.8,
        memory=141,
        watts=700,
        source="NVIDIA H200 Tensor Core GPU datasheet, H200 SXM: memory bandwidth and maximum thermal "
        "design power; derived: rates are half of those it gives with sparsity (1,979 BFLOAT16, "
        "3,958 FP8).",
        products=(794.5, 794.5),
        measured_by=f"{ML_ENGINEERING}: as the H100 SXM.",
    ),
    "b200": Gpu(
        "B200",
        (10, 0),
        {"bfloat16": 2250.0, "fp8": 4500.0, "fp4": 9000.0},
        bandwidth=7.7,
        memory=180,
        watts=1000,
        source="NVIDIA Blackwell datasheet, HGX B200, per GPU at 1,000 W; derived: rates are half of those "
        "it gives with sparsity (4.5 PFLOPS BF16, 9 FP8, 18 FP4), bandwidth and memory an eighth of "
        "those of eight GPUs (62 TB/s, 1.44 TB), rounded down.",
        products=(1745.0, 1745.0),
        measured_by=f"{ML_ENGINEERING}.",
    ),
}

if TYPE_CHECKING:
    GpuName = str
else:
    # For the parser of flags: a key of the registry, or this machine.
    GpuName = Literal[(*GPUS, "this")]

# Words in a driver's name for another model than the one with the same number.
OTHER_MODELS = {"Laptop", "PCIe", "NVL", "Ti", "SUPER", "D"}


def known_gpu(name: str) -> Gpu | None:
    """The GPU that the driver calls ``name``, such as NVIDIA GeForce RTX 5090; None if not listed.

    A laptop's GPU of the same number is another one, and so is one with PCIe or NVL in its name.
    """
    words = name.removeprefix("NVIDIA ").removeprefix("GeForce ").replace("-", " ").split()
    if OTHER_MODELS & set(words):
        return None
    found = [gpu for gpu in GPUS.values() if set(gpu.name.split()) - {"SXM"} <= set(words)]
    return found[0] if len(found) == 1 else None
