"""The config: one frozen pydantic model, read from YAML with dotted overrides.

Defaults stand on the fields and nowhere else. `sources.py` describes rows, models and difficulty,
`training.py` the curriculum and the training, `root.py` the whole, `loading.py` reads it from a file.
"""

from pocl_ray.config.loading import load_config
from pocl_ray.config.root import Config, ControlConfig, EvaluationConfig, ReportConfig
from pocl_ray.config.sources import (
    DataConfig,
    DifficultyConfig,
    GenerationConfig,
    ModelConfig,
    SourceConfig,
    StudentConfig,
    TeacherConfig,
    TokenizerConfig,
)
from pocl_ray.config.training import (
    CurriculumConfig,
    DistillConfig,
    PlateauConfig,
    ScalingConfig,
    ScheduleConfig,
    SftConfig,
    TrainConfig,
)

__all__ = [
    "Config",
    "ControlConfig",
    "CurriculumConfig",
    "DataConfig",
    "DifficultyConfig",
    "DistillConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "ModelConfig",
    "PlateauConfig",
    "ReportConfig",
    "ScalingConfig",
    "ScheduleConfig",
    "SftConfig",
    "SourceConfig",
    "StudentConfig",
    "TeacherConfig",
    "TokenizerConfig",
    "TrainConfig",
    "load_config",
]
