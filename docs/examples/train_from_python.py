"""A training without the command line.    python docs/examples/train_from_python.py DATASET RUN

The same choices as `aftersam train --preset tiny`, changed in Python."""

import dataclasses
import sys
from pathlib import Path

from aftersam.config import preset
from aftersam.training.arguments import TrainArgs
from aftersam.training.run import TrainResult, train


def main(data: Path, run: Path, *, steps: int = 1500, image_size: int = 96) -> TrainResult:
    """Train on the data set in `data`, into the new folder `run`."""
    config = preset("tiny")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, image_size=image_size, num_slices=5),
        train=dataclasses.replace(config.train, max_steps=steps, learning_rate=5e-4),
    )
    return train(TrainArgs(data=data, output=run, config=config))


if __name__ == "__main__":
    print(main(*map(Path, sys.argv[1:3])))
