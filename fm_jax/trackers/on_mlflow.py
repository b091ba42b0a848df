"""MLflow, in the process of its own that a tracker has."""

import os
from pathlib import Path
from typing import Any

from fm_jax.trackers import rows as metrics

TAG = "fm_jax.id"
ENDS = {"finished": "FINISHED", "failed": "FAILED", "preempted": "KILLED"}
MOST_METRICS, MOST_PARAMS = 1000, 100  # of one request, as MLflow has it
MOST_LETTERS = 6000  # of a param


def open_run(told: dict[str, Any]) -> "Mlflow":
    """Return the MLflow run, gone on with where there is one; told: `named.told`."""
    return Mlflow(told)


class Mlflow:
    """Logs rows, and the config as params, of which MLflow keeps the first values.

    Without MLFLOW_TRACKING_URI they go to RUN/mlflow.db. MLflow takes no point back:
    steps that a run takes again are there twice.
    """

    def __init__(self, told: dict[str, Any]):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import entities
        from mlflow.tracking import MlflowClient

        self._entities = entities
        folder = Path(told["path"])
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        is_here = not uri
        self._client = MlflowClient(uri or f"sqlite:///{folder}/mlflow.db")
        experiment = self._experiment(folder if is_here else None)
        wanted = f"tags.`{TAG}` = '{told['id']}'"
        found = self._client.search_runs([experiment], wanted, max_results=1)
        if found:
            self._id, known = found[0].info.run_id, found[0].data.params
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {TAG: told["id"]}
            made = self._client.create_run(experiment, run_name=told["name"], tags=tags)
            self._id, known = made.info.run_id, {}
        params = [
            entities.Param(name, str(value)[:MOST_LETTERS])
            for name, value in told["config"].items()
            if name not in known
        ]
        for first in range(0, len(params), MOST_PARAMS):
            part = params[first : first + MOST_PARAMS]
            self._client.log_batch(self._id, params=part)

    def rows(self, rows: list[tuple[float, dict[str, Any]]]) -> None:
        """Log the scalars of each row at its step; pairs of a time and a row."""
        found = [
            self._entities.Metric(name, value, round(1000 * when), row["step"])
            for when, row in rows
            for name, value in metrics.scalars(row).items()
        ]
        for first in range(0, len(found), MOST_METRICS):
            part = found[first : first + MOST_METRICS]
            self._client.log_batch(self._id, metrics=part)

    def went_on_from(self, step: int) -> None:
        """Note from which step the run went on last."""
        self._client.set_tag(self._id, "fm_jax.went_on_from", step)

    def close(self, status: str) -> None:
        """Say how the run ended."""
        self._client.set_tag(self._id, "fm_jax.status", status)
        self._client.set_terminated(self._id, ENDS[status])

    def _experiment(self, folder: Path | None) -> str:
        """Return the id of the experiment; folder: where a local one has its files."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "fm_jax"
        if known := self._client.get_experiment_by_name(name):
            return known.experiment_id
        place = folder and (folder / "mlartifacts").as_uri()
        return self._client.create_experiment(name, artifact_location=place)
