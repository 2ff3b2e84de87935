"""The document of ``storylab plan --json``."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from storylab.documents.fields import about


class RunShape(Struct, frozen=True, kw_only=True):
    """The run that the flags describe."""

    preset: Annotated[str, about("the named shape that the flags start from")]
    dtype: Annotated[str, about("precision of the training steps")]
    parameters: Annotated[int, about("trained parameters")]
    tokens: Annotated[int, about("tokens that the run trains on", "tokens")]
    flops_per_token: Annotated[float, about("of a training step's products", "FLOP per token")]
    flops: Annotated[float, about("of the whole run's products", "FLOP")]


class ExperimentShape(Struct, frozen=True, kw_only=True):
    """The experiment in the file."""

    file: Annotated[str, about("the file, as it was given")]
    title: Annotated[str, about("the experiment's title")]
    scale: Annotated[str | None, about("the scale that was chosen; null without one")]
    seeds: Annotated[int, about("seeds of every arm")]


class PartCost(Struct, frozen=True, kw_only=True):
    """A part of a micro-batch."""

    name: Annotated[str, about("the part; several may belong to one part of a profile")]
    part: Annotated[str, about("the part of a profile that it belongs to, as `bench` names it")]
    flops: Annotated[float, about("arithmetic of its matrix products", "FLOP")]
    bytes: Annotated[float, about("memory traffic", "bytes")]
    seconds: Annotated[float, about("predicted time in a micro-batch", "seconds")]


class Gain(Struct, frozen=True, kw_only=True):
    """The predicted gain from a recipe in low precision over bfloat16."""

    recipe: Annotated[str, about("the value of `--dtype` that chooses the recipe")]
    quantized_flops_share: Annotated[float, about("share of the FLOPs that convert, 0 to 1")]
    speedup: Annotated[float, about("predicted speed over that of bfloat16")]
    largest_speedup: Annotated[
        float, about("the same if quantizing cost nothing: the most by Amdahl's law")
    ]


class SoftwarePrediction(Struct, frozen=True, kw_only=True):
    """Predicted time of the run with one kind of software."""

    software: Annotated[str, about("a value of `--software`, or `limit`: the limit of the card")]
    parts: Annotated[list[PartCost], about("the parts of a micro-batch, in the order of a step")]
    waiting_seconds: Annotated[
        float, about("in which the GPU waits for the host to start kernels", "seconds")
    ]
    micro_batch_seconds: Annotated[float, about("all parts, and that waiting", "seconds")]
    tokens_per_second: Annotated[float, about("speed of training", "tokens per second")]
    slowest_tokens_per_second: Annotated[
        float | None,
        about(
            "the same on the slowest measured card of this name; null where cards do not differ",
            "tokens per second",
        ),
    ]
    fastest_tokens_per_second: Annotated[
        float | None, about("the same on the fastest measured card", "tokens per second")
    ]
    bfloat16_peak_share: Annotated[
        float, about("FLOP per second over the GPU's bfloat16 peak, 0 to 1")
    ]
    training_seconds: Annotated[float, about("the whole run without evaluations", "seconds")]
    energy_joules: Annotated[
        float, about("of the whole run at the rated power: an upper bound", "joules")
    ]
    gains: Annotated[
        list[Gain], about("of the recipes that the GPU has; empty unless the run is in bfloat16")
    ]


class RunPrediction(Struct, frozen=True, kw_only=True):
    """The run on one GPU."""

    software: Annotated[list[SoftwarePrediction], about("one for each kind of software")]
    training_memory_bytes: Annotated[float, about("predicted peak memory", "bytes")]
    fits: Annotated[bool, about("whether that is less than the GPU has")]
    idle_windows: Annotated[
        str | None, about("why the attention windows save no time here; null where they may")
    ]


class ArmCost(Struct, frozen=True, kw_only=True):
    """Predicted cost of one seed of an arm."""

    tokens_per_second: Annotated[float, about("speed of training", "tokens per second")]
    training_seconds: Annotated[float, about("one seed without evaluations", "seconds")]
    training_memory_bytes: Annotated[float, about("predicted peak memory", "bytes")]


class ArmPrediction(Struct, frozen=True, kw_only=True):
    """One seed of one arm on one GPU, with the kind of software of ``--software``."""

    arm: Annotated[str, about("name of the arm")]
    condition: Annotated[str | None, about("the condition that it runs under; null without one")]
    software: Annotated[str, about("the value of `--software`")]
    obstacle: Annotated[str | None, about("why there is no prediction; null where there is one")]
    cost: Annotated[ArmCost | None, about("of one seed; null with an obstacle")]


class GpuPrediction(Struct, frozen=True, kw_only=True):
    """A GPU's limits and the predictions for it."""

    gpu: Annotated[str, about("the value of `--gpu`")]
    name: Annotated[str, about("the GPU's name")]
    peak_flops_per_second: Annotated[
        dict[str, float],
        about("dense peak rate of each matrix unit that the GPU has", "FLOP per second"),
    ]
    bandwidth_bytes_per_second: Annotated[
        float, about("bandwidth of its memory", "bytes per second")
    ]
    memory_bytes: Annotated[float, about("its memory", "bytes")]
    power_watts: Annotated[float, about("rated power", "watts")]
    obstacle: Annotated[str | None, about("why the run has no prediction; null where it has one")]
    run: Annotated[
        RunPrediction | None, about("the run; null for an experiment, and with an obstacle")
    ]
    arms: Annotated[
        list[ArmPrediction] | None, about("every arm of the experiment; null for a run")
    ]


class MeasuredPlan(Struct, frozen=True, kw_only=True):
    """The run on this machine, predicted from steps that were timed."""

    micro_batch_seconds: Annotated[float, about("measured time of a micro-batch", "seconds")]
    update_seconds: Annotated[
        float | None,
        about("measured time of an update; null where it is in that of the micro-batch", "seconds"),
    ]
    tokens_per_second: Annotated[float, about("predicted speed", "tokens per second")]
    training_seconds: Annotated[
        float, about("predicted time of the whole run without evaluations", "seconds")
    ]
    peak_memory_bytes: Annotated[float, about("measured peak memory", "bytes")]


class PlanDocument(Struct, frozen=True, kw_only=True, tag_field="schema", tag="storylab.plan/1"):
    """The predicted cost of a run or of an experiment."""

    vocab_size: Annotated[int, about("token ids that the plan counts with")]
    run: Annotated[RunShape | None, about("the run of the flags; null for an experiment")]
    experiment: Annotated[ExperimentShape | None, about("the experiment; null for a run")]
    gpus: Annotated[list[GpuPrediction], about("one for each `--gpu` other than `this`")]
    measured_over_predicted: Annotated[
        list[float],
        about(
            "speed of runs that the predictions were not fitted to over their prediction: lowest, highest"
        ),
    ]
    this_machine: Annotated[MeasuredPlan | None, about("with `--gpu this`; else null")]
