"""Checkpoints of a run by Orbax: written in the background, complete or absent, and read back bit-for-bit."""

import contextlib
import hashlib
import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

import wmkp
from wmkp import checks
from wmkp.experiments.config import InputError, first_line
from wmkp.experiments.runs import outputs

SHOWN = 8  # differences from the expected checkpoint that an error lists
# Orbax numbers background saves by one counter in the process, so two saves at a time would break each other.
_TURN = threading.Lock()


@epath.register_path_cls
class _Literal(type(epath.Path("/"))):  # type: ignore[misc]
    """A path whose own characters are no pattern: etils takes all of ``r[1]/*`` for one, and Orbax then merges nothing."""

    def glob(self, pattern: str) -> Iterator["_Literal"]:
        for found in Path(self).glob(pattern):
            yield type(self)(found)


@contextlib.contextmanager
def opened(directory: Path, keep: int) -> Iterator[ocp.CheckpointManager]:
    """``open_manager`` as a context. An error inside is not replaced by one of closing."""
    manager = open_manager(directory, keep)
    try:
        yield manager
        finish(manager)
    finally:
        with contextlib.suppress(Exception):
            manager.close()


def open_manager(directory: Path, keep: int, read_only: bool = False) -> ocp.CheckpointManager:
    """Orbax's manager of a directory's checkpoints. It makes the directory, and removes leftovers of a killed save.

    Raises:
      InputError: the directory cannot be made, or not be written to.
    """
    if not read_only:
        outputs.make_directory(directory)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs much, and raises its errors anyway
    options = ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else keep,
        create=not read_only,
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
    )
    handlers = {"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(_Literal(directory.absolute()), options=options, item_handlers=handlers)


def save(manager: ocp.CheckpointManager, state: wmkp.TrainState, progress: dict[str, Any]) -> None:
    """Starts to save a state and the run's progress under its step. Waits for the save before it.

    Raises:
      InputError: this or the save before it failed; older checkpoints are kept.
    """
    step = int(state.step)
    if step in manager.all_steps():
        return
    progress = progress | {"sha256": _digest(state, progress)}
    try:
        manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        )
    except Exception as error:  # Orbax passes on any error of the disk or the storage layer
        raise _failed(manager, error) from error


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits until all saves are on disk. Raises InputError as ``save``."""
    try:
        manager.wait_until_finished()
    except Exception as error:
        raise _failed(manager, error) from error


def verify(manager: ocp.CheckpointManager, like: Any) -> None:
    """Reads the latest checkpoint back into host memory, after waiting for its save.

    Args:
      like: as ``restore``.

    Raises:
      InputError: as ``save``; or the checkpoint on disk differs from what was saved.
    """
    finish(manager)
    step = choose(manager)

    def on_host(x: Any) -> Any:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        return np.broadcast_to(np.zeros((), x.dtype), x.shape)  # a view, which takes no memory

    with _readable(f"{manager.directory}/{step}", manager, step):
        _read(manager, step, jax.tree.map(on_host, like))


def save_in_turn(manager: ocp.CheckpointManager, state: wmkp.TrainState, progress: dict[str, Any]) -> None:
    """Saves, and reads back. For a process whose threads have a manager each. Raises as ``verify``."""
    with _TURN:
        save(manager, state, progress)
        verify(manager, state)


def _failed(manager: ocp.CheckpointManager, error: Exception) -> InputError:
    kept = manager.latest_step()
    older = f"the checkpoint of step {kept} is kept" if kept is not None else "there is no older one"
    return InputError(f"a checkpoint could not be saved in {manager.directory} ({first_line(error)}); {older}")


def choose(manager: ocp.CheckpointManager, step: int | None = None) -> int:
    """The step of the latest checkpoint, or ``step``. Raises InputError if it does not exist."""
    there = sorted(manager.all_steps())
    if not there:
        raise InputError(f"{manager.directory} has no checkpoint")
    step = there[-1] if step is None else step
    if step not in there:
        raise InputError(f"{manager.directory} has no checkpoint of step {step}, only of {', '.join(map(str, there))}")
    return step


def restore(manager: ocp.CheckpointManager, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """The latest checkpoint, or that of ``step``.

    Args:
      like: a state with the structure, shapes, dtypes and shardings to read into.

    Returns:
      The state, and the run's progress.

    Raises:
      InputError: there is none; it is of another model or rule (the message lists the differences); it cannot be read;
        or a bit differs from what was saved, which the storage layer may not notice.
    """
    step = choose(manager, step)
    name = f"{manager.directory}/{step}"
    with _readable(name, manager, step):
        found = manager.item_metadata(step)["state"]
        theirs = {checks.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found.tree)}
    ours = {checks.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(like)}
    differences = [f"{path} is not in it" for path in ours if path not in theirs]
    differences += [f"{path} is in it and not expected" for path in theirs if path not in ours]
    for path in ours.keys() & theirs.keys():
        mine, saved = jax.eval_shape(_data, ours[path]), theirs[path]
        if mine.shape != tuple(saved.shape) or mine.dtype != saved.dtype:
            differences.append(f"{path} is {_describe(saved)}, where {_describe(mine)} is expected")
    if differences:
        more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        differences.sort(key=lambda line: (not line.startswith("params/"), line))
        raise InputError(f"{name} is of another model or rule: {'; '.join(differences[:SHOWN])}{more}")
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    with _readable(name, manager, step):
        return _read(manager, step, target)


def _read(manager: ocp.CheckpointManager, step: int, target: Any) -> tuple[Any, dict[str, Any]]:
    """A checkpoint's state, in arrays as ``target`` has them, and progress. Raises ValueError if they are not what was saved."""
    restored = manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore())
    )
    state, progress = restored["state"], dict(restored["progress"])
    if progress.pop("sha256") != _digest(state, progress):
        raise ValueError("its SHA-256 is not that of what was saved")
    return state, progress


@contextlib.contextmanager
def _readable(name: str, manager: ocp.CheckpointManager, step: int) -> Iterator[None]:
    """Turns any error in reading a checkpoint into an InputError that names the older checkpoints."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                yield
            except Exception:
                # TensorStore's other reads end too, and print that their event loop is closed.
                time.sleep(0.2)
                raise
    except Exception as error:  # TensorStore, Orbax, JSON or this module may notice the damage
        older = [s for s in manager.all_steps() if s < step]
        way_out = f"; delete it, and step {max(older)} is the latest" if older else ""
        raise InputError(f"cannot read the checkpoint {name} ({checks.first_line(error)}){way_out}") from error


def _digest(state: Any, progress: dict[str, Any]) -> str:
    """SHA-256 of a checkpoint's content, independent of devices and files."""
    digest = hashlib.sha256(json.dumps(progress, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        x = _data(leaf)
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            x = multihost_utils.process_allgather(x, tiled=True)
        digest.update(f"{checks.path_name(path)} {_describe(x)}".encode())
        digest.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _data(x: Any) -> Any:
    """The numbers of a random key."""
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _describe(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)}"
