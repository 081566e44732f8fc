"""From a name, or from a user's own network, to a network that returns `Outputs`."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode

from lkd.core.errors import UserError, check_choice, first_line
from lkd.core.files import MALFORMED
from lkd.core.outputs import Outputs, evaluating, take_logits
from lkd.data.images import ImageSet
from lkd.models.cifar import CIFAR_NETWORKS
from lkd.models.small import SMALL_NETWORKS

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, of pixels in [0, 1]."""


class AdaptedInput(nn.Module):
    """A network that was trained with another normalisation or size, seeing the same pixels in its own.

    Args:
        network: The network, returning `Outputs`.
        given: What images are normalised with.
        wanted: What the network was trained with.
        size: Height and width that images are scaled to, bilinearly, antialiased; 0 keeps theirs.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, given: Statistics, wanted: Statistics, size: int = 0) -> None:
        super().__init__()
        self.network = network
        self.size = size
        self.wanted = wanted
        mean, std, own_mean, own_std = (torch.tensor(part).view(-1, 1, 1) for part in (*given, *wanted))
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)

    def forward(self, images: Tensor) -> Outputs:
        images = images * self.scale + self.shift
        if self.size and images.shape[-2:] != (self.size, self.size):
            images = interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        outputs: Outputs = self.network(images)
        return outputs


def adapt_input(network: nn.Module, images: ImageSet, wanted: Statistics, size: int = 0) -> nn.Module:
    """The network as it is, or adapted if the normalisation that it wants differs from that of the images."""
    given = images.mean, images.std
    if given != wanted and not images.says_normalisation:
        raise UserError(
            "read_images: mean, std: the images are not in [0, 1], so they are normalised already, and a network of a "
            "file or of timm's pretrained weights wants its own normalisation: say which mean and std they have"
        )
    return AdaptedInput(network, given, wanted, size).train(network.training) if size or given != wanted else network


def adapt_pretrained(network: nn.Module, images: ImageSet, size: int = 0) -> nn.Module:
    """A network of timm's pretrained weights, seeing images in the normalisation that these were trained with.

    Of images of another number of channels than three, for which timm sums the first layer's weights, it is the mean.
    """
    configuration, (channels, *_) = unwrap(network).pretrained_cfg, images.image_shape
    parts = configuration["mean"], configuration["std"]
    mean, std = (tuple(p) if len(p) == channels else (sum(p) / len(p),) * channels for p in parts)
    return adapt_input(network, images, (mean, std), size)


class TakenClasses(nn.Module):
    """A network of which some classes are taken.

    Args:
        network: The network, returning `Outputs`.
        columns: Which of its logits, in the order of the data's classes.
    """

    columns: Tensor

    def __init__(self, network: nn.Module, columns: list[int]) -> None:
        super().__init__()
        self.network, self.size = network, getattr(network, "size", 0)
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    def forward(self, images: Tensor) -> Outputs:
        outputs = self.network(images)
        return Outputs(outputs.logits[:, self.columns], outputs.features)


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
        model: Any = self.model
        last, intermediates = model.forward_intermediates(images)
        logits = take_logits(model.forward_head(last))
        return Outputs(logits, dict(zip(self.stage_names, intermediates, strict=True)))


GIVEN = "object/"  # what the name of a network starts with that was given as an object: no name builds it


class LogitNetwork(nn.Module):
    """A network that gives logits alone, returning `Outputs` without features.

    Args:
        model: Maps images [B, C, H, W] to logits [B, classes], or to what `take_logits` finds them in.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Outputs:
        answer = self.model(images)
        return answer if isinstance(answer, Outputs) else Outputs(take_logits(answer), {})


def adapt_given(network: nn.Module, role: str, num_classes: int | None, image_shape: tuple[int, int, int]) -> nn.Module:
    """Make a network return `Outputs`, and check by a dry run that it fits the images.

    It returns logits, or an object that has them as `logits`, or several outputs of which they are the first, or
    `Outputs`; of a timm model, features are read too. `num_classes` None takes any.
    """
    name = type(network).__name__
    if next(network.parameters(), None) is None:
        raise UserError(f"{role}: this {name} has no parameters")
    try:
        with running_dry(network) as device:
            images = torch.zeros(2, *image_shape, device=device)
            answer = network(images)
    except Exception as error:
        raise UserError(f"{role}: this {name} fails on images {[2, *image_shape]}: {first_line(error)}") from error
    if images._version and role == "student":  # a teacher is given a copy
        raise UserError(f"{role}: this {name} writes into its input, which others see too: let it work on a copy")
    logits = take_logits(answer)
    found = list(logits.shape) if isinstance(logits, Tensor) else type(answer).__name__
    if not (isinstance(found, list) and len(found) == 2 and found[0] == 2 and num_classes in (None, found[1])):
        of_images = f"[2, {num_classes}] for the {num_classes} classes of the images (read_images takes num_classes)"
        wanted = "[2, classes]" if num_classes is None else of_images
        raise UserError(f"{role}: this {name} answers 2 images with {found}, not with logits {wanted}")
    if isinstance(answer, Outputs):
        return network
    return TimmNetwork(network) if is_timm(network) else LogitNetwork(network)


def is_timm(network: nn.Module) -> bool:
    """Whether a network gives features as timm's do."""
    return all(hasattr(network, part) for part in ("forward_intermediates", "forward_head", "feature_info"))


@contextmanager
def running_dry(network: nn.Module) -> Iterator[torch.device]:
    """Within, a network is in eval mode and makes no graph; its mode and the random state stay. Gives its device."""
    with evaluating(network), torch.no_grad(), torch.random.fork_rng(devices=[]):
        yield next(network.parameters()).device


REGISTERED: dict[str, Callable[..., nn.Module]] = {}
"""Networks of a user's own, by name."""


def register(name: str, builder: Callable[..., nn.Module]) -> None:
    """Give a network of one's own a name, for recipes and for the files of its weights.

    On the command line, in a file of Python that `--plugins FILE` names. The file of a student never makes anybody
    import code: who evaluates or exports it names the same file.

    Args:
        name: The name.
        builder: `builder(num_classes, in_chans, **options)` gives a module from images [B, in_chans, H, W] to logits,
            to an object that has them as `logits`, or to `lkd.Outputs`, whose features losses over features read;
            `options` are those of the recipe.

    Raises:
        UserError: If the name is another network's.
    """
    import timm

    if name in OWN_NETWORKS or timm.is_model(name.partition(".")[0]) or "/" in name:
        raise UserError(f"lkd.register: {name!r} is the name of another network, or has a '/': take another name")
    if not callable(builder):
        raise UserError(f"lkd.register: what builds {name!r} is a {type(builder).__name__}, not a function")
    REGISTERED[name] = builder


def wrap_registered(name: str, network: Any) -> nn.Module:
    """A registered network, returning `Outputs`, whatever it returns itself."""
    if not isinstance(network, nn.Module):
        raise ValueError(f"what is registered as {name!r} builds a {type(network).__name__}, not a torch.nn.Module")
    return TimmNetwork(network) if is_timm(network) else LogitNetwork(network)


OWN_NETWORKS = {**SMALL_NETWORKS, **CIFAR_NETWORKS}
TORCHVISION = "torchvision/"  # before the name of a network of torchvision's where timm has one of that name, too
# Options of timm.create_model that read other files or the internet: no recipe and no file of a stranger may set them.
REACHING_OUT = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_strict")


def build(
    name: str, num_classes: int, in_chans: int = 3, pretrained: bool = False, options: dict[str, Any] | None = None
) -> nn.Module:
    """Build a network.

    Args:
        name: A timm model name, with its pretrained tag if it matters (`resnet50.tv_in1k`), one of the literature's
            CIFAR networks (`resnet32x4`, `wrn_40_2`, ...: `CIFAR_NETWORKS`), one of the quickstart's
            (`small_resnet`, `small_cnn`, `tiny_cnn`, `small_mobilenet`), one that was registered (`register`), or one
            of torchvision's (`googlenet`; `torchvision/NAME` where timm has a NAME, too), which gives logits alone.
        num_classes: Number of classes.
        in_chans: Channels of the input images.
        pretrained: Load timm's pretrained weights of that tag.
        options: Further keyword arguments of `timm.create_model`, say `{"act_layer": "relu"}`, or of what builds it.

    Returns:
        A module whose forward maps images [B, in_chans, H, W] to `Outputs`.

    Raises:
        UserError: If the name is unknown, or pretrained weights or options are asked of a network that has none.
    """
    known, options = check_name(name)[0], options or {}
    if pretrained and (known in OWN_NETWORKS or known in REGISTERED or known.startswith(TORCHVISION)):
        raise UserError(f"model {name!r} has no `pretrained` weights: it is not one of timm's; give a file as `path`")
    if options and known in OWN_NETWORKS:
        raise UserError(f"model {name!r} takes no `options`: it is not one of timm's")
    if known in OWN_NETWORKS:
        return OWN_NETWORKS[known](num_classes, in_chans)
    reaching_out = sorted(set(options) & {*REACHING_OUT, "pretrained", "weights", "weights_backbone"})
    if reaching_out:
        raise UserError(
            f"model {name!r}: option {reaching_out[0]} is not taken; weights are read from the file that "
            "teacher.path or student.path names, or fetched by `pretrained`"
        )
    try:
        network: nn.Module
        if known in REGISTERED:
            network = wrap_registered(name, REGISTERED[known](num_classes, in_chans, **options))
        elif known.startswith(TORCHVISION):
            network = LogitNetwork(create_torchvision(known.removeprefix(TORCHVISION), num_classes, in_chans, options))
        else:
            import timm

            network = TimmNetwork(
                timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **options)
            )
    except (*MALFORMED, OSError) as error:
        raise UserError(f"model {name!r} cannot be built with {options}: {first_line(error)}") from error
    logging.getLogger("timm").setLevel(logging.WARNING)
    return network


def check_name(name: str) -> list[str]:
    """What a name may stand for, the first that is meant first: a registered network, ours, timm's, torchvision's."""
    if name in REGISTERED or name in OWN_NETWORKS:
        return [name]
    if ":" in name or name.endswith(".py"):
        raise UserError(
            f"model: {name!r} is no name: no code is imported by a name; register a network of your own with "
            'lkd.register("mine", builder) in a file of Python, and give that by --plugins'
        )
    import timm
    import torchvision

    architecture, _, tag = name.partition(".")
    classifiers = torchvision.models.list_models(torchvision.models)
    found = [name] if timm.is_model(architecture) else []
    if name.removeprefix(TORCHVISION) in classifiers:
        found.append(TORCHVISION + name.removeprefix(TORCHVISION))
    if not found:
        try:
            check_choice("network", architecture, [*REGISTERED, *timm.list_models(), *OWN_NETWORKS, *classifiers])
        except UserError as error:
            raise UserError(f"{error}; a network of one's own is registered in a file that --plugins names") from error
    if tag:
        check_choice(f"pretrained tag of {architecture}", name, timm.list_pretrained(f"{architecture}.*"))
    return found


def create_torchvision(name: str, num_classes: int, in_chans: int, options: dict[str, Any]) -> nn.Module:
    """One of torchvision's classifiers, untrained; its first convolution takes the images' channels."""
    import torchvision

    given = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}  # else they warn of a change
    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **given, **options)
    if in_chans == 3:
        return network
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            old: Any = module
            shape = old.kernel_size, old.stride, old.padding
            network.set_submodule(path, nn.Conv2d(in_chans, old.out_channels, *shape, bias=old.bias is not None))
            return network
    raise ValueError("it has no convolution that could take other channels than three")


COMPILED = "_orig_mod."  # what torch.compile puts before the names of a module's weights


def unwrap(network: Any) -> Any:
    """The network as its own library made it, without what ours, torch.compile and DataParallel put around it."""
    if isinstance(network, AdaptedInput | TakenClasses):
        return unwrap(network.network)
    if isinstance(network, TimmNetwork | LogitNetwork):
        return unwrap(network.model)
    if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrap(network.module)
    return unwrap(network._orig_mod) if hasattr(network, "_orig_mod") else network


def plain_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """The network's own weights under its library's names: a timm student loads with `timm.create_model`."""
    return {name.replace(COMPILED, ""): tensor for name, tensor in unwrap(network).state_dict().items()}


def load_plain_state_dict(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `plain_state_dict` gave, of a network or of a copy that is not compiled, or is."""
    own = unwrap(network)
    own.load_state_dict({name: state[name.replace(COMPILED, "")] for name in own.state_dict()})


def describe(
    role: str, network: nn.Module, name: str, input_shape: tuple[int, int, int], pretrained: bool = False
) -> str:
    """Describe a network in one line, by a dry run: papers mix up MobileNets, so a run says what it trains.

    Args:
        role: What it is here, say `"student"`.
        network: The network, returning `Outputs`.
        name: The name that it was built from.
        input_shape: Channels, height and width of one image.
        pretrained: Whether it started from timm's weights.

    Returns:
        Role, name, parameters, FLOPs of one forward pass of one image (a multiply-add counted as two), classes of
        activations, and the tag of timm's weights.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted
        try_black_image(network, name, input_shape)
    parameters, flops = sum(parameter.numel() for parameter in network.parameters()), counter.get_total_flops()
    tag = (getattr(unwrap(network), "pretrained_cfg", None) or {}).get("tag", "") if pretrained else ""
    activations = {type(m).__name__ for m in network.modules() if type(m).__module__ == "torch.nn.modules.activation"}
    return (
        f"{role}: {name}, {parameters:,} parameters, {flops / 1e6:,.1f} MFLOPs an image, "
        f"{'/'.join(sorted(activations)) or 'none'}, pretrained tag {tag or 'none'}"
    )


def try_black_image(network: nn.Module, name: str, input_shape: Sequence[int]) -> Outputs:
    """What a network says of one black image, in eval mode, and unchanged.

    Raises:
        UserError: If it takes no such images.
    """
    try:
        with running_dry(network) as device:
            outputs: Outputs = network(torch.zeros(1, *input_shape, device=device))
    except MALFORMED as error:
        size = "×".join(map(str, input_shape[1:]))
        raise UserError(
            f"{name}: takes no images of {size} ({first_line(error)}): give another image_size, or another network"
        ) from error
    return outputs


def find_stages(network: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """Shape of each stage's feature for one image, by one dry run; stage names as `Outputs.features` has them."""
    outputs = try_black_image(network, type(unwrap(network)).__name__, input_shape)
    return {stage: tuple(feature.shape[1:]) for stage, feature in outputs.features.items()}


# ----------------------------------------------------------------------------------------------------------------------
# A network's forward pass made faster, its parameters, their names and its evaluation left alone.


def build_forward(
    network: nn.Module, compiled: bool = False, channels_last: bool = False, features: bool = True
) -> Callable[[Tensor], Outputs]:
    """The forward pass as a training asks for it: the network's own, or a compiled one.

    The compiled code is beside the network: its state dict, copies of it and its evaluation know nothing of it. With
    `channels_last` its weights are laid out anew, in place. Without `features` a compiled one gives the logits alone:
    its backward pass would take a gradient of zeros for each feature that nobody reads.
    """
    if channels_last:
        network.to(memory_format=torch.channels_last)
    if not compiled:
        return network.__call__

    def give_logits(images: Tensor) -> Outputs:
        return Outputs(network.forward(images).logits, {})

    run = torch.compile(network.forward if features else give_logits)

    def forward(images: Tensor) -> Outputs:
        try:
            return run(images)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = first_line(error)
            raise UserError(f"train.compile: torch.compile does not work here ({reason}); leave it out") from error

    return forward
