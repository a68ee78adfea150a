"""TensorBoard's event files in the run's folder `tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from mvpretrain.loggers import LoggerConfig, RunInfo


class TensorBoardConfig(LoggerConfig):
    """A scalar a value; TensorBoard hides those after the step from which a run goes on."""

    kind: Literal["tensorboard"] = "tensorboard"

    def build(self) -> TensorBoardLogger:
        return TensorBoardLogger()


class TensorBoardLogger:
    def start(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(info.folder / "tensorboard"), purge_step=info.start + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()
