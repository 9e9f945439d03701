"""Every figure against its definition, or against somebody else's program for it."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity

from dreamsr_cli.errors import DreamSRError, InputError, UsageError, WeightsError
from dreamsr_cli.evaluation import niqe as niqe_module
from dreamsr_cli.evaluation import pyiqa_metrics
from dreamsr_cli.evaluation.metric import Metric, Sample
from dreamsr_cli.evaluation.metrics import (
    DEFAULT_METRICS,
    PAPER_METRICS,
    MetricOptions,
    choose_metrics,
    parse_names,
    signal_metric,
)
from dreamsr_cli.evaluation.niqe import load_model, niqe
from dreamsr_cli.evaluation.perceptual_metrics import KINDS, distance_metric
from dreamsr_cli.evaluation.runs import read_levels
from dreamsr_cli.evaluation.signal_metrics import luma, planes, psnr, ssim
from dreamsr_cli.models import perceptual
from dreamsr_cli.models.perceptual import BACKBONES
from dreamsr_cli.weights import file_sha256

SHARED = Path(__file__).resolve().parents[2] / "shared"
WEIGHTS = SHARED / "data" / "weights"
WIDTHS = {"lpips-alex": [64, 192, 384, 256, 256], "lpips-vgg": [64, 128, 256, 512, 512]}
needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason=f"no perceptual weights at {WEIGHTS}")


def textured(seed: int, height: int = 200, width: int = 300) -> np.ndarray:
    """Smooth colours with noise, uint8 (P, Q, 3)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 4, width // 4, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return (smooth + rng.integers(-12, 13, (height, width, 3))).clip(0, 255).astype(np.uint8)


def pair(seed: int, height: int = 60, width: int = 47, noise: int = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = textured(seed, height + 4, width + 4)[:height, :width]
    return a, (a.astype(int) + rng.integers(-noise, noise + 1, a.shape)).clip(0, 255).astype(np.uint8)


def sample(sr: np.ndarray, hq: np.ndarray | None) -> Sample:
    nowhere = Path("nowhere.png")
    return Sample(sr.astype(np.float64), None if hq is None else hq.astype(np.float64), nowhere, nowhere, None)


# ---------------------------------------------------------------- PSNR and SSIM


def test_luma_is_studio_range_bt601_unrounded():
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 200, 77]]])
    assert luma(colours)[0] == pytest.approx(
        [16, 235, 16 + 65.481, 16 + 128.553, 16 + 24.966, 16 + (654.81 + 25710.6 + 1922.382) / 255]
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("crop", [0, 4])
def test_psnr_y_agrees_with_its_definition_to_1e_4_db(seed, crop):
    a, b = pair(seed, noise=1 + 9 * seed)
    total, count = 0.0, 0
    for row in range(crop, a.shape[0] - crop):
        for col in range(crop, a.shape[1] - crop):
            y = [
                16 + (65.481 * int(p[row, col, 0]) + 128.553 * int(p[row, col, 1]) + 24.966 * int(p[row, col, 2])) / 255
                for p in (a, b)
            ]
            total += (y[0] - y[1]) ** 2
            count += 1
    wanted = 20 * math.log10(255) - 10 * math.log10(total / count)
    found = signal_metric("psnr", "y", crop).score(sample(a, b))
    assert abs(found - wanted) < 1e-9


def test_the_choice_of_channel_and_border_changes_psnr_and_is_in_the_name():
    a, b = pair(7)
    b[:4] = 255 - b[:4]
    columns = [signal_metric("psnr", channel, crop) for channel in ("rgb", "y") for crop in (0, 4)]
    assert [m.ident.id for m in columns] == ["psnr-rgb", "psnr-rgb-crop4", "psnr-y", "psnr-y-crop4"]
    values = [m.score(sample(a, b)) for m in columns]
    assert min(abs(x - y) for i, x in enumerate(values) for y in values[:i]) > 0.5
    assert len({m.ident.definition for m in columns}) == 4


def test_psnr_of_equal_pictures_is_infinite():
    a, _ = pair(1)
    assert psnr(a.astype(float), a.astype(float)) == math.inf


@pytest.mark.parametrize("channel", ["rgb", "y"])
@pytest.mark.parametrize("crop", [0, 3])
def test_ssim_equals_scikit_image(channel, crop):
    a, b = pair(3)
    found = signal_metric("ssim", channel, crop).score(sample(a, b))
    x, y = (planes(p, channel, crop) for p in (a, b))
    wanted = structural_similarity(
        x, y, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert found == pytest.approx(wanted, abs=1e-10) and 0.1 < found < 0.99


def test_too_small_for_a_figure():
    tiny = np.zeros((10, 10, 3))
    with pytest.raises(InputError, match="11 pixels"):
        ssim(tiny, tiny)
    with pytest.raises(InputError, match="border of 5"):
        planes(tiny, "y", 5)


OSEDIFF_PSNR = {
    "Canon_003_LR4": 23.226414,
    "Canon_009_LR4": 24.175928,
    "Canon_013_LR4": 24.523401,
    "Canon_019_LR4": 24.609070,
    "Canon_023_LR4": 26.045341,
    "Canon_029_LR4": 27.609627,
    "Canon_033_LR4": 24.966484,
    "Canon_039_LR4": 25.846281,
    "Canon_043_LR4": 26.105312,
    "Canon_049_LR4": 22.189711,
    "Nikon_003_LR4": 21.906532,
    "Nikon_009_LR4": 23.717701,
    "Nikon_013_LR4": 20.944630,
}
"""PSNR that OSEDiff published for its RealSR results: cswry/OSEDiff 851cb889, preset/datasets/benchmark_realsr/
results_osediff/metrics/test_METRICS_241023-172854.log."""


@pytest.mark.skipif(
    not (SHARED / "data/eval/results_osediff").is_dir(), reason="OSEDiff's RealSR results are not on this machine"
)
def test_psnr_that_osediff_published_for_its_results():
    metric = signal_metric("psnr", "y", 0)
    for name, published in OSEDIFF_PSNR.items():
        sr = read_levels(SHARED / "data/eval/results_osediff" / f"{name}.png")
        hq = read_levels(SHARED / "data/eval/RealSRVal_crop128/test_HR" / f"{name}.png")
        assert metric.score(sample(sr, hq)) == pytest.approx(published, abs=1e-3)


# ---------------------------------------------------------------- NIQE


@needs_weights
@pytest.mark.parametrize(
    ("seed", "theirs"), [(1, 11.905857535251004), (2, 14.488263339141877), (3, 15.179226359664236)]
)
def test_niqe_agrees_with_pyiqas_code(seed, theirs):
    """`theirs`: pyiqa 0.1.16's niqe_arch.py with the same pristine model, on the same pictures."""
    assert niqe(textured(seed), load_model(WEIGHTS)) == pytest.approx(theirs, abs=0.03)


@needs_weights
@pytest.mark.skipif(not pyiqa_metrics.is_installed(), reason="pyiqa is not installed")
def test_niqe_within_a_quarter_of_pyiqas():
    import pyiqa  # ty: ignore[import-not-found]

    theirs = pyiqa.create_metric("niqe")
    for path in sorted((SHARED / "data/eval/kodak8").glob("*.png"))[:4]:
        rgb = read_levels(path)
        tensor = torch.tensor(rgb, dtype=torch.float32).permute(2, 0, 1)[None] / 255
        assert abs(niqe(rgb, load_model(WEIGHTS)) - float(theirs(tensor))) < 0.25


@needs_weights
def test_niqe_grows_with_noise_and_blur():
    path = SHARED / "data/eval/kodak8/kodim04.png"
    photo = Image.open(path).convert("RGB")
    model = load_model(WEIGHTS)
    noisy = np.asarray(photo).astype(float) + np.random.default_rng(0).normal(0, 30, (768, 512, 3))
    blurred = photo.resize((128, 192), Image.Resampling.BICUBIC).resize((512, 768), Image.Resampling.BICUBIC)
    good = niqe(np.asarray(photo), model)
    assert good + 1 < niqe(noisy.clip(0, 255), model) and good + 1 < niqe(np.asarray(blurred), model)


@pytest.mark.parametrize(("shape", "left", "right"), [(2.0, 1.0, 1.0), (1.0, 0.5, 1.5), (4.0, 2.0, 1.0)])
def test_the_fit_recovers_the_distribution_it_is_drawn_from(shape, left, right):
    rng = np.random.default_rng(5)
    count = 400_000
    size = rng.gamma(1 / shape, 1, count) ** (1 / shape)
    is_left = rng.random(count) < left / (left + right)
    values = np.where(is_left, -left * size, right * size).reshape(1, 400, 1000)
    found = [float(x[0]) for x in niqe_module._fit(values)]
    assert found == pytest.approx([shape, left, right], rel=0.03)


def test_niqe_where_it_is_not_defined(tmp_path):
    model = niqe_module.PristineModel(np.zeros(36), np.eye(36), np.full((7, 7), 1 / 49))
    with pytest.raises(InputError, match="96x192"):
        niqe(textured(0, 96, 180), model)
    with pytest.raises(InputError, match="no texture"):
        niqe(np.full((192, 192, 3), 127.0), model)
    with pytest.raises(WeightsError, match=r"niqe_pris_params\.npz"):
        load_model(tmp_path)
    (tmp_path / "niqe").mkdir()
    (tmp_path / niqe_module.PARAMS).write_bytes(b"PK no zip")
    with pytest.raises(WeightsError, match="pristine"):
        load_model(tmp_path)


# ---------------------------------------------------------------- LPIPS


@needs_weights
def test_lpips_squeeze_agrees_with_the_reference_tool():
    spec = importlib.util.spec_from_file_location("lpips_squeeze", SHARED / "tools" / "lpips_squeeze.py")
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    metric = distance_metric("lpips-squeeze", WEIGHTS, "cpu")
    for seed in range(3):
        a, b = pair(seed, 72, 90)
        tensors = [torch.tensor(p).permute(2, 0, 1)[None].float() / 255 for p in (a, b)]
        assert metric.score(sample(a, b)) == pytest.approx(tool.distance(*tensors), rel=1e-4)
    assert metric.ident.id == "lpips-squeeze*" and metric.score(sample(a, a)) == 0


@pytest.fixture
def drawn_weights(tmp_path, monkeypatch) -> Path:
    """Weights of drawn values in the layout of torchvision's and LPIPS' files, with a classifier; taken as known."""
    torch.manual_seed(0)
    sums = {}
    for kind, widths in WIDTHS.items():
        backbone = BACKBONES[kind]
        state = {f"features.{key}": value for key, value in backbone.build().state_dict().items()}
        state["classifier.1.weight"] = torch.zeros(4, 4)
        heads = {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1) for i, w in enumerate(widths)}
        for name, tensors in ((backbone.weights.replace("*", "net"), state), (backbone.heads, heads)):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(tensors, path)
            sums[name] = file_sha256(path)
    monkeypatch.setattr(perceptual, "PINS", sums)
    return tmp_path


@pytest.mark.parametrize("name", ["lpips", "lpips-vgg"])
def test_lpips_is_its_definition(name, drawn_weights):
    kind = KINDS[name]
    backbone = BACKBONES[kind]
    a, b = pair(2, 64, 80)
    metric = distance_metric(name, drawn_weights, "cpu")
    found = metric.score(sample(a, b))
    network = backbone.build()
    state = torch.load(drawn_weights / backbone.weights.replace("*", "net"), weights_only=True)
    network.load_state_dict({k.removeprefix("features."): v for k, v in state.items() if k.startswith("features")})
    heads = iter(torch.load(drawn_weights / backbone.heads, weights_only=True).values())
    shift, spread = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    xs = [((torch.tensor(p).float() / 255 * 2 - 1 - shift) / spread).permute(2, 0, 1)[None] for p in (a, b)]
    total = torch.zeros(())
    with torch.no_grad():
        for index, layer in enumerate(network):
            xs = [layer(x) for x in xs]
            if index in backbone.taps:
                units = [x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for x in xs]
                total = total + ((units[0] - units[1]) ** 2 * next(heads)).sum(1).mean()
    assert found == pytest.approx(float(total), rel=1e-4) and found > 0
    assert metric.ident.id == kind and len(metric.ident.weights_sha256 or "") == 64
    with pytest.raises(InputError, match="32 pixels"):
        metric.score(sample(a[:20], b[:20]))


def test_lpips_weights_that_cannot_be_used(drawn_weights, no_pyiqa, monkeypatch, tmp_path):
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))
    with pytest.raises(WeightsError, match="needs its weights"):
        distance_metric("lpips", None, "cpu")
    with pytest.raises(WeightsError, match="not a folder"):
        distance_metric("lpips", drawn_weights / "gone", "cpu")
    (drawn_weights / "alexnet" / "net.pth").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="not a file that is known") as error:
        distance_metric("lpips", drawn_weights, "cpu")
    assert "pyiqa" in error.value.hint
    columns = choose_metrics(MetricOptions(("lpips", "psnr"), weights=drawn_weights), True)
    assert "lpips" in columns.unavailable and len(columns.metrics) == 2


@pytest.fixture
def no_pyiqa(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        pyiqa_metrics.importlib.util, "find_spec", lambda name, *rest: None if name == "pyiqa" else real(name, *rest)
    )


# ---------------------------------------------------------------- names, and pyiqa


def test_names_and_aliases():
    assert parse_names("psnr, SSIM,psnr") == ("psnr", "ssim")
    assert parse_names("default") == DEFAULT_METRICS and parse_names("paper,niqe") == (*PAPER_METRICS, "niqe")
    assert parse_names("psnr-y") == ("psnr-y",)
    with pytest.raises(UsageError, match="'lpip'") as error:
        parse_names("psnr,lpip")
    assert "did you mean lpips" in error.value.hint
    with pytest.raises(UsageError, match="no metric"):
        parse_names(" , ")


def test_sets_without_references_have_no_reference_figures():
    columns = choose_metrics(MetricOptions(("psnr", "delta-e"), ("y",)), has_references=False)
    assert [m.ident.id for m in columns.metrics] == ["delta-e"]
    assert columns.unavailable == {"psnr-y": "this set has no references"}


def test_without_pyiqa_one_line_says_what_it_adds(no_pyiqa):
    columns = choose_metrics(MetricOptions(PAPER_METRICS, ("rgb",)), has_references=True)
    assert [m.ident.id for m in columns.metrics] == ["psnr-rgb", "ssim-rgb"]
    (offer,) = columns.notes
    assert "MUSIQ, MANIQA, CLIPIQA+ and DISTS" in offer and "Noncommercial" in offer and "\n" not in offer
    assert set(columns.unavailable) == {"lpips", "musiq", "maniqa", "clipiqa+"}
    assert choose_metrics(MetricOptions(("psnr",)), True).notes == ()


@pytest.fixture
def stand_in_for_pyiqa(monkeypatch):
    """A module called pyiqa that makes one metric and can't reach the weights of any other."""

    def create_metric(name: str, device: torch.device, as_loss: bool):
        if name != "musiq":
            raise OSError(f"<urlopen error: no route to the weights of {name}>")
        return lambda x: x.mean() * 100

    module = types.ModuleType("pyiqa")
    setattr(module, "create_metric", create_metric)  # noqa: B010
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    monkeypatch.setattr(pyiqa_metrics, "is_installed", lambda: True)
    monkeypatch.setattr(pyiqa_metrics.importlib.metadata, "version", lambda name: "9.9")


def test_pyiqas_metrics_are_named_in_full_or_unavailable_with_the_reason(stand_in_for_pyiqa):
    columns = choose_metrics(MetricOptions(("musiq", "maniqa", "maniqa-pipal"), ("rgb",)), has_references=False)
    (metric,) = columns.metrics
    assert metric.ident.id == "musiq-koniq" and "pyiqa 9.9" in metric.ident.definition
    a, _ = pair(1)
    assert metric.score(sample(a, None)) == pytest.approx(a.mean() / 2.55, rel=1e-5)
    assert set(columns.unavailable) == {"maniqa", "maniqa-pipal"}
    assert "no route to the weights of maniqa" in columns.unavailable["maniqa"]


def test_two_families_are_never_one_column():
    ids = [variant.id for variant in pyiqa_metrics.VARIANTS.values()]
    assert len(set(ids)) == len(ids)
    assert {"maniqa-koniq", "maniqa-pipal", "clipiqa+-rn50", "clipiqa+-vitL14-512"} <= set(ids)


def test_a_metric_that_needs_a_reference_says_so_without_one():
    metrics: list[Metric] = [signal_metric("psnr", "y", 0), signal_metric("ssim", "rgb", 0)]
    for metric in metrics:
        with pytest.raises(DreamSRError, match="no reference"):
            metric.score(sample(pair(1)[0], None))
