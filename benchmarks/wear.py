"""Tests endurance: a run with thirty random SIGKILLs is bit-for-bit identical, and nothing leaks.

    python -m benchmarks.wear

One run of ``wmkp train`` is not disturbed. Its memory, open files and threads are counted after every evaluation.
Another run with the same settings is killed and resumed. Some kills come while a process starts or restores, others at
a given step. Saves and evaluations are so frequent that many kills interrupt one. The exit code is 1 if the runs
differ, if files or processes remain, or if memory grows. The test covers a weight mirror, whose mirror steps use random
keys, and Kolen-Pollack, whose B has an optimizer state.
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import save
from wmkp.experiments.runs import build, checkpoints, logs, settings

STEPS, KILLS, AT_START = 2000, 30, 8
SEED = 0
COMMON = (
    f"--hidden 16 16 --batch-size 32 --accumulate 2 --augment --clip-norm 1 --label-smoothing 0.1 --steps {STEPS} "
    "--log-every 10 --save-every 0.5"
)
OPTIONS = {
    "wm": f"mlp-digits-wm {COMMON} --mirror-every 3 --mirror-steps 20 --mirror-angle 20".split(),
    "kp": f"mlp-digits-kp {COMMON}".split(),
}
GROWTH = 0.02  # the limit on memory growth, from the second quarter of the steps to the last


def start(rule: str, out: pathlib.Path, *options: str) -> subprocess.Popen[bytes]:
    """Starts ``wmkp train`` and its children in their own process session. All runs share one compilation cache."""
    command = [
        sys.executable,
        "-c",
        "from wmkp.experiments.commands.cli import main; main()",
        "train",
        *OPTIONS[rule],
        *options,
    ]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(out.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **cache}
    return subprocess.Popen(
        [*command, "--out", str(out)], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )


def last_step(out: pathlib.Path, name: str = "train") -> int:
    """The last step in a run's log; 0 before there is one."""
    path = out / f"{name}.csv"
    lines = path.read_text().split("\n")[1:-1] if path.exists() else []
    return int(lines[-1].split(",")[0]) if lines else 0


def session(leader: int) -> list[int]:
    """The running processes of a process session."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:  # the process has just ended
            continue
        if int(its_session) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def sample(process: int) -> dict[str, float]:
    """The memory (MB), open files and threads of a process."""
    where = pathlib.Path(f"/proc/{process}")
    status = dict(line.split(":", 1) for line in (where / "status").read_text().splitlines())
    return {
        "memory_MB": int(status["VmRSS"].split()[0]) / 1e3,
        "files": len(list((where / "fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def undisturbed(rule: str, out: pathlib.Path) -> list[dict[str, float]]:
    """Runs to the end, and returns a sample for each evaluation but the last.

    A sample holds the memory after the evaluation, and the smallest numbers of files and threads until the next one.
    The smallest numbers are used because a save starts there, and briefly holds some files and threads.
    """
    process = start(rule, out)
    samples: list[dict[str, float]] = []
    while process.poll() is None:
        step = last_step(out, "test")
        if 0 < step < STEPS:
            held = sample(process.pid)
            if not samples or step > samples[-1]["step"]:
                samples.append({"step": step, **held})
            else:
                samples[-1] |= {name: min(held[name], samples[-1][name]) for name in ("files", "threads")}
        time.sleep(0.005)
    if process.returncode:
        sys.exit(f"the undisturbed run ended with exit code {process.returncode}")
    return samples


def killed(rule: str, out: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Kills and resumes a run until it ends, and yields one dict per kill."""
    rng = random.Random(SEED)
    early = set(rng.sample(range(1, KILLS), AT_START))  # the first process shows how long a start takes
    share = 0.98 * STEPS / (KILLS - AT_START)
    targets = iter([share * (i + rng.random()) for i in range(KILLS - AT_START)])  # one in each share of the run
    startup = 0.0
    for number in range(KILLS):
        before, begin = last_step(out), time.perf_counter()
        process = start(rule, out, "--resume")
        if number in early:
            stop = begin + rng.uniform(0, startup)
            while time.perf_counter() < stop and last_step(out) <= before:  # this start may be faster
                time.sleep(0.002)
        else:
            target = max(next(targets), before)
            while process.poll() is None and last_step(out) <= before:
                time.sleep(0.002)
            startup = time.perf_counter() - begin  # until the first row, soon after the first step
            while process.poll() is None and last_step(out) <= target:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
        ended = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.1)
        yield {
            "at": "start" if number in early else "step",
            "step": last_step(out),
            "ended_before": ended,
            "left_running": len(session(process.pid)),
        }
    process = start(rule, out, "--resume")
    if process.wait():
        sys.exit(f"the resumed run ended with exit code {process.returncode}")


def arrays(out: pathlib.Path) -> list[np.ndarray]:
    """All arrays of the training state in the last checkpoint."""
    config = settings.read(out)
    manager = checkpoints.open_manager(out / "checkpoints", config.keep, read_only=True)
    state, progress = checkpoints.restore(manager, build.like(config, build.build(config)))
    manager.close()
    assert progress["step"] == STEPS
    return [np.asarray(x) for x in jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))]


def rows(out: pathlib.Path, name: str) -> list[dict[str, float]]:
    """The rows of a log, without the column of times."""
    return [
        {k: v for k, v in row.items() if k != "examples_per_second" and v == v}
        for row in logs.read(out / f"{name}.csv")
    ]


def files(out: pathlib.Path) -> list[str]:
    """The files of a run, without TensorBoard's (each process starts one) and without those inside stored arrays."""
    paths = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    return sorted(str(path) for path in paths if not {"tensorboard", "state"} & set(path.parts))


def worn(rule: str) -> dict[str, Any]:
    """Tests one rule. Prints and returns the results."""
    print(rule)
    with tempfile.TemporaryDirectory() as scratch:
        one, other = pathlib.Path(scratch) / "undisturbed", pathlib.Path(scratch) / "killed"
        samples = undisturbed(rule, one)
        kills = []
        for kill in killed(rule, other):
            kills.append(kill)
            print(f"kill {len(kills)}, {kill['at']}: step {kill['step']}", flush=True)
        mine, theirs = arrays(one), arrays(other)
        same = [a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(mine, theirs, strict=True)]
        logs_same = all(rows(one, name) == rows(other, name) for name in ("train", "test"))
        left = {"undisturbed": files(one), "killed": files(other)}

    def quarter(name: str, number: int) -> list[float]:
        return [s[name] for s in samples if STEPS * (number - 1) / 4 <= s["step"] < STEPS * number / 4]

    growth = float(np.mean(quarter("memory_MB", 4)) / np.mean(quarter("memory_MB", 2)) - 1)
    held = {name: [min(quarter(name, n)) for n in (2, 4)] for name in ("files", "threads")}
    conditions = {
        f"{len(same)} arrays equal to the bit": all(same),
        "logs equal": logs_same,
        f"killed {KILLS} times before its end": not any(kill["ended_before"] for kill in kills),
        "killed in each tenth of the run": {10 * kill["step"] // STEPS for kill in kills} >= set(range(10)),
        "no process left": not any(kill["left_running"] for kill in kills),
        "no file left besides those of an undisturbed run": left["undisturbed"] == left["killed"],
        f"memory grows by at most {GROWTH:.0%} from the second quarter to the last": growth <= GROWTH,
        "no more open files": held["files"][1] <= held["files"][0],
        "no more threads": held["threads"][1] <= held["threads"][0],
    }
    print(f"memory {growth:+.2%}; open files and threads at least {held}")
    for condition, holds in conditions.items():
        print(f"{'yes' if holds else 'NO '}  {condition}")
    return {
        "conditions": conditions,
        "memory_growth": growth,
        "files_left": left["killed"],
        "kills": kills,
        "samples": samples,
    }


def main() -> None:
    """Tests all rules and saves the results."""
    result = {rule: worn(rule) for rule in OPTIONS}
    print(f"Written: {save('wear', result)}")
    sys.exit(not all(holds for found in result.values() for holds in found["conditions"].values()))


if __name__ == "__main__":
    main()
