"""Pool: processes that stay, joined in a gloo group, and run functions of the modules beside this.

Importing torch takes longer than most of the tests, so one pool of each size serves them all.
"""

import importlib
import io
import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta

import torch

COLLECTIVE_SECONDS = 30
"""How long a rank waits for the others: a missed collective fails instead of hanging."""

ANSWER_SECONDS = 120


class Pool:
    """``size`` ranks that wait for work.

    Args:
        size: how many.
    """

    def __init__(self, size):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor"])
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, f"{self.folder.name}/store", theirs)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, *args, **options):
        """Call "module.function" on every rank; return the results in the order of the ranks.

        Raises:
            AssertionError: with the tracebacks of all ranks that failed.
        """
        for pipe in self.pipes:
            pipe.send_bytes(packed((function, args, options)))
        results, failures = [], []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(ANSWER_SECONDS), f"rank {rank} does not answer"
            fine, result = unpacked(pipe.recv_bytes())
            results.append(result)
            if not fine:
                failures.append(f"rank {rank}:\n{result}")
        assert not failures, "\n".join(failures)
        return results

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def serve(rank, size, store, pipe):
    """What a rank's process does: joins the others, then works until its pipe is closed."""
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
    """Bytes, since tensors sent as such would share memory that ends with the process."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpacked(data):
    return torch.load(io.BytesIO(data), weights_only=False)
