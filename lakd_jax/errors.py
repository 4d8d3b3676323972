"""Errors meant for the person at the terminal, each with its exit code."""


class LakdError(Exception):
    """A fault the user can mend; printed without a traceback."""

    exit_code = 2


class ConfigError(LakdError):
    """One or more configuration fields are wrong; lists them all."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class DataError(LakdError):
    """The images cannot be used: missing, empty, undecodable, too few."""


class TeacherError(LakdError):
    """The teacher's weights are missing, of another network, or no use."""


class ExportError(LakdError):
    """A run cannot be given out or explained: not finished, or a package is missing."""


class WorkdirError(LakdError):
    """The run directory cannot be written or belongs to another config."""


class HostsError(LakdError):
    """Several processes that should train together do not agree, or one was lost."""


class NoCheckpointError(LakdError):
    """Checkpoints exist but none of them can be restored."""

    exit_code = 3


class NonFiniteError(LakdError):
    """A loss or gradient became NaN or infinite."""

    exit_code = 4


class CheckpointWriteError(LakdError):
    """A checkpoint could not be written."""

    exit_code = 5
