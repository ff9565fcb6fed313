"""One command of the terminal: its errors become messages, its exit status is told."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable

from mmref.errors import FileError, MMRefError, OutputError, ReaderLeftError
from mmref.storage.locations import bypass_proxies
from mmref.terminal import output
from mmref.terminal.output import PrintableFormatter, printable

OF_FILES = {  # what is wrong with a file that the error names, rather than with us
    errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC, errno.EDQUOT, errno.EBUSY, errno.ETXTBSY, errno.EXDEV,
}  # fmt: skip


def run_command(command: Callable[[], int]) -> int:
    """Run a command; an error of ours is printed as its message, anything else keeps its traceback."""
    output.prepare()
    bypass_proxies()
    if logging.lastResort:
        logging.lastResort.setFormatter(PrintableFormatter())  # of warnings, where no other handler is set up
    try:
        try:
            return _named(command)
        finally:  # where argparse leaves too: at its own end Python could only complain
            sys.stdout.flush()
    except OutputError as error:
        return _report(error)


def _named(command: Callable[[], int]) -> int:
    try:
        return command()
    except MMRefError as error:
        return _report(error)
    except OSError as error:
        if error.errno not in OF_FILES or error.filename is None:
            raise
        return _report(FileError(f"{os.fsdecode(error.filename)}: {error.strerror}."))
    except KeyboardInterrupt:
        print("mmref: interrupted; the same command resumes from the last checkpoint.", file=sys.stderr)
        return 130


def _report(error: MMRefError) -> int:
    """Say what an error is; its exit status."""
    if not isinstance(error, ReaderLeftError):  # who left wants to hear no more
        print(printable(f"mmref: {type(error).__name__}: {error}", lines=True), file=sys.stderr)
    return error.exit_status
