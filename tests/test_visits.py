"Visits: files that are none, rules of masks, and repeats."

import os

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from stellar_lab.archives import real_stars
from stellar_lab.cannon import Cannon
from stellar_lab.clean import MASK_RULES, read_files
from stellar_lab.inversion import infer
from stellar_lab.labelling import read_star
from stellar_lab.models import Flag
from stellar_lab.normalize import as_trained
from stellar_lab.refusal import Refusal
from stellar_lab.spectrum import label_star
from stellar_lab.survey import PIXMASK, LabError, chip_slices, real_data
from stellar_lab.survey import wavelength as GRID
from stellar_lab.training import dwarf_lights
from stellar_lab.visits import (
    GENTLE,
    STRICT,
    MaskRule,
    combine,
    find_visits,
    influence,
    is_visit,
    line_influence,
    made_visit,
    on_grid,
    read_visit,
    repeats,
    weigh_mask,
)

pytest_plugins = ["forty_stars"]


@pytest.fixture(scope="module")
def cannon(good_files):
    return Cannon(scatter=True, labels=["TEFF", "M_H"]).fit(good_files[1])


@pytest.fixture(scope="module")
def paths(good_files, tmp_path_factory):
    "Three visits of one star."
    spectra = good_files[1]
    good = spectra.ivar[3] > 0
    flux = np.interp(GRID, GRID[good], spectra.flux[3][good])
    folder = tmp_path_factory.mktemp("visits")
    found = []
    for k, velocity in enumerate((-60.0, 0.0, 80.0)):
        found.append(folder / f"apVisit-r8-1-{k}-1.fits")
        made_visit(GRID, flux, 0.01, velocity, seed=k).writeto(found[-1])
    return found


def test_what_is_a_visit(paths, good_files, tmp_path):
    (tmp_path / "x.fits").write_bytes(b"SIMPLE")
    assert (
        is_visit(paths[0]) and not is_visit(good_files[0][0]) and not is_visit(tmp_path / "x.fits")
    )
    with pytest.raises(LabError, match="no apVisit file"):
        read_visit(good_files[0][0])
    with pytest.raises(LabError, match="cannot read"):
        read_visit(tmp_path / "none.fits")


def test_a_visit_cut_short(paths, tmp_path):
    short = tmp_path / paths[0].name
    short.write_bytes(paths[0].read_bytes()[:60_000])
    with pytest.raises(LabError):
        read_visit(short)


def test_a_velocity_may_be_given_or_left_open(paths):
    by_header = read_visit(paths[2])
    given = read_visit(paths[2], 80.0)
    assert np.array_equal(by_header.wavelength, given.wavelength)
    assert np.isnan(read_visit(paths[2], "measure").stars["VELOCITY"][0])


def test_masks():
    bits = [0, PIXMASK.BADPIX, PIXMASK.PERSIST_LOW, PIXMASK.SIG_SKYLINE]
    assert list(STRICT.factors(bits)) == [1, np.inf, np.inf, np.inf]
    assert list(GENTLE.factors(bits)) == [1, np.inf, 3, 10]
    assert list(MaskRule(0).factors(bits)) == [1, 1, 1, 1]


def test_weighing_a_mask(good_files):
    raw = read_files(good_files[0][:2], progress=False)[0]
    raw = raw.replace(mask=np.where(np.arange(len(GRID)) < 100, 2048, 0) + 0 * raw.mask)
    soft = weigh_mask(raw)
    assert np.allclose(soft.ivar[:, :100] * 9, raw.ivar[:, :100]) and not soft.mask.any()
    assert not weigh_mask(raw, STRICT).ivar[:, :100].any()
    with pytest.raises(LabError, match="have no mask"):
        weigh_mask(raw.replace(mask=None))
    with pytest.raises(LabError, match="give raw spectra"):
        weigh_mask(good_files[1].replace(mask=np.zeros(good_files[1].flux.shape, int)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dust", "is no rule for masks: say strict, gentle, dr10"),
        ("kill=DUST", "no bit 'DUST': choose from BADPIX"),
        ("raise=PERSIST_LOW:0.5", "'0.5' is no factor on an error"),
        ("raise=PERSIST_LOW", "'' is no factor on an error"),
        ("kill=BADPIX spare=CRPIX", "is no rule for masks"),
        ("", "is no rule for masks"),
    ],
)
def test_rules_that_are_none(text, said):
    with pytest.raises(LabError, match=said):
        MaskRule.parse(text)


def test_rules_in_words():
    rule = MaskRule.parse("kill=badpix,CRPIX raise=PERSIST_LOW:2.5,SIG_SKYLINE:10")
    assert list(rule.factors([1, 2, 4, 2048, 4096])) == [np.inf, np.inf, 1, 2.5, 10]
    assert str(MaskRule.parse(str(rule))) == str(rule)
    assert GENTLE.kill == 16639  # what the survey's own code calls bad
    assert [str(MaskRule.parse(name)) for name in MASK_RULES] == list(map(str, MASK_RULES.values()))


def test_a_rule_travels_with_the_model(root, good_files, run, tmp_path):
    model = tmp_path / "gentle.asdf"
    words = ("train", root, "--model", model, "--labels", "teff,m_h", "--mask", "gentle")
    assert run(*words, "--no-refusal")[0] == 0
    with fits.open(good_files[0][0]) as hdus:  # the archive's own masks hold broken pixels only
        hdus[3].data[..., 1000:1500] |= PIXMASK.PERSIST_LOW
        hdus.writeto(tmp_path / "persistent.fits")
    counts = {}
    for mask in (None, "gentle", "strict"):
        option = () if mask is None else ("--mask", mask)
        found = tmp_path / f"{mask}.fits"
        words = ("label", "--model", model, tmp_path / "persistent.fits", "--out", found, *option)
        assert run(*words)[0] == 0
        counts[mask] = Table.read(found)["n_good"][0]
    assert counts[None] == counts["gentle"] > counts["strict"] + 300
    code, _, err = run("train", root, "--model", model, "--mask", "dust")
    assert code == 2 and "is no rule for masks" in err


def test_combining(paths):
    visits = [on_grid(read_visit(path)) for path in paths]
    together = combine(visits)
    assert together.stars["NVISITS"][0] == 3
    assert together.stars["SNR"][0] > 1.5 * visits[0].stars["SNR"][0]
    dimmed = visits[1].replace(flux=visits[1].flux * 0.3, ivar=visits[1].ivar / 0.09)
    again = combine([visits[0], dimmed, visits[2]])
    assert np.allclose(again.flux, together.flux, atol=0.01)
    with pytest.raises(LabError, match="no visits"):
        combine([])
    with pytest.raises(LabError, match="other pixels"):
        combine([visits[0], read_visit(paths[1])])


def test_influence_is_the_derivative(good_files):
    cannon = Cannon(order=1, scatter=True, labels=["TEFF", "M_H"]).fit(good_files[1])
    star = good_files[1][[3]]
    table = infer(cannon, star)
    moves = influence(cannon, star, table)
    flux = star.flux.copy()
    flux[0] += 1e-4
    moved = infer(cannon, star.replace(flux=flux))
    for move, name in zip(moves, ("teff", "m_h")):
        step = (moved[name] - table[name]).value[0]
        assert abs(step - move.sum() * 1e-4) < 0.02 * abs(step) + 1e-5
    shares = line_influence(cannon, star, table)
    assert np.isclose(shares["teff"].sum(), 100)


def test_repeats(cannon, paths, good_files, run, model, tmp_path):
    found = repeats(cannon, [*paths, good_files[0][0].replace("apStar", "none")])
    assert len(found.visits) == 3 and len(found.problems) == 1
    assert set(found.table["label"]) == {"teff", "m_h"}
    with pytest.raises(LabError, match="no star has two visits"):
        repeats(cannon, paths[:1])
    code, out, _ = run("repeats", "--model", model, paths[0].parent, "--out", tmp_path / "r.fits")
    assert code == 0 and "3 visits of 1 stars" in out and (tmp_path / "r.fits").exists()
    with pytest.raises(LabError, match="no file or folder"):
        find_visits([tmp_path / "nothing"])


def test_visits_are_labelled_like_files(model, paths, run, tmp_path):
    code, out, _ = run("label", "--model", model, *paths, "--out", tmp_path / "v.fits")
    assert code == 0 and "3 of 3 stars labelled" in out


def test_the_combination_has_the_labels_of_its_star(cannon, paths, good_files):
    together = combine([on_grid(read_visit(path)) for path in paths])
    found = infer(cannon, as_trained(cannon, together), any_recipe=True)[0]
    star = good_files[1][[3]]
    good = star.ivar[0] > 0
    flux = np.interp(GRID, GRID[good], star.flux[0][good])[None].astype("f4")  # what was observed
    known = infer(cannon, star.replace(flux=flux, ivar=np.full_like(flux, 1e4)))[0]
    assert abs(found["teff"] - known["teff"]) < 3 * known["teff_err"]


def test_a_pipe_is_no_visit(tmp_path):
    path = tmp_path / "apVisit-r8-1-1-1.fits"
    os.mkfifo(path)
    assert not is_visit(path)
    with pytest.raises(LabError, match="not a file"):
        read_visit(path)


def test_checksums_and_facts_of_a_visit_are_looked_at(paths, tmp_path):
    path = tmp_path / paths[0].name
    with fits.open(paths[0]) as hdus:
        hdus[0].header["RA"] = "x" * 60
        hdus[0].header["MJD5"] = 2**62
        hdus[0].header["VHELIO"] = "fast"
        hdus[1].data[1, 2000] = 1e30
        hdus.writeto(path, checksum=True)
    visit = read_visit(path)
    assert visit.stars["VERIFIED"][0] and visit.stars["STRANGE_PIXELS"][0] == 1
    assert np.isnan(visit.stars["RA"][0]) and visit.stars["MJD"][0] == -1
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(LabError, match="does not fit its checksum"):
        read_visit(path)


def changed(path, target, change):
    "A copy of a visit with something changed."
    with fits.open(path) as hdus:
        copies = fits.HDUList([hdu.copy() for hdu in hdus])
        (change(copies) or copies).writeto(target)
    return target


def without(*keys):
    def change(hdus):
        for key in keys:
            del hdus[0].header[key]

    return change


def set_cards(**cards):
    def change(hdus):
        hdus[0].header.update(cards)

    return change


def on_arrays(*functions):
    "Functions for flux, error, mask and wavelength; None leaves them."

    def change(hdus):
        for number, function in enumerate(functions, 1):
            if function is not None:
                hdus[number].data = np.ascontiguousarray(function(hdus[number].data))

    return change


def first_chip(value):
    def function(array):
        array = array.copy()
        array[2] = value
        return array

    return function


HEADERS = {
    "no VRAD": (without("VRAD"), 80.0),
    "no BC": (without("VRAD", "BC"), None),
    "no velocity": (without("VRAD", "VHELIO", "BC"), None),
    "none found": (set_cards(VRAD=0.0, VHELIO=0.0), None),
    "a placeholder": (set_cards(VRAD=999999.0, VHELIO="NaN"), None),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_other_reductions(name, paths, cannon, tmp_path):
    change, velocity = HEADERS[name]
    star = read_visit(changed(paths[2], tmp_path / "apVisit-r3-1-2-3.fits", change))
    found = star.stars["VELOCITY"][0]
    assert np.isnan(found) if velocity is None else np.isclose(found, velocity)
    if velocity is None:
        measured = label_star(cannon, star).table["velocity"][0].value
        assert abs(measured - 80) < 1.5


ARRAYS = {
    "other order of chips": on_arrays(*[lambda a: a[::-1]] * 4),
    "increasing": on_arrays(*[lambda a: a[::-1, ::-1]] * 4),
    "five HDUs": lambda hdus: fits.HDUList(hdus[:5]),
    "double precision": on_arrays(*[lambda a: a.astype("f8")] * 2, lambda a: a.astype("i4")),
    "in micron": on_arrays(None, None, None, lambda a: a / 1e4),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_other_reductions(name, paths, tmp_path):
    usual = read_visit(paths[0])
    star = read_visit(changed(paths[0], tmp_path / "apVisit-r3-1-2-3.fits", ARRAYS[name]))
    assert np.allclose(star.wavelength, usual.wavelength, rtol=1e-12)
    assert np.array_equal(star.flux, usual.flux) and np.array_equal(star.ivar, usual.ivar)


MISSING = {
    "dead": on_arrays(first_chip(0), first_chip(1e10), first_chip(1)),
    "NaN": on_arrays(first_chip(np.nan), first_chip(np.nan)),
    "no wavelengths": on_arrays(first_chip(0), first_chip(0), None, first_chip(0)),
    "half the pixels": on_arrays(*[lambda a: a[:, ::2]] * 4),
}


@pytest.mark.parametrize("name", MISSING)
def test_chips_that_are_missing(name, paths, cannon, tmp_path):
    path = changed(paths[1], tmp_path / "apVisit-r3-1-2-3.fits", MISSING[name])
    found, usual = (label_star(cannon, read_visit(p)).table[0] for p in (path, paths[1]))
    assert abs(found["teff"] - usual["teff"]) < 3 * found["teff_err"]
    assert found["teff_err"] > usual["teff_err"]


def test_visits_that_are_not_whole(paths, cannon, tmp_path):
    short = changed(paths[0], tmp_path / "short.fits", lambda hdus: fits.HDUList(hdus[:4]))
    with pytest.raises(LabError, match="error, mask and wavelength must follow"):
        read_star(short)
    wrong = changed(paths[0], tmp_path / "apVisit-r3-1-2-3.fits", set_cards(VRAD=55.0))
    notes = label_star(cannon, read_visit(wrong)).notes
    assert any("lines stand at -6" in note and "not at the 55.0" in note for note in notes)


@pytest.fixture(scope="module")
def guarded():
    "Real giants that no visit is made of, a model of them with a guard, and the others."
    stars = real_stars()
    giants = np.flatnonzero((stars.stars["LOGG"] < 3.5) & np.isfinite(stars.stars["M_H"]))
    learned = stars[giants[np.arange(len(giants)) % 4 > 0]]
    model = Cannon(order=1, scatter=True, labels=["TEFF", "LOGG", "M_H"]).fit(learned)
    guard = Refusal(order=1, hidden=8, labels=["TEFF", "LOGG", "M_H"])
    model.refusal_ = guard.fit(learned, lights=dwarf_lights(GRID))
    return model, stars[giants[::4][:40:4]], list(dwarf_lights(GRID).values())[2]


def flags_of_visits(guarded, folder, light=0.0, where=slice(None), bits=0):
    "Flags of a visit of each star, with a share of a dwarf in some pixels, and bits in the blue."
    model, stars, dwarf = guarded
    flags = []
    for k in range(len(stars)):
        flux = stars.flux[k].copy()
        flux[where] = (1 - light) * flux[where] + light * dwarf[where]
        visit = made_visit(GRID, flux, 0.01, 20.0 * k - 90, seed=k, good=stars.ivar[k] > 0)
        visit[3].data[2] |= int(bits)  # the blue chip is the last one
        path = folder / f"apVisit-r8-{light}-{int(bits)}-{k}.fits"
        visit.writeto(path)
        flags.append(label_star(model, read_visit(path)).table["flags"][0])
    return np.array(flags)


def test_good_visits_raise_no_flag_and_double_stars_do(guarded, tmp_path):
    second = int(Flag.SECOND_LIGHT)
    assert np.mean(flags_of_visits(guarded, tmp_path) & second > 0) <= 0.1
    assert np.mean(flags_of_visits(guarded, tmp_path, light=0.4) & second > 0) > 0.8


def test_persistence_is_no_second_star(guarded, tmp_path):
    "The guard does not look at pixels of doubt; without their bits it finds the light in them."
    model, stars, dwarf = guarded
    few = (model, stars[:5], dwarf)
    blue = chip_slices(GRID)["blue"]
    kinds = int(Flag.SECOND_LIGHT | Flag.DILUTED | Flag.BROADENED | Flag.UNUSUAL)
    lit = flags_of_visits(few, tmp_path, light=0.9, where=blue)
    told = flags_of_visits(few, tmp_path, light=0.9, where=blue, bits=PIXMASK.PERSIST_MED)
    assert np.mean(lit & kinds > 0) > 0.7 and np.mean(told & kinds > 0) < 0.3


@pytest.mark.skipif(real_data() is None, reason="STELLAR_LAB_REAL_DATA is not set")
def test_real_visits_raise_no_flag(guarded):
    for path in sorted((real_data() / "own").glob("apVisit-*.fits")):
        assert not label_star(guarded[0], read_visit(path)).table["flags"][0] & int(
            Flag.SECOND_LIGHT
        )
