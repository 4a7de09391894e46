"""How exact the photometry is: mosaics of a known sky, judged against that sky.

Every case is run twice through the same engine: with what Phase 5 finds of gains and backgrounds, and with the truth put
in by hand (the *floor*, what noise and resampling alone cost). `photometry_judge` says what the figures mean,
`photometry_scenes` what is wanted of each case: some figures within a margin of its floor, some at most a limit; those
are marked with an asterisk. Only ``--strict`` shows the largest difference from the floor within one region, which noise
cannot hide.

    python benchmarks/photometry.py [--seeds 1 2] [--cases plain sip3] [--strict] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import photometry_judge as judging
import photometry_scenes as scenes

from zemosaic_photometry import compute_photometric_gains_and_offsets
from zemosaic_pipeline.overlaps.gradients import orthonormal, polynomial_terms
from zemosaic_pipeline.overlaps.pairs import CoarseTile, PairRelation

FIGURES = ("sky", "star", "colour", "low", "low_q", "seam")
#: Figures that are told region by region.
BY_REGION = ("sky", "star", "colour")


def run_case(name: str, case: scenes.Case, seed: int) -> dict:
    """One case with one seed: figures of the solved mosaic, of the floor, and the verdict."""
    start = time.perf_counter()
    scene = scenes.case_scene(case, seed)
    solved_at = time.perf_counter()
    solution = compute_photometric_gains_and_offsets(scene.coarse)
    solve_s = time.perf_counter() - solved_at
    truth, noise = judging.true_sky(scene), case.layout.noise
    ours = judging.judge(scenes.mosaic(scene, solution)[0], truth, noise)
    floor = judging.judge(scenes.true_mosaic(scene)[0], truth, noise)
    reached, best = ours.figures, floor.figures
    excess = {key: reached[key] - best[key] for key in FIGURES}
    stated = getattr(solution, "sky_error", None)
    return {
        "case": name,
        "seed": seed,
        "ours": reached,
        "floor": best,
        "excess": excess,
        "strict": {key: float(np.max(np.abs(getattr(ours, key) - getattr(floor, key)))) for key in BY_REGION},
        "passed": verdict(case, reached, excess),
        "stated": None if stated is None else float(np.max(stated)),
        "regions": len(ours.sky),
        "regions_with_stars": len(ours.star),
        "stars": len(truth.stars),
        "solve_s": solve_s,
        "seconds": time.perf_counter() - start,
        "warnings": [warning.text for warning in solution.warnings],
    }


def verdict(case: scenes.Case, reached: dict[str, float], excess: dict[str, float]) -> dict[str, bool]:
    """Which of the figures that a case is judged by keep within their limits."""
    passed = {key: reached[key] <= limit for key, limit in case.most.items()}
    return passed | {key: excess[key] <= margin for key, margin in case.above.items()}


def table(results: Sequence[dict], strict: bool = False) -> Iterator[str]:
    """The results as text, one line a run: of each figure ours, then the floor's."""
    yield f"{'case':9} seed  " + "".join(f"{key + ' (floor)':>17}" for key in FIGURES) + "   stated"
    for r in results:
        cells = [
            f"{r['ours'][k]:8.3f}{'*' if k in r['passed'] else ' '}({r['floor'][k]:6.3f})".rjust(17) for k in FIGURES
        ]
        failed = [k for k, good in r["passed"].items() if not good]
        result = "FAIL " + " ".join(failed) if failed else "PASS"
        stated = "    none" if r["stated"] is None else f"{r['stated']:8.3f}"
        yield f"{r['case']:9} {r['seed']:4}  " + "".join(cells) + f" {stated}  {result}  ({r['seconds']:.1f} s)"
        if strict:
            yield "    strict: " + ", ".join(f"{k} {value:.3f}" for k, value in r["strict"].items())
        yield from (f"    {note}" for note in r["warnings"])


def solve_seconds(tiles: int = 200, pairs: int = 6500, channels: int = 3, seed: int = 1) -> float:
    """Time to solve many given pairs of tiles with gradients: squares of one size that lie anywhere on each other."""
    rng = np.random.default_rng(seed)
    gain = rng.normal(0, 0.15, (tiles, channels))
    terms = rng.normal(0, [10.0, 1.5, 1.5, 0.3, 0.3, 0.3], (tiles, channels, 6))
    blank = CoarseTile("tile", (0, 0), np.zeros((channels, 1, 1)), np.ones((1, 1)), *np.ones((3, channels)))
    relations = []
    for i, j in rng.permutation(np.stack(np.triu_indices(tiles, 1), axis=1))[:pairs].tolist():
        modes_i, modes_j = modes_of_squares(rng.uniform(-1.0, 1.0, 2))
        error = rng.uniform(1e-3, 1e-2, channels)
        relations.append(
            PairRelation(
                i,
                j,
                log_ratio=gain[i] - gain[j] + rng.normal(0, error),
                log_ratio_se=error,
                stars=np.full(channels, 100.0),
                star_scatter=np.full(channels, 0.01),
                star_noise=np.full(channels, 0.01),
                scatter=np.ones(channels),
                samples=1000,
                smooth_i=np.exp(gain[i])[:, None] * (terms[i] @ modes_i.T + rng.normal(0, 0.02, (channels, 6))),
                smooth_j=np.exp(gain[j])[:, None] * (terms[j] @ modes_j.T),
                smooth_se=np.full(channels, 0.02),
                modes_i=modes_i,
                modes_j=modes_j,
                step_before=np.zeros(channels),
            )
        )
    start = time.perf_counter()
    compute_photometric_gains_and_offsets([blank] * tiles, pairs=relations)
    return time.perf_counter() - start


def modes_of_squares(shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The modes (6, 6) of the overlap of two squares, of both polynomials; the second is shifted by so much of -1..1."""
    y, x = (at.ravel() for at in np.mgrid[-1:1:24j, -1:1:24j])
    inside = (np.abs(y - shift[0]) <= 1) & (np.abs(x - shift[1]) <= 1)
    first, second = (polynomial_terms(x[inside] - dx, y[inside] - dy, (1.0, 1.0), 2) for dy, dx in ((0.0, 0.0), shift))
    weight = np.full(first.shape[1], 1.0 / first.shape[1])
    modes = orthonormal(first, weight)
    return (modes * weight) @ first.T, (modes * weight) @ second.T


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; the exit status is 1 where one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cases", nargs="+", choices=[*scenes.CASES, *scenes.GROUPS], default=list(scenes.CASES))
    parser.add_argument("--strict", action="store_true", help="print the largest difference from the floor as well")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    results = []
    for name in dict.fromkeys(n for given in options.cases for n in scenes.GROUPS.get(given, [given])):
        for seed in options.seeds:
            results.append(run_case(name, scenes.CASES[name], seed))
            lines = list(table(results[-1:], options.strict))
            print("\n".join(lines if len(results) == 1 else lines[1:]), flush=True)
    print(f"solving 200 tiles with 6,500 given pairs: {solve_seconds():.2f} s")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0 if all(all(r["passed"].values()) for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
