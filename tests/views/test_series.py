import io

import numpy as np
import pytest
import torch

from mvpretrain.views.series import Augment, SeriesConfig

LEADS = np.random.default_rng(0).normal(3.0, 2.0, (4, 100))


def saved(**arrays: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.savez(target, **arrays)  # pyright: ignore
    return target.getvalue()


def npy(array: np.ndarray, **options) -> bytes:
    target = io.BytesIO()
    np.save(target, array, **options)
    return target.getvalue()


def torched(value) -> bytes:
    target = io.BytesIO()
    torch.save(value, target)
    return target.getvalue()


def plain(**settings) -> SeriesConfig:
    return SeriesConfig.model_validate({"channels": 4, "length": 60, "standardize": False} | settings)


@pytest.mark.parametrize("steps", [1, 59, 60, 61, 200])
def test_shape_and_mask_are_static(steps):
    raw = np.random.default_rng(1).normal(size=(4, steps))
    for train in (True, False):
        item = plain().build(train)(raw)
        assert item.data.shape == (60, 4) and item.data.dtype == torch.float32
        assert item.mask is not None and item.mask.tolist() == [t < steps for t in range(60)]
        assert not item.data[min(steps, 60) :].any()
    assert np.allclose(item.data[: min(steps, 60)], raw.T[:60])


def test_every_form_gives_the_same_series():
    want = plain().build(train=False)(LEADS).data
    forms = [npy(LEADS), saved(x=LEADS), torched(torch.from_numpy(LEADS)), torched({"x": torch.from_numpy(LEADS)})]
    for raw in (*forms, torch.from_numpy(LEADS), LEADS.tolist()):
        assert torch.equal(plain().build(train=False)(raw).data, want)
    assert torch.equal(plain(key="x").build(train=False)(saved(y=-LEADS, x=LEADS)).data, want)
    assert torch.equal(plain(time_first=True).build(train=False)(LEADS.T).data, want)
    single = plain(channels=1).build(train=False)
    assert torch.equal(single(LEADS[0]).data, single(LEADS[:1]).data)


def test_selected_channels_in_their_order():
    item = plain(select=(2, 0)).build(train=False)(LEADS)
    assert np.allclose(item.data, LEADS[[2, 0], :60].T)
    assert plain(select=(2, 0)).build(train=True).blank().data.shape == (60, 2)


def test_standardised_over_what_is_there_and_a_dead_lead_is_zero():
    raw = np.random.default_rng(2).normal(5.0, 1e-4, (4, 40))
    raw[2] = 1234.567
    data = plain(standardize=True).build(train=False)(raw).data[:40].numpy()
    live = raw[[0, 1, 3]].astype(np.float32).astype(np.float64)
    want = (live - live.mean(1, keepdims=True)) / live.std(1, keepdims=True)
    assert np.allclose(data[:, [0, 1, 3]], want.T, atol=2e-2) and not data[:, 2].any()
    microvolts = plain(standardize=True).build(train=False)(LEADS * 1e-9).data
    assert np.allclose(microvolts, plain(standardize=True).build(train=False)(LEADS).data, atol=1e-3)


def test_training_crops_anywhere_and_evaluation_at_the_start():
    ramp = np.tile(np.arange(100.0), (4, 1))
    torch.manual_seed(0)
    starts = {int(plain().build(train=True)(ramp).data[0, 0]) for _ in range(300)}
    assert min(starts) == 0 and max(starts) == 40 and len(starts) > 30
    transform = plain(augment={"crop": 0.5}).build(train=True)
    firsts, lengths = set(), set()
    for _ in range(200):
        item = transform(ramp[:, :60])
        assert item.mask is not None
        kept = item.data[item.mask]
        assert (kept.diff(dim=0) == 1).all()
        firsts.add(int(kept[0, 0]))
        lengths.add(len(kept))
    assert min(lengths) >= 30 and max(lengths) <= 60 and len(lengths) > 20 and len(firsts) > 15


def test_augmentations_by_the_seed_and_only_when_training():
    config = plain(length=5000, augment=Augment(jitter=0.5))
    raw = np.zeros((4, 5000))
    transform = config.build(train=True)
    found = [(torch.manual_seed(seed), transform(raw).data)[1] for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert abs(found[0].std() - 0.5) < 0.02 and not config.build(train=False)(raw).data.any()
    scaled = plain(augment={"scaling": 0.1}).build(train=True)(np.ones((4, 60))).data
    assert (scaled == scaled[0]).all() and len(scaled[0].unique()) == 4 and (scaled[0] - 1).abs().max() < 0.5


def test_channel_dropout_never_takes_all():
    transform = plain(augment={"channel_dropout": 0.8}).build(train=True)
    torch.manual_seed(0)
    kept = torch.stack([transform(np.ones((4, 60))).data[0] for _ in range(300)])
    assert (kept.sum(dim=1) >= 1).all() and (kept.sum(dim=0) > 20).all() and kept.mean() < 0.45


def test_padding_stays_zero_under_noise():
    item = plain(augment={"jitter": 1.0}).build(train=True)(LEADS[:, :10])
    assert item.data[:10].all() and not item.data[10:].any()


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (LEADS.T, r"shape \(100, 4\), needed is `channels steps` with channels: 4; set channels, or time_first"),
        (LEADS[0], r"shape \(100,\)"),
        (LEADS[:, :0], r"shape \(4, 0\)"),
        (np.full((4, 10), np.nan), "NaN"),
        (b"junk", "not npy, npz or torch"),
        (b"", "not npy, npz or torch"),
        (npy(LEADS)[:-8], "not npy, npz or torch"),
        (saved(x=LEADS)[:-30], "not npy, npz or torch"),
        (npy(np.array([{}], dtype=object), allow_pickle=True), "not npy, npz or torch"),
        (torched(io.StringIO), "not npy, npz or torch"),
        (saved(x=LEADS, y=LEADS), r"named \['x', 'y'\] and key is None; set key"),
        ("leads.npy", "got str"),
    ],
)
def test_bad_series_are_refused_with_the_reason(raw, says):
    with pytest.raises(ValueError, match=says):
        plain().build(train=False)(raw)


@pytest.mark.parametrize("select", [(0, 4), (-1,), ()])
def test_channels_that_do_not_exist_are_refused(select):
    with pytest.raises(ValueError, match="between 0 and 3"):
        plain(select=select)
