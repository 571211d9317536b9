"""A run's config.json: writes it, reads it with types, and compares it with the settings of a resumed run."""

import contextlib
import dataclasses
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from wmkp.experiments.config import MACHINES, InputError, Train, first_line, flag
from wmkp.experiments.runs import outputs

# Settings that a resumed run may change. None of them changes what is learned.
FREE = frozenset("out resume data_dir max_bad on_nan log_every eval_every save_every keep tensorboard".split()) | {
    *MACHINES
}
LENGTH = frozenset(("epochs", "steps"))
WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "text", type(None): "null"}


def to_json(config: Train) -> dict[str, Any]:
    """A config as in config.json."""
    values = dataclasses.asdict(config)
    return {
        name: str(x) if isinstance(x, Path) else list(x) if isinstance(x, tuple) else x for name, x in values.items()
    }


def write(config: Train) -> None:
    """Writes config.json. Raises InputError if that fails."""
    text = json.dumps(to_json(config), indent=2) + "\n"
    outputs.write_atomically({config.out / "config.json": text.encode()})


def read(directory: Path) -> Train:
    """The config of a run. Raises InputError if it is missing or damaged."""
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{directory} is not a run: cannot read {path.name} in it ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {first_line(error)}") from None
    try:
        config = _from_json(values)
        config.check()
    except InputError as error:
        raise InputError(f"{path} is damaged: {error}") from None
    return config


def _from_json(values: Any) -> Train:
    """A config from config.json's values. Raises InputError, naming the setting, if one is missing, unknown or of another type."""
    if not isinstance(values, dict):
        raise InputError("it is not a JSON object of settings")
    kinds = get_type_hints(Train)
    if unknown := sorted(values.keys() - kinds.keys()):
        raise InputError(f"it has unknown settings: {', '.join(unknown)}")
    if missing := sorted(kinds.keys() - values.keys()):
        raise InputError(f"it lacks the settings {', '.join(missing)}")
    for name, kind in kinds.items():
        if not _fits(values[name], kind):
            raise InputError(f"{name} must be {_words(kind)}; got {json.dumps(values[name])[:80]}")
    made = {name: _converted(values[name], kind) for name, kind in kinds.items()}
    return Train(**made)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value fits a type. ``true`` is no integer, and an integer is a number."""
    if isinstance(kind, types.UnionType):
        return any(_fits(value, each) for each in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return type(value) is list and all(_fits(x, get_args(kind)[0]) for x in value)
    return type(value) in {Path: (str,), float: (int, float)}.get(kind, (kind,))


def _converted(value: Any, kind: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if isinstance(value, str) and Path in (kind, *get_args(kind)) else value


def _words(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_words(each) for each in get_args(kind))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return f"a list, each item {_words(get_args(kind)[0])}"
    return WORDS[kind]


@contextlib.contextmanager
def claim(config: Train) -> Iterator[None]:
    """Makes the run's directory, and locks it for this run.

    Raises:
      InputError: another run is at work there, a finished one is and --resume was not given, or it was started with
        other settings.
    """
    with outputs.claim(config.out):
        if (config.out / "config.json").exists():
            if not config.resume:
                raise InputError(f"{config.out} has a run in it; continue it with --resume, or use another --out")
            _check_resumable(config, to_json(read(config.out)), to_json(config))
        yield


def _check_resumable(config: Train, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises InputError if a setting changed that may not. A run may grow longer, unless its schedule spans it."""
    changed = {name for name in now if name not in FREE and before[name] != now[name]}
    longer = before["steps"] == now["steps"] or None not in (before["steps"], now["steps"])
    longer &= now["epochs"] >= before["epochs"] and (now["steps"] or 0) >= (before["steps"] or 0)
    if not changed or (changed <= LENGTH and longer and config.schedule != "cosine"):
        return
    said = "; ".join(f"{flag(name)} was {before[name]} and is {now[name]}" for name in now if name in changed)
    hint = "use another --out"
    if changed <= LENGTH:
        hint += " to train from the start. A run can be resumed with more --epochs or more --steps"
        hint += (
            ", but only with a constant or step --schedule: cosine ends with the run" if longer else ", not with fewer"
        )
    raise InputError(f"--resume: {config.out} was started with other settings: {said}; {hint}")
