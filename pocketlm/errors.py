"""The one exception for a user's mistake, and how a command line reports it."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A sentence for a person: what is wrong, where, and how to mend it. Ends the program with status 2."""


class FieldError(ValueError):
    """A field of a dataclass has a value that it cannot have.

    The text is `field message`. A caller that has another name for the field, such as a command line or an API, puts the two
    together itself.
    """

    def __init__(self, field: str, message: str):
        super().__init__(f"{field} {message}")
        self.field, self.message = field, message


def run_main(main: Callable[[], int | None]) -> None:
    """Exit with main's status. A UserError, and whatever the system refuses (a full or read-only disk, a folder that is
    a file), becomes one line on stderr and status 2.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # whatever the locale says
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(
            f"error: {place}{error.strerror or error}; mend that, or choose another place",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(2)
