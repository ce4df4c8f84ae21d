"""How a command ends on bad input: one line on stderr and exit status 2, no traceback."""

import os
import sys
import threading
import traceback
from typing import NoReturn

DEBUG = "MMDIT_DEBUG"
"""Environment variable that turns tracebacks on; `mmdit --debug` sets it."""


def is_expected(error: BaseException) -> bool:
    """Whether an error is due to bad input, missing files or a lack of memory, and not to a bug in the program."""
    return isinstance(error, ValueError | OSError) or _out_of_memory(error) or _out_of_main_memory(error)


def line(error: BaseException) -> str:
    """The error in one line."""
    if isinstance(error, OSError) and error.strerror and (name := error.filename) is not None:
        text = f"{name.decode(errors='backslashreplace') if isinstance(name, bytes) else name}: {error.strerror}"
    elif _out_of_memory(error):
        text = "out of GPU memory: lower training.batch_size or raise training.grad_accumulation"
    elif _out_of_main_memory(error):
        text = f"out of memory: take fewer or smaller pictures at a time, or fewer steps ({error})"
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def complain(text: str, error: BaseException | None = None, alike: bool = False) -> None:
    """Print "mmdit: error: ..." to stderr; before it the traceback, if `DEBUG` is set.

    alike: all processes that torchrun started on this machine find the same error; then its first one says it.
    """
    if (alike or getattr(error, "alike", False)) and os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if error is not None and os.environ.get(DEBUG, "0") not in ("", "0"):
        traceback.print_exception(error)
    rank = os.environ.get("RANK", "0")  # processes other than the first say which they are
    who = "mmdit" if rank == "0" else f"mmdit (process {rank})"
    print(f"{who}: error: {text}\n", end="", file=sys.stderr, flush=True)  # in one piece: others may write there too


def of_thread(died: threading.ExceptHookArgs) -> None:
    """`threading.excepthook` of the command. It prints nothing for an OSError, such as of a full disk, since whoever
    waits for the thread raises it again; for any other error the traceback.
    """
    if not isinstance(died.exc_value, OSError) or os.environ.get(DEBUG, "0") not in ("", "0"):
        threading.__excepthook__(died)


def end_at_once(code: int | str) -> NoReturn:
    """End a process without Python's usual shutdown. torch's threads may still wait for other processes; a shutdown in
    which they run aborts the process, with another exit status.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"  # torch's, without importing torch


def _out_of_main_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
