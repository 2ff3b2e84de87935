"""Low precision is used: quantized layers multiply as the recipe says."""

from __future__ import annotations

from storylab.precision import selftest
from storylab.precision.linear import BackendLinear, QuantizedLinear
from storylab.precision.recipes import quantized_flops_fraction
from storylab.training.check import Check, Finding, Subject


def applies(subject: Subject) -> bool:
    """Whether the run has a recipe."""
    return subject.setup.precision.recipe is not None


def run(subject: Subject) -> Finding:
    """Count the quantized layers, and compare every product of each with float32 and the emulation.

    Raises:
        UserError: a product does not run as its recipe says.
    """
    setup = subject.setup
    precision, config, blocks = setup.precision, setup.config, setup.state.model.blocks
    assert precision.recipe is not None
    low = sum(isinstance(layer, QuantizedLinear | BackendLinear) for layer in blocks.modules())
    wanted = len(precision.recipe.quantized_blocks(len(blocks))) * len(config.model.matrices())
    if low != wanted:
        fault = (
            f"{low} linear layers are quantized, and the recipe of {config.dtype} has {wanted}: repair the "
            "code that replaces them, or take --dtype bfloat16"
        )
        return Finding("", fault)
    checks = selftest.check_model(blocks, precision.recipe, precision.hardware)
    share = quantized_flops_fraction(
        precision.recipe, config.model, setup.dataset.vocab_size, config.block_size
    )
    found = {"backend": precision.backend, "share_of_flops": share}
    setup.precision_info = selftest.summarize(checks) | found
    products = setup.precision_info
    return Finding(f"{products['low']} of {products['products']} products run low")


CHECK = Check("low precision", 80, run, applies=applies, on_resume=True)
