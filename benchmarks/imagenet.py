"""Gather what the benchmarks of the ImageNet path measured into docs/evidence/imagenet/result.json.

python benchmarks/imagenet.py
"""

from pathlib import Path

from lkd.core.files import environment, read_json, write_json
from lkd.tracking.run import evidence

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence"
SOURCES = {
    "loader_vs_timm": ("imagenet/loader", "files_host_over_timm"),
    "loader_vs_torchvision": ("imagenet/loader", "files_host_over_torchvision"),
    "packed_vs_timm": ("imagenet/loader", "packed_host_over_timm"),
    "distill_vs_timm": ("imagenet/distillation_speed", "speed_vs_timm_resnet50-mobilenetv1"),
    "cached_vs_student_only": ("imagenet/distillation_speed", "cached_vs_student_only"),
    "learned_loss_share_of_step": ("imagenet/distillation_speed", "learned_share"),
    "resume_bitwise_fraction": ("resume", "resume_bitwise_fraction"),
    "two_process_max_difference": ("resume", "two_process_max_difference"),
}
"""Figure → the evidence that holds it, and its name there."""


def main() -> None:
    figures = {
        name: read_json(EVIDENCE / folder / "result.json")["figures"][key] for name, (folder, key) in SOURCES.items()
    }
    write_json(EVIDENCE / "imagenet" / "result.json", evidence("python benchmarks/imagenet.py", environment(), figures))
    print("\n".join(f"{name}: {value:g}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
