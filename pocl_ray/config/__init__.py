"""The config: one frozen pydantic model, read from YAML with dotted overrides.

Every default is written on its field and nowhere else. `sources.py` describes rows, models and difficulty,
`schedules.py` values that move, `training.py` the curriculum, the training and the rollouts, `scaling.py` workers and
actors, `tuning.py` the search, `experiments.py` paired comparisons, and `root.py` the whole config. `loading.py` reads
it from a file.
"""

from pocl_ray.config.experiments import ExperimentConfig, ScreenConfig
from pocl_ray.config.loading import load_config
from pocl_ray.config.root import Config, ControlConfig, EvaluationConfig, EvaluationTaskConfig, ReportConfig
from pocl_ray.config.scaling import ScalingConfig
from pocl_ray.config.schedules import ScheduleConfig
from pocl_ray.config.sources import (
    DataConfig,
    DifficultyConfig,
    GenerationConfig,
    LoraConfig,
    ModelConfig,
    OtherTeacherConfig,
    SourceConfig,
    StudentConfig,
    TeacherConfig,
    TokenizerConfig,
)
from pocl_ray.config.training import (
    CurriculumConfig,
    DistillConfig,
    PlateauConfig,
    RolloutConfig,
    SftConfig,
    TrainConfig,
)
from pocl_ray.config.tuning import (
    METRIC_MODES,
    BudgetConfig,
    ConfirmConfig,
    DomainConfig,
    ObjectiveConfig,
    SchedulerConfig,
    TuneConfig,
)

__all__ = [
    "METRIC_MODES",
    "BudgetConfig",
    "Config",
    "ConfirmConfig",
    "ControlConfig",
    "CurriculumConfig",
    "DataConfig",
    "DifficultyConfig",
    "DistillConfig",
    "DomainConfig",
    "EvaluationConfig",
    "EvaluationTaskConfig",
    "ExperimentConfig",
    "GenerationConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OtherTeacherConfig",
    "PlateauConfig",
    "ReportConfig",
    "RolloutConfig",
    "ScalingConfig",
    "ScheduleConfig",
    "SchedulerConfig",
    "ScreenConfig",
    "SftConfig",
    "SourceConfig",
    "StudentConfig",
    "TeacherConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TuneConfig",
    "load_config",
]
