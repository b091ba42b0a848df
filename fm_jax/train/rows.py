"""The run's own rows of the run table, appended as it goes: what a law is fitted to."""

import time

import jax

from fm_jax.finetune import weights
from fm_jax.machine import git_state
from fm_jax.models import counts
from fm_jax.prepare.opened import Data
from fm_jax.runs import Run
from fm_jax.tables import schema
from fm_jax.train import beginning, feeds
from fm_jax.train.compose import Parts


class Table:
    """Appends a row at each evaluation, at the end, and where the run diverged.

    Rows are never taken back: a run that goes on from a checkpoint writes the steps
    after it again, and a reader takes the last row of a step.
    """

    def __init__(self, run: Run, parts: Parts, data: Data, record: dict):
        self.run, self.parts, self.data = run, parts, data
        self.resolved, self.digest = record["resolved"], record["fingerprint"]
        self.git = git_state()
        self.last: dict[str, float] = {}
        self.step = 0
        self.began = time.monotonic()
        # Laws are of models that are trained as a whole, on text.
        frozen = weights.has_frozen(parts.tuning)
        self.is_kept = data.kind == "text" and not frozen and parts.num_steps > 0
        run.mend(schema.FILE)

    def note(self, step: int, numbers: dict[str, float]) -> None:
        """Keep the numbers of a step for the row that may come after it."""
        self.step, self.last = step, numbers

    def add(self, step: int, held_out: dict[str, float]) -> None:
        """Append the row of `step` with its held-out metrics."""
        is_final = step == self.parts.num_steps
        self._append(step, "final" if is_final else "running", held_out)

    def diverged(self, step: int) -> None:
        """Append the row that says that the run ended at `step` without a number."""
        self._append(step, "diverged", {})

    def _noted(self, step: int) -> dict[str, float]:
        """Return the numbers of a step, those that an earlier start wrote too."""
        if step == self.step:
            return self.last
        found = {}
        for row in self.run.rows():
            if row["step"] == step:
                found |= row
        return found

    def _seen(self, num_steps: int) -> float:
        size = self.parts.config.train.batch_size
        return feeds.tokens(self.data, num_steps, size)

    def _append(self, step: int, status: str, held_out: dict[str, float]) -> None:
        if not self.is_kept:
            return
        parts, config = self.parts, self.parts.config
        params = counts.params(config.model)
        tokens = beginning.tokens_at(step, self._seen, self.resolved["init"])
        corpus = self.data.train.num_targets
        init, noted = self.resolved["init"] or {}, self._noted(step)
        warmup = max(1, round(config.schedule.warmup_fraction * parts.num_steps))
        row = schema.row(
            run_id=self.resolved["run_id"],
            parent_id=init.get("run_id"),
            branch_step=init.get("step"),
            status=status,
            step=step,
            steps=parts.num_steps,
            seed=config.train.seed,
            config_hash=self.digest,
            commit=self.git.get("commit"),
            params_total=params.total,
            params_non_embedding=params.non_embedding,
            params_embedding=params.embedding,
            params_head=params.head,
            params_matmul=params.matmul,
            tokens=round(tokens),
            unique_tokens=round(
                self.data.unique_tokens(tokens, step, config.train.batch_size)
            ),
            epochs=tokens / corpus,
            max_length=config.data.max_length,
            batch_tokens=round(parts.tokens_per_step),
            flops_exact=tokens * parts.flops_per_token,
            flops_6n_total=6.0 * params.total * tokens,
            flops_6n_non_embedding=6.0 * params.non_embedding * tokens,
            flops_6n_matmul=6.0 * params.matmul * tokens,
            learning_rate=config.optimizer.learning_rate,
            learning_rate_now=noted.get("optimizer/learning_rate"),
            schedule=config.schedule.name,
            schedule_fraction=step / parts.num_steps,
            is_final=step == parts.num_steps,
            warmup_tokens=round(self._seen(warmup)),
            beta2=config.optimizer.beta2,
            weight_decay=config.optimizer.weight_decay,
            train_loss=noted.get("train/loss"),
            loss=held_out.get("loss"),
            loss_se=held_out.get("loss_se"),
            bits_per_byte=held_out.get("bits_per_byte"),
            bayes_loss=held_out.get("bayes_loss"),
            tokenizer=self.data.tokenizer.fingerprint,
            dataset=self.data.train.name,
            wall_seconds=time.monotonic() - self.began,
            device=jax.devices()[0].device_kind,
            num_devices=jax.device_count(),
            embed_dim=config.model.embed_dim,
            num_layers=config.model.num_layers,
        )
        self.run.append(row, schema.FILE)
