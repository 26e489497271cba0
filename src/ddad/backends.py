"""Run the two networks in something faster than eager PyTorch: `compile`, `onnxruntime` or `openvino`.

ONNX Runtime and OpenVINO read one graph a network, made from the model folder once and kept in a cache folder of the
user, by the content of the files it was made from. What they compute is the same to rounding: a few millionths of a
score in fp32. `benchmarks/speed.py` measures both, time and difference.
"""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ddad.config import Backend, Precision
from ddad.errors import ConfigError
from ddad.files import atomic_folder, sha256
from ddad.runtime import load_graph
from ddad.unet import parse_device, predict

BACKENDS: tuple[Backend, ...] = get_args(Backend)
WITH_GRAPHS: tuple[Backend, ...] = ("onnxruntime", "openvino")
GRAPH_VERSION = 2
"""Of the graphs in the cache; another number, and they are made again."""
_OPSET = 20
_UNET, _FEATURES, _SCHEDULE = "unet.onnx", "features.onnx", "schedule.safetensors"


class Networks(NamedTuple):
    """What a detector needs of its networks, whatever computes them."""

    denoise: Callable[[Tensor, Tensor], Tensor]
    """The U-Net's raw output for x_t (B, 3, H, W) and timesteps (B,)."""
    features: Callable[[Tensor], Sequence[Tensor]]
    """One (B, C_i, H_i, W_i) a layer, of images (B, 3, H, W) in [-1, 1]."""
    alphas_cumprod: Tensor
    """ā, (T,)."""
    prediction_type: str


def check_backend(backend: str, precision: str, device: str | torch.device | None) -> None:
    """Raises ConfigError where there is no such backend, it lacks its package, or cannot do what is asked."""
    if backend not in BACKENDS:
        raise ConfigError(f"Expected a backend among {', '.join(BACKENDS)}, found {backend!r}.")
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"Expected a precision of fp32 or bf16, found {precision!r}.")
    if backend not in WITH_GRAPHS:
        return
    if device is not None and parse_device(device).type != "cpu":
        raise ConfigError(f"Expected device cpu for backend {backend}, found {device}; use backend compile on a GPU.")
    if backend == "onnxruntime" and precision != "fp32":
        raise ConfigError(f"Expected precision fp32 for backend onnxruntime, found {precision}; use openvino for bf16.")
    for package in (backend, "onnxscript"):
        if find_spec(package) is None:
            raise ConfigError(
                f"Expected the package {package} for backend {backend}, found none; pip install 'ddad[export]'."
            )


# -- PyTorch -----------------------------------------------------------------------------------------------------------


def compiled(unet: Any, features: Any) -> tuple[Callable[..., Tensor], Callable[[Tensor], Sequence[Tensor]]]:
    """Both networks through torch.compile, for one batch size: smaller batches are filled up and cut again.

    On a GPU as CUDA graphs, which leave no time between kernels.
    """
    mode = "reduce-overhead" if next(unet.parameters()).device.type == "cuda" else "default"

    def denoise(sample: Tensor, timesteps: Tensor) -> Tensor:
        return predict(unet, sample, timesteps)

    fast_unet = torch.compile(denoise, dynamic=False, mode=mode)
    fast_features = torch.compile(features, dynamic=False, mode=mode)
    return _one_size(fast_unet), _one_size(fast_features)


def _one_size(network: Callable[..., Any]) -> Callable[..., Any]:
    """Calls with batches smaller than the largest one so far are filled up to that: no shape is compiled twice."""
    largest = 0

    def call(*batch: Tensor) -> Any:
        nonlocal largest
        size = len(batch[0])
        largest = max(largest, size)
        filled = [torch.cat([one, one[-1:].expand(largest - size, *one.shape[1:])]).contiguous() for one in batch]
        output = network(*filled)
        # CUDA graphs write every answer to the same place.
        return output[:size].clone() if isinstance(output, Tensor) else [one[:size].clone() for one in output]

    return call


# -- graphs ------------------------------------------------------------------------------------------------------------


class Graphs(NamedTuple):
    """The graphs of one model for one shape, on disk."""

    folder: Path

    def load(self, backend: Backend, precision: Precision) -> Networks:
        """The networks in `onnxruntime` or `openvino`, on the CPU, with as many threads as PyTorch has."""
        threads = torch.get_num_threads()
        unet, features = (load_graph(self.folder / name, backend, precision, threads) for name in (_UNET, _FEATURES))
        with safe_open(self.folder / _SCHEDULE, framework="pt") as schedule:
            alphas_cumprod = schedule.get_tensor("alphas_cumprod")
            prediction_type = schedule.metadata()["prediction_type"]

        def denoise(sample: Tensor, timesteps: Tensor) -> Tensor:
            return torch.from_numpy(unet(sample.numpy(), timesteps.numpy())[0])

        def extract(image: Tensor) -> list[Tensor]:
            return [torch.from_numpy(layer) for layer in features(image.numpy())]

        return Networks(denoise, extract, alphas_cumprod, prediction_type)


def find_graphs(model: Path, shape: Sequence[int]) -> Graphs | None:
    """The graphs of the model folder `model`, where they are in the cache; raises OSError for an incomplete folder."""
    graphs = _place(model, shape)
    return graphs if graphs.folder.is_dir() else None


def make_graphs(
    model: Path, shape: Sequence[int], unet: Any, features: Any, alphas_cumprod: Tensor, prediction_type: str
) -> Graphs:
    """Turn both networks of the model folder `model` into graphs, once; takes half a minute.

    Raises:
        DataError: no folder can be made in the cache.
    """
    graphs = _place(model, shape)
    image = torch.zeros(2, 3, *shape)  # diffusers' network takes special paths for a batch of one
    timesteps = torch.zeros(2, dtype=torch.int64)
    with atomic_folder(graphs.folder) as temporary:
        export_network(_Denoiser(unet), (image, timesteps), temporary / _UNET)
        export_network(features, (image,), temporary / _FEATURES)
        schedule = {"alphas_cumprod": alphas_cumprod.cpu()}
        save_file(schedule, temporary / _SCHEDULE, metadata={"prediction_type": prediction_type})
    return graphs


def cache_folder() -> Path:
    """Where graphs are kept: `$XDG_CACHE_HOME/ddad`, by default `~/.cache/ddad`; safe to delete."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddad"


def _place(model: Path, shape: Sequence[int]) -> Graphs:
    record = json.loads((model / "detector.json").read_text(encoding="utf-8"))
    what = [GRAPH_VERSION, _OPSET, torch.__version__, list(shape), record["settings"]["network"]]
    digest = hashlib.sha256(json.dumps(what).encode())
    for part in ("unet", "scheduler", "features"):
        for file in sorted((model / part).iterdir()):
            digest.update(file.name.encode())
            digest.update(bytes.fromhex(sha256(file)))
    return Graphs(cache_folder() / digest.hexdigest()[:32])


class _Denoiser(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timesteps: Tensor) -> Tensor:
        return predict(self.unet, sample, timesteps)


def export_network(
    network: nn.Module, example: tuple[Tensor, ...], path: Path, *, sizes: dict[int, str] | None = None, **options: Any
) -> None:
    """Write an ONNX graph of a network that takes any number of images, or any size in the dimensions that are named.

    Args:
        example: its inputs, at least two images each.
        sizes: names of dimensions of each input that may have other sizes; by default the first.
        options: of `torch.onnx.export`.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer

    # The limits are of the tracing only: the graph takes any size.
    open_sizes = {
        place: torch.export.Dim(name, min=2, max=63 if place == 0 else 1 << 15)
        for place, name in (sizes or {0: "batch"}).items()
    }
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            network.eval(),
            example,
            dynamo=True,
            dynamic_shapes=tuple(open_sizes for _ in example),
            opset_version=_OPSET,
            verbose=False,
            optimize=False,
            **options,
        )
        assert program is not None  # it has no path to write to
        # Of the exporter's own optimisation the part that runners don't do, or need; the rest takes minutes.
        optimizer.fold_constants(program.model)
        optimizer.remove_unused_nodes(program.model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(program.model)
        common.DeduplicateInitializersPass()(program.model)
        common.CommonSubexpressionEliminationPass()(program.model)
        program.save(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own internals."""
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
