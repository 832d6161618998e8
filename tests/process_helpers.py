"""What tests with processes of their own share: programs, signals, and jobs for several ranks."""

import json
import os
import socket
import subprocess
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import REPO_DIR


def run_program(name, *argv, before=(), timeout=100):
    """Run tests/programs/<name>.py to its end, after the words of another command."""
    return subprocess.run([*before, sys.executable, "-m", f"tests.programs.{name}", *map(str, argv)], cwd=REPO_DIR,
                          capture_output=True, text=True, timeout=timeout)


def send_signal_at(process, step, signum):
    """Wait for the line of a step, send the signal, wait for the end; returns (exit code, stderr)."""
    try:
        for line in process.stdout:
            if line.startswith(f"step {step:05d}/"):
                process.send_signal(signum)
                break
        process.stdout.read()
        stderr = process.stderr.read()
        return process.wait(timeout=60), stderr
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()


def choose_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def get_rank_env(rank, world_size, port):
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}


def run_jobs(rank, jobs, folder):
    """What each of four processes does: the jobs one after the other, each by the ranks that it is for."""
    torch.set_num_threads(1)
    for i, (world_size, port, work, args) in enumerate(jobs):
        if rank < world_size:
            os.environ.update(get_rank_env(rank, world_size, port))
            dist.init_process_group("gloo")
            result = work(*args)
            with open(f"{folder}/{i}_{rank}.json", "w") as file:
                json.dump(result, file)
            dist.destroy_process_group()


def run_on_ranks(jobs, folder):
    """Run (world size, function, arguments) jobs; returns for each the results of its ranks."""
    jobs = [(world_size, choose_port(), work, args) for world_size, work, args in jobs]
    mp.spawn(run_jobs, (jobs, str(folder)), nprocs=max(job[0] for job in jobs))
    return [[json.loads((folder / f"{i}_{rank}.json").read_text()) for rank in range(job[0])]
            for i, job in enumerate(jobs)]
