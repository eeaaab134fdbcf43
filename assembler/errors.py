"""What can go wrong in running a container, beyond the errors of clipfs. Knows the exit codes, not the causes."""

from __future__ import annotations

import clipfs


class RunError(clipfs.ClipfsError):
    """The container did not start. The exit codes are those that `podman run` and `docker run` have made known."""

    FAILED = 125
    NOT_EXECUTABLE = 126
    NOT_FOUND = 127

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code
