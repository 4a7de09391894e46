"""run_report.json: what was used, what was found, what it cost."""

from __future__ import annotations

import platform
import sys
import time
from dataclasses import asdict
from importlib import metadata
from typing import Any

from zemosaic_pipeline.files import to_jsonable, write_json
from zemosaic_pipeline.host.folders import program_version
from zemosaic_pipeline.phases.phase5_aesthetic import Aesthetics
from zemosaic_pipeline.phases.phase5_normalise import Scene
from zemosaic_pipeline.phases.phase6_save import Outputs
from zemosaic_pipeline.phases.result import MosaicResult
from zemosaic_pipeline.phases.run import Run

LIBRARIES = ("numpy", "scipy", "astropy", "reproject", "numba", "cupy-cuda12x", "cupy-cuda13x", "numba-cuda")


def write_report(run: Run, scene: Scene, factors: Aesthetics | None, outputs: Outputs) -> MosaicResult:
    """Write run_report.json, which completes the outputs, and say that the mosaic stands."""
    switch = run.tools.switch
    backend = {"used": switch.name, "reason": switch.reason, "fell_back": switch.fell_back}
    run.release()
    report = to_jsonable(
        {
            **describe(run, scene, factors, outputs, backend),
            "input": run.source,
            "resume": run.kept.report(),
            "phases": run.clock.report(),
            "seconds": round(time.monotonic() - run.began, 3),
        }
    )
    write_json(outputs.report, report)
    run.reporter.stage("phase6", 2, 2)
    name = outputs.science.name
    run.reporter.say("SUCCESS", "run_success_mosaic_saved", f"saved {outputs.science}", filename=name)
    return MosaicResult(
        outputs.science, outputs.aesthetic, outputs.coverage, outputs.preview, outputs.report, report
    )  # fmt: skip


def describe(
    run: Run, scene: Scene, factors: Aesthetics | None, outputs: Outputs, backend: dict[str, Any]
) -> dict[str, Any]:
    """The report of a run, without its costs (JSON types and numpy scalars)."""
    return {
        "program": {"name": "zemosaic-worker", "version": program_version()},
        "outputs": {name: path.name for name, path in outputs.named().items()},
        "backend": backend,
        "grid": {
            "shape": list(scene.grid.shape),
            "crval": list(scene.grid.wcs.wcs.crval),
            "header": scene.grid.wcs.to_header_string(relax=True),
        },
        "tiles": tile_rows(scene, factors),
        "pairs": pair_rows(scene),
        "frames": list(run.frames.values()),
        "gradients": gradient_facts(scene),
        "sky_plane": None if factors is None or factors.plane is None else {"range": factors.plane.span},
        "islands": int(scene.solution.component.max()) + 1,
        "set_aside": [asdict(item) for item in run.aside],
        "warnings": run.reporter.warning_texts,
        "settings": asdict(run.settings),
        "versions": versions(),
    }


def gradient_facts(scene: Scene) -> dict[str, Any]:
    """What was found of gradients, in units of the noise of one tile's pixel: see docs/photometry.md."""
    solution = scene.solution
    return {
        "found": solution.has_gradients,
        "sizes": dict(zip(("slope", "curvature", "common_curvature"), solution.gradient_sizes, strict=False)),
        "sky_error": dict(zip(("whole", "after_plane", "after_quadratic"), solution.sky_error, strict=True)),
    }


def tile_rows(scene: Scene, factors: Aesthetics | None) -> list[dict[str, Any]]:
    """One row a tile; lists hold one number a channel."""
    solution = scene.solution
    rows = []
    for k, item in enumerate(scene.placed):
        rows.append(
            {
                "name": item.tile.name,
                "frames": item.tile.n_frames,
                "weight": item.weight,
                "gain": solution.gain[k],
                "offset": solution.offset[k],
                "pivot": solution.pivot[k],
                "level": solution.level[k],
                "gradient": solution.gradient[k],
                "ln_gain_se": solution.gain_se[k],
                "offset_se": solution.offset_se[k],
                "noise": scene.surveys[k].noise,
                "island": int(solution.component[k]),
                "coordinate_error_px": item.mesh.error,
                "mesh_step_px": item.mesh.step,
                "coverage_gain": 1.0 if factors is None else factors.coverage_gain[k],
            }
        )
    return rows


def pair_rows(scene: Scene) -> list[dict[str, Any]]:
    """One row a pair: the sky step in its overlap before and after, in units of one tile's pixel noise."""
    rows = []
    for pair, after in zip(scene.solution.pairs, scene.solution.step_after, strict=True):
        rows.append(
            {
                "tiles": [scene.measured[pair.i], scene.measured[pair.j]],
                "cells": pair.samples,
                "ln_gain_ratio": pair.log_ratio,
                "ln_gain_ratio_se": pair.log_ratio_se,
                "scatter_sigma": pair.scatter,
                "step_before_sigma": pair.step_before,
                "step_after_sigma": after,
            }
        )
    return rows


def versions() -> dict[str, str]:
    """Versions of Python, the system and the libraries in use."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["byteorder"] = sys.byteorder
    return found
