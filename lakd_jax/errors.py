"""Errors shown to the user without a traceback, each with its exit code."""


class LakdError(Exception):
    """An error that the user can fix; printed without a traceback."""

    exit_code = 2


class ConfigError(LakdError):
    """One or more configuration fields are invalid; lists all of them."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class DataError(LakdError):
    """The images cannot be used: missing, empty, undecodable, too few."""


class TeacherError(LakdError):
    """The teacher's weights are missing, incompatible, or below the accuracy floor."""


class ExportError(LakdError):
    """A run cannot be exported or explained: unfinished, or a package is missing."""


class WorkdirError(LakdError):
    """The run directory cannot be written or belongs to another config."""


class HostsError(LakdError):
    """The processes of a run differ or cannot connect, or one was lost."""


class NoCheckpointError(LakdError):
    """Checkpoints exist but none of them can be restored."""

    exit_code = 3


class NonFiniteError(LakdError):
    """A loss or gradient became NaN or infinite."""

    exit_code = 4


class CheckpointWriteError(LakdError):
    """A checkpoint could not be written."""

    exit_code = 5
