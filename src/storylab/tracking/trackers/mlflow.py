"""MLflow: a server, or a database or folder of this machine.

Written against mlflow-skinny 3.17. MLflow keeps every point that it gets, so the steps that it has are left
out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run
from mlflow.exceptions import MlflowException

from storylab.tracking.points import Point, RunEnd
from storylab.tracking.protocol import DEFAULT_PROJECT, TrackedRun

ID_TAG = "storylab.run"
# Limits of MLflow: numbers and parameters in a call, characters of a value.
MOST_METRICS, MOST_PARAMS, LONGEST_VALUE = 1000, 100, 6000


class MlflowTracker:
    """Sends to ``MLFLOW_TRACKING_URI``, by default ``mlflow.db`` in the current folder. The project is an
    experiment of MLflow, the group a tag."""

    def __init__(self, run: TrackedRun) -> None:
        self._client, self._started = MlflowClient(), run.started
        project = run.place.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_PROJECT
        experiment = self._experiment(project)
        found = self._client.search_runs([experiment], f"tags.`{ID_TAG}` = '{run.id}'")
        if found:
            self._run = self._client.get_run(found[0].info.run_id)
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._run = self._create(experiment, run)
        self._known = {key: self._steps(key) for key in self._run.data.metrics}
        self._log_params(run.config)
        self.place = f"MLflow run {self._id} of {project} at {self._client.tracking_uri}"

    def log(self, points: Sequence[Point]) -> None:
        """See :class:`storylab.tracking.protocol.Tracker`."""
        metrics = [metric for point in points for metric in self._new_metrics(point)]
        for start in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + MOST_METRICS])

    def finish(self, end: RunEnd | None) -> None:
        """See :class:`storylab.tracking.protocol.Tracker`."""
        if end is None:
            self._client.set_terminated(self._id, "KILLED")
            return
        seconds = end.values["final/training_seconds"]
        self.log([Point(end.step, seconds, end.values)])
        for name, text in end.notes.items():
            self._client.set_tag(self._id, name, text[:LONGEST_VALUE])
        for number, sample in enumerate(end.samples, start=1):
            self._client.log_text(self._id, sample.text, f"samples/{number}.txt")
        status = "FINISHED" if end.status == "finished" else "FAILED"
        self._client.set_terminated(self._id, status, self._time(seconds))

    @property
    def _id(self) -> str:
        return str(self._run.info.run_id)

    def _experiment(self, name: str) -> str:
        """The id of an experiment, which several runs may create at the same time."""
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _create(self, experiment: str, run: TrackedRun) -> Run:
        tags = {ID_TAG: run.id} | ({"group": run.place.group} if run.place.group else {})
        created = self._client.create_run(
            experiment, start_time=self._time(0.0), tags=tags, run_name=run.place.name
        )
        return created

    def _steps(self, key: str) -> set[int]:
        return {metric.step for metric in self._client.get_metric_history(self._id, key)}

    def _new_metrics(self, point: Point) -> Iterator[Metric]:
        for name, value in point.values.items():
            key = _allowed(name)
            steps = self._known.setdefault(key, set())
            if point.step not in steps:
                steps.add(point.step)
                yield Metric(key, value, self._time(point.seconds), point.step)

    def _log_params(self, config: Mapping[str, object]) -> None:
        """Log the parameters that are not there: MLflow lets none be changed."""
        params = [
            Param(name, str(value)[:LONGEST_VALUE])
            for name, value in config.items()
            if name not in self._run.data.params
        ]
        for start in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + MOST_PARAMS])

    def _time(self, seconds: float) -> int:
        """Milliseconds since 1970 of a point."""
        return round((self._started + seconds) * 1000)


def _allowed(name: str) -> str:
    """A name of characters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)
