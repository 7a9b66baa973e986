"""User mistakes and verdicts -> one clear line on stderr and the documented exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

# They warn at import of GPU kernels that a CPU build lacks and of their own deprecations.
NOISY_LIBRARIES = ("torchao", "torch.utils._pytree")


class AlignKDError(Exception):
    """A failure that one line explains: what, where, allowed values, what to run next. Exit code 1."""

    exit_code = 1


class UsageError(AlignKDError):
    """Wrong flag, path, file shape or missing extra. Exit code 2."""

    exit_code = 2


class VerificationError(AlignKDError):
    """A bundle does not compute what its golden vectors say, or a file changed. Exit code 3."""

    exit_code = 3


class NotComparableError(AlignKDError):
    """Two bundles that cannot be set against each other. Exit code 5."""

    exit_code = 5


class BackendMissingError(AlignKDError):
    """This host has no runtime or device for the request. Exit code 6."""

    exit_code = 6


def missing_extra(package: str, extra: str) -> UsageError:
    """The one line for an import that needs an optional extra, e.g. ``missing_extra("onnx", "onnx")``."""
    return UsageError(f"the package '{package}' is not installed; run: pip install 'alignkd[{extra}]'")


def run_command(command: Callable[[], int | None]) -> None:
    """Run a command's body and leave the process with its exit code; an AlignKDError becomes one line on stderr.

    What libraries warn of at import, and no user can act on, is kept off stderr.
    """
    for library in NOISY_LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        code = command()
    except AlignKDError as error:
        line = " ".join(str(error).split())
        sys.stderr.write(f"error: {line}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("stopped by the user\n")
        sys.exit(130)
    sys.exit(code or 0)
