"""The network that weighs single differences between two networks' features."""

import torch
from torch import Tensor, nn

from lkd.losses.learned.inputs import squash
from lkd.losses.learned.perceptron import build_linear, effective_weight


class EntryNetwork(nn.Module):
    """From a difference, the teacher's value there and where that is to a number in (−1, 1); 0 before meta-training.

    One hidden layer of tanh. What is shared by many entries enters the hidden layer as one addend, so that the inputs
    are never written out for every entry.

    Args:
        places: Number of inputs that say which two stages and which comparison.
        samples: Number of inputs that are seen of a sample.
        hidden: Width of the hidden layer.
        lipschitz: Bound of the network's Lipschitz constant; 0 sets none.
    """

    def __init__(self, places: int, samples: int, hidden: int, lipschitz: float) -> None:
        super().__init__()
        self.places = places
        self.hidden = build_linear(2 + places + samples, hidden, lipschitz ** (1 / 2))
        self.head = build_linear(hidden, 1, lipschitz ** (1 / 2))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, difference: Tensor, theirs: Tensor, places: Tensor, samples: Tensor) -> Tensor:
        """Weigh every entry.

        Args:
            difference: Student's less teacher's entries, [S, T, B, E].
            theirs: The teacher's entries, [T, B, E].
            places: [S, T, places].
            samples: [B, samples].

        Returns:
            [S, T, B, E].
        """
        weight = effective_weight(self.hidden)
        differences, values, of_places, of_samples = weight.split([1, 1, self.places, len(samples.T)], 1)
        shared = (places.to(weight) @ of_places.T + self.hidden.bias)[:, :, None] + samples.to(weight) @ of_samples.T
        own = squash(theirs.to(weight)).unsqueeze(3) * values[:, 0]
        base = shared[:, :, :, None] + own
        seen = torch.addcmul(base, squash(difference.to(weight)).unsqueeze(4), differences[:, 0])
        return self.head(seen.tanh()).squeeze(4).tanh()
