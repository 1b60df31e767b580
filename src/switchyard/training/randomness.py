"""Draws the random numbers of training steps: each device draws those of its own sequences.

Legend: A micro-batches, J noise slices, B sequences of a micro-batch, N rows of the sequences that are drawn, D width.
"""

import numpy as np

NOISE_RULE = "float32 U(0,1) of numpy SFC64, one stream for each (train.seed, step, micro-batch, sequence)"
NOISE_STREAM = 0x4E4F4953  # keeps these keys apart from those of initial weights


def random_state(seed: int, step: int) -> np.ndarray:
    """Returns the number that all randomness of a step follows from, see `draw_noise`: [] uint64."""
    return np.array(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])


def draw_noise(
    seed: int, step: int, micro_batches: int, slices: int, sequences: range, length: int, width: int
) -> np.ndarray:
    """Draws the noise of some sequences of one step: [A, J, N, D] float32 of U(0, 1), zeros [A, 1, 1, 1] where J is 0.

    A pure function of its arguments (NOISE_RULE). The numbers of a sequence do not depend on which other sequences
    are drawn, so every layout of the devices trains with the same noise, and a resumed run repeats it.

    Args:
        seed: train.seed.
        step: from 0.
        micro_batches: A.
        slices: J.
        sequences: numbers of the sequences (images: of the samples) within the whole micro-batch, in steps of 1.
        length: rows of a sequence; N = len(sequences) * length.
        width: D.
    """
    if not slices:
        return np.zeros((micro_batches, 1, 1, 1), np.float32)
    noise = np.empty((micro_batches, slices, len(sequences), length, width), np.float32)
    stream = np.random.SFC64(0)
    draw = np.random.Generator(stream).random
    for micro in range(micro_batches):
        for index, state in enumerate(stream_states(seed, step, micro, sequences)):
            stream.state = {"bit_generator": "SFC64", "state": {"state": state}, "has_uint32": 0, "uinteger": 0}
            for part in noise[micro, :, index]:  # [S, D], contiguous
                draw(dtype=np.float32, out=part)
    return noise.reshape(micro_batches, slices, -1, width)


def stream_states(seed: int, step: int, micro: int, sequences: range) -> np.ndarray:
    """Returns the states of SFC64 in which the streams of sequences begin: [len(sequences), 4] uint64.

    A state is three random words and a counter. Philox makes four words of each number of a sequence, whichever are
    asked for. NumPy's own seeding of SFC64 gives streams as independent, and takes seven times as long.
    """
    key = np.random.SeedSequence((NOISE_STREAM, seed)).generate_state(2, np.uint64)
    counter = np.array([sequences.start, micro, step, 0], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(4 * len(sequences)).reshape(-1, 4)
    words[:, 3] = 1  # the counter, as NumPy's seeding sets it
    return words
