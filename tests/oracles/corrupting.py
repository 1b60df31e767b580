"""Training of one process of several in which one bit of one parameter flips: CONFIG [RANK STEP PARAMETER]."""

import sys

import numpy as np

from switchyard import cli, config
from switchyard.training import loop


def main(arguments: list[str]) -> None:
    """Trains; after STEP steps the last bit of the first element of PARAMETER is another one on RANK."""
    path, *where = arguments
    advance = loop.Trainer._advance

    def spoilt(self):
        advance(self)
        if where and (self.processes.rank, self.done) == (int(where[0]), int(where[1])):
            from mindspore import Tensor

            parameter = next(p for p in self.model.get_parameters() if p.name == where[2])
            array = parameter.asnumpy().copy()
            array.reshape(-1)[:1].view(np.uint32)[0] ^= 1
            parameter.set_data(Tensor(array))

    loop.Trainer._advance = spoilt
    loop.train(config.load(path))


if __name__ == "__main__":
    sys.exit(cli.run(main))
