"""Programs that are known to ignore the windows of an exported model, each with its source."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ignorer:
    """A program that computes full attention where the model has windows.

    Attributes:
        program: its name, with the version that was read where one was.
        models: the classes whose windows it ignores, by their names in Python.
        source: where that can be read.
    """

    program: str
    models: tuple[str, ...]
    source: str


IGNORERS = (
    Ignorer("vLLM", ("Qwen3ForCausalLM",), "https://github.com/vllm-project/vllm/issues/39514"),
    Ignorer("SGLang", ("Qwen3ForCausalLM",), "https://github.com/sgl-project/sglang/issues/22528"),
    # The class is that of Llama, and that one gives its attention no window.
    Ignorer(
        "SGLang 0.5.23",
        ("MistralForCausalLM",),
        "`sglang/srt/models/mistral.py` and `llama.py` of the package",
    ),
    # The converter makes both of type llama, or qwen3, and neither reads a window.
    Ignorer(
        "llama.cpp, as llama-cpp-python 0.3.36 has it,",
        ("MistralForCausalLM", "Qwen3ForCausalLM"),
        "`conversion/llama.py`, `src/models/llama.cpp` and `src/models/qwen3.cpp`",
    ),
)


def ignorers(model_class: str) -> list[Ignorer]:
    """The programs that ignore the windows of models of this class."""
    return [entry for entry in IGNORERS if model_class in entry.models]
