"""Adapt the feature extractor to the product (paper: domain adaptation).

A network pretrained on everyday pictures sees differences that mean nothing here: a reconstruction is a little smoother
than its photograph everywhere. On good images any difference between the two is of that kind, so the extractor φ is
trained to find them alike, while distillation from its frozen copy φ₀ keeps it from forgetting what it can see:

    L = Σ_layers  d(φ(x₀), φ(y)) + λ_DL [ d(φ(y), φ₀(y)) + d(φ(x₀), φ₀(x₀)) ],   d = 1 - cosine

y is a good photograph and x₀ a reconstruction: as published, of another good photograph rebuilt towards y; here by
default y's own.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ddad.checkpoint import CheckpointStore
from ddad.config import AdaptationSettings
from ddad.detector import Detector
from ddad.errors import Interrupted
from ddad.sampling import to_unit
from ddad.training import Images, asked_to_stop, step_generator

Similarity = Literal["position", "flat"]
RECONSTRUCTION_BATCH = 4
PATIENCE = 3
"""Judged passes without a better one, after which there are no more."""


def cosine_distance(one: Tensor, other: Tensor, similarity: Similarity) -> Tensor:
    """d: 1 - cosine of two layers' features (B, C, h, w), averaged over the batch, a scalar in [0, 2].

    position: the cosine of the channels at each place, averaged over places. flat (as published): of all of an image's
    features as one vector, which strong places decide.
    """
    if similarity == "flat":
        one, other = one.flatten(1), other.flatten(1)
    return (1 - functional.cosine_similarity(one, other, dim=1)).mean()


def adaptation_loss(
    target: Sequence[Tensor],
    reconstruction: Sequence[Tensor],
    frozen_target: Sequence[Tensor],
    frozen_reconstruction: Sequence[Tensor],
    distillation_weight: float,
    similarity: Similarity,
) -> Tensor:
    """L, from the features φ(y), φ(x₀), φ₀(y), φ₀(x₀), one (B, C_l, h_l, w_l) a layer."""
    loss = torch.zeros((), device=target[0].device)
    for y, x, frozen_y, frozen_x in zip(target, reconstruction, frozen_target, frozen_reconstruction, strict=True):
        distillation = cosine_distance(y, frozen_y, similarity) + cosine_distance(x, frozen_x, similarity)
        loss = loss + cosine_distance(x, y, similarity) + distillation_weight * distillation
    return loss


class Pairs:
    """Good photographs y and reconstructions x₀ to adapt on; passes over all images, each in an order of its own.

    A photograph's own reconstruction does not change while the extractor does: it is made once and kept, in 16 bits.
    """

    def __init__(self, detector: Detector, images: Images, settings: AdaptationSettings, seed: int) -> None:
        self._detector, self._images, self._settings, self._seed = detector, images, settings, seed
        self._own: list[Tensor] = []
        if settings.pairs != "different":
            self._own = list(reconstruct_all(detector, images))

    def identity(self) -> str:
        """One hash of what the pairs are made of, the network included."""
        digest = hashlib.sha256(f"{self._settings.model_dump_json(exclude={'epochs'})} {self._seed}".encode())
        for image in self._images:
            digest.update(image.tobytes())
        for tensor in self._detector.unet.state_dict().values():
            digest.update(tensor.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(y, x₀) of one pass, (B, 3, H, W) each, on the CPU."""
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self._images))
        others = np.roll(order, 1)  # a good image other than itself
        size = max(1, self._settings.batch_size // self._detector.tiling.number)  # a canvas takes that many times more
        for number, first in enumerate(range(0, len(order), size)):
            chosen, other = order[first : first + size], others[first : first + size]
            photographs = [self._images[i] for i in chosen]
            own = self._settings.pairs == "own" or (self._settings.pairs == "both" and number % 2 == 0)
            if own:
                rebuilt = torch.stack([self._own[i] for i in chosen]).float()
            else:
                rebuilt = self._detector.reconstruct(
                    photographs,
                    start=[self._images[i] for i in other],
                    conditioning_weight=self._settings.conditioning_weight,
                    draw=epoch,  # a photograph meets other noise in each pass
                ).cpu()
            yield to_unit(photographs), rebuilt


def reconstruct_all(detector: Detector, images: Images) -> Iterator[Tensor]:
    """The reconstruction of each image, (3, H, W) float16 on the CPU."""
    for first in range(0, len(images), RECONSTRUCTION_BATCH):
        chunk = [images[i] for i in range(first, min(first + RECONSTRUCTION_BATCH, len(images)))]
        yield from detector.reconstruct(chunk).half().cpu()


@dataclass(frozen=True)
class Epoch:
    """What is known after a number of passes; 0 is the extractor as it came."""

    epoch: int
    loss: float | None
    """Mean over the pass; None before the first."""
    synthetic_auroc: float | None
    """How well good images and synthetic defects are told apart; None where nobody measured."""


class Adapter:
    """The loop over passes; keeps the best extractor, and resumes after the last whole pass."""

    def __init__(self, features: Any, settings: AdaptationSettings, device: torch.device) -> None:
        self.features = features
        self.settings = settings
        self.device = device
        self.frozen = copy.deepcopy(features).eval()
        self.layers = [layer for layer in settings.layers if layer <= max(features.layers)]
        features.backbone.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(features.backbone.parameters(), lr=settings.learning_rate)

    def step(self, target: Tensor, reconstruction: Tensor) -> float:
        """One optimisation step on a batch of pairs; returns the loss."""
        target, reconstruction = target.to(self.device), reconstruction.to(self.device)
        self.features.train(self.settings.batch_norm == "train")
        both = torch.cat([target, reconstruction])
        with torch.no_grad():
            frozen = [layer.chunk(2) for layer in self.frozen(both, self.layers)]
        if self.settings.batch_norm == "train":  # statistics of each kind of picture by itself, as published
            of_target, of_reconstruction = (self.features(images, self.layers) for images in (target, reconstruction))
            adapted = list(zip(of_target, of_reconstruction, strict=True))
        else:
            adapted = [layer.chunk(2) for layer in self.features(both, self.layers)]
        loss = adaptation_loss(
            [y for y, _ in adapted],
            [x for _, x in adapted],
            [y for y, _ in frozen],
            [x for _, x in frozen],
            self.settings.distillation_weight,
            self.settings.similarity,
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def run(
        self,
        pairs: Pairs,
        epochs: int,
        *,
        seed: int,
        judge: Callable[[], float] | None = None,
        store: CheckpointStore | None = None,
        on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    ) -> list[Epoch]:
        """Make `epochs` passes, from the last whole one in `store`; leave the extractor at the best, or at the last.

        Args:
            judge: measures the extractor as it is, higher is better; it then chooses the epoch, 0 where no pass helps.

        Returns:
            One entry a pass, and one for the extractor as it came.

        Raises:
            Interrupted: SIGINT or SIGTERM came; what was done before this pass is saved.
        """
        identity = pairs.identity()
        history = self._resume(store, identity)
        with asked_to_stop() as asked:
            if not history:
                if store:
                    store.clear()
                history.append(Epoch(0, None, self._judged(judge)))
                self._best = _copied(self.features.backbone)
                on_epoch(history[0])
            for epoch in range(len(history), epochs + 1):
                if judge and len(history) > best_epoch(history) + PATIENCE:
                    break
                # Dropout and the like, where a backbone has them, draw from the global generator.
                torch.manual_seed(int(step_generator(seed, epoch).initial_seed()))
                losses = []
                for target, reconstruction in pairs.batches(epoch):
                    losses.append(self.step(target, reconstruction))
                    if asked():
                        raise Interrupted(f"adaptation pass {epoch} of {epochs}")
                history.append(Epoch(epoch, float(np.mean(losses)), self._judged(judge)))
                if judge is None or history[-1].epoch == best_epoch(history):
                    self._best = _copied(self.features.backbone)
                on_epoch(history[-1])
                if store:
                    state = {"identity": identity, "history": [vars(entry) for entry in history]}
                    store.save(epoch, self._tensors(), state)
                if asked():
                    raise Interrupted(f"adaptation pass {epoch} of {epochs}")
        self.features.backbone.load_state_dict(self._best)
        self.features.backbone.requires_grad_(False)
        self.features.eval()
        return history

    def _judged(self, judge: Callable[[], float] | None) -> float | None:
        self.features.eval()
        return judge() if judge else None

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        state = self.optimizer.state_dict()["state"]
        return {
            "features": self.features.backbone.state_dict(),
            "best": self._best,
            "optimizer": {f"{index}/{key}": value for index, values in state.items() for key, value in values.items()},
        }

    def _resume(self, store: CheckpointStore | None, identity: str) -> list[Epoch]:
        latest = store.load_latest() if store else None
        if latest is None or latest[1]["identity"] != identity:  # none, or left behind by another adaptation
            return []
        tensors, state = latest
        self.features.backbone.load_state_dict(tensors["features"])
        self._best = tensors["best"]
        stored: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors["optimizer"].items():
            index, entry = name.split("/")
            stored.setdefault(int(index), {})[entry] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": stored, "param_groups": groups})
        return [Epoch(**entry) for entry in state["history"]]


def best_epoch(history: Sequence[Epoch]) -> int:
    """The epoch that finds synthetic defects best, the earliest of equals; the last where nobody measured."""
    measured = [entry for entry in history if entry.synthetic_auroc is not None]
    if not measured:
        return history[-1].epoch
    return max(measured, key=lambda entry: (entry.synthetic_auroc, -entry.epoch)).epoch


def _copied(module: Any) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
