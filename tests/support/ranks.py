"""Pools of processes joined in a gloo group, and the fixture ``ranks`` by which tests use them.

Importing torch takes longer than most tests, so one pool of each size serves all of them.
"""

import importlib
import io
import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta

import pytest
import torch

COLLECTIVE_SECONDS = 30
"""How long a rank waits for the others: a missed collective fails instead of hanging."""

ANSWER_SECONDS = 120


def forkserver():
    """Return the context that forks processes from one that has imported torch once."""
    context = multiprocessing.get_context("forkserver")
    parts = ("fsdp", "tensor.parallel", "checkpoint.state_dict")
    modules = [f"torch.distributed.{part}" for part in parts]
    context.set_forkserver_preload([*modules, "mechanic_fused", "pytest"])
    return context


def hide_gpus():
    """Hide all GPUs: where torch sees one, each gloo mesh gets its own process group."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


class Pool:
    """``size`` ranks that wait for work; they start at the first call, and anew after a failure."""

    def __init__(self, size):
        self.size, self.pipes, self.processes = size, [], []

    def start(self):
        context = forkserver()
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.size, f"{self.folder.name}/store", theirs)
            self.processes.append(context.Process(target=serve, args=arguments, daemon=True))
            self.processes[-1].start()
            self.pipes.append(ours)
            theirs.close()

    def run(self, function, *args, **options):
        """Call a function on every rank and return the results in the order of the ranks.

        Args:
            function: of a module's top level; or its name, "module.function".

        Raises:
            AssertionError: with the tracebacks of all ranks that failed.
        """
        if not self.processes:
            self.start()
        if callable(function):
            function = f"{function.__module__}.{function.__qualname__}"
        try:
            for pipe in self.pipes:
                pipe.send_bytes(packed((function, args, options)))
            answers = []
            for rank, pipe in enumerate(self.pipes):
                assert pipe.poll(ANSWER_SECONDS), f"rank {rank} does not answer"
                answers.append(unpacked(pipe.recv_bytes()))
            failures = [f"rank {i}:\n{text}" for i, (fine, text) in enumerate(answers) if not fine]
            assert not failures, "\n".join(failures)
        except BaseException:
            # The ranks may wait in different collectives now.
            self.close()
            raise
        return [result for _, result in answers]

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()
        if self.processes:
            self.folder.cleanup()
        self.pipes, self.processes = [], []


def serve(rank, size, store, pipe):
    """Join the other ranks, then work until the pipe is closed: the life of a rank's process."""
    hide_gpus()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    while True:
        try:
            function, args, options = unpacked(pipe.recv_bytes())
        except EOFError:
            return
        try:
            module, name = function.rsplit(".", 1)
            result = True, getattr(importlib.import_module(module), name)(*args, **options)
        except Exception:
            result = False, traceback.format_exc()
        pipe.send_bytes(packed(result))


def packed(value):
    """Return bytes, since tensors sent as such would share memory that ends with the process."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpacked(data):
    return torch.load(io.BytesIO(data), weights_only=False)


@pytest.fixture(scope="session")
def ranks():
    """ranks(n).run(function, …) calls a function on n processes in one gloo group."""
    pools = {}
    yield lambda size: pools.setdefault(size, Pool(size))
    for pool in pools.values():
        pool.close()
