"""What several recipes have: data, networks, training, and what every run has."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lkd.config import ranges


@dataclass
class DataRecipe:
    """Which images.

    Args:
        name: Data set: embedded, fashion_mnist, fashion_mnist_unseen, fashion_mnist_rest, cifar10, cifar100; npz/NAME,
            arrays in NAME.npz; or, from files, image_folder, tar, wds/NAME, hfds/NAME or torch/NAME (see docs/data.md).
        root: Folder of the data set's files (not for `embedded`).
        train_size: Images to train on; 0 takes all that meta-validation leaves.
        meta_validation_size: Images that tuning and the outer loop look at; disjoint from the training images and from
            the test split; a tenth of the data set's training images if left out. 0, for `lkd distill` and
            `lkd teacher`: nothing is evaluated, and the last weights are kept.
        split_seed: Seed of the split, of flipped labels and of a teacher's random answers.
        label_noise: Fraction of the training labels that are flipped on purpose.
        label_noise_kind: symmetric, to any other class; pairs, to one partner of each class, with which a weak network
            confuses it most; or by_student, to the class that a weak network errs to, on images that it is unsure of
            (docs/data.md).
        meta_validation_noise: Fraction of the meta-validation labels that are flipped, by the same kind. Test labels
            stay as they are.
        imbalance: Training images of the first class over those of the last; between them they fall exponentially. 1
            for no long tail. Where a class has too few images, there are fewer than `train_size`.
        augmentation: none, flip_and_crop (2 pixels of padding), flip_and_crop_4 (4 pixels: the literature's for CIFAR);
            from files none (the centre), random_resized_crop (with flips), or rand_augment (the same and RandAugment).
        augmentation_seeds: 0 for a new augmentation in every epoch; N for epochs that cycle over N augmentations of
            each image, so that a teacher's answers to all of them can be kept.
        repeats: How often an image is in a batch, each time augmented otherwise (repeated augmentation); an epoch keeps
            its number of steps.
        mixup: α of mixup's Beta distribution; 0 for none. Targets are then distributions.
        cutmix: α of CutMix's; 0 for none. With both, each batch has one of them.
        random_erasing: Probability that a rectangle of a training image is overwritten with noise (timm's, mode pixel).
            The teacher sees the same.
        image_size: Pixels, height and width, of the crops that are cut from files; other data sets have their own size.
        crop_pct: Their share of the shorter side, where the centre is cut out, as timm has it; the literature's 0.875
            scales to 256 pixels for crops of 224. 1 for pictures that are small, or cut to their object.
        workers: Threads that decode images in files; 0 for one for each CPU core of the process.
        damaged_limit: Fraction of the images seen, of at least 10,000, that may be damaged before the run stops.
            Damaged images are skipped and named in the log.
        read_timeout: Seconds after which a run stops that waits for an image in a file to be read; 0 waits for ever.
        packed: Folder of images in files that `lkd pack` has decoded and scaled down; then no file is decoded.
        class_map: File that numbers the classes: a name a line, the first is class 0 (timm's class_map). Without it
            class folders are sorted as text, as torchvision does (0, 1, 10, 2), where timm sorts 0, 1, 2, 10.
        evaluation_batch_size: Images at a time in evaluation and in the teacher's first answers; fewer take less
            memory.
    """

    name: str = "embedded"
    root: str | None = None
    train_size: ranges.NonNegativeInt = 0
    meta_validation_size: ranges.NonNegativeInt | None = None
    split_seed: ranges.Seed = 0
    label_noise: ranges.ClosedUnitInterval = 0.0
    label_noise_kind: Literal["symmetric", "pairs", "by_student"] = "symmetric"
    meta_validation_noise: ranges.ClosedUnitInterval = 0.0
    imbalance: ranges.AtLeastOne = 1.0
    augmentation: str = "none"
    augmentation_seeds: ranges.NonNegativeInt = 0
    repeats: ranges.PositiveInt = 1
    mixup: ranges.NonNegativeFloat = 0.0
    cutmix: ranges.NonNegativeFloat = 0.0
    random_erasing: ranges.ClosedUnitInterval = 0.0
    image_size: ranges.AtLeast8 = 224
    crop_pct: ranges.PositiveFraction = 0.875
    workers: ranges.NonNegativeInt = 0
    damaged_limit: ranges.ClosedUnitInterval = 0.001
    read_timeout: ranges.NonNegativeFloat = 600.0
    packed: str | None = None
    class_map: str | None = None
    evaluation_batch_size: ranges.PositiveInt = 500


@dataclass
class ModelRecipe:
    """Which network.

    Args:
        name: A timm model name (with its tag, as in resnet50.tv_in1k), a CIFAR network (resnet32x4, wrn_40_2, ...),
            small_resnet, small_cnn, tiny_cnn, small_mobilenet, a torchvision name, or one that `plugins` registers.
        pretrained: Start from timm's pretrained weights.
        options: Further arguments of timm.create_model, such as {act_layer: relu}. A network of a fixed image size gets
            the images' as img_size.
        path: Start from the weights in this file, of any that `teacher.path` takes; a classifier of another number of
            classes starts anew.
        new_head: The classifier of `path` starts anew even if it has as many classes: they are others.
        freeze: Stages that stay as they are, with the statistics of their BatchNorm: stem, stage1, stage2, ... as timm
            groups a network's layers, or names of its modules, as in layer1 or blocks.0.
    """

    name: str = "small_cnn"
    pretrained: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    path: str | None = None
    new_head: bool = False
    freeze: list[str] = field(default_factory=list)


@dataclass
class TeacherRecipe:
    """Which teacher.

    Args:
        path: File written by `lkd teacher`; or a checkpoint of another program: timm's, torchvision's or your own
            training script's, RepDistiller's (docs/networks.md); or `embedded`, the teacher that the package carries;
            or `random`, the untrained network `name` (to try a recipe).
        name: The network that the file holds; needed by files of other programs, `pretrained` and `random`.
        pretrained: The teacher is timm's `name` with the weights of its tag, as in resnet34.tv_in1k; no file is read.
        options: Further arguments of timm.create_model, for `pretrained`, `random` and files of other programs.
        image_size: Height and width that the student's images are scaled to for the teacher; 0 for no scaling, or, of a
            network that takes one size only, for that one. timm's weights get them in the normalisation that they were
            trained with.
        classes: Which of the teacher's logits are the data's classes, in their order, counted from 0: a list; or first
            and last, as in 1-1000 for a teacher whose first is the background; or a file with one on each line, as for
            a teacher of 21k classes. All if left out.
        random_answers: Fraction of the images on which the teacher's logits are permuted at random, to test robustness
            to a bad teacher.
        logit_scale: Factor of the teacher's logits: above 1 it is more confident than it was trained to be.
        cache: Folder that `lkd cache` has filled with this teacher's answers; the teacher is then never asked, but of
            images that are not augmented, for their labels (`labelled_size`) or influence, where the others are.
    """

    path: str = "embedded"
    name: str | None = None
    pretrained: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    image_size: ranges.ZeroOrAtLeast8 = 0
    classes: list[ranges.NonNegativeInt] | str | None = None
    random_answers: ranges.ClosedUnitInterval = 0.0
    logit_scale: ranges.PositiveFloat = 1.0
    cache: str | None = None


@dataclass
class TrainRecipe:
    """How a network is trained.

    The defaults of learning rate and weight decay are SGD's: give an optimiser of another kind its own.

    Args:
        epochs: Passes over the training images.
        batch_size: Images a step, of all processes of a torchrun job together.
        optimizer: timm's name of it (sgd, adamw, lamb, lion, muon, ...; timm.optim.list_optimizers()). Meta-training
            takes sgd, adam and adamw.
        optimizer_options: Its further arguments, as in {betas: [0.9, 0.95]}.
        learning_rate: At the start, or after warm-up.
        learning_rate_for_batch: The batch size that `learning_rate` is for: with another one it is multiplied by their
            ratio. 0 takes it as it is.
        head_learning_rate: Of the network's classifier, with the same schedule; that of the rest if left out.
        layer_decay: Factor by which the learning rate falls from each layer to the one below it, from the head on
            (BEiT's); 1 for none.
        momentum: Of SGD, and of other optimisers that have one.
        nesterov: Nesterov's momentum, of sgd and sgdw.
        weight_decay: L2 penalty of sgd and adam, coupled as in torch; decoupled where the optimiser has it so (adamw).
        decay_norms_and_biases: Whether norms and biases, and what a network names in `no_weight_decay`, are decayed
            too. If left out yes with sgd, as the literature of distillation does, and no with others.
        clip_norm: The gradient of a step is scaled down to this norm; 0 for none.
        label_smoothing: Part of the label that is spread evenly over all classes. Every loss is given the smoothed
            label, as with mixup: its task term learns it, while terms that ask which class is the right one take the
            most probable. The teacher's answers stay as they are.
        schedule: timm's name of the learning-rate schedule, stepped every update (cosine, multistep, ...).
        milestones: Epochs at whose end the learning rate is multiplied by decay_rate; of schedule multistep only.
        decay_rate: Factor at every milestone (multistep, step), or the power (poly).
        min_learning_rate: Where the schedule ends; multistep, step and constant have no such end.
        warmup_epochs: Linear warm-up.
        warmup_steps: The same in steps.
        warmup_learning_rate: Where warm-up starts.
        cooldown_epochs: The last of `epochs`, after the schedule's end, at `min_learning_rate`.
        precision: Of student and teacher: float32; bfloat16, by autocast, with weights and losses in float32; float16,
            whose gradients are scaled, for GPUs without bfloat16; or auto, which is bfloat16 on a GPU that has it
            (NVIDIA's from compute capability 8.0 on; T4 and V100 only emulate it), else float32. Rollouts of
            meta-training are in float32, and so are students that the loss alternates with, which are neither compiled
            nor given a batch in parts.
        accumulation: Equal parts of a batch that are computed one after another, their gradients averaged: for batches
            that do not fit in memory. BatchNorm, and losses that compare images (sp, rkd, dist, ...), see a part at a
            time.
        ema_decay: Decay of a moving average of the student's weights, a step at a time (timm's ModelEmaV3), which is
            then evaluated and saved in the student's place; 0 for none. It is warmed up as timm does: after t steps it
            is at most 1 − t^(−2/3), so that a short training does not keep its initial weights.
        swa_epochs: Stochastic weight averaging: the mean of the weights, and of the statistics of BatchNorm, after each
            of the last so many epochs is evaluated and saved in the student's place; 0 for none.
        sync_batchnorm: BatchNorm over the batches of all GPUs of a torchrun job.
        compile: Run the student through torch.compile, and in `lkd distill` the teacher too. The first step then waits
            for the compiler; evaluation does not use it.
        channels_last: Lay out images and the weights of student (and, in `lkd distill`, teacher) with the channels
            last, which convolutions in bfloat16 on a GPU are faster with.
        checkpoint_every: Steps between two checkpoints; distillation writes one after every epoch, too.
        checkpoints_kept: How many are kept. Where the newest is damaged, a resumed run goes on from the one before.
    """

    epochs: ranges.PositiveInt = 13
    batch_size: ranges.PositiveInt = 64
    optimizer: str = "sgd"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    learning_rate: ranges.NonNegativeFloat = 0.1
    learning_rate_for_batch: ranges.NonNegativeInt = 0
    head_learning_rate: ranges.NonNegativeFloat | None = None
    layer_decay: ranges.PositiveFraction = 1.0
    momentum: ranges.FractionBelowOne = 0.9
    nesterov: bool = False
    weight_decay: ranges.NonNegativeFloat = 5e-4
    decay_norms_and_biases: bool | None = None
    clip_norm: ranges.NonNegativeFloat = 0.0
    label_smoothing: ranges.FractionBelowOne = 0.0
    schedule: str = "cosine"
    milestones: list[ranges.PositiveInt] = field(default_factory=list)
    decay_rate: ranges.NonNegativeFloat = 0.1
    min_learning_rate: ranges.NonNegativeFloat = 0.0
    warmup_epochs: ranges.NonNegativeInt = 0
    warmup_steps: ranges.NonNegativeInt = 0
    warmup_learning_rate: ranges.NonNegativeFloat = 0.0
    cooldown_epochs: ranges.NonNegativeInt = 0
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    accumulation: ranges.PositiveInt = 1
    ema_decay: ranges.FractionBelowOne = 0.0
    swa_epochs: ranges.NonNegativeInt = 0
    sync_batchnorm: bool = False
    compile: bool = False
    channels_last: bool = False
    checkpoint_every: ranges.PositiveInt = 1000
    checkpoints_kept: ranges.PositiveInt = 2


@dataclass
class WandbRecipe:
    """Weights & Biases.

    Args:
        mode: disabled, offline or online.
        project: Project name.
        entity: User or team; the one that is logged in if left out.
        group: Group of runs that belong together.
        tags: Words to find the run by.
        name: Run name; the run directory's name if left out.
    """

    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "lkd"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    name: str | None = None


@dataclass
class RunRecipe:
    """What every run has.

    Args:
        run_dir: Where the run's config, log, checkpoints and results go.
        resume: never, or auto: go on with the run in `run_dir` if there is one.
        seed: Of initial weights and of the order of the batches.
        device: cpu, cuda, mps, xpu, or auto (cuda where there is one, else cpu).
        threads: CPU threads of torch; 0 leaves its own choice, or takes the cores that a container grants if those are
            fewer. Where there are `workers`, of each of them, and 0 is one, however many they are: the number decides
            digits.
        wandb: Weights & Biases.
        trackio: Project of trackio's local dashboard that metrics go to as well; none if left out.
        plugins: File of Python that registers networks of your own (docs/networks.md). It is run, so that no recipe may
            name it.
    """

    run_dir: str = "runs/run"
    resume: Literal["never", "auto"] = "never"
    seed: ranges.Seed = 0
    device: str = "auto"
    threads: ranges.NonNegativeInt = 0
    wandb: WandbRecipe = field(default_factory=WandbRecipe)
    trackio: str | None = None
    plugins: str | None = None


@dataclass
class StudentRecipe(RunRecipe):
    """What every run has that trains students with a teacher.

    Args:
        data: The images.
        teacher: The teacher.
        student: The network.
        train: The training.
    """

    data: DataRecipe = field(default_factory=DataRecipe)
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    student: ModelRecipe = field(default_factory=ModelRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
