"""The kernels' threads: with any number of them, the results are the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_serve.serve.engine.kernels.native import load_kernels

_WORKER = """
import os, sys, threading, time
import torch
from torch import nn
from qlora_serve.serve.engine.kernels.native import load_kernels
from qlora_serve.serve.engine.linear import PanelLinear

# torch itself takes no more than there are cores
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
kernels = load_kernels()
kernels.team_size()  # the team is made here, of as many as OpenMP would have
torch.manual_seed(0)
layers = [PanelLinear(nn.Linear(96, outside), kernels) for outside in (33, 320, 64)]
inputs = [torch.randn(1, rows, 96) for rows in (1, 9, 40)]


def products():
    return [layer(x) for layer in layers for x in inputs]


def alone():
    kernels.compute_alone()
    expected.extend(products())


def same(found):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    return thread


expected = []
with torch.inference_mode():
    in_thread(alone).join()
    wrong = []

    def many(count, pause):
        with torch.inference_mode():
            for _ in range(count):
                if not same(products()):
                    wrong.append(pause)
                time.sleep(pause)  # longer than helpers look for work: they sleep and are called

    for thread in [in_thread(lambda: many(400, 0.0)) for _ in range(3)]:
        thread.join()
    many(400, 0.0)
    many(40, 0.002)
    child = os.fork()  # which has none of the helpers
    if child == 0:
        os._exit(0 if same(products()) else 1)
    _, status = os.waitpid(child, 0)
    print(kernels.team_size(), len(expected), len(wrong), os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_jobs_give_the_same_with_any_threads(threads) -> None:
    """More threads than cores as well: some come late, and others do their pieces."""
    if load_kernels() is None:
        pytest.skip("no compiler")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _WORKER],
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(threads), "9", "0", "0"]
