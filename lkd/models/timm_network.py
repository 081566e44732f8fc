"""Any timm model as a network that returns `Outputs`."""

from typing import Any

from torch import Tensor, nn

from lkd.outputs import Outputs


class TimmNetwork(nn.Module):
    """A timm model whose forward pass returns logits and the features of every stage that its `feature_info` names.

    Args:
        model: A timm model with `forward_intermediates` and `forward_head`.

    Raises:
        ValueError: If the model offers no intermediate features.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"{type(model).__name__} has no forward_intermediates: it cannot give features")
        self.model = model
        info: Any = model.feature_info
        self.stage_names = [entry["module"] for entry in getattr(info, "info", info)]

    def forward(self, images: Tensor) -> Outputs:
        """Compute logits and stage features; `images` is [B, in_chans, H, W]."""
        model: Any = self.model
        last, intermediates = model.forward_intermediates(images)
        return Outputs(model.forward_head(last), dict(zip(self.stage_names, intermediates, strict=True)))
