"""Checkpoints of a run, kept by Orbax: written in the background, whole or not there, read back bit by bit."""

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

SHOWN = 8  # of the differences between a checkpoint and what was expected
# Orbax tells saves in the background apart by a number that the process has one of: two at a time spoil each other.
_TURN = threading.Lock()


@epath.register_path_cls
class _Literal(type(epath.Path("/"))):  # type: ignore[misc]
    """A path whose own characters are no pattern: etils takes all of ``r[1]/*`` for one, and Orbax then merges nothing."""

    def glob(self, pattern: str) -> Iterator["_Literal"]:
        for found in Path(self).glob(pattern):
            yield type(self)(found)


@contextlib.contextmanager
def opened(directory: Path, keep: int) -> Iterator[ocp.CheckpointManager]:
    """``open_manager``'s, closed at the end: an error on its way is not replaced by one of closing."""
    manager = open_manager(directory, keep)
    try:
        yield manager
        finish(manager)
    finally:
        with contextlib.suppress(Exception):
            manager.close()


def open_manager(directory: Path, keep: int, read_only: bool = False) -> ocp.CheckpointManager:
    """Orbax's manager of the checkpoints in a directory, which it makes; leftovers of a killed save are cleared away.

    Raises:
      InputError: the directory cannot be made, or not be written to.
    """
    if not read_only:
        outputs.make_directory(directory)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax says much, and errors are raised besides
    options = ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else keep,
        create=not read_only,
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
    )
    handlers = {"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(_Literal(directory.absolute()), options=options, item_handlers=handlers)


def save(manager: ocp.CheckpointManager, state: wmkp.TrainState, progress: dict[str, Any]) -> None:
    """Starts to save a state and what a run knows besides, under its step; waits for the save before it.

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
    except Exception as error:  # Orbax passes on whatever the disk or the storage layer says
        raise _failed(manager, error) from error


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits until what is being saved is on disk. Raises InputError as ``save``."""
    try:
        manager.wait_until_finished()
    except Exception as error:
        raise _failed(manager, error) from error


def verify(manager: ocp.CheckpointManager, like: Any) -> None:
    """Reads the latest checkpoint back, into memory of the host alone. Waits for it first.

    Args:
      like: as ``restore``.

    Raises:
      InputError: as ``save``; or what is on disk is not what was saved.
    """
    finish(manager)
    step = choose(manager)

    def on_host(x: Any) -> Any:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        return np.broadcast_to(np.zeros((), x.dtype), x.shape)  # no memory yet

    with _readable(f"{manager.directory}/{step}", manager, step):
        _read(manager, step, jax.tree.map(on_host, like))


def save_in_turn(manager: ocp.CheckpointManager, state: wmkp.TrainState, progress: dict[str, Any]) -> None:
    """Saves, and waits until it can be read back: for a process whose threads have a manager each. Raises as ``verify``."""
    with _TURN:
        save(manager, state, progress)
        verify(manager, state)


def _failed(manager: ocp.CheckpointManager, error: Exception) -> InputError:
    kept = manager.latest_step()
    older = f"the checkpoint of step {kept} is kept" if kept is not None else "there is no older one"
    return InputError(f"a checkpoint could not be saved in {manager.directory} ({first_line(error)}); {older}")


def choose(manager: ocp.CheckpointManager, step: int | None = None) -> int:
    """The step of the latest checkpoint, or ``step``. Raises InputError if there is none of it."""
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
      The state, and what the run knew besides.

    Raises:
      InputError: there is none; it is of another model or rule (what differs, by path); it cannot be read; or a bit of
        it is not what was saved, which the storage layer's own checks may miss.
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
    """Any error in reading a checkpoint as an InputError that says what is left."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                yield
            except Exception:
                # TensorStore's other reads end too, and print that the loop they were read in is closed.
                time.sleep(0.2)
                raise
    except Exception as error:  # damage shows in any layer: TensorStore, Orbax, JSON, or here
        older = [s for s in manager.all_steps() if s < step]
        way_out = f"; delete it, and step {max(older)} is the latest" if older else ""
        raise InputError(f"cannot read the checkpoint {name} ({checks.first_line(error)}){way_out}") from error


def _digest(state: Any, progress: dict[str, Any]) -> str:
    """SHA-256 of a checkpoint's content, however its arrays are laid out over devices and files."""
    digest = hashlib.sha256(json.dumps(progress, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        x = _data(leaf)
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            x = multihost_utils.process_allgather(x, tiled=True)
        digest.update(f"{checks.path_name(path)} {_describe(x)}".encode())
        digest.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _data(x: Any) -> Any:
    """A random key as the numbers it is saved as."""
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _describe(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)}"
