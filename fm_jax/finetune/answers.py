"""What examples ask of a model: labels to choose from, pairs to tell apart."""

import dataclasses

from fm_jax.finetune import heads
from fm_jax.models import zoo
from fm_jax.models.config import ModelConfig
from fm_jax.models.zoo import Model


@dataclasses.dataclass(frozen=True)
class Answers:
    """The labels of a classification, and the pairs of preferences.

    labels: () where nothing is classified. label_ids: of a word for each of them, where
    the vocabulary's own head tells which it is. num_segments: the most of any row, of
    which a pair has two.
    """

    labels: tuple[str, ...] = ()
    label_ids: tuple[int, ...] = ()
    num_segments: int = 2

    def to_json(self) -> dict:
        """Return what config.json keeps of it."""
        return {"labels": list(self.labels), "label_ids": list(self.label_ids)}

    @classmethod
    def from_record(cls, record: dict) -> "Answers":
        """Return what config.json of a run says; older ones say nothing."""
        data = record["data"]
        found = {name: tuple(data.get(name, ())) for name in ("labels", "label_ids")}
        return cls(**found)


def model(config: ModelConfig, answers: Answers) -> Model:
    """Return the model of a config, with the head that gives such answers."""
    plain = zoo.build(config)
    if answers.label_ids:
        return heads.with_label_words(plain, answers.label_ids)
    if answers.labels:
        return heads.with_classifier(plain, len(answers.labels))
    return plain
