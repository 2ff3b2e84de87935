"""The config of a run: its fields with their facts, presets, and the identity that follows from them.

It is imported before torch, so that ``--help`` and bad flags answer at once. The flags of ``storylab
train``, their help, and ``config.json`` in the run folder are made from :class:`TrainConfig`.
"""

from storylab.config.identity import (
    ADDED_FIELDS,
    ADDED_MODEL_FIELDS,
    FIELDS,
    LAST_WITH_REMOVED,
    PRESENTATION_FIELDS,
    REMOVED_FIELDS,
    SEED_FIELDS,
    SPLIT_FIELDS,
    differences,
    fields_of,
    flat,
    from_dict,
    recipe_digest,
    timing_key,
    to_dict,
    without_removed,
)
from storylab.config.marks import at_most, check_seed
from storylab.config.model import Matrix, ModelConfig
from storylab.config.patterns import FULL, AttentionPattern, Window, parse_attention
from storylab.config.presets import (
    GPT2_VOCAB_SIZE,
    METHODS,
    PRESETS,
    SMALL_VOCAB_SIZE,
    Preset,
    preset_config,
)
from storylab.config.train import (
    DEFAULT_DATA_DIR,
    DEFAULT_PRESET,
    NATIVE_DTYPES,
    Backend,
    Dtype,
    MethodName,
    OptimizerName,
    PresetName,
    ScheduleName,
    TrainConfig,
)

__all__ = [
    "ADDED_FIELDS",
    "ADDED_MODEL_FIELDS",
    "DEFAULT_DATA_DIR",
    "DEFAULT_PRESET",
    "FIELDS",
    "FULL",
    "GPT2_VOCAB_SIZE",
    "LAST_WITH_REMOVED",
    "METHODS",
    "NATIVE_DTYPES",
    "PRESENTATION_FIELDS",
    "PRESETS",
    "REMOVED_FIELDS",
    "SEED_FIELDS",
    "SMALL_VOCAB_SIZE",
    "SPLIT_FIELDS",
    "AttentionPattern",
    "Backend",
    "Dtype",
    "Matrix",
    "MethodName",
    "ModelConfig",
    "OptimizerName",
    "Preset",
    "PresetName",
    "ScheduleName",
    "TrainConfig",
    "Window",
    "at_most",
    "check_seed",
    "differences",
    "fields_of",
    "flat",
    "from_dict",
    "parse_attention",
    "preset_config",
    "recipe_digest",
    "timing_key",
    "to_dict",
    "without_removed",
]
