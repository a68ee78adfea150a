"""All loggers of a run as one."""

from __future__ import annotations

from collections.abc import Mapping

from mvpretrain.loggers import CountsSteps, Logger, RunInfo, ShowsText
from mvpretrain.loggers._settings import LogConfig


class MetricsLogger:
    """Every record to each logger that the settings name; on ranks other than 0 (`active` False) it does nothing.

    ValueError: a logger that refuses; those that have started are closed again.
    """

    def __init__(self, config: LogConfig, info: RunInfo, active: bool):
        self.loggers: list[Logger] = []
        if not active:
            return
        info.folder.mkdir(parents=True, exist_ok=True)
        try:
            for settings in config.loggers():
                logger = settings.build()
                logger.start(info)
                self.loggers.append(logger)
        except BaseException:
            self.close()
            raise

    def step(self, number: int) -> None:
        """A step is over, logged or not."""
        for logger in self.loggers:
            if isinstance(logger, CountsSteps):
                logger.step(number)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One record of scalars."""
        for logger in self.loggers:
            logger.write(step, values)

    def say(self, text: str) -> None:
        """A sentence to those that show text."""
        for logger in self.loggers:
            if isinstance(logger, ShowsText):
                logger.say(text)

    def close(self) -> None:
        """Close each logger, the last one first, even where another one fails to."""
        errors: list[Exception] = []
        while self.loggers:
            try:
                self.loggers.pop().close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
