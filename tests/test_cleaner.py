"""The cleaner of damaged photos: the network, its rows, and what a plan counts of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cleaners import cleaned_rows, cleaner
from enlargers import cubic_of, planes
from torch.utils.flop_counter import FlopCounterMode

from dreamsr_cli.counting_pixels import CleanerSizes
from dreamsr_cli.models.cleaner import ALIGN, FAITHFUL, MANNERS, PLEASING, CleanedRows, Cleaner
from dreamsr_cli.resample import resize


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path_factory.getbasetemp() / "cleaner-cache"))


# ---------------------------------------------------------------- the network


@torch.no_grad()
def test_untrained_it_adds_nothing() -> None:
    made = Cleaner((6, 8, 8), (1, 1, 1), pleases=True)
    for manner in MANNERS:
        assert not made(torch.rand(1, 3, 20, 28), manner).any()


@torch.no_grad()
def test_its_second_manner_begins_as_the_first() -> None:
    made, photo = cleaner(pleases=False), torch.rand(2, 3, 20, 28)
    alone = made(photo, PLEASING)
    assert torch.equal(alone, made(photo, FAITHFUL)) and alone.shape == (2, 3, 80, 112)
    made.learn_to_please()
    assert made.config["pleases"] and torch.equal(made(photo, PLEASING), alone)
    assert made.pleasing is not None and made.pleasing.exit.bias is not None
    made.pleasing.exit.bias.add_(0.1)
    assert torch.equal(made(photo, FAITHFUL), alone)
    assert (made(photo, PLEASING) - alone).abs().max() > 0.05
    known = made.pleasing
    made.learn_to_please()
    assert made.pleasing is known


@torch.no_grad()
def test_new_blocks_change_nothing_until_they_are_trained(tmp_path) -> None:
    made, photo = cleaner(), torch.rand(2, 3, 20, 28)
    before = [made(photo, manner) for manner in MANNERS]
    _, had_half, had_quarter = had = made.config["blocks"]
    made.deepen((3, 0, had_quarter + 1))
    assert tuple(made.config["blocks"]) == (3, had_half, had_quarter + 1) and had[0] < 3
    assert all(torch.equal(made(photo, manner), alone) for manner, alone in zip(MANNERS, before, strict=True))
    made.save_pretrained(tmp_path)
    again = Cleaner.from_pretrained(tmp_path)
    assert torch.equal(again(photo, PLEASING), before[1])
    weights = dict(again.named_parameters())
    for part in ("down.at_full.2", f"down.at_quarter.{had_quarter}", "faithful.at_full.2", "pleasing.at_full.2"):
        weights[f"{part}.second.bias"].add_(0.1)
    assert all((again(photo, m) - alone).abs().max() > 1e-3 for m, alone in zip(MANNERS, before, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(("views", "others"), [(2, [2]), (4, [1, 2, 3])])
def test_more_views_are_seen_alike_however_a_photo_lies(views: int, others: list[int]) -> None:
    made, photo = cleaner(), torch.rand(2, 3, 20, 28)

    def turned(manner: str, quarters: int) -> torch.Tensor:
        return torch.rot90(made(torch.rot90(photo, quarters, (2, 3)), manner), -quarters, (2, 3))

    each = {manner: [turned(manner, quarters) for quarters in (0, *others)] for manner in MANNERS}
    made.look(views)
    for manner, seen in each.items():
        found = made(photo, manner)
        assert torch.allclose(found, torch.stack(seen).mean(0), atol=1e-6)
        assert (found - seen[0]).abs().max() > 1e-3
        assert all(torch.allclose(turned(manner, quarters), found, atol=1e-6) for quarters in others)
    both = made.both(photo, 0.1)
    assert all(torch.allclose(a, made(photo, manner), atol=1e-6) for a, manner in zip(both, MANNERS, strict=True))
    with pytest.raises(ValueError, match="3 views"):
        made.look(3)


def test_the_way_down_learns_from_the_faithful_manner_alone() -> None:
    for manner in MANNERS:
        made = cleaner()
        made(torch.rand(1, 3, 16, 16), manner).square().mean().backward()
        learns = {name.split(".")[0]: parameter.grad is not None for name, parameter in made.named_parameters()}
        assert learns == {"down": manner == FAITHFUL, "faithful": manner == FAITHFUL, "pleasing": manner == PLEASING}


def test_both_manners_at_once_share_the_way_down() -> None:
    photo = torch.rand(1, 3, 16, 16)

    def gradient(faithful: float, pleasing: float, sharing: float) -> torch.Tensor:
        made = cleaner()
        both = made.both(photo, sharing)
        assert all(torch.equal(found, made(photo, manner)) for found, manner in zip(both, MANNERS, strict=True))
        first, second = (part.sum() for part in both)
        (faithful * first + pleasing * second).backward()
        return torch.cat([weights.grad.flatten() for weights in made.down.parameters() if weights.grad is not None])

    first, second = gradient(1, 0, 0.25), gradient(0, 1, 1)
    assert first.norm() > 0 and second.norm() > 0 and not torch.allclose(first, second)
    assert torch.allclose(gradient(1, 1, 0.25), first + 0.25 * second, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="one manner"):
        cleaner(pleases=False).both(photo, 1.0)


@torch.no_grad()
@pytest.mark.parametrize("blocks", [(1, 1, 1), (2, 1, 2)])
def test_it_reaches_as_far_as_it_says_and_no_farther(blocks) -> None:
    torch.manual_seed(0)
    made = Cleaner((4, 4, 4), blocks).double()
    for parameter in made.parameters():
        parameter.copy_(torch.rand_like(parameter) + 0.1)  # everything that is seen shows
    side = 4 * made.reach
    photo = torch.rand(1, 3, side, 8, dtype=torch.float64) + 0.5
    changed = photo.clone()
    changed[:, :, side // 2] += 0.1
    rows = (made(changed, FAITHFUL) - made(photo, FAITHFUL)).abs().amax((0, 1, 3)).view(side, 4).amax(1).nonzero()[:, 0]
    farthest = max(side // 2 - int(rows.min()), int(rows.max()) - side // 2)
    assert made.reach - 2 * ALIGN <= farthest <= made.reach and made.reach % ALIGN == 0


# ---------------------------------------------------------------- its rows


@torch.no_grad()
def test_rows_are_those_of_the_whole_photo(monkeypatch) -> None:
    monkeypatch.setattr(CleanedRows, "COLUMNS", 24)
    made, photo_PQC = cleaner(), np.random.default_rng(0).random((302, 50, 3), np.float32)
    for manner, views in zip(MANNERS, (1, 4), strict=True):
        made.look(views)
        rows = cleaned_rows(made, manner, photo_PQC, 1208, 200)
        whole, photo = rows.read_rows(0, 1208), planes(photo_PQC)
        padded = torch.nn.functional.pad(photo, (0, 2, 0, 2), mode="replicate")
        expected = cubic_of(photo) + made(padded, manner)[..., :1208, :200]
        assert np.abs(whole - expected[0].permute(1, 2, 0).clamp(0, 1).numpy()).max() < 1e-5
        for top, bottom in [(1207, 1208), (0, 1), (508, 516), (100, 1100)]:
            again = cleaned_rows(made, manner, photo_PQC, 1208, 200).read_rows(top, bottom)
            assert np.array_equal(again, whole[top:bottom])
            assert np.array_equal(rows.read_rows(top, bottom), whole[top:bottom])
    assert rows.strips == 3


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 130), (70, 3)])
def test_photos_of_any_size(height, width) -> None:
    photo_PQC = np.random.default_rng(1).random((height, width, 3), np.float32)
    rows = cleaned_rows(cleaner(), FAITHFUL, photo_PQC, 4 * height, 4 * width)
    assert rows.read_rows(0, 4 * height).shape == (4 * height, 4 * width, 3)


@torch.no_grad()
@pytest.mark.parametrize("factor", [1, 3.3, 8])
def test_other_factors_resize_the_fourfold_photo(factor) -> None:
    made, photo_PQC = cleaner(), np.random.default_rng(2).random((70, 16, 3), np.float32)
    height, width = round(70 * factor), round(16 * factor)
    rows = cleaned_rows(made, FAITHFUL, photo_PQC, height, width).read_rows(0, height)
    fourfold = planes(cleaned_rows(made, FAITHFUL, photo_PQC, 280, 64).read_rows(0, 280))
    assert np.abs(rows - resize(fourfold, height, width)[0].permute(1, 2, 0).clamp(0, 1).numpy()).max() < 1e-4


def test_two_threads_may_read_at_once() -> None:
    """Colours are read beside the result."""
    photo_PQC = np.random.default_rng(3).random((900, 8, 3), np.float32)
    whole = cleaned_rows(cleaner(), FAITHFUL, photo_PQC, 3600, 32).read_rows(0, 3600)
    rows = cleaned_rows(cleaner(), FAITHFUL, photo_PQC, 3600, 32)
    with ThreadPoolExecutor(4) as pool:
        spans = [(top, min(top + 700, 3600)) for top in range(0, 3600, 300)]
        for (top, bottom), found in zip(spans, pool.map(lambda span: rows.read_rows(*span), spans), strict=True):
            assert np.array_equal(found, whole[top:bottom])


@torch.no_grad()
@pytest.mark.parametrize(("blocks", "views"), [((1, 1, 1), 1), ((2, 1, 3), 1), ((1, 1, 1), 4)])
def test_a_plan_counts_its_operations_and_weights(blocks, views) -> None:
    made = Cleaner((6, 8, 10), blocks, views=views)
    sizes = CleanerSizes(dict(made.config))
    with FlopCounterMode(display=False) as counter:
        made(torch.rand(1, 3, 64, 40), FAITHFUL)
    assert sizes.flops(64, 40) == counter.get_total_flops()
    # Two strips are computed with what surrounds them.
    assert sizes.flops(256, 40) == counter.get_total_flops() * 2 * (128 + made.reach) // 64
    kernels = sum(p.numel() for p in made.parameters() if p.ndim == 4)
    assert sizes.working(64, 40, 2) - sizes.working(0, 40, 2) == 64 * 40 * (5 * 6 * 2 + (2 + (views > 1)) * 48 * 4)
    assert sizes.working(0, 40, 4) == kernels * 4
