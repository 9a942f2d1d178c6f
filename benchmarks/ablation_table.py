"""Write docs/results.md from the kept results of ablation.py: figures per arm, and a verdict per published ordering.

    python benchmarks/ablation_table.py [--profile cpu] [--out docs/results.md]

Intervals are 95 % t-intervals over seeds; an ordering is judged on differences paired by seed.
"""

import argparse
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ablation_arms import ARMS, CUT_LENGTH, CUT_LENGTHS, CUTS, FRAMEWORKS, LADDER, PROFILES, Profile, kept_results

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by seeds
LEAST_SEEDS = 3
METRICS = {
    "i2t_r1": "image→text R@1",
    "t2i_r1": "text→image R@1",
    "accuracy": "accuracy on emoji classes",
    "miou": "segmentation mIoU",
}
FAMILIES = {"DreamLIP's ladder": LADDER, "CLIPS' cuts": CUTS, "CLIPS and its baselines": FRAMEWORKS}
LADDER_STEPS = list(zip(list(LADDER)[1:], list(LADDER), strict=False))
SHORTER = [(f"cut_sub_caption_{n}", f"cut_sub_caption_{CUT_LENGTHS[-1]}") for n in CUT_LENGTHS[:-1]]
BEST_CUTS = [
    (f"cut_{better}_{CUT_LENGTH}", f"cut_{worse}_{CUT_LENGTH}")
    for better in ("sub_caption", "block_mask")
    for worse in ("truncation", "random_mask")
]
ORDERINGS = {
    "DreamLIP, ablation table: each step adds": LADDER_STEPS,
    "CLIPS, section 3.2: a short piece beats the whole caption": SHORTER,
    "CLIPS, section 3.2: sub-caption and block mask are the best cuts": BEST_CUTS,
    "CLIPS, main tables: CLIPS beats CLIPA and CoCa": [("clips", "clipa"), ("clips", "coca")],
}

Results = dict[str, dict[int, dict[str, Any]]]
"""arm -> seed -> what ablation.py kept."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=list(PROFILES), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    options = parser.parse_args()
    results = read(options.profile)
    written = [options.out.with_name(name) for name in ("results_notes.md", "results_llava.md")]
    parts = [
        heading(results, PROFILES[options.profile]),
        *figures(results),
        *orderings(results),
        *(part.read_text() for part in written if part.is_file()),
    ]
    options.out.write_text("\n".join(parts).rstrip() + "\n")
    print(f"wrote {options.out}: {sum(len(seeds) for seeds in results.values())} runs of {len(results)} arms")


def read(profile: str) -> Results:
    results: Results = defaultdict(dict)
    for result in kept_results(profile):
        results[result["arm"]][result["seed"]] = result
    if not results:
        raise SystemExit(f"no results of profile {profile} for the present arms; run benchmarks/ablation.py first")
    return results


def heading(results: Results, profile: Profile) -> str:
    every = [result for seeds in results.values() for result in seeds.values()]
    one, slowest = every[0], max(every, key=lambda result: result["cpu_seconds"])
    world, vision = profile.scenes, profile.vision
    what = f"""Every arm sees the same {profile.steps * profile.batch_size:,} pictures ({profile.steps} batches of
        {profile.batch_size}) of {world.train:,} scenes of the embedded world ({world.classes} emoji classes, up to
        {world.max_objects} in a picture, {world.image_size} px), with the same towers (image {vision.layers} x
        {vision.width}, patch {vision.patch_size}, {vision.pool} token as pool) and learning rate ({profile.lr}), chosen
        on validation scenes. Scored on {world.test:,} unseen scenes: retrieval by short captions (chance
        {one["chance"]["i2t_r1"]:.2%}), zero-shot accuracy on pictures of one class (chance {1 / world.classes:.1%}),
        mean IoU of patch-text segmentation. Mean over seeds, ± half of the 95 % t-interval; test scenes are the same
        for all seeds."""
    machine = f"""Machine: {one["device"]}; torch {one["torch"]}; the costliest run ({slowest["arm"].replace("_", " ")})
        took {slowest["cpu_seconds"]:.0f} CPU seconds."""
    title = "# The papers' findings in the small"
    origin = f"Written by `benchmarks/ablation_table.py` from {len(every)} runs of `benchmarks/ablation.py`."
    return "\n\n".join([title, origin, *(textwrap.fill(" ".join(p.split()), 118) for p in (what, machine)), ""])


def figures(results: Results) -> list[str]:
    parts = ["## Figures\n"]
    for family, arms in FAMILIES.items():
        parts += [f"### {family}\n", "| arm | seeds | " + " | ".join(METRICS.values()) + " |", "|---" * 6 + "|"]
        for arm in (arm for arm in arms if arm in results):
            columns = [[r["metrics"][metric] for r in results[arm].values()] for metric in METRICS]
            cells = " | ".join(with_interval(column) for column in columns)
            parts.append(f"| {arm.replace('_', ' ')} | {len(results[arm])} | {cells} |")
        parts.append("")
    missing = [arm for arm in ARMS if arm not in results]
    return [*parts, *([f"Not run yet: {', '.join(missing)}.\n"] if missing else [])]


def orderings(results: Results) -> list[str]:
    parts = ["## Published orderings\n"]
    for finding, pairs in ORDERINGS.items():
        parts += [f"### {finding}\n", "| better | than | " + " | ".join(METRICS.values()) + " |", "|---" * 6 + "|"]
        for better, worse in pairs:
            cells = " | ".join(verdict(results, better, worse, metric) for metric in METRICS)
            parts.append(f"| {better.replace('_', ' ')} | {worse.replace('_', ' ')} | {cells} |")
        parts.append("")
    return parts


def verdict(results: Results, better: str, worse: str, metric: str) -> str:
    seeds = sorted(results.get(better, {}).keys() & results.get(worse, {}).keys())
    if len(seeds) < LEAST_SEEDS:
        return f"{len(seeds)} seeds: too few"
    differences = [results[better][seed]["metrics"][metric] - results[worse][seed]["metrics"][metric] for seed in seeds]
    middle, half = interval(differences)
    word = "reproduced" if middle > half else "not reproduced" if middle < -half else "undecided"
    return f"**{word}** {100 * middle:+.1f} ± {100 * half:.1f}"


def with_interval(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{100 * values[0]:.1f}"
    middle, half = interval(values)
    return f"{100 * middle:.1f} ± {100 * half:.1f}"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % t-interval."""
    return statistics.mean(values), T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5


if __name__ == "__main__":
    main()
