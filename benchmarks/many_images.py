"""Many images by processes that are killed: every seed exactly once, bit-equal to an undisturbed run.

    python benchmarks/many_images.py --seeds 50000

The script draws the digits of the seeds 0 to N - 1 twice, by two processes each. The first run is undisturbed. In the second
run a process is killed (SIGKILL) at random moments, three times, and started again. The script then compares the two folders
and prints the rate.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import iia_ode as iia
from iia_ode.errors import IIAError
from iia_ode.many import read_samples

SHAPE = (1, 8, 8)


def digits() -> tuple[iia.ProbabilityFlowODE, tuple[int, ...]]:
    """The packaged denoiser of digits, as ``--model`` takes it."""
    model = iia.denoisers.digits()
    labels = {"class_labels": torch.zeros(1, dtype=torch.long)}
    return iia.ProbabilityFlowODE(model, iia.EDM(), "data", conditioning=labels), SHAPE


def draw(out: Path, seeds: int, batch: int, nfe: int) -> None:
    """Draw the digits of the seeds 0 to `seeds` - 1; seed k has class k mod 10."""
    torch.set_num_threads(1)
    ode, shape = digits()
    grid = iia.grids.karras(nfe)
    conditions = lambda seed: {"class_labels": seed % 10}  # noqa: E731
    iia.sample_many(ode, "dpmpp_2m", range(seeds), shape, out, conditions, grid=grid, batch=batch)


def _ranked(rank: int, size: int, out: Path, seeds: int, batch: int, nfe: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    draw(out, seeds, batch, nfe)


def run(out: Path, seeds: int, batch: int, nfe: int, kills: int, processes: int, seed: int) -> int:
    """Draw by several processes, of which one at a time is killed and started again; return the number of kills."""
    context, chance, killed = multiprocessing.get_context("fork"), random.Random(seed), 0
    batches = -(-seeds // batch)

    def started(rank: int) -> BaseProcess:
        process = context.Process(target=_ranked, args=(rank, processes, out, seeds, batch, nfe))
        process.start()
        return process

    workers = [started(rank) for rank in range(processes)]
    moments = sorted(chance.sample(range(1, max(batches - processes, kills + 1)), kills))
    while any(worker.is_alive() for worker in workers):
        if moments and _written(out) >= moments[0]:
            moments.pop(0)
            time.sleep(chance.random() * 0.05)
            rank = chance.randrange(processes)
            if (victim := workers[rank]).is_alive() and victim.pid is not None:
                os.kill(victim.pid, signal.SIGKILL)
                victim.join()
                killed += victim.exitcode == -signal.SIGKILL
            workers[rank] = started(rank)
        time.sleep(0.01)
    for worker in workers:
        worker.join()
        if worker.exitcode != 0:
            raise RuntimeError(f"a process ended with exit status {worker.exitcode}.")
    return killed


def _written(out: Path) -> int:
    return len(list(out.glob("samples-*.safetensors"))) if out.exists() else 0


def difference(out: Path, other: Path, seeds: int) -> str:
    """The first fault of two folders that should hold the same samples; empty if there is none."""
    counts: Counter[int] = Counter()
    for (ours, x), (theirs, y) in zip(read_samples(out), read_samples(other), strict=True):
        counts.update(ours)
        if ours != theirs or not torch.equal(x, y):
            return f"the samples of the seeds {ours[0]} to {ours[-1]} differ"
    if counts != Counter(range(seeds)):
        return "not every seed occurs exactly once"
    left = sorted(p.name for p in out.iterdir() if p.name.endswith(".tmp"))
    return f"files are left over: {left}" if left else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    options = parser.parse_args()
    torch.set_num_threads(1)
    digits()  # the processes are forks of this one, and share what the first model imports
    sizes = (options.seeds, options.batch, options.nfe)
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "undisturbed"), Path(folder, "killed")
        begun = time.perf_counter()
        run(whole, *sizes, 0, options.processes, options.seed)
        seconds = time.perf_counter() - begun
        killed = run(broken, *sizes, options.kills, options.processes, options.seed)
        fault = difference(broken, whole, options.seeds)
    result = {"seeds": options.seeds, "nfe": options.nfe, "processes": options.processes, "kills": killed}
    print(json.dumps(result | {"samples_per_second": round(options.seeds / seconds, 1), "fault": fault or None}))
    if fault or killed != options.kills:
        raise IIAError(fault or f"{killed} of {options.kills} kills met a running process: try another --seed.")


if __name__ == "__main__":
    main()
