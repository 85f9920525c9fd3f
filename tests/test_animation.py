"""Films: paths through labels for any range, files read back, and what a user may get wrong."""

import base64
import io
import json
import re
from importlib.util import find_spec

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import make_spectra
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stellar_lab.animation import (
    _COLORS,
    _WRITERS,
    _brackett,
    _check_lines,
    _label_path,
    _Picture,
    _Player,
    _strong_lines,
    _titles,
    film,
    player,
    write_film,
)
from stellar_lab.cannon import Cannon
from stellar_lab.survey import (
    LabError,
    air_to_vacuum,
    full_wavelength,
    use_style,
    wavelength,
)

NAMES = ("TEFF", "LOGG", "FE_H", "MG_FE", "SI_FE")  # the survey's five
SMALL = {"size": (4, 3), "dpi": 50, "progress": False}
few = settings(max_examples=25, deadline=None)


def made_up(seed=0, n_stars=150):
    """A model of five labels on the on-band grid, some pixels unusable.

    Every line of the table, deeper with [Fe/H] and shallower with temperature."""
    rng = np.random.default_rng(seed)
    logg, feh = rng.uniform(0.5, 3.3, n_stars), rng.uniform(-1, 0.45, n_stars)
    teff = 3900 + 330 * logg - 250 * feh + rng.normal(0, 40, n_stars)
    labels = np.column_stack([teff, logg, feh, rng.normal(0.1, 0.1, (n_stars, 2))])
    lines = sum(
        np.exp(-0.5 * ((wavelength - centre) / 0.4) ** 2)
        for centre in _strong_lines()["wavelength"].value
    ).clip(0, 1)
    depth = 0.25 + 0.12 * feh - 0.05 * (teff - 4500) / 500 + 0.02 * feh**2
    flux = 1 - depth[:, None] * lines
    stars = make_spectra(grid=wavelength, names=NAMES, labels=labels, flux=flux, error=1e-4)
    stars.ivar[:, 3000:3010] = 0
    return Cannon().fit(labels, stars.flux, stars.ivar, NAMES, wavelength)


@pytest.fixture(scope="module")
def model():
    return made_up()


@pytest.fixture(scope="module")
def short(model):
    return film(model, "FE_H", -1, 0.45, frames=5)


def read_back(path):
    with Image.open(path) as image:
        frames, durations = [], []
        for k in range(image.n_frames):
            image.seek(k)
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(image.info.get("duration"))
    return frames, durations


# ---- paths


@few
@given(st.sampled_from(NAMES), st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.integers(2, 40))
def test_a_path_goes_where_it_is_told_and_nothing_else_moves(moving, start, end, frames):
    model = MODEL
    k = NAMES.index(moving)
    low, high = np.quantile(model.training_labels_[:, k], [start, end])
    if low == high:
        return
    path = _label_path(model, moving.lower(), low, high, frames)
    assert path.shape == (frames, 5) and path[0, k] == low and path[-1, k] == high
    assert np.allclose(np.diff(path[:, k]), (high - low) / (frames - 1))
    assert np.array_equal(
        np.delete(path, k, axis=1),
        np.tile(np.delete(model.training_labels_.mean(axis=0), k), (frames, 1)),
    )


@few
@given(st.floats(-0.9, 0.4))
def test_the_branch_is_that_of_the_training_stars(metallicity):
    path = _label_path(MODEL, "LOGG", 3, 1, 20, {"FE_H": metallicity}, "branch")
    assert np.all(path[:, 2] == metallicity)
    assert np.allclose(
        path[:, 0], 3900 + 330 * path[:, 1] - 250 * metallicity, atol=50
    )  # the rule behind the stars, which scatter by 40 K
    assert np.all(np.diff(path[:, 0]) < 0)


def test_given_labels_are_given_and_pivots_are_not_the_mean():
    stars = MODEL.training_labels_
    odd = Cannon(order=1, pivots=[4000, 0, 0, 0, 0]).fit(
        stars, np.ones((len(stars), 5)), label_names=NAMES
    )
    path = _label_path(odd, "FE_H", -0.5, 0, 3, {"teff": 4400})
    assert np.all(path[:, 0] == 4400) and np.allclose(path[:, 1], stars[:, 1].mean())


# ---- films


def test_a_film_is_the_models_spectra_and_slopes(model, short):
    inside = (wavelength >= 16000) & (wavelength <= 16200)
    assert np.array_equal(short.wavelength, wavelength[inside])
    assert np.allclose(short.flux, model.predict(short.labels)[:, inside], equal_nan=True)
    assert np.allclose(short.slope, model.derivative(short.labels)[:, 2, inside], equal_nan=True)
    assert len(short) == 5 and short.values.tolist() == pytest.approx(
        np.linspace(-1, 0.45, 5).tolist()
    )


def test_many_frames_have_the_slopes_of_few(model):
    many = film(model, "FE_H", -1, 0.4, frames=71)  # derivatives are computed in parts
    assert np.allclose(
        many.slope,
        model.derivative(many.labels)[:, 2][:, np.isin(wavelength, many.wavelength)],
        equal_nan=True,
    )


def test_the_model_is_not_changed(model, tmp_path):
    before = {
        name: np.array(value, copy=True)
        for name, value in vars(model).items()
        if isinstance(value, np.ndarray)
    }
    for others in ("mean", "branch"):
        write_film(film(model, "FE_H", -1, 0.4, 3, others=others), tmp_path / "a.gif", **SMALL)
    for name, value in before.items():
        np.testing.assert_array_equal(value, getattr(model, name), name)


def test_frames_beyond_the_training_stars_are_marked(model):
    top = model.training_labels_[:, 2].max()
    made = film(model, "FE_H", 0, 0.6, 61)
    assert (
        np.array_equal(made.outside[made.values > top], np.ones((made.values > top).sum(), bool))
        and not made.outside[0]
    )
    inside, beyond = (_Picture(made).frame(k) for k in (0, 60))
    color = np.array([int(_COLORS["mark"][i : i + 2], 16) for i in (1, 3, 5)])
    corner = np.s_[-20:, -300:]
    assert (np.abs(beyond[corner] - color).sum(axis=2) < 60).any() and not (
        np.abs(inside[corner].astype(int) - color).sum(axis=2) < 60
    ).any()


def test_one_frame_and_labels_without_a_record(tmp_path):
    rng = np.random.default_rng(1)
    labels = rng.uniform(0, 1, (60, 2))
    plain = Cannon(order=1).fit(
        labels, 1 - 0.1 * labels[:, :1] + np.zeros((60, len(wavelength))), wavelength=wavelength
    )
    still = film(plain, "label_1", 0.5, 0.5, frames=1)
    write_film(still, tmp_path / "still.gif", **SMALL)
    assert (
        len(read_back(tmp_path / "still.gif")[0]) == 1 and _titles(still, 0)[0] == "LABEL_1 = 0.50"
    )
    assert len(still.lines) == 0  # a spectrum without lines has no names


def test_unusable_pixels_and_gaps_break_the_curve(model):
    picture = _Picture(film(model, "FE_H", -1, 0.4, 3, window=None))
    drawn = picture.flux.get_xdata()
    assert np.isnan(drawn).sum() == 2  # three chips
    picture.frame(1)
    assert np.isnan(picture.flux.get_ydata()).sum() == 2 + 10


@few
@given(
    st.sampled_from([("FE_H", -1.0, 0.45), ("TEFF", 4200.0, 4700.0), ("TEFF", 4500.0, 4500.5)]),
    st.integers(2, 400),
)
def test_every_frame_has_its_own_title(case, frames):
    film_ = object.__new__(type(SHORT))
    vars(film_).update(
        vars(SHORT) | {"moving": case[0], "labels": _label_path(MODEL, *case, frames)}
    )
    assert len({_titles(film_, k)[0] for k in range(frames)}) == frames


# ---- lines


def test_wavelengths_of_lines():
    table = _strong_lines()
    assert (
        np.all(np.diff(table["wavelength"].value) > 0)
        and 15_100 < table["wavelength"].value.min()
        and table["wavelength"].value.max() < 17_000
    )
    assert _brackett(11) == pytest.approx(16811.1, abs=0.1) and _brackett(13) == pytest.approx(
        16113.7, abs=0.1
    )
    assert air_to_vacuum(16718.957) == pytest.approx(16723.52, abs=0.01)
    numbers = [int(row["species"][3:]) for row in table if row["species"].startswith("Br ")]
    assert numbers == sorted(numbers, reverse=True)


def test_lines_that_are_there_are_confirmed_and_others_are_not(model):
    table = _check_lines(model)
    alone = np.array(
        [
            np.sum(np.abs(table["wavelength"].value - row["wavelength"].value) < 4) == 1
            for row in table
        ]
    )
    metals = np.array([not row["species"].startswith("Br") for row in table])
    near_bad = np.abs(table["wavelength"].value - wavelength[3005]) < 5
    assert np.all(table["named"][alone & metals & ~near_bad])
    assert not table["named"][
        ~metals
    ].any()  # these get weaker with temperature here, as no hydrogen does
    assert np.all(np.abs(table["offset"].value[table["named"]]) < 0.35)


def test_lines_on_another_grid():
    labels = np.linspace(-1, 0.4, 40)[:, None]
    full = Cannon(order=1).fit(
        labels,
        0.9 - 0.01 * labels + np.zeros((40, 8575)),
        label_names=["FE_H"],
        wavelength=full_wavelength,
    )
    assert (
        len(_check_lines(full)) > len(_check_lines(made_up_grid(wavelength[100:400])))
        and not _check_lines(full)["named"].any()
    )


def made_up_grid(grid):
    labels = np.linspace(-1, 0.4, 40)[:, None]
    return Cannon(order=1).fit(
        labels,
        0.9 - 0.01 * labels + np.zeros((40, len(grid))),
        label_names=["FE_H"],
        wavelength=grid,
    )


# ---- files


@pytest.mark.parametrize("interval", [20, 50, 130])
def test_gif_read_back(short, tmp_path, interval):
    write_film(short, tmp_path / "film.GIF", interval=interval, **SMALL)
    frames, durations = read_back(tmp_path / "film.GIF")
    assert len(frames) == 5 and durations == [interval] * 5
    assert all((a != b).any() for a, b in zip(frames, frames[1:])) and frames[0].shape == (
        150,
        200,
        3,
    )
    assert tuple(frames[0][0, 0]) == (255, 255, 255)


def test_a_gif_shows_what_was_drawn(short, tmp_path):
    write_film(short, tmp_path / "film.gif", **SMALL)
    picture = _Picture(short, SMALL["size"], SMALL["dpi"])
    for k, frame in enumerate(read_back(tmp_path / "film.gif")[0]):
        assert np.abs(frame.astype(int) - picture.frame(k)).mean() < 3  # 64 colours instead of all


def test_same_bytes_whatever_the_session_draws_like(short, tmp_path):
    write_film(short, tmp_path / "one.gif", **SMALL)
    with plt.rc_context():
        use_style()
        plt.rcParams.update({"font.size": 20, "axes.facecolor": "black"})
        write_film(short, tmp_path / "two.gif", **SMALL)
    assert (tmp_path / "one.gif").read_bytes() == (tmp_path / "two.gif").read_bytes()


def test_a_film_that_fails_leaves_nothing(short, tmp_path, monkeypatch):
    (tmp_path / "film.gif").write_bytes(b"the old one")
    monkeypatch.setattr(_Picture, "frame", lambda self, k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_film(short, tmp_path / "film.gif", **SMALL)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [
        ("film.gif", b"the old one")
    ]


@pytest.mark.skipif(find_spec("imageio_ffmpeg") is None, reason="needs the extra 'video'")
def test_mp4_read_back(short, tmp_path):
    import imageio_ffmpeg

    write_film(
        short, tmp_path / "film.mp4", interval=100, size=(4.02, 3.01), dpi=50, progress=False
    )  # odd sides
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "film.mp4"))
    facts = next(reader)
    frames = [np.frombuffer(frame, np.uint8) for frame in reader]
    assert len(frames) == 5 and facts["fps"] == 10 and facts["size"] == (200, 150)
    assert (frames[0] != frames[-1]).any()


@pytest.mark.skipif(find_spec("imageio_ffmpeg") is None, reason="needs the extra 'video'")
def test_a_broken_ffmpeg_is_said(short, tmp_path, monkeypatch):
    import imageio_ffmpeg

    monkeypatch.setattr(
        imageio_ffmpeg,
        "write_frames",
        lambda *_, **__: (_ for _ in ()).throw(OSError("Broken pipe")),
    )
    with pytest.raises(
        LabError, match="ffmpeg could not write the film .*Broken pipe.*: write a .gif instead"
    ):
        write_film(short, tmp_path / "film.mp4", **SMALL)
    assert not list(tmp_path.iterdir())


def test_mp4_without_the_package(short, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    with pytest.raises(LabError, match=r"pip install 'stellar_lab\[video\]'"):
        write_film(short, tmp_path / "film.mp4", **SMALL)


def embedded(html):
    "The frames that a player carries."
    frames = json.loads(re.search(r"frames = (\[.*?\])", html).group(1))
    return [Image.open(io.BytesIO(base64.b64decode(frame))) for frame in frames]


def test_the_player_needs_nothing_else(short, tmp_path):
    made = player(short)
    assert isinstance(made, _Player) and made._repr_html_() == made.html and len(repr(made)) < 60
    assert len(embedded(made.html)) == 5 and not re.search(r"https?:|src=\"(?!data:)", made.html)
    write_film(short, tmp_path / "film.html", **SMALL)
    page = (tmp_path / "film.html").read_text(encoding="utf-8")
    assert (
        page.startswith("<!DOCTYPE html>")
        and [image.size for image in embedded(page)] == [(200, 150)] * 5
    )


# ---- what goes wrong


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("COLOUR", 0, 1), "no label 'COLOUR': choose from TEFF, LOGG, FE_H"),
        (("FE_H", -3, 0), "FE_H would go from -3 to 0. The training stars reach from"),
        (("FE_H", np.nan, 0), "FE_H from nan to 0: nothing moves"),
        (("FE_H", 0, 0), "nothing moves"),
        (("FE_H", -1, 0, 0), "0 frames"),
        (("FE_H", -1, 0, 2.5), "2.5 frames"),
        (("FE_H", -1, 0, True), "True frames"),
        (("FE_H", -1, 0, 5, (16000, 18000)), "leaves the grid: the model reaches from 15168"),
        (("FE_H", -1, 0, 5, (16200, 16000)), "no usable pixel"),
        (("FE_H", -1, 0, 5, (15800, 15850)), "no usable pixel"),
        (("FE_H", -1, 0, 5, None, {"FE_H": 0}), "a label occurs twice"),
        (("FE_H", -1, 0, 5, None, {"TEFF": 9000}), "TEFF would go from 9000 to 9000"),
        (("FE_H", -1, 0, 5, None, None, "median"), "choose 'mean'"),
    ],
)
def test_errors_say_what_is_wrong(model, arguments, message):
    with pytest.raises(LabError, match=message):
        film(model, *arguments)


def test_a_model_without_wavelengths(model):
    blind = Cannon(order=1).fit(model.training_labels_, np.ones((150, 5)), label_names=NAMES)
    with pytest.raises(LabError, match="does not know its wavelengths"):
        film(blind, "FE_H", -1, 0)


@pytest.mark.parametrize(
    "name, interval, message",
    [
        ("film.avi", 50, "the extension must be one of .gif, .mp4, .html"),
        ("film", 50, "the extension must be one of"),
        ("film.gif", 33, "counts in steps of 10 ms"),
        ("film.gif", 10, "not shown faster than 20"),
        ("film.html", 0, "above 0"),
        ("film.gif", np.inf, "above 0"),
    ],
)
def test_files_that_cannot_be(short, tmp_path, name, interval, message):
    with pytest.raises(LabError, match=message):
        write_film(short, tmp_path / name, interval=interval, **SMALL)
    assert set(_WRITERS) == {".gif", ".mp4", ".html"} and not list(tmp_path.iterdir())


MODEL = made_up()
SHORT = film(MODEL, "FE_H", -1, 0.45, frames=5)
