"""A plan as text."""

from typing import Any


def format_plan(plan: dict[str, Any]) -> str:
    """One line for each thing that a plan says."""
    gpu, loading = plan["gpu"], plan["loading"]
    total = sum(plan["hours"].values())
    parameters = ", ".join(f"{name} {count:,}" for name, count in plan["parameters"].items())
    rows = [
        ("command", f"lkd {plan['command']}: {plan['teacher']} → {plan['student']}, loss: {plan['loss']}"),
        ("parameters", parameters),
        ("images", f"{loading['images']:,} ({loading['source']}), {loading['gigabytes']:,.1f} GB"),
        ("training", f"{plan['epochs']} epochs of batch {plan['batch_size']}: {plan['steps']:,} steps"),
        ("precision", plan["precision"]),
        *(format_part(name, part) for name, part in plan["step"].items()),
        *(format_rollout(name, rollout) for name, rollout in plan.get("rollout", {}).items()),
        *(("memory", f"{name}: {size:.1f} GB of {gpu['memory']:g}") for name, size in plan["memory_gigabytes"].items()),
        ("GPU", f"{gpu['count']} × {gpu['name']} at {plan['efficiency']:.0%} of its datasheet"),
        *((f"  {name}", f"{hours:,.2f} hours") for name, hours in plan["hours"].items() if hours),
        ("in all", f"{total:,.2f} hours, {plan['gpu_hours']:,.2f} GPU-hours"),
        ("needs", f"{loading['needed_images_per_second']:,.0f} images/s"),
    ]
    if "decoded_images_per_second" in loading:
        rate = f"{loading['images_per_core']:,.0f} images/s on each of {loading['cores']} cores"
        rows.append(("decoding", f"{loading['decoded_images_per_second']:,.0f} images/s: {rate}"))
    if "cache" in plan:
        rows += format_cache(plan["cache"])
    rows += [("WARNING", warning) for warning in plan["warnings"]]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def format_part(name: str, part: dict[str, float]) -> tuple[str, str]:
    """A part of a step."""
    work = f"{part['gflops_an_image']:.3f} GFLOPs and {part['megabytes_an_image']:.1f} MB an image"
    return f"  {name}", f"{work}, {part['operations']:.0f} operations, {part['share']:.1%} of a step"


def format_rollout(name: str, rollout: dict[str, float]) -> tuple[str, str]:
    """A hypergradient."""
    work = f"{rollout['gflops'] / 1000:,.1f} TFLOPs, {rollout['seconds']:,.2f} s"
    return f"  {name}", f"{rollout['steps']:.0f} steps: {work}; each step adds {rollout['megabytes_a_step']:,.0f} MB"


def format_cache(cache: dict[str, float]) -> list[tuple[str, str]]:
    """A teacher cache."""
    small = f"{cache['top_k_gigabytes']:,.1f} GB of the best {cache['top_k']:.0f} classes"
    size = f"{cache['augmentation_seeds']:.0f} augmentations of each image: {cache['gigabytes']:,.1f} GB, or {small}"
    again = f"{cache['saved_hours_of_another_training']:,.2f} of another training"
    saved = f"pays after {cache['break_even_epochs']:.0f} epochs; saves {cache['saved_hours']:,.2f} hours here, {again}"
    return [("teacher cache", size), ("", saved)]
