"""Errors a user can cause. The command line prints them as one message and exits with 2.

Invariant: everything a person can get wrong (YAML, data, checkpoint, store, cluster) is raised as a
UserError that says what was found, where, and what to do next; anything else is a bug of ours and
keeps its traceback.
"""


class UserError(Exception):
    """A mistake in what the user gave us.

    message: what was found. where: "file:line", a stage, a field or a sample. remedy: the next step.
    """

    def __init__(self, message: str, *, where: str = "", remedy: str = ""):
        super().__init__(message, where, remedy)
        self.message, self.where, self.remedy = message, where, remedy

    def __reduce__(self):  # crosses process borders as its three texts, whatever a subclass's own arguments are
        return _rebuild, (type(self), self.message, self.where, self.remedy)

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text} → {self.remedy}" if self.remedy else text


class DataError(UserError):
    """A source, annotation or sample that cannot be used."""


class CheckpointError(UserError):
    """A stored checkpoint or model folder that is incomplete, damaged or of another shape."""


def _rebuild(cls: type[UserError], message: str, where: str, remedy: str) -> UserError:
    error = cls.__new__(cls)
    UserError.__init__(error, message, where=where, remedy=remedy)
    return error
