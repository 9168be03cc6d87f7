"""The command line called in this process: a process of its own spends four seconds on imports before it works.

What a command leaves in the process is put back, so that the next one finds it as a new process would.
"""

import gc
import io
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import IO, Any

import numpy as np
import torch

from m3vit import plugins
from m3vit.cli import main
from m3vit.data.opening import LAYOUTS
from m3vit.kinds import KINDS
from m3vit.label_sets import DECLARED, LABEL_SETS
from m3vit.losses import LOSSES
from m3vit.models.decoders import DECODERS
from m3vit.tasks import TASKS

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGPIPE, signal.SIGHUP)


def call(words: tuple[object, ...], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run `m3vit WORDS` here and return what a process would: exit code, output, errors.

    `env` are variables set or, if empty, taken away for the call.
    """
    argv = [str(word) for word in words]
    gc.collect()
    gc.freeze()  # what is there now, modules above all, would take the collection below half a second to look through
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        with kept_state(), redirected(1, "stdout", output), redirected(2, "stderr", errors):
            os.environ.update(env or {})
            code = _code(argv)
        gc.collect()  # loaders with worker processes, sessions
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(argv, code, *texts)


def _code(argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except Exception:
        traceback.print_exc()
        return 1


@contextmanager
def redirected(number: int, name: str, file: IO[bytes]) -> Iterator[None]:
    """Send a stream of this process and of its children to a file: the descriptor, and Python's `sys.stdout`."""
    before, kept = getattr(sys, name), os.dup(number)
    before.flush()
    os.dup2(file.fileno(), number)
    stream = io.TextIOWrapper(os.fdopen(os.dup(number), "wb", 0), encoding="utf-8", write_through=True)
    setattr(sys, name, stream)
    try:
        yield
    finally:
        setattr(sys, name, before)
        stream.close()
        os.dup2(kept, number)
        os.close(kept)


@contextmanager
def kept_state() -> Iterator[None]:
    """Put back, at the end, what a command may change for the whole process."""
    environment, folder, stdin, argv = dict(os.environ), os.getcwd(), sys.stdin, sys.argv
    handlers = {kind: signal.getsignal(kind) for kind in SIGNALS}
    formatting = warnings.formatwarning
    levels = {name: logging.getLogger(name).level for name in ("", *logging.root.manager.loggerDict)}
    drawn = random.getstate(), np.random.get_state(), torch.get_rng_state()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    tables: tuple[dict[str, Any], ...] = (
        TASKS,
        KINDS,
        DECODERS,
        LABEL_SETS,
        LAYOUTS,
        LOSSES,
        plugins._loaded,
        plugins._missing,
    )
    rows, modules, path, declared = [dict(table) for table in tables], set(sys.modules), list(sys.path), len(DECLARED)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.resetwarnings()
        warnings.simplefilter("default", UserWarning)
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        sys.stdin = stack.enter_context(open(os.devnull))
        sys.argv = ["m3vit"]
        try:
            yield
        finally:
            sys.stdin, sys.argv = stdin, argv
            os.chdir(folder)
            for name in set(plugins.STATE[0]) - modules:
                sys.modules.pop(name, None)  # entry points of one thing have a name of their own
            for table, before in zip(tables, rows, strict=True):
                table.clear()
                table.update(before)
            sys.path[:] = path
            del DECLARED[declared:]
            for name in set(os.environ) - set(environment):
                del os.environ[name]
            os.environ.update(environment)
            for kind, handler in handlers.items():
                signal.signal(kind, handler)
            warnings.formatwarning = formatting
            for name, level in levels.items():
                if (logger := logging.getLogger(name)).level != level:  # setting it visits all loggers
                    logger.setLevel(level)
            _restore(drawn)
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            torch.use_deterministic_algorithms(deterministic)
            torch.set_float32_matmul_precision(precision)
            torch.set_grad_enabled(True)


def _restore(drawn: tuple[Any, Any, torch.Tensor]) -> None:
    random.setstate(drawn[0])
    np.random.set_state(drawn[1])
    torch.set_rng_state(drawn[2])
