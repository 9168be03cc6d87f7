"""Event files for TensorBoard.

Written in place: TensorBoard's own writer works in a thread, where a full disk ends in a stack trace unnoticed.
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from m3vit.files import writing


class Board:
    """One event file in `folder`; what earlier files there hold of steps from `first_step` on is not shown."""

    def __init__(self, folder: Path, first_step: int) -> None:
        # The readers sort the files of a folder by name: by time, and within a second by process and number.
        self.path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        folder.mkdir(parents=True, exist_ok=True)
        with writing(self.path):
            self.file = open(self.path, "wb")
        self.records = RecordWriter(self.file)
        self._append(Event(file_version="brain.Event:2"))
        self._append(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Append the values of a step; raises WriteError if the disk is full."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._append(Event(step=step, summary=Summary(value=scalars)))

    def _append(self, event: Event) -> None:
        event.wall_time = time.time()
        with writing(self.path, "its earlier values are kept"):
            self.records.write(event.SerializeToString())
            self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()
