"""Exceptions for a user's mistakes, and how a command reports them."""

import io
import os
import sys
from collections.abc import Callable

from pocketlm.startup import open_closed_streams


class UserError(Exception):
    """A mistake of the user. Its text says what is wrong, where, and how to fix it.

    `run_main` prints it and exits with status 2.
    """


class FieldError(ValueError):
    """A field of a dataclass has an invalid value.

    The text is `<field> <message>`. A caller that has another name for the field, such as a command
    line or an HTTP API, combines its own name with `message`.
    """

    def __init__(self, field: str, message: str):
        super().__init__(f"{field} {message}")
        self.field, self.message = field, message


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with its status.

    A UserError, or an error of the operating system such as a full disk, a read-only disk or a file
    where a folder is needed, is printed as one line on stderr; the status is then 2.
    """
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(encoding="utf-8", errors="replace")  # whatever the locale is
    try:
        status = main()
        sys.stdout.flush()  # a full disk is an error now, and not a status of the interpreter
        sys.exit(status)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except BrokenPipeError:  # the program that reads our output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or error
        print(f"error: {file}{reason}; fix this, or choose another location", file=sys.stderr)
    except MemoryError as error:
        detail = f" ({error})" if str(error) else ""
        print(f"error: the memory has run out{detail}; use smaller sizes", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(2)
