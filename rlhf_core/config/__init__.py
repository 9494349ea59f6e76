"""Settings of all jobs: frozen dataclasses with a sentence under every field, which the command line shows as its help.

Nothing here imports torch, so that `rlhf --help` answers at once.
"""

from rlhf_core.config.groups import CachedReferenceConfig as CachedReferenceConfig
from rlhf_core.config.groups import DataConfig as DataConfig
from rlhf_core.config.groups import KLConfig as KLConfig
from rlhf_core.config.groups import LoadConfig as LoadConfig
from rlhf_core.config.groups import LoraConfig as LoraConfig
from rlhf_core.config.groups import ModelConfig as ModelConfig
from rlhf_core.config.groups import OptimConfig as OptimConfig
from rlhf_core.config.groups import ReferenceConfig as ReferenceConfig
from rlhf_core.config.groups import SamplingConfig as SamplingConfig
from rlhf_core.config.groups import ScoreShapingConfig as ScoreShapingConfig
from rlhf_core.config.groups import ValueConfig as ValueConfig
from rlhf_core.config.jobs import LossOptions as LossOptions
from rlhf_core.config.jobs import OnPolicyConfig as OnPolicyConfig
from rlhf_core.config.jobs import PolicyGradientConfig as PolicyGradientConfig
from rlhf_core.config.jobs import RunConfig as RunConfig
from rlhf_core.config.jobs import ScoringConfig as ScoringConfig
from rlhf_core.config.settings import AtLeastTwo as AtLeastTwo
from rlhf_core.config.settings import Bounds as Bounds
from rlhf_core.config.settings import ConfigError as ConfigError
from rlhf_core.config.settings import Fraction as Fraction
from rlhf_core.config.settings import Kind as Kind
from rlhf_core.config.settings import LabelSmoothing as LabelSmoothing
from rlhf_core.config.settings import NonNegativeFloat as NonNegativeFloat
from rlhf_core.config.settings import NonNegativeInt as NonNegativeInt
from rlhf_core.config.settings import PositiveFloat as PositiveFloat
from rlhf_core.config.settings import PositiveInt as PositiveInt
from rlhf_core.config.settings import Settings as Settings
from rlhf_core.config.settings import alternatives as alternatives
from rlhf_core.config.settings import did_you_mean as did_you_mean
from rlhf_core.config.settings import from_dict as from_dict
from rlhf_core.config.settings import kinds_of as kinds_of
from rlhf_core.config.settings import new_name as new_name
from rlhf_core.config.settings import require as require
from rlhf_core.config.settings import require_attributes as require_attributes
from rlhf_core.config.settings import to_dict as to_dict
