"""TensorBoard: event files, written without torch and without TensorFlow.

Written against tensorboard 2.21. A run's folder is written whole every time, so no point is there twice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from storylab.tracking.points import Point, RunEnd, quoted
from storylab.tracking.protocol import DEFAULT_PROJECT, TrackedRun

# Where transformers looks too. Without it, events are next to the run folder, in `tensorboard`.
FOLDER_VARIABLE = "TENSORBOARD_LOGGING_DIR"
# Seconds after which events are on disk at the latest.
FLUSH_SECONDS = 10
_EVENT_FILES = "events.out.tfevents.*"


class TensorBoardTracker:
    """Writes scalars, texts and hyperparameters to ``FOLDER/PROJECT/GROUP/NAME-ID``."""

    def __init__(self, run: TrackedRun) -> None:
        self._started = run.started
        root, folder = log_folders(run)
        self.place = f"tensorboard --logdir {root}"
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(_EVENT_FILES):
            old.unlink()
        self._writer = EventFileWriter(str(folder), flush_secs=FLUSH_SECONDS)
        # A TensorBoard that runs meanwhile forgets the points of the file before.
        self._write(0, 0.0, session_log=SessionLog(status=SessionLog.START))
        self._write(0, 0.0, summary=_session_start(run))
        lines = "\n".join(f"{name}: {value}" for name, value in run.config.items())
        self._write(0, 0.0, summary=_text("config", quoted(lines)))

    def log(self, points: Sequence[Point]) -> None:
        """See :class:`storylab.tracking.protocol.Tracker`."""
        for point in points:
            self._write(point.step, point.seconds, summary=_scalars(point.values))

    def finish(self, end: RunEnd | None) -> None:
        """See :class:`storylab.tracking.protocol.Tracker`."""
        if end is not None:
            seconds = end.values["final/training_seconds"]
            self._write(end.step, seconds, summary=_scalars(end.values))
            for number, sample in enumerate(end.samples, start=1):
                story = f"{sample.prompt!r}\n\n{quoted(sample.text)}"
                self._write(end.step, seconds, summary=_text(f"samples/{number}", story))
            notes = "\n\n".join(f"{name}: {text}" for name, text in end.notes.items())
            self._write(end.step, seconds, summary=_text("final/notes", quoted(notes)))
            name = "STATUS_SUCCESS" if end.status == "finished" else "STATUS_FAILURE"
            closing = SessionEndInfo(
                status=Status.Value(name), end_time_secs=self._started + seconds
            )
            plugin_data = HParamsPluginData(session_end_info=closing)
            content = _hparams(hparams.SESSION_END_INFO_TAG, plugin_data)
            self._write(end.step, seconds, summary=content)
        self._writer.close()

    def _write(self, step: int, seconds: float, **content: object) -> None:
        self._writer.add_event(Event(wall_time=self._started + seconds, step=step, **content))


def log_folders(run: TrackedRun) -> tuple[Path, Path]:
    """The folder of all runs' events, and that of one run's."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    root = (Path(chosen) if chosen else Path(run.folder).parent / "tensorboard").absolute()
    names = (run.place.project or DEFAULT_PROJECT, run.place.group, run.label)
    return root, root.joinpath(*(_safe(name) for name in names if name))


def _safe(name: str) -> str:
    """A name as the name of one folder."""
    return re.sub(r"[^\w.,=+@ -]|^\.+", "_", name)


def _scalars(values: object) -> Summary:
    assert isinstance(values, dict)
    return Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])


def _session_start(run: TrackedRun) -> Summary:
    """The config for the HParams page, which averages over the seeds of a group."""
    start = SessionStartInfo(group_name=run.place.group, start_time_secs=run.started)
    for name, value in run.config.items():
        match value:
            case bool():  # before int, which bool is a kind of
                start.hparams[name].bool_value = value
            case int() | float():
                start.hparams[name].number_value = value
            case str():
                start.hparams[name].string_value = value
    return _hparams(hparams.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start))


def _hparams(tag: str, content: HParamsPluginData) -> Summary:
    metadata = hparams.create_summary_metadata(content)
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=hparams.NULL_TENSOR)])


def _text(name: str, text: str) -> Summary:
    tensor = TensorProto(
        dtype=DT_STRING,
        string_val=[text.encode()],
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
    )
    metadata = create_summary_metadata(display_name=name, description="")
    return Summary(value=[Summary.Value(tag=name, metadata=metadata, tensor=tensor)])
