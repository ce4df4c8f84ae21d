"""Runs for tests/training/test_distributed.py, in one of several processes: `python two_processes.py JOBS`.

JOBS is JSON: a list of [port, resume, settings], done one after another; processes find each other at the port, as
torchrun would have them.
"""

import json
import os
import sys

import torch

import training
import training.muon
import training.trainer
from training.config import load_config


def main() -> None:
    torch.set_num_threads(1)
    training.trainer.evaluate_run = lambda path, progress: {}
    training.muon.multiplies_bf16 = lambda device: False  # rounding there would hide what is compared
    for port, resume, settings in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = str(port)
        if resume:
            training.resume(resume, settings)
        else:
            training.train(load_config("pixels-tiny", settings))


if __name__ == "__main__":
    main()
