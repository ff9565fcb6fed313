"""The config of a run: `tree` the fields, `checks` what goes together, `files` flags, YAML and identity."""

from mmref.config.checks import check_batch, check_config
from mmref.config.files import (
    build_parser,
    config_hash,
    dump_yaml,
    from_dict,
    from_saved,
    known_keys,
    load_config,
    make_config,
    placed,
    read_yaml,
    to_dict,
    unknown_key,
    with_absolute_paths,
)
from mmref.config.tree import (
    AUTO,
    MIN_TAU,
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    ReferenceConfig,
    TrainConfig,
)

__all__ = [
    "AUTO", "MIN_TAU", "Config", "DataConfig", "EvalConfig", "LossConfig", "ModelConfig", "ReferenceConfig", "TrainConfig",
    "build_parser", "check_batch", "check_config", "config_hash", "dump_yaml", "from_dict", "from_saved", "known_keys",
    "load_config", "make_config", "placed", "read_yaml", "to_dict", "unknown_key", "with_absolute_paths",
]  # fmt: skip
