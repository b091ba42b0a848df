"""The sections of a config as frozen dataclasses: names and types, no defaults.

configs/base.py has the defaults and says what each key means. Imports no jax.
"""

import dataclasses

from fm_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    source: str
    paths: tuple[str, ...]
    eval_paths: tuple[str, ...]
    eval_fraction: float
    name: str
    tfds_dir: str
    split: str
    eval_split: str
    text_field: str
    on_bad_text: str
    max_document_bytes: int
    deduplicate: bool
    weights: tuple[float, ...]
    weights_at: tuple[tuple[int, tuple[float, ...]], ...]
    tokenizer: str
    vocab_size: int
    end_token: str
    max_length: int
    packing: str
    mask_documents: bool
    examples: str
    fields: tuple[tuple[str, str], ...]
    chat_template: str
    on_long: str
    prompt: str
    label_words: tuple[tuple[str, str], ...]
    num_workers: int
    cache_dir: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    kind: str
    num_symbols: int
    num_states: int
    num_components: int
    concentration: float
    zipf: float
    mean_length: float
    num_tokens: int
    num_eval_tokens: int
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    from_: str  # the key is `from`, which Python keeps for itself
    model: bool
    optimizer: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    method: str
    rules: tuple[tuple[str, float], ...]
    last_layers: int
    layer_decay: float
    unfreeze_every: int
    preference: str
    beta: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int
    alpha: float
    scaling: str
    dropout: float
    targets: str
    base: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: str
    learning_rate: float
    weight_decay: float
    decay_rules: tuple[tuple[str, bool], ...]
    beta1: float
    beta2: float
    epsilon: float
    mu_dtype: str
    nu_dtype: str
    clip_norm: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    name: str
    warmup_fraction: float
    decay_fraction: float
    final_fraction: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int
    tokens: float
    epochs: float
    tokens_per_param: float
    batch_size: int
    accumulation: int
    seed: int
    z_loss: float
    loss_chunk: int
    ema_decay: float
    balance_loss: float
    router_z_loss: float
    balance_rate: float
    max_skips: int
    compile_cache: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    preset: str
    data: int
    fsdp: int
    tensor: int
    context: int
    expert: int
    dcn_data: int
    dcn_fsdp: int
    rules: tuple[tuple[str, tuple[str, ...]], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: int
    batch_size: int
    max_batches: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int
    keep: int
    keep_best: int
    keep_every: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    every: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    prompt: str
    num_samples: int
    num_tokens: int
    temperature: float
    top_k: int
    top_p: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. `raw` is the nested dict of every key, as given."""

    model: ModelConfig
    data: DataConfig
    synthetic: SyntheticConfig
    init: InitConfig
    finetune: FinetuneConfig
    lora: LoraConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    mesh: MeshConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    sample: SampleConfig
    raw: dict
