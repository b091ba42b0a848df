"""What a step sums up, by what the examples of a config are."""

from collections.abc import Callable

from fm_jax import config as configs
from fm_jax.finetune import lora, preferences
from fm_jax.finetune.answers import Answers
from fm_jax.models import zoo
from fm_jax.prepare.opened import Data
from fm_jax.train import step as steps

EXPERT_LOSSES = ("balance_loss", "router_z_loss")


def objective(
    config: configs.Config,
    model: zoo.Model,
    answers: Answers,
    names: tuple[str, ...],
    *,
    is_training: bool = True,
    is_plain: bool = False,
) -> Callable:
    """Return what a step sums up, f(params, batch) -> (total, sums).

    names: of the components, where there are several. In evaluation it is the loss
    alone, without what is added to steady training. is_plain: params have no updates of
    low rank beside a base that could be a reference.
    """
    train, chunk = config.train, config.train.loss_chunk
    added = {name: getattr(train, name) for name in EXPERT_LOSSES}
    experts = added if is_training else None
    if config.data.examples == "preference":
        return preferences.sums_of(
            model,
            kind=config.finetune.preference,
            beta=config.finetune.beta,
            num_segments=answers.num_segments,
            loss_chunk=chunk,
            num_components=len(names),
            expert_losses=experts,
            without=None if is_plain or needs_reference(config) else lora.without,
        )
    return steps.loss_sums(
        model,
        z_loss=train.z_loss if is_training else 0.0,
        loss_chunk=chunk,
        num_components=len(names),
        expert_losses=experts,
        is_text=config.data.examples != "classify",
    )


def answers_of(data: Data) -> Answers:
    """Return what the examples of a run's data ask of its model."""
    return Answers(data.labels, data.label_ids, max(2, data.num_segments))


def needs_reference(config: configs.Config) -> bool:
    """Return whether batches bring what the reference says of their pairs.

    Under LoRA the frozen base says it in the step; ORPO has no reference.
    """
    return has_reference(config) and config.finetune.method != "lora"


def has_reference(config: configs.Config) -> bool:
    """Return whether the loss compares a model with its first weights."""
    is_free = config.finetune.preference in preferences.REFERENCE_FREE
    return config.data.examples == "preference" and not is_free


def least(config: configs.Config) -> Answers:
    """Return answers of as few labels as there can be, for plans without data."""
    if config.data.examples != "classify":
        return Answers()
    words = config.data.label_words
    if words:
        return Answers(tuple(w for w, _ in words), tuple(range(len(words))))
    return Answers(("", ""))


def has_dropout(config: configs.Config) -> bool:
    return config.finetune.method == "lora" and config.lora.dropout > 0
