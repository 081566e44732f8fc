"""Random numbers that are functions of integers: nothing to save, nothing that depends on the order of asking."""

import numpy as np
import torch
from torch import Generator, Tensor

WORD = 0xFFFFFFFFFFFFFFFF
GAMMA = 0x9E3779B97F4A7C15


def mix_words(*words: int) -> int:
    """Mix several integers into one of 64 bits, by splitmix64: neighbouring words share nothing."""
    state = 0
    for word in words:
        state = (state ^ (word & WORD)) + GAMMA & WORD
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & WORD
        state = (state ^ state >> 27) * 0x94D049BB133111EB & WORD
        state ^= state >> 31
    return state


def seeded_generator(*words: int) -> Generator:
    """A CPU generator whose seed is mixed from several integers."""
    return Generator().manual_seed(mix_words(*words))


def draw_seed(*words: int) -> int:
    """A seed of 62 bits that is a function of several integers."""
    return int(torch.randint(2**62, (), generator=seeded_generator(*words)))


def draw_uniform(augmentation: Tensor, index: Tensor, count: int) -> Tensor:
    """Uniform random numbers in [0, 1) for each image, a function of its augmentation seed and its index alone.

    Args:
        augmentation: Augmentation seeds, int64, [B].
        index: The images' index, int64, [B].
        count: Numbers for each image.

    Returns:
        float64, [B, count].
    """
    state = scramble(augmentation.numpy().astype(np.uint64) + np.uint64(GAMMA))
    state = scramble((state ^ index.numpy().astype(np.uint64)) + np.uint64(GAMMA))
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GAMMA)
    return torch.from_numpy((scramble(state[:, None] + steps) >> np.uint64(11)) * 2.0**-53)


def scramble(state: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, element by element."""
    state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return state ^ state >> np.uint64(31)


def draw_positions(count: int, batch_size: int, generator: Generator) -> Tensor:
    """Draw `batch_size` distinct positions out of `count`."""
    return torch.randperm(count, generator=generator)[:batch_size]
