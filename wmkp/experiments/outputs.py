"""Results on disk: a directory that is known to be writable beforehand, and files that are whole or not there."""

import os
import tempfile
from pathlib import Path

from wmkp.experiments.config import InputError


def make_directory(path: Path) -> None:
    """Makes the directory if need be, and tries to write in it. Raises InputError if that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError:
        raise InputError(f"cannot write to {path}: it is not a directory") from None
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}") from None


def write_atomically(files: dict[Path, bytes]) -> None:
    """Writes files, each of which appears under its name only when all are complete."""
    partial = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in files}
    try:
        for path, content in files.items():
            partial[path].write_bytes(content)
        for path, temporary in partial.items():
            temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write to {error.filename}: {error.strerror}") from None
    finally:
        for temporary in partial.values():
            temporary.unlink(missing_ok=True)
