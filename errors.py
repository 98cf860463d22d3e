"""The one exception for a user's mistake, and how a command line reports it."""

import errno
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A sentence for a person: what is wrong, where, and how to mend it. Ends the program with status 2."""


def run_main(main: Callable[[], int | None]) -> None:
    """Exit with main's status; a UserError, or a disk that refuses, becomes one line on stderr and status 2."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EFBIG):
            raise
        place = f" {error.filename}" if error.filename else ""
        print(f"error: cannot write{place}: {os.strerror(error.errno)}; free space or choose another folder", file=sys.stderr)
    sys.exit(2)
