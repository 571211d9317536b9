"""Results on disk: directories that are checked beforehand, and files that are complete or absent."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from wmkp.experiments.config import InputError


def make_directory(path: Path) -> None:
    """Makes the directory if needed, and tries to write in it. Raises InputError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError:
        raise InputError(f"cannot write to {path}: it is not a directory") from None
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}") from None


def check_file(path: Path) -> None:
    """Raises InputError if a file cannot be written there. Call it before the work. Makes the file's directory."""
    try:
        if path.exists() and not path.is_file():  # a device would be replaced
            raise InputError(f"cannot write to {path}: it is not a file")
        make_directory(_target(path).parent)
        _partial(path).touch()
        _partial(path).unlink()
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}") from None


@contextlib.contextmanager
def claim(path: Path) -> Iterator[None]:
    """Makes the directory and locks it. Raises InputError if that fails, or another run holds the lock.

    If the command then fails, a directory that was made for it is removed.
    """
    if "\\" in str(path.absolute()):  # TensorStore reads it as a slash, and would write checkpoints elsewhere
        raise InputError(f"cannot write to {path}: its path has a backslash; use another --out")
    made = not path.exists()
    make_directory(path)
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context((path / ".lock").open("w"))
        except OSError as error:
            raise InputError(f"cannot write to {path / '.lock'}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another run is at work in {path}; wait for it, or use another --out") from None
        for left in path.glob(".*.partial"):  # left by a run that was killed while writing
            left.unlink()
        try:
            yield
        except (InputError, OSError):
            if made and [file.name for file in path.iterdir()] == [".lock"]:
                with contextlib.suppress(OSError):
                    (path / ".lock").unlink()
                    path.rmdir()
            raise


def write_atomically(files: dict[Path, bytes]) -> None:
    """Writes files. They appear under their names (or their links' targets) only when all are complete."""
    partial = {path: _partial(path) for path in files}
    try:
        for path, content in files.items():
            partial[path].write_bytes(content)
        for path, temporary in partial.items():
            temporary.replace(_target(path))
    except OSError as error:
        names = {str(temporary): path for path, temporary in partial.items()}
        where = error.filename2 or error.filename
        raise InputError(f"cannot write to {names.get(str(where), where)}: {error.strerror}") from None
    finally:
        for temporary in partial.values():
            with contextlib.suppress(OSError):  # it is not there, nor perhaps its directory
                temporary.unlink()


def _target(path: Path) -> Path:
    """The path of a file, with links resolved."""
    return Path(os.path.realpath(path))  # unlike Path.resolve, it accepts a circle of links


def _partial(path: Path) -> Path:
    """The path to which a file is written until it is complete."""
    target = _target(path)
    return target.with_name(f".{target.name}.{os.getpid()}.partial")
