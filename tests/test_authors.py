"""pytest tests/test_authors.py"""

import math
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from diffusers import UNet2DModel
from torch import nn
from torch.nn import functional

from ddad.config import make_settings
from ddad.data.samples import content_hash
from ddad.detector import Detector, read_record
from ddad.errors import ConfigError, ModelError
from ddad.features import create_features
from ddad.integrations.authors import convert_checkpoint
from ddad.unet import predict

OFFLINE = "efficientnet-lite2"
SIZES = {"paper": (64, 4, 32_952_707), "paper-s": (32, 2, 8_257_731)}  # base channels, heads, parameters
TOLERANCE = 1e-5  # of the largest output, in float32

# -- The published network, written down from its description: what a conversion is compared with -------------------


class Embedding(nn.Module):
    """t to (sin, cos) of t · 10000^(-k / half), k = 0 ... half - 1."""

    def __init__(self, channels, sines_first):
        super().__init__()
        self.half, self.sines_first = channels // 2, sines_first

    def forward(self, timesteps):
        rates = torch.exp(-math.log(10000) / self.half * torch.arange(self.half))
        angles = timesteps[:, None] * rates
        waves = (angles.sin(), angles.cos()) if self.sines_first else (angles.cos(), angles.sin())
        return torch.cat(waves, dim=1)


class Residual(nn.Module):
    def __init__(self, channels, width, embedded, dropout, eps, resample=None):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels, eps), nn.SiLU(), nn.Conv2d(channels, width, 3, padding=1)
        )
        self.embed_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedded, width))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, width, eps), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(width, width, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1)
        self.resample = resample or (lambda x: x)

    def forward(self, x, embedded):
        norm, activation, convolution = self.in_layers
        hidden = convolution(self.resample(activation(norm(x))))
        hidden = self.out_layers(hidden + self.embed_layers(embedded)[:, :, None, None])
        return self.skip_connection(self.resample(x)) + hidden


class SelfAttention(nn.Module):
    def __init__(self, channels, heads, eps, by_head):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps)
        self.to_qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        self.heads, self.by_head = heads, by_head

    def forward(self, x, embedded):
        pixels = x.flatten(2)
        joined = self.to_qkv(self.norm(pixels))
        if self.by_head:
            q, k, v = joined.unflatten(1, (self.heads, 3, -1)).unbind(2)  # (B, heads, C / heads, pixels)
        else:
            q, k, v = joined.unflatten(1, (3, self.heads, -1)).unbind(1)
        weights = torch.softmax(q.transpose(2, 3) @ k / math.sqrt(q.shape[2]), dim=-1)
        seen = v @ weights.transpose(2, 3)
        return (pixels + self.proj_out(seen.flatten(1, 2))).view_as(x)


class Entry(nn.Sequential):
    """Parts one after the other; the network's plain convolution knows nothing of the timestep."""

    def forward(self, x, embedded):
        for part in self:
            x = part(x) if isinstance(part, nn.Conv2d) else part(x, embedded)
        return x


def halve(x):
    return functional.avg_pool2d(x, 2)


def double(x):
    return functional.interpolate(x, scale_factor=2, mode="nearest")


class Published(nn.Module):
    """The published U-Net; the keywords allow other readings of it, to show that they are told apart."""

    def __init__(self, base, heads, dropout=0.0, *, eps=1e-5, by_head=True, sines_first=True):
        super().__init__()
        embedded = 4 * base
        self.time_embedding = nn.Sequential(
            Embedding(base, sines_first), nn.Linear(base, embedded), nn.SiLU(), nn.Linear(embedded, embedded)
        )

        def residual(channels, width, resample=None):
            return Residual(channels, width, embedded, dropout, eps, resample)

        def attention(level, channels):
            return [SelfAttention(channels, heads, eps, by_head)] if level >= 3 else []

        widths = [base * multiplier for multiplier in (1, 1, 2, 2, 4, 4)]
        channels, kept = base, [base]
        down = [Entry(nn.Conv2d(3, base, 3, padding=1))]
        for level, width in enumerate(widths):
            for _ in range(2):
                down.append(Entry(residual(channels, width), *attention(level, width)))
                channels = width
                kept.append(channels)
            if level < 5:
                down.append(Entry(residual(channels, channels, halve)))
                kept.append(channels)
        self.down = nn.ModuleList(down)
        self.middle = Entry(residual(channels, channels), *attention(5, channels), residual(channels, channels))
        up = []
        for level, width in reversed(list(enumerate(widths))):
            for block in range(3):
                parts = [residual(channels + kept.pop(), width), *attention(level, width)]
                channels = width
                if block == 2 and level > 0:
                    parts.append(residual(channels, channels, double))
                up.append(Entry(*parts))
        self.up = nn.ModuleList(up)
        self.out = nn.Sequential(nn.GroupNorm(32, channels, eps), nn.SiLU(), nn.Conv2d(channels, 3, 3, padding=1))

    def forward(self, x, timesteps):
        embedded = self.time_embedding(timesteps)
        kept = []
        for entry in self.down:
            x = entry(x, embedded)
            kept.append(x)
        x = self.middle(x, embedded)
        for entry in self.up:
            x = entry(torch.cat([x, kept.pop()], dim=1), embedded)
        return self.out(x)


def published(preset, seed=0, **readings):
    """The network with random weights strong enough that every layer counts: smaller ones would hide mistakes."""
    base, heads, _ = SIZES[preset]
    network = Published(base, **{"heads": heads, "dropout": 0.3 if preset == "paper-s" else 0.0, **readings}).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.normal_(1, 0.1, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
            elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
                module.weight.normal_(0, module.weight[0].numel() ** -0.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
    return network


# -- The network -----------------------------------------------------------------------------------------------------

TIMESTEPS = torch.tensor([225, 100, 0])


def photographs():
    """Noise of the usual strength, and faint noise, whose small variance makes the eps of the norms count."""
    strength = torch.tensor([1.0, 0.3, 0.01]).view(-1, 1, 1, 1)
    return strength * torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def save(network, path):
    """As the published code does: the state dict of a network in DataParallel."""
    torch.save(nn.DataParallel(network).state_dict(), path)
    return path


def difference(ours, theirs):
    """Largest difference over the largest output, of the image where that is worst."""
    return float(((ours - theirs).abs().amax((1, 2, 3)) / theirs.abs().amax((1, 2, 3))).max())


@pytest.fixture(scope="module", params=list(SIZES))
def converted(request, tmp_path_factory):
    """Preset, model folder, and what its network makes of the photographs, after the whole way through files."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = save(published(request.param), folder / "2000")
    model = convert_checkpoint(checkpoint, folder / "model", features_name=OFFLINE, category="tile")
    with torch.no_grad():
        return request.param, model, predict(Detector.from_pretrained(model, "cpu").unet, photographs(), TIMESTEPS)


@torch.no_grad()
def test_original_and_converted_agree(converted):
    preset, _, output = converted
    original = published(preset)
    assert sum(tensor.numel() for tensor in original.parameters()) == SIZES[preset][2]
    assert difference(output, original(photographs(), TIMESTEPS)) < TOLERANCE


@pytest.mark.parametrize("reading", [{"heads": 8}, {"eps": 1e-6}, {"by_head": False}, {"sines_first": False}], ids=str)
@torch.no_grad()
def test_the_comparison_notices_another_reading(converted, reading):
    preset, _, output = converted
    assert difference(output, published(preset, **reading)(photographs(), TIMESTEPS)) > 1000 * TOLERANCE


@torch.no_grad()
def test_plain_diffusers_computes_something_else_as_the_card_says(converted):
    _, model, output = converted
    plain = UNet2DModel.from_pretrained(model / "unet").eval()
    assert difference(predict(plain, photographs(), TIMESTEPS), output) > 1000 * TOLERANCE
    assert "load it with ddad, since plain diffusers would compute something else" in (model / "README.md").read_text()


def test_the_model_folder_says_where_it_comes_from(converted):
    preset, model, _ = converted
    assert {file.suffix for file in model.rglob("*") if file.is_file()} == {".json", ".safetensors", ".md"}
    detector = Detector.from_pretrained(model, device="cpu")
    assert detector.settings == make_settings(preset, scoring={"features": OFFLINE})
    assert (detector.shape, detector.calibration) == ((256, 256), None)
    assert detector.scheduler.config.prediction_type == "epsilon"
    record = read_record(model)
    assert record["category"] == "tile"
    assert record["converted"]["checkpoint"] == {"file": "2000", "sha256": content_hash(model.parent / "2000")}
    assert record["converted"]["features"] == {"backbone": OFFLINE, "weights": "pretrained"}
    card = (model / "README.md").read_text()
    assert "# Anomaly detector for tile" in card
    assert f"| features | {OFFLINE} |" in card
    assert "| features' weights | pretrained |" in card
    assert "| false alarms | not calibrated |" in card


@pytest.fixture(scope="module")
def weights():
    """A sound state dict of the small size, without the prefix."""
    return published("paper-s").state_dict()


def test_every_form_of_file_gives_the_same_network(weights, tmp_path):
    other = {f"module.{name}": tensor.double() for name, tensor in weights.items()}
    torch.save(weights, tmp_path / "new")
    torch.save(other, tmp_path / "old", _use_new_zipfile_serialization=False)
    stored = []
    for name in ("new", "old"):
        model = convert_checkpoint(tmp_path / name, tmp_path / "model", features_name=OFFLINE, preset="paper-s")
        stored.append((model / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert len(set(stored)) == 1


# -- The extractor ---------------------------------------------------------------------------------------------------


def extractor(seed=0):
    """torchvision's ResNet-18 with random weights and statistics."""
    network = torchvision.models.resnet18(weights=None).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.ndim > 1:
                tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
            elif name.endswith(("weight", "running_var")):
                tensor.uniform_(0.5, 2, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.1, generator=generator)
    return network


@torch.no_grad()
def test_original_and_converted_features_agree(weights, tmp_path):
    original = extractor()
    torch.save(weights, tmp_path / "2000")
    file = save(original, tmp_path / "feat8")
    model = convert_checkpoint(tmp_path / "2000", tmp_path / "model", features=file, features_name="resnet18")
    detector = Detector.from_pretrained(model, device="cpu")

    theirs = []
    for layer in (original.layer2, original.layer3):
        layer.register_forward_hook(lambda module, arguments, output: theirs.append(output))
    image = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(2)) * 2 - 1
    original(torchvision.transforms.functional.normalize((image + 1) / 2, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    for one, two in zip(detector.features(image), theirs, strict=True):
        assert difference(one, two) < TOLERANCE
    assert not any(name.startswith(("layer4", "fc")) for name in detector.features.backbone.state_dict())

    identity = {"file": "feat8", "sha256": content_hash(file)}
    assert read_record(model)["converted"]["features"] == {"backbone": "resnet18", "weights": identity}
    card = (model / "README.md").read_text()
    assert f"| features' weights | adapted, `feat8 (SHA-256 {identity['sha256']})` |" in card


def test_the_published_backbone_has_the_same_names_and_shapes_in_timm():
    with torch.device("meta"):  # half a gigabyte otherwise
        theirs = torchvision.models.wide_resnet101_2(weights=None).state_dict()
        ours = timm.create_model(make_settings("paper").scoring.features, pretrained=False).state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}


def test_without_a_file_or_a_name_the_features_are_the_presets(weights, tmp_path, monkeypatch):
    asked = []

    def create(name, layers, shape):
        asked.append((name, layers, shape))
        return create_features(OFFLINE, layers)

    monkeypatch.setattr("ddad.integrations.authors.create_features", create)
    torch.save(weights, tmp_path / "2000")
    convert_checkpoint(tmp_path / "2000", tmp_path / "model")
    assert asked == [("wide_resnet101_2.tv_in1k", (2, 3), (256, 256))]


# -- What is refused -------------------------------------------------------------------------------------------------


def convert(tmp_path, stored, **options):
    torch.save(stored, tmp_path / "2000")
    return convert_checkpoint(tmp_path / "2000", tmp_path / "model", **{"features_name": OFFLINE, **options})


def without(name):
    return lambda weights: {key: tensor for key, tensor in weights.items() if key != name}


def changed(name, change):
    return lambda weights: {**weights, name: change(weights[name])}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("up.17.0.skip_connection.bias"), "found that up.17.0.skip_connection.bias is missing"),
        (without("down.0.0.weight"), "found no tensor down.0.0.weight in it"),
        (lambda w: {**w, "up.17.1.norm.weight": torch.ones(32)}, "found that up.17.1.norm.weight is not one of them"),
        (lambda w: {**w, "module.out.2.bias": torch.ones(3)}, "found that module.out.2.bias is not one of them"),
        (
            changed("middle.1.to_qkv.weight", lambda t: t[..., 0]),
            r"middle.1.to_qkv.weight has the shape \(384, 128\) instead of \(384, 128, 1\)",
        ),
        (
            changed("down.1.0.embed_layers.1.weight", lambda t: t.repeat(2, 1)),  # scale and shift
            r"down.1.0.embed_layers.1.weight has the shape \(64, 128\) instead of \(32, 128\)",
        ),
        (changed("out.2.bias", lambda t: t * float("nan")), "found that out.2.bias holds NaN or infinity"),
        (changed("down.0.0.weight", lambda t: t[:24]), "Expected a U-Net of 64 or 32 base channels in .*, found 24"),
        (changed("down.0.0.weight", lambda t: t.sum()), "Expected a U-Net of 64 or 32 base channels in .*, found 0"),
        (changed("out.2.bias", lambda t: t.to_sparse()), r"found an entry 'out.2.bias' that is none \(Tensor\)"),
        (changed("out.2.bias", lambda t: t.tolist()), r"found an entry 'out.2.bias' that is none \(list\)"),
        (
            lambda w: {"model": w, "epoch": 2000},
            r"entry 'model' that is none \(OrderedDict\); save the network's state_dict\(",
        ),
        (lambda w: {0: w["out.2.bias"]}, r"found an entry 0 that is none \(Tensor\)"),
        (lambda w: {}, "Expected a state dict of named tensors in .*2000, found an empty one"),
        (lambda w: list(w.values()), r"named tensors in .*2000, found something else \(list\)"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(weights, tmp_path, spoil, message):
    with pytest.raises(ModelError, match=message) as caught:
        convert(tmp_path, spoil(weights))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harmed"),))


def test_what_is_not_a_state_dict_is_said_in_a_sentence_and_never_run(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": weights["out.2.weight"]}, "whole")
    torch.save({"weight": weights["out.2.weight"]}, "old", _use_new_zipfile_serialization=False)
    whole, old = Path("whole").read_bytes(), Path("old").read_bytes()
    torch.save({"weight": Harmful()}, "harmful")
    torch.save(nn.Linear(2, 2), "network")
    with warnings.catch_warnings(action="ignore"):  # deprecated, but such files are about
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), "script")
    with zipfile.ZipFile("zip", "w") as archive:
        archive.writestr("chapter.txt", "years of work")
    contents = {
        **{f"whole-{cut}": whole[:cut] for cut in range(0, len(whole), 97)},
        **{f"old-{cut}": old[:cut] for cut in range(0, len(old), 53)},
        "text": b"a sentence",
        "pickle": pickle.dumps({"weight": Harmful()}),
        **{name: Path(name).read_bytes() for name in ("harmful", "network", "script", "zip")},
    }
    for name, content in contents.items():
        Path("file").write_bytes(content)
        with pytest.raises(
            ModelError, match=r"^Expected a state dict, as torch.save writes it, in file, found .*"
        ) as e:
            convert_checkpoint("file", "model", features_name=OFFLINE)
        assert "\n" not in str(e.value), name
    assert not Path("harmed").exists()
    pickle.loads(contents["pickle"])
    assert Path("harmed").exists()  # the file would have done harm
    with pytest.raises(ModelError, match="Expected a checkpoint file at nowhere, found none; name a file"):
        convert_checkpoint("nowhere", "model")


def test_the_authors_settings_of_a_category_are_taken_where_asked_for(weights, tmp_path):
    model = convert(tmp_path, weights, dataset="visa", category="pcb1")
    settings = Detector.from_pretrained(model, device="cpu").settings
    assert (settings.sampling.conditioning_weight, settings.scoring.pixel_weight) == (9, 7)


def test_options_that_cannot_be_are_said_in_a_sentence(weights, tmp_path):
    with pytest.raises(ConfigError, match="Expected the preset paper or paper-s for a conversion, found 'xs'"):
        convert(tmp_path, weights, preset="xs")
    with pytest.raises(ModelError, match=r"Expected a checkpoint of the preset paper in .*, found one of paper-s"):
        convert(tmp_path, weights, preset="paper")
    file = save(extractor(), tmp_path / "feat8")
    for name in (OFFLINE, "resnet18.unheard-of", f"local-dir:{tmp_path}"):
        with pytest.raises(ConfigError, match=r"Expected the timm name of the backbone whose weights are in .*feat8"):
            convert(tmp_path, weights, features=file, features_name=name)
    with pytest.raises(
        ModelError, match=r"Expected the tensors of the backbone resnet34 in .*layer1.2.conv1.weight is"
    ):
        convert(tmp_path, weights, features=file, features_name="resnet34")
    with pytest.raises(ModelError, match=r"Expected a U-Net of the published code in .*feat8"):
        convert_checkpoint(file, tmp_path / "model", features_name=OFFLINE)
    with pytest.raises(ModelError, match=r"Expected a checkpoint file at .*nowhere, found none"):
        convert(tmp_path, weights, features=tmp_path / "nowhere", features_name="resnet18")
    with pytest.raises(ConfigError, match="Expected a category of mvtec-ad, visa, for which published settings exist"):
        convert(tmp_path, weights, dataset="mvtec-ad", category="spoon")
    assert not (tmp_path / "model").exists()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "chapter.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="Expected a new or empty folder, or an older model, found other files in"):
        convert(tmp_path, weights)
