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
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC, errno.EDQUOT, errno.EBUSY, errno.ETXTBSY, errno.EXDEV, errno.EMFILE,
}  # fmt: skip


def run_command(command: Callable[[], int], after_interrupt: str = "") -> int:
    """Run a command; an error of ours is printed as its message, anything else keeps its traceback.

    Args:
        after_interrupt: what to say to who has ended it by Ctrl-C.
    """
    output.prepare()
    bypass_proxies()
    if logging.lastResort:
        logging.lastResort.setFormatter(PrintableFormatter())  # of warnings, where no other handler is set up
    try:
        try:
            return _named(command, after_interrupt)
        finally:  # where argparse leaves too: at its own end Python could only complain
            sys.stdout.flush()
    except OutputError as error:
        return _report(error)


def _named(command: Callable[[], int], after_interrupt: str) -> int:
    try:
        return command()
    except MMRefError as error:
        return _report(error)
    except OSError as error:
        if error.errno not in OF_FILES or error.filename is None:
            raise
        fix = " Raise the limit: `ulimit -n 4096`." if error.errno == errno.EMFILE else ""
        return _report(FileError(f"{os.fsdecode(error.filename)}: {error.strerror}.{fix}"))
    except KeyboardInterrupt:
        print("mmref: interrupted" + (f"; {after_interrupt}." if after_interrupt else "."), file=sys.stderr)
        return 130


def _report(error: MMRefError) -> int:
    """Say what an error is; its exit status."""
    if not isinstance(error, ReaderLeftError):  # who left wants to hear no more
        print(printable(f"mmref: {type(error).__name__}: {error}", lines=True), file=sys.stderr)
    return error.exit_status
