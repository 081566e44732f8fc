"""Influence by EK-FAC (George et al., 2018; Grosse et al., 2023), computed by kronfluence."""

import copy
import logging
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from lkd.balance.problem import Problem
from lkd.config import InfluenceSettings
from lkd.data import Batch, ImageSet
from lkd.errors import UserError

LAYERS = (nn.Linear, nn.Conv2d)


class Examples(Dataset[tuple[Tensor, ...]]):
    """An image set as kronfluence's loaders read it: the columns of `Batch`."""

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        self.images, self.device = images, device

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[Tensor, ...]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[tuple[Tensor, ...]]:
        return list(zip(*self.images.batch(torch.tensor(positions), self.device), strict=True))


def measure_with_ekfac(problem: Problem, settings: InfluenceSettings) -> tuple[Tensor, Tensor]:
    """Influence over the weights of linear and convolutional layers, those of normalisation held fixed.

    The Fisher's labels are drawn from the network. kronfluence's own damping: a tenth of a layer's mean eigenvalue.

    Returns:
        Index and influence of each example, [N] each.

    Raises:
        UserError: If kronfluence is not installed, or no such layer is chosen.
    """
    try:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task
    except ModuleNotFoundError as error:
        raise UserError(
            f"influence.method: ekfac needs a package that is not installed ({error.name}); "
            'pip install "lkd[influence]", or take conjugate_gradient'
        ) from error
    layers = [
        name
        for name, module in problem.network.named_modules()
        if isinstance(module, LAYERS) and f"{name}.weight".startswith(settings.parameters)
    ]
    if not layers:
        raise UserError(f"influence.parameters: {settings.parameters!r} names no linear or convolutional layer")

    class Distillation(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(batch[0]).logits
            if sample:
                drawn = torch.multinomial(logits.detach().softmax(1), 1).squeeze(1)
                return cross_entropy(logits, drawn, reduction="sum")
            return len(logits) * problem.compute_loss(logits, Batch(*batch))

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return problem.score_validation(model(batch[0]).logits, batch[1])

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

    task = Distillation()
    logging.getLogger("kronfluence").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        model = prepare_model(copy.deepcopy(problem.network), task)
        analyzer = Analyzer(
            "influence",
            model,
            task,
            problem.device.type == "cpu",
            logging.WARNING,
            disable_tqdm=True,
            output_dir=folder,
        )
        train, queries = (Examples(images, problem.device) for images in (problem.train, problem.meta_validation))
        size = min(settings.batch_size, len(train))
        most = settings.curvature_examples or None
        analyzer.fit_all_factors(
            "ekfac", train, size, factor_args=FactorArguments(covariance_max_examples=most, lambda_max_examples=most)
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            queries,
            train,
            per_device_query_batch_size=min(settings.batch_size, len(queries)),
            per_device_train_batch_size=size,
            score_args=ScoreArguments(damping_factor=None, aggregate_query_gradients=True),
        )
        scores = analyzer.load_pairwise_scores("scores")
    return problem.train.index, -scores["all_modules"][0].cpu() / len(queries)
