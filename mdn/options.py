"""The options of a config: their names, types and ranges, by the constructor that takes them.

Nothing here imports TensorFlow.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Monitored = Literal["loss", "nll", "val_loss", "val_nll"]
FITTED = "mdn.fit_distribution"  # the model that is no network
GENERATIVE = "mdn.vae.VAE"  # the model that reads no x, and has no exact nll
STACKED = tuple(f"mdn.backbones.{name}" for name in ("MLP", "ResNet", "Constant"))
SEQUENTIAL = "mdn.backbones.LSTM"  # which takes no plain rows
SEQUENCES = "mdn.data.arrays.Npz"  # the one source of mdn that may hold them
STREAMED = "mdn.data.records.TFRecord"  # rows that are never in memory
SEVERAL_WORKERS = "mdn.strategy.multi_worker"
AUTO = "auto"  # in place of a number of components: see mdn.selection
TRANSFORMS = ("log", "logit", "box_cox")
ONE_DEVICE = tuple(f"mdn.strategy.{name}" for name in ("auto", "cpu", "gpu"))
Names = str | list[str]  # one name stands for a list of one


class Section(BaseModel):
    """Options by name; any other name is a mistake."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Target(Section):
    """Options of a constructor."""

    target: str = Field(alias="_target_")


class HeadOptions(Target):
    event_size: PositiveInt | None
    positivity: Literal["softplus", "exp", "elu"]
    min_scale: PositiveFloat
    grid_floor: bool
    kernel_scale: NonNegativeFloat
    target_transform: Any


class MixtureOptions(HeadOptions):
    components: PositiveInt | Literal["auto"]
    background: Share | Literal["auto", "learned"]
    start: Literal["clusters", "centre"]


class LowRankOptions(MixtureOptions):
    rank: PositiveInt


class VAEOptions(Target):
    event_size: PositiveInt | None
    latent_size: PositiveInt
    prior: Literal["mixture", "normal"]
    components: PositiveInt
    spread: PositiveFloat
    decoder_widths: Annotated[list[PositiveInt], Field(min_length=1)]
    activation: str
    dropout: Share
    likelihood: Literal["bernoulli"]
    kl_warmup: NonNegativeInt
    min_scale: PositiveFloat


class DistributionOptions(Target):
    distribution: str
    components: PositiveInt | None
    method: Literal["gradient", "exact", "em"]
    initial: dict[str, Any] | Literal["random"] | None
    fixed: list[str]
    batch_size: PositiveInt | None
    learning_rate: PositiveFloat
    tolerance: PositiveFloat | None
    max_steps: PositiveInt | None
    restarts: PositiveInt | None
    positivity: Literal["softplus", "exp", "elu"]
    min_scale: PositiveFloat
    dtype: Literal["float32", "float64"] | None
    compiled: bool
    seed: NonNegativeInt


class PiecewiseLinearOptions(Target):
    bins: Annotated[int, Field(ge=2)]


class MLPOptions(Target):
    widths: Annotated[list[PositiveInt], Field(min_length=1)]
    activation: str
    dropout: Share
    layer_norm: bool


class ResNetOptions(Target):
    width: PositiveInt
    blocks: PositiveInt
    activation: str
    dropout: Share
    layer_norm: bool


class LSTMOptions(Target):
    units: Annotated[list[PositiveInt], Field(min_length=1)]
    return_sequences: bool
    dropout: Share


class SimulatorOptions(Target):
    rows: PositiveInt
    validation_rows: PositiveInt
    test_rows: PositiveInt
    seed: NonNegativeInt


class PointsOptions(Target):
    y: list[Any] | None


class GaussiansOptions(SimulatorOptions):
    weights: list[PositiveFloat]
    loc: list[list[float]]
    covariance: list[list[list[float]]]


class RandomGaussiansOptions(SimulatorOptions):
    dimensions: PositiveInt
    components: PositiveInt
    separation: NonNegativeFloat
    truth_seed: NonNegativeInt


class SplitOptions(Target):
    validation: Annotated[float, Field(gt=0.0, lt=1.0)]
    test: Annotated[float, Field(gt=0.0, lt=1.0)]
    seed: NonNegativeInt
    missing: Literal["error", "indicator"]


class TableOptions(SplitOptions):
    path: str | None
    targets: Names | None
    features: Names | None
    categorical: Names
    weight: str | None
    split: Literal["random", "time", "group", "column"]
    split_column: str | None
    max_rows: PositiveInt | None


class ParquetOptions(TableOptions):
    stream: bool
    held_out_rows: PositiveInt
    sample_rows: PositiveInt
    shuffle_rows: PositiveInt


class TFRecordOptions(SplitOptions):
    path: str | None
    targets: Names | None
    features: Names | None
    weight: str | None
    held_out_rows: PositiveInt
    sample_rows: PositiveInt
    shuffle_rows: PositiveInt


class NpzOptions(SplitOptions):
    path: str | None
    x_key: str
    y_key: str
    weight: str | None
    fold: NonNegativeInt | None
    split: Literal["random", "time", "group", "column"]
    split_column: str | None


class FlightsOptions(SplitOptions):
    split: Literal["time", "group", "random"]
    max_rows: PositiveInt | None


class DigitsOptions(Target):
    validation: Annotated[float, Field(gt=0.0, lt=1.0)]
    test: Annotated[float, Field(gt=0.0, lt=1.0)]
    seed: NonNegativeInt


class OptimizerOptions(Target):
    learning_rate: PositiveFloat
    global_clipnorm: PositiveFloat | None


class AdamWOptions(OptimizerOptions):
    weight_decay: NonNegativeFloat | Literal["auto"]
    decay: Literal["all", "kernels"]


class SGDOptions(OptimizerOptions):
    momentum: Share
    nesterov: bool


class EarlyStoppingOptions(Target):
    monitor: Monitored
    patience: PositiveInt
    min_delta: NonNegativeFloat


class PlateauOptions(Target):
    monitor: Monitored
    factor: Annotated[float, Field(gt=0.0, lt=1.0)]
    patience: PositiveInt
    min_lr: NonNegativeFloat


class TensorBoardOptions(Target):
    image_every: NonNegativeInt


class CheckpointOptions(Target):
    keep: PositiveInt


class PriorComparisonOptions(Target):
    latent_sizes: Annotated[list[PositiveInt], Field(min_length=1)]
    seeds: Annotated[int, Field(ge=2)]


class GpuOptions(Target):
    index: NonNegativeInt


class MirroredOptions(Target):
    devices: PositiveInt | None
    logical_cpus: PositiveInt | None


class MultiWorkerOptions(Target):
    timeout: PositiveInt


class TpuOptions(Target):
    tpu: str


class EnergyOptions(Section):
    directions: PositiveInt = 32
    seed: NonNegativeInt = 0


class BetaOptions(Section):
    beta: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5


class IntervalOptions(Section):
    step: PositiveFloat | list[PositiveFloat] | None = None


LOSSES: dict[str, type[Section]] = {
    "nll": Section,
    "crps": Section,
    "energy": EnergyOptions,
    "beta_nll": BetaOptions,
    "interval_nll": IntervalOptions,
}

SIMULATORS = (
    "Sinusoid",
    "EconDensity",
    "ArmaJump",
    "SkewNormal",
    "LinearGaussian",
    "TwoMoons",
    "TwoGaussians",
    "SLCP",
)

OPTIONS: dict[str, type[Target]] = {
    "mdn.heads.Diag": HeadOptions,
    "mdn.heads.TriL": HeadOptions,
    "mdn.heads.Mixture": MixtureOptions,
    "mdn.heads.MixtureDiag": MixtureOptions,
    "mdn.heads.MixturePrecision": MixtureOptions,
    "mdn.heads.MixtureLowRank": LowRankOptions,
    FITTED: DistributionOptions,
    GENERATIVE: VAEOptions,
    "mdn.embeddings.PiecewiseLinear": PiecewiseLinearOptions,
    "mdn.backbones.MLP": MLPOptions,
    "mdn.backbones.ResNet": ResNetOptions,
    "mdn.backbones.Constant": Target,
    SEQUENTIAL: LSTMOptions,
    **{f"mdn.data.simulators.{name}": SimulatorOptions for name in SIMULATORS},
    "mdn.data.draws.Points": PointsOptions,
    "mdn.data.draws.Gaussians": GaussiansOptions,
    "mdn.data.draws.random_gaussians": RandomGaussiansOptions,
    "mdn.data.tabular.Csv": TableOptions,
    "mdn.data.tabular.Parquet": ParquetOptions,
    "mdn.data.records.TFRecord": TFRecordOptions,
    SEQUENCES: NpzOptions,
    "mdn.data.flights.Flights": FlightsOptions,
    "mdn.data.digits.Digits": DigitsOptions,
    "tf_keras.optimizers.Adam": OptimizerOptions,
    "mdn.optimizers.AdamW": AdamWOptions,
    "tf_keras.optimizers.SGD": SGDOptions,
    "mdn.callbacks.stopping.EarlyStopping": EarlyStoppingOptions,
    "mdn.callbacks.stopping.ReduceLROnPlateau": PlateauOptions,
    "mdn.callbacks.tensorboard.TensorBoard": TensorBoardOptions,
    "mdn.callbacks.checkpoint.Checkpoint": CheckpointOptions,
    "mdn.comparison.PriorComparison": PriorComparisonOptions,
    "mdn.strategy.auto": Target,
    "mdn.strategy.cpu": Target,
    "mdn.strategy.gpu": GpuOptions,
    "mdn.strategy.mirrored": MirroredOptions,
    "mdn.strategy.multi_worker": MultiWorkerOptions,
    "mdn.strategy.tpu": TpuOptions,
}


class TrainerOptions(Section):
    epochs: PositiveInt
    steps: PositiveInt | Literal["auto"] | None
    batch_size: PositiveInt | Literal["auto"]
    schedule: Literal["constant", "cosine", "plateau"]
    warmup: NonNegativeFloat
    ema: Share | None
    jitter: bool
    split_components: bool
    compiled: bool
    steps_per_execution: PositiveInt | None
    deterministic: bool
    precision: Literal["float32", "mixed_bfloat16"]
    verbose: Literal[0, 1, 2] | None


class TopOptions(Section):
    loss: Any
    ensemble: PositiveInt = 1
    recipe: Literal["auto"] | None
    folds: Annotated[int, Field(ge=2)] | None
    recalibrate: bool | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    output_dir: str | None
    overwrite: bool
    init_from: str | None
    trainer: TrainerOptions
    k: PositiveInt | Literal["auto"] | None = None
    rank: PositiveInt | None = None
    target_transform: Any = None
    fixed: list[str] = []
