"""VGG with BatchNorm and one linear layer (Simonyan and Zisserman, 2015), as RepDistiller's `vgg.py`."""

from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from lkd.core.outputs import Outputs
from lkd.models.cifar.parts import initialize, pool, run_stages

WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five stages of 3×3 convolutions; max-pooling before all but the first and the last.

    Args:
        depth: Convolutions of every stage.
        num_classes: Number of classes.
        in_chans: Channels of the images.
    """

    def __init__(self, depth: int, num_classes: int, in_chans: int) -> None:
        super().__init__()
        channels = in_chans
        for stage, width in enumerate(WIDTHS):
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            self.add_module(f"block{stage}", nn.Sequential(*layers))
        self.classifier = nn.Linear(channels, num_classes)
        initialize(self, classifier_std=0.01)

    def forward(self, images: Tensor) -> Outputs:
        """Compute logits and the features `block0` to `block4`; `images` is [B, in_chans, H, W]."""

        def run_pooled(stage: int, x: Tensor) -> Tensor:
            return self.get_submodule(f"block{stage}")(max_pool2d(x, 2) if stage in (1, 2, 3) else x)

        stages = {f"block{stage}": lambda x, stage=stage: run_pooled(stage, x) for stage in range(len(WIDTHS))}
        features = run_stages(images, stages)
        return Outputs(self.classifier(pool(features["block4"])), features)
