"""How many network calls, at which timesteps, and of which order: quality on synthetic defects, and time.

    python benchmarks/steps.py DATA MODEL [--defects 160] [--backend torch] [--test]

Good images are those of the model's *select* split, with synthetic defects painted on them; units come from one half of
these images and judge the other half. Grids: uniform in t (the default), quadratic (dense near the end), Karras (ρ = 7
in the noise level). Second order: DPM-Solver++(2M) (Lu et al. 2022), which extrapolates from the clean estimate of the
call before and needs no further call. ± is the standard error of the difference to the model's own setting, over groups
of images. With --test the uniform grids are measured on test images instead: to report, after the choice.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ddad.detector
from ddad import sampling
from ddad.anomaly_map import image_score
from ddad.config import SamplingSettings
from ddad.data.folder import scan
from ddad.data.samples import paths_by_hash, spread
from ddad.detector import Detector
from ddad.evaluation import evaluate
from ddad.images import read_image
from ddad.metrics import image_metrics
from ddad.report import inspect
from ddad.tuning import GROUPS, SyntheticTest, paint_halves

COUNTS = (10, 5, 3, 2, 1)


class GridSettings(SamplingSettings):
    """Network calls at any falling timesteps."""

    grid: tuple[int, ...]

    @property
    def timesteps(self) -> tuple[int, ...]:
        return self.grid


def noise_level(alphas_cumprod: Tensor) -> Tensor:
    """σ = √((1-ā)/ā)."""
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


def grids(start: int, count: int, alphas_cumprod: Tensor) -> dict[str, tuple[int, ...]]:
    """Timesteps of `count` calls from `start` on."""
    share = np.arange(count) / count
    found = {
        "uniform": tuple(round(start * (1 - one)) for one in share),
        "quadratic": tuple(max(1, round(start * (1 - one) ** 2)) for one in share),
    }
    sigma = noise_level(alphas_cumprod).numpy()
    ends = sigma[[start, 1]] ** (1 / 7)
    wanted = (ends[0] + np.arange(count) / max(1, count - 1) * (ends[1] - ends[0])) ** 7
    karras = tuple(int(np.abs(sigma - one).argmin()) for one in wanted)
    found["karras"] = tuple(max(one, 1) for one in karras)
    return found if count > 1 else {"uniform": found["uniform"]}


def second_order(reconstruct: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`ddad.sampling.reconstruct` whose clean estimates are extrapolated from the one before."""

    def extrapolated(
        denoiser: sampling.Denoiser, target: Tensor, alphas_cumprod: Tensor, timesteps: Sequence[int], **options: Any
    ) -> Tensor:
        log_snr = -noise_level(alphas_cumprod).log()
        before: list[Tensor] = []

        def both(sample: Tensor, timestep: int) -> Tensor:
            clean = denoiser(sample, timestep)
            index = list(timesteps).index(timestep)
            before.append(clean)
            if index == 0 or index + 1 == len(timesteps):  # the last step goes to no noise at all
                return clean
            last, now, following = (log_snr[timesteps[i]] for i in (index - 1, index, index + 1))
            ratio = (following - now) / (now - last)
            return clean + ratio / 2 * (clean - before[-2])

        return reconstruct(both, target, alphas_cumprod, timesteps, **options)

    return extrapolated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("model")
    parser.add_argument("--defects", type=int, default=160)
    parser.add_argument("--good", type=int, default=93, help="good images at most")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--test", action="store_true")
    options = parser.parse_args()

    detector = Detector.from_pretrained(options.model, backend=options.backend, precision=options.precision)
    paths = paths_by_hash(sample.path for sample in scan(options.data).train)
    parts = detector.record["data"]
    good, ranking = (
        [read_image(paths[one], detector.shape, detector.image_rule) for one in spread(sorted(parts[part]), most)]
        for part, most in (("select", options.good), ("calibration", 10**6))
    )
    painted = paint_halves(good, options.defects, detector.settings.seed)
    own, plain = detector.settings, ddad.detector.reconstruct
    alphas = detector.scheduler.alphas_cumprod

    def use(grid: tuple[int, ...], order: int) -> None:
        chosen = GridSettings(**own.sampling.model_dump(), grid=grid)
        detector.settings = own.model_copy(update={"sampling": chosen})
        ddad.detector.reconstruct = second_order(plain) if order == 2 else plain  # type: ignore[attr-defined]

    def measure(grid: tuple[int, ...], order: int) -> tuple[np.ndarray, float, float]:
        use(grid, order)
        test = SyntheticTest(detector, good, painted)
        detector.reconstruct(good[:4])
        times = []
        for _ in range(3):
            started = time.perf_counter()
            detector.reconstruct(good[:4])
            times.append((time.perf_counter() - started) / 4)
        distances = test.distances()
        auroc = image_metrics(image_score(test.maps(distances)).numpy(), test.labels)["image_auroc"]
        return test.quality(distances), auroc, 1000 * min(times)

    def on_synthetic() -> None:
        print(
            "| calls | grid | order | timesteps | image AUROC | mean of AUROC and AUPRO | difference | ms to rebuild |"
        )
        print("|---|---|---|---|---|---|---|---|")
        reference, _, _ = measure(own.sampling.timesteps, 1)
        for count in COUNTS:
            for name, grid in grids(own.sampling.start_timestep, count, alphas).items():
                for order in (1, 2) if count > 2 and name == "uniform" else (1,):
                    quality, auroc, milliseconds = measure(grid, order)
                    gain = quality - reference
                    steps = ", ".join(map(str, grid))
                    print(
                        f"| {count} | {name} | {order} | {steps} | {auroc:.3f} | {quality.mean():.3f} | "
                        f"{gain.mean():+.3f} ± {gain.std(ddof=1) / GROUPS**0.5:.3f} | {milliseconds:.0f} |",
                        flush=True,
                    )

    def on_test() -> None:
        print("| calls | image AUROC | pixel AUROC | AUPRO | ms an image |\n|---|---|---|---|---|")
        samples = scan(options.data).test
        for count in COUNTS:
            use(grids(own.sampling.start_timestep, count, alphas)["uniform"], 1)
            detector.calibrate(good, ranking)
            found = evaluate(inspect(detector, samples, 4, 2, [])).metrics
            columns = " | ".join(f"{found[name]:.3f}" for name in ("image_auroc", "pixel_auroc", "aupro"))
            print(f"| {count} | {columns} | {1000 * (found['seconds_per_image'] or 0):.0f} |", flush=True)

    print(f"{len(good)} good images, {len(painted)} defects, {torch.get_num_threads()} threads, {datetime.now(UTC):%F}")
    (on_test if options.test else on_synthetic)()


if __name__ == "__main__":
    main()
