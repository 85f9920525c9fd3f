"""The contract of all models: what `fit` and `infer` refuse, what a file must hold, one thread."""

import os
import warnings

import asdf
import numpy as np
import pytest
from astropy.table import Table
from conftest import make_labels, make_spectra
from threadpoolctl import ThreadpoolController

from stellar_lab import hidden, latents, models
from stellar_lab.cannon import Cannon
from stellar_lab.hidden import HiddenCannon
from stellar_lab.inversion import infer
from stellar_lab.judging import with_error_model
from stellar_lab.latents import LatentLabels
from stellar_lab.models import (
    Answer,
    fold_numbers,
    label_table,
    label_values,
    outside_training,
    single_threaded,
)
from stellar_lab.readers import RidgeLabels
from stellar_lab.survey import LabError
from stellar_lab.training import load_model

NAMES = ("TEFF", "LOGG", "FE_H")


def arrays():
    spectra = make_spectra()
    return spectra.labels(NAMES), spectra.flux, spectra.ivar


@pytest.mark.parametrize(
    "grid, message",
    [
        (np.arange(39.0), r"wavelength has the shape \(39,\), but flux has 40 pixels"),
        (np.arange(40.0)[::-1], "wavelengths must be finite and increase"),
        (np.where(np.arange(40) == 3, np.nan, np.arange(40.0)), "must be finite and increase"),
        (np.zeros(40), "must be finite and increase"),
    ],
)
@pytest.mark.parametrize("model", [Cannon(order=1), RidgeLabels()])
def test_a_grid_that_does_not_fit_is_refused_at_once(model, grid, message):
    with pytest.raises(LabError, match=message):
        model.fit(*arrays(), NAMES, wavelength=grid)


@pytest.mark.parametrize(
    "flux, ivar, message",
    [
        (np.nan, 1e4, r"star 7 has a usable pixel without a finite flux or ivar \(2 such pixels\)"),
        (np.inf, 1e4, r"star 7 has a usable pixel without a finite flux or ivar \(2 such pixels\)"),
        (1.0, np.nan, r"star 7 has a usable pixel without a finite flux or ivar \(2 such pixels\)"),
        (1.0, np.inf, r"star 7 has a usable pixel without a finite flux or ivar \(2 such pixels\)"),
        (1.0, -1.0, "ivar is negative in 2 pixels of star 7"),
    ],
)
@pytest.mark.parametrize("model", [Cannon(order=1), Cannon(scatter=True), RidgeLabels()])
def test_a_usable_pixel_holds_a_number(model, flux, ivar, message):
    spectra = make_spectra()
    spoiled = spectra.replace(flux=spectra.flux.copy(), ivar=spectra.ivar.copy())
    spoiled.flux[7, [3, 30]] = flux
    spoiled.ivar[7, [3, 30]] = ivar
    with pytest.raises(LabError, match=message):
        model.fit(spoiled)
    with pytest.raises(LabError, match=message):
        infer(model.fit(spectra), spoiled)


@pytest.mark.parametrize("model", [Cannon(order=1, scatter=True), RidgeLabels()])
def test_an_unusable_pixel_may_hold_anything(model):
    spectra = make_spectra(bad=0.1)
    holes = np.where(spectra.ivar > 0, spectra.flux, [[np.nan], [np.inf], [-np.inf]] * 50)
    filled = spectra.replace(flux=np.where(spectra.ivar > 0, spectra.flux, 0).astype("f4"))
    with_holes = spectra.replace(flux=holes.astype("f4"))
    one, other = model.fit(filled), model.__class__(**model.get_params()).fit(with_holes)
    assert one.training_digest_ == other.training_digest_
    np.testing.assert_array_equal(
        label_values(infer(one, filled), NAMES), label_values(infer(other, with_holes), NAMES)
    )


@pytest.mark.parametrize(
    "names",
    [
        ("TEFF", "teff", "LOGG"),
        ("Age", "age", "LOGG"),
        ("TEFF", "LOGG", "chi2"),
        ("TEFF", "LOGG", "Flags"),
        ("TEFF", "APOGEE_ID", "LOGG"),
        ("age", "age_err", "LOGG"),
        ("age_err", "age", "LOGG"),
    ],
)
def test_labels_have_columns_of_their_own(names):
    with pytest.raises(LabError, match="a label cannot be called"):
        Cannon(order=1).fit(*arrays(), names)


def test_one_name_is_not_a_row_of_letters():
    labels, flux, ivar = arrays()
    spectra = make_spectra()
    assert Cannon(order=1, labels="teff").fit(spectra).label_names_ == ("TEFF",)
    assert RidgeLabels(labels="TEFF").fit(spectra).label_names_ == ("TEFF",)
    table = infer(Cannon(order=1).fit(labels[:, :1], flux, ivar, "TEFF"), flux, ivar)
    assert label_values(table, "TEFF").shape == (150, 1)
    frame = Table(labels, names=NAMES)
    assert Cannon(order=1).fit(frame, flux, ivar, "LOGG").label_names_ == ("LOGG",)
    with pytest.raises(LabError, match=r"1 names \(TEFF\) for 3 labels"):
        Cannon(order=1).fit(labels, flux, ivar, "TEFF")


def test_an_unknown_label_is_named_with_the_known_ones():
    spectra = make_spectra()
    table = infer(Cannon(order=1).fit(spectra), spectra)
    with pytest.raises(LabError, match="no column age: it has apogee_id, teff, teff_err, logg"):
        label_values(table, ["TEFF", "AGE"])


def test_facts_of_the_spectra_survive_as_plain_values(tmp_path):
    facts = {
        "row": np.int64(1),
        "dark": np.float32(0.5),
        "release": np.str_("dr10"),
        "good": np.bool_(True),
        "pixels": [np.int16(3)],
        "array": np.ones(3),
    }
    model = Cannon(order=1).fit(make_spectra(**facts))
    kept = {name: model.metadata_.get(name) for name in facts}
    assert kept == {
        "row": 1,
        "dark": 0.5,
        "release": "dr10",
        "good": True,
        "pixels": [3],
        "array": None,
    }
    assert [type(kept[name]) for name in ("row", "dark", "release", "good")] == [
        int,
        float,
        str,
        bool,
    ]
    model.save(tmp_path / "model.asdf")
    assert Cannon.load(tmp_path / "model.asdf").metadata_ == model.metadata_


@pytest.mark.parametrize("entry", ["parameters", "label_names_", "theta_", "exponents", "pivots_"])
def test_a_file_that_lacks_an_entry_is_refused_by_name(tmp_path, entry):
    path = tmp_path / "model.asdf"
    Cannon(order=1).fit(make_spectra()).save(path)
    with asdf.open(path, memmap=False, lazy_load=False) as file:
        tree = {name: value for name, value in file.tree.items() if name != entry}
        asdf.AsdfFile(tree).write_to(tmp_path / "less.asdf")
    for read in (Cannon.load, load_model):
        with pytest.raises(LabError, match=f"less.asdf has no entry {entry}"):
            read(tmp_path / "less.asdf")


def test_a_file_with_a_parameter_that_nobody_knows_is_refused(tmp_path):
    path = tmp_path / "model.asdf"
    Cannon(order=1).fit(make_spectra()).save(path)
    with asdf.open(path, memmap=False, lazy_load=False) as file:
        tree = dict(file.tree)
        tree["parameters"] = {"colour": "red", **tree["parameters"]}
        asdf.AsdfFile(tree).write_to(tmp_path / "more.asdf")
    with pytest.raises(LabError, match="more.asdf has the parameters colour, which a Cannon does"):
        Cannon.load(tmp_path / "more.asdf")


def test_a_table_leaves_the_answer_alone():
    model = Cannon(order=1).fit(make_spectra())
    found = Answer(np.ones((2, 3)), np.tile(np.eye(3), (2, 1, 1)), n_good=np.array([0, 40]))
    table = label_table(model, found)
    assert np.isnan(table["teff"].value).tolist() == [True, False]
    assert np.all(found.labels == 1) and np.isfinite(found.covariance).all()
    assert found.resting.all()


def blas_threads():
    pools = ThreadpoolController().select(user_api="blas").info()
    return [pool["num_threads"] for pool in pools]


def test_overlapping_single_threads_give_the_threads_back():
    with ThreadpoolController().limit(limits=2):
        before = blas_threads()
        first, second = single_threaded(), single_threaded()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert set(blas_threads()) <= {1}  # somebody is still inside
        second.__exit__(None, None, None)
        assert blas_threads() == before


def test_training_stars_are_searched_in_one_tree(monkeypatch):
    model = Cannon(order=1).fit(make_spectra())
    built = []
    tree = models.cKDTree
    monkeypatch.setattr(models, "cKDTree", lambda points: built.append(1) or tree(points))
    far = make_labels(50, NAMES, seed=1) * [1, 1, 3]
    first = outside_training(model, far)
    assert np.array_equal(outside_training(model, far), first) and len(built) == 1
    model.fit(make_spectra(seed=5))
    assert not np.array_equal(outside_training(model, far), first) and len(built) == 2


def test_names_of_stars_must_match_the_rows():
    with pytest.raises(LabError, match="2 names of stars for 10 rows"):
        fold_numbers(10, stars=["a", "b"])


# --- files that are no models, or no longer


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    "A model in a file."
    path = tmp_path_factory.mktemp("kept") / "model.asdf"
    Cannon(order=1).fit(make_spectra()).save(path)
    return path


def changed(path, folder, change):
    "A file whose tree `change` has changed, checksums right."
    with asdf.open(path, memmap=False, lazy_load=False) as file:
        tree = {name: value for name, value in file.tree.items()}
        arrays = {name: np.array(value) for name, value in tree.items() if hasattr(value, "dtype")}
        tree |= arrays
        change(tree)
        asdf.AsdfFile(tree).write_to(folder / "changed.asdf")
    return folder / "changed.asdf"


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("theta_", np.ones((4, 40)), "theta_ has the shape"),
        ("theta_", np.ones((40, 4)) > 0, "theta_ is of the type bool instead of numbers"),
        ("theta_", [[1.0]], "theta_ is a list instead of an array"),
        ("scales_", np.zeros(3), "scales_ holds numbers beyond"),
        ("scatter_", -np.ones(40), "scatter_ holds numbers beyond"),
        ("pivots_", np.array([1, np.nan, 3]), "1 of 3 numbers in pivots_ are not finite"),
        ("exponents", np.full((4, 3), 10**9), "exponents holds numbers beyond 0 to 64"),
        ("exponents", np.ones((4, 3), int), "its terms are none"),
        ("label_names_", ["TEFF", "TEFF", "FE_H"], "a label cannot be called TEFF"),
        ("label_names_", ["TEFF", "\x1b[31m", "FE_H"], "label_names_ holds"),
        ("wavelength_", np.arange(40.0)[::-1], "must be finite and increase"),
        ("metadata_", {"product": 3}, "metadata_ has a int as product"),
        ("metadata_", {"recipe": [{"step": "continuum"}]}, "a step of its recipe has the entries"),
        ("parameters", {"order": "two"}, "has 'two' as the parameter order"),
        ("versions", None, "does not say by which versions"),
        ("training_labels_", np.empty((0, 3)), "training_labels_ is empty"),
        ("usable_", np.ones(40, bool), "it has the entry usable_"),
        ("theta_", np.ones((40, 4)), "changed since it was written"),
    ],
)
def test_a_file_that_holds_something_else_is_one_sentence(kept, tmp_path, name, value, message):
    path = changed(kept, tmp_path, lambda tree: tree.update({name: value}))
    with pytest.raises(LabError, match=message) as refused:
        load_model(path)
    assert "changed.asdf" in str(refused.value) and "train the model again" in str(refused.value)


def test_nothing_outside_a_file_is_opened(kept, tmp_path):
    other = tmp_path / "other.asdf"
    asdf.AsdfFile({"x": np.ones(3)}).write_to(other)
    for source in (f"file://{other}", "other.asdf", "http://127.0.0.1:9/x", "-1", "99", "[0]"):
        path = tmp_path / "model.asdf"
        path.write_bytes(kept.read_bytes().replace(b"source: 0", f"source: {source}".encode()))
        with pytest.raises(LabError, match="an array is not in the file itself"):
            load_model(path)


@pytest.mark.parametrize(
    "old, new, message",
    [
        (b"shape: [40, 4]", b"shape: [4000000000, 4]", "larger than the file"),
        (b"shape: [40, 4]", b"shape: [40, -4]", "an array of the shape"),
        (b"datatype: float64", b"datatype: complex128", "an array of 'complex128'"),
        (b"format_version: 1", b"format_version: !!python/name:os.system", "no plain YAML"),
        (b"format_version: 1", b"format_version: &a [*a]", "refers to itself"),
        (
            b"format_version: 1",
            b"format_version: " + b"[" * 1000 + b"]" * 1000,
            "too deep|flow level",
        ),
        (b"format_version: 1", b"format_version: 1" + b"0" * 5000, "Exceeds the limit|holds"),
        (b"#ASDF", b"SIMPL", "it begins with 'SIMPL"),
    ],
)
def test_texts_that_ask_for_too_much_are_refused(kept, tmp_path, old, new, message):
    path = tmp_path / "model.asdf"
    path.write_bytes(kept.read_bytes().replace(old, new))
    with pytest.raises(LabError, match=message):
        load_model(path)


def test_every_cut_and_every_flipped_bit_is_seen(kept, tmp_path):
    whole = kept.read_bytes()
    path = tmp_path / "model.asdf"
    first = whole.index(b"\xd3BLK")
    last = whole.index(b"#ASDF BLOCK INDEX")
    for cut in range(0, last, last // 50):
        path.write_bytes(whole[:cut])
        with pytest.raises(LabError, match="model.asdf"):
            load_model(path)
    for place in range(first, last, (last - first) // 50):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            again = load_model(path)  # a bit in the room behind an array
        except LabError as error:
            assert "model.asdf" in str(error)
        else:
            assert again.theta_.tobytes() == load_model(kept).theta_.tobytes()


def test_a_pipe_and_a_device_are_no_models(tmp_path):
    os.mkfifo(tmp_path / "pipe.asdf")
    (tmp_path / "device.asdf").symlink_to("/dev/zero")
    for name in ("pipe.asdf", "device.asdf", "pipe.json"):
        with pytest.raises(LabError, match="it is a pipe, a device or a socket|there is no model"):
            load_model(tmp_path / name)


# --- numbers that no star has, and stars that no model can learn from


def test_one_training_star_has_no_neighbours():
    model = Cannon(order=1).fit(make_spectra())
    model.training_labels_ = model.training_labels_[:1]
    assert outside_training(model, make_labels(5, NAMES)).all()


def test_labels_beyond_all_numbers_are_outside():
    model = Cannon(order=1).fit(make_spectra())
    far = model.training_labels_[:3] * [[1], [1e300], [np.inf]]
    assert outside_training(model, far).tolist() == [False, True, True]


@pytest.mark.parametrize("model", [Cannon(order=1), RidgeLabels()])
@pytest.mark.parametrize("kind", [str, complex, bool])
def test_arrays_hold_real_numbers(model, kind):
    labels, flux, ivar = arrays()
    for wrong in ((labels.astype(kind), flux, ivar), (labels, flux.astype(kind), ivar)):
        with pytest.raises(LabError, match="not real numbers"):
            model.fit(*wrong, NAMES)
    model.fit(labels, flux, ivar, NAMES)
    with pytest.raises(LabError, match="flux holds"):
        infer(model, flux.astype(kind), ivar)
    with pytest.raises(LabError, match="ivar holds"):
        infer(model, flux, ivar.astype(kind))


@pytest.mark.parametrize("model", [Cannon(order=1, scatter=True), RidgeLabels()])
@pytest.mark.parametrize("size", [3e38, 1e300, -3e38])
def test_a_flux_beyond_any_star_s_is_no_pixel(model, size):
    labels, flux, ivar = arrays()
    model.fit(labels, flux, ivar, NAMES)
    wild = flux.astype(float)
    wild[7, 3] = size
    without = ivar.copy()
    without[7, 3] = 0
    found, expected = infer(model, wild, ivar), infer(model, flux, without)
    assert found["n_good"][7] == 39
    for name in ("teff", "teff_err", "flags"):
        assert np.array_equal(found[name], expected[name])
    with pytest.raises(LabError, match="star 7 has 1 pixels with a flux beyond any star's"):
        model.fit(labels, wild, ivar, NAMES)


def test_labels_no_star_has_are_named():
    labels, flux, ivar = arrays()
    labels[5, 1] = 1e300
    with pytest.raises(LabError, match=r"star 5 has the LOGG 1e\+300"):
        Cannon(order=1).fit(labels, flux, ivar, NAMES)


@pytest.mark.parametrize("offset", [0, 1e-6, 1e-3])
def test_two_labels_that_are_one_are_named(offset):
    labels, flux, ivar = arrays()
    noise = np.random.default_rng(0).normal(size=len(labels))
    labels[:, 2] = labels[:, 1] + offset * noise
    message = "follows from the other labels|determine only"
    with pytest.raises(LabError, match=message):
        Cannon(order=2).fit(labels, flux, ivar, NAMES)
    RidgeLabels().fit(labels, flux, ivar, NAMES)  # each has a line of its own


@pytest.mark.parametrize(
    "model", [Cannon(order=2, scatter=True), HiddenCannon(hidden=2), RidgeLabels()]
)
@pytest.mark.parametrize("value", [1e10, -1e20])
def test_a_label_far_from_all_others_is_named(model, value):
    labels, flux, ivar = arrays()
    labels[5, 0] = value
    with pytest.raises(LabError, match="star 5 has the TEFF .* leave it out"):
        model.fit(labels, flux, ivar, NAMES)


def test_no_solution_is_no_traceback():
    labels, flux, ivar = arrays()
    flux[3, 5] = 1e14
    with pytest.raises(LabError, match="no solution in double precision"):
        LatentLabels(latents=5).fit(labels, flux, ivar, NAMES)


def test_labels_of_latents_are_those_of_the_machine_that_learned(tmp_path, monkeypatch):
    "Nothing is solved again when a model is read: another machine would round otherwise."
    spectra = make_spectra()
    model = LatentLabels(latents=5).fit(spectra)
    model.save(tmp_path / "model.asdf")
    monkeypatch.setattr(latents, "RidgeCV", None)
    monkeypatch.setattr(latents, "cho_solve", None)
    again = load_model(tmp_path / "model.asdf")
    for name in ("teff", "teff_err", "fe_h"):
        assert np.array_equal(infer(again, spectra)[name], infer(model, spectra)[name])


def test_copies_of_a_star_share_a_fold_when_hidden_labels_are_counted(monkeypatch):
    spectra = make_spectra(150)
    twice = spectra[np.tile(np.arange(75), 2)]
    asked = []
    real = hidden.fold_numbers
    monkeypatch.setattr(
        hidden, "fold_numbers", lambda *a, **k: asked.append(real(*a, **k)) or asked[-1]
    )
    for stars in (twice, (twice.labels(NAMES), twice.flux, twice.ivar, NAMES)):
        HiddenCannon(order=1).fit(*([stars] if stars is twice else stars))
        assert np.array_equal(asked[-1][:75], asked[-1][75:])


@pytest.mark.parametrize(
    "truth, message",
    [
        (lambda t: t.astype(str), "not real numbers"),
        (lambda t: t.astype(complex), "not real numbers"),
        (lambda t: None, "not real numbers"),
        (lambda t: t * np.inf, "too few for an error model"),
    ],
)
def test_odd_truths_are_named(truth, message):
    spectra = make_spectra()
    model = Cannon(order=1).fit(spectra)
    table = infer(model, spectra)
    with pytest.raises(LabError, match=message):
        with_error_model(model, table, truth(spectra.labels(NAMES)))
    table["teff_err"] *= -1
    with pytest.raises(LabError, match="150 errors in the table are negative"):
        with_error_model(model, table, spectra.labels(NAMES))


@pytest.mark.parametrize("alphas", [None, "x", [], [-1], [0], [np.nan], [1j]])
def test_odd_penalties_are_named(alphas):
    with pytest.raises(LabError, match="alphas"):
        RidgeLabels(alphas=alphas).fit(make_spectra())


def test_a_line_needs_stars_that_differ():
    labels, flux, ivar = arrays()
    with pytest.raises(LabError, match="1 training star is too few"):
        RidgeLabels().fit(labels[:1], flux[:1], ivar[:1], NAMES)
    labels[:, 1] = 2.5
    with pytest.raises(LabError, match="LOGG is 2.5 in all training stars: leave it out"):
        RidgeLabels().fit(labels, flux, ivar, NAMES)


def test_a_weight_beyond_all_others_is_named():
    labels, flux, ivar = arrays()
    ivar[9, 4] = 1e24
    with pytest.raises(LabError, match=r"star 9 has the ivar 1e\+24 in a pixel"):
        Cannon(order=1).fit(labels, flux, ivar, NAMES)


@pytest.mark.parametrize("model", [Cannon(order=1), RidgeLabels(), HiddenCannon(hidden=2, order=1)])
def test_a_fit_that_fails_leaves_the_model_as_it_was(model):
    spectra = make_spectra()
    before = infer(model.fit(spectra), spectra)
    broken = spectra.replace(flux=np.full_like(spectra.flux, np.nan))
    for wrong in (broken, spectra[:1], spectra[:0]):
        with pytest.raises(LabError):
            model.fit(wrong)
        after = infer(model, spectra)
        assert all(np.array_equal(after[name], before[name]) for name in ("teff", "flags"))


def test_blocks_do_not_depend_on_the_cores(monkeypatch):
    seen = []
    for cores in (1, 2, 8):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        seen.append(models.in_blocks(lambda rows: (rows.start, rows.stop), 7214))
    assert seen[0] == seen[1] == seen[2]


def test_writing_a_model_leaves_nothing_behind(tmp_path, monkeypatch):
    model = Cannon(order=1).fit(make_spectra())
    seen = []
    write = asdf.AsdfFile.write_to

    def watched(self, *arguments, **options):
        write(self, *arguments, **options)
        seen.extend(path.name for path in tmp_path.iterdir())

    monkeypatch.setattr(asdf.AsdfFile, "write_to", watched)
    old = tmp_path / ".asdf_tmpq1w2e3"
    foreign = tmp_path / ".asdf_tmpother"
    model.save(tmp_path / "m.asdf")
    old.write_bytes((tmp_path / "m.asdf").read_bytes())
    foreign.write_bytes(b"#ASDF of another program")
    for path in (old, foreign):
        os.utime(path, (1e9, 1e9))
    model.save(tmp_path / "m.asdf")
    assert {path.name for path in tmp_path.iterdir()} == {"m.asdf", foreign.name}
    assert not [name for name in seen if "asdf_tmp" in name and name != foreign.name]


def test_half_an_error_model_is_refused(kept, tmp_path):
    def half(tree):
        tree["error_inflation_"] = np.ones(len(tree["label_names_"]))

    with pytest.raises(LabError, match="its error model is only half there"):
        load_model(changed(kept, tmp_path, half))


@pytest.mark.parametrize("wrong", [np.zeros((3, 3)), np.ones((3, 3)) - 2 * np.eye(3)[::-1]])
def test_no_correlation_is_refused(tmp_path, wrong):
    model = Cannon(order=1).fit(make_spectra())
    model.error_inflation_ = model.error_floor_ = np.ones(3)
    model.error_correlation_ = np.eye(3)
    model.save(tmp_path / "model.asdf")
    assert load_model(tmp_path / "model.asdf").errors_ == "calibrated"
    model.error_correlation_ = wrong
    model.save(tmp_path / "model.asdf")
    with pytest.raises(LabError, match="error_correlation_ holds no correlations"):
        load_model(tmp_path / "model.asdf")


def test_numbers_of_half_precision_are_checked_in_silence(kept, tmp_path):
    def halved(tree):
        tree["theta_"] = tree["theta_"].astype("f2")

    path = changed(kept, tmp_path, halved)
    with warnings.catch_warnings(), pytest.raises(LabError, match="was changed since it was writ"):
        warnings.simplefilter("error")
        load_model(path)


def test_nothing_in_place_of_what_left_out_stars_teach_is_not_learned(tmp_path):
    model = Cannon(order=1).fit(make_spectra())
    names = ("error_inflation_", "error_floor_", "catalogue_noise_", "fit_limit_", "refusal_")
    for name in names:
        setattr(model, name, None)
    model.save(tmp_path / "model.asdf")
    again = load_model(tmp_path / "model.asdf")
    assert not any(hasattr(again, name) for name in names) and again.errors_ == "formal"
    assert len(infer(again, make_spectra(), any_recipe=True))
