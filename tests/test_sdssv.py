"The tree of SDSS-V: written, read by another library, fetched, learned from, labelled."

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from stellar_lab.archives import real_stars, write_sdssv
from stellar_lab.clean import find_files, product_of, read_files
from stellar_lab.fetch import fetch, read_sdss_ids, serve
from stellar_lab.labelling import find_spectra
from stellar_lab.mwm import read_astra, read_mwm
from stellar_lab.survey import RELEASES, LabError, on_band, sha256_of
from stellar_lab.training import load_model, train

pytest_plugins = ["forty_stars"]

RULES = RELEASES["dr19"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "Twenty real stars."
    root = tmp_path_factory.mktemp("sdssv") / "tree"
    write_sdssv(root, stars=20, progress=False)
    return root


@pytest.fixture(scope="module")
def paths(tree):
    return [str(path) for path in find_files(tree, "mwmstar")["path"]]


def of_kind(paths, kind):
    "The first file with rows in exactly these extensions."
    for path in paths:
        with fits.open(path) as hdus:
            if [hdu.name for hdu in hdus[1:] if hdu.header["NAXIS2"]] == kind:
                return path


def test_every_column_by_plain_astropy(paths):
    "What a reader that knows the data model, and none of our code, finds."
    with fits.open(of_kind(paths, ["APOGEE/APO"])) as hdus:
        assert [h.name for h in hdus[1:]] == ["BOSS/APO", "BOSS/LCO", "APOGEE/APO", "APOGEE/LCO"]
        assert all(hdu.verify_checksum() and hdu.verify_datasum() for hdu in hdus[1:])
        sdss_id = hdus[0].header["SDSS_ID"]
        hdu = hdus["APOGEE/APO"]
        names = hdu.columns.names
        data = {name: hdu.data[name] for name in names}
        assert names[:6] == "spectrum_pk release filetype v_astra healpix sdss_id".split()
        assert data["sdss_id"][0] == sdss_id and data["v_astra"][0] == "0.6.0"
        assert (data["release"][0], data["filetype"][0]) == ("sdss5", "mwmStar")
        pixels = "wavelength flux ivar pixel_flags continuum nmf_rectified_model_flux".split()
        for name in pixels:
            assert data[name].shape == (1, 8575) and data[name].dtype == ">f4", name
            assert hdu.columns[name].format == "8575E"
        assert np.allclose(data["wavelength"][0], 10 ** (4.179 + 6e-6 * np.arange(8575)), rtol=1e-6)
        header = [hdu.header[key] for key in ("CRVAL", "CDELT", "NPIXELS", "CTYPE", "DC-FLAG")]
        assert header == [4.179, 6e-6, 8575, "LOG-LINEAR", 1]
        stars = real_stars()
        row = list(map(str, stars.stars["APOGEE_ID"])).index(data["obj"][0])
        good = stars.ivar[row] > 0
        flux, ivar = data["flux"][0][on_band], data["ivar"][0][on_band]
        ratio = flux[good] * np.sqrt(ivar[good])
        assert np.allclose(ratio, stars.flux[row][good] * np.sqrt(stars.ivar[row][good]), rtol=1e-4)
        assert np.array_equal(data["pixel_flags"][0][on_band] == 0, good)
        scalars = set(names) - set(pixels)
        assert len(scalars) == 41 and all(data[name].shape == (1,) for name in scalars)
        empty = hdus["APOGEE/LCO"]
        assert empty.columns.names == names and empty.columns["flux"].format == "0E"


def test_specutils_reads_them(paths):
    specutils = pytest.importorskip("specutils")
    reader = getattr(specutils, "Spectrum", None) or specutils.Spectrum1D
    path = of_kind(paths, ["APOGEE/APO"])
    found = reader.read(path, format="SDSS-V mwm", hdu=3)
    assert found.flux.shape[-1] == 8575
    ours = read_mwm(path)
    assert np.allclose(np.ravel(found.flux.value)[on_band], ours.flux[0])
    assert np.allclose(np.ravel(found.spectral_axis.value)[on_band], ours.wavelength, rtol=1e-6)
    lists = specutils.SpectrumList.read(path, format="SDSS-V mwm")
    assert len(lists) == 1


def apstar_of_sdss5(folder, spectra, visits):
    """An apStar file as the reduction of SDSS-V writes it: one combination for a single visit, two
    and the visits for more; VRAD and BC beside VHELIO; names with the telescope."""
    rows = 1 if visits == 1 else visits + 2
    full = {name: np.zeros((rows, 8575), "f4") for name in ("flux", "error", "mask")}
    full["flux"][:, on_band] = spectra.flux
    full["error"][:] = 1e10
    good = spectra.ivar[0] > 0
    full["error"][:, on_band[good]] = spectra.ivar[0][good] ** -0.5
    full["mask"][:, on_band[~good]] = 1
    if rows > 1:  # as in DR17 the second row is another combination, without flags
        full["mask"][1] = 0
        full["flux"][1] *= 1.1
    header = fits.Header({"APRED": "1.2", "V_APRED": "1.2", "NVISITS": visits, "SURVEY": "SDSS-V"})
    header.update({"OBJID": "2M05560393-0133549", "TELESCOP": "apo25m", "VHELIO": 1.0})
    card = {"CRVAL1": 4.179, "CDELT1": 6e-6, "CRPIX1": 1, "CTYPE1": "LOG-LINEAR", "DC-FLAG": 1}
    hdus = [fits.PrimaryHDU(header=header)]
    units = ("Flux (10^-17 erg/s/cm^2/Ang)", "Err (10^-17 erg/s/cm^2/Ang)", "Pixel Mask")
    for values, unit in zip((full["flux"], full["error"], full["mask"].astype("i2")), units):
        hdus.append(fits.ImageHDU(values, fits.Header(card | {"BUNIT": unit})))
    hdus += [fits.ImageHDU(np.zeros((rows, 8575), "f4")) for _ in range(6)]
    hdus.append(fits.BinTableHDU(Table({"JD": [2459000.0]})))
    path = folder / "apStar-1.2-apo25m-2M05560393-0133549.fits"
    fits.HDUList(hdus).writeto(path)
    return path


@pytest.mark.parametrize("visits", [1, 2, 3])
def test_apstar_files_of_sdss5(visits, tmp_path):
    spectra = real_stars()[[5]]
    path = apstar_of_sdss5(tmp_path, spectra, visits)
    found, problems = read_files([path], progress=False)
    assert not problems and product_of(path) == "apstar"
    good = found.mask[0] == 0
    assert np.array_equal(good, spectra.ivar[0] > 0)
    assert np.allclose(found.flux[0][good], spectra.flux[0][good], rtol=1e-5)
    assert np.allclose(found.ivar[0][good], spectra.ivar[0][good], rtol=1e-4)
    if visits > 1 and (specutils := _specutils()):
        seen = specutils.Spectrum.read(path, format="SDSS-V apStar", idx=0)
        assert np.allclose(seen.flux.value[on_band], spectra.flux[0], rtol=1e-5)


def _specutils():
    try:
        import specutils
    except ImportError:
        return None
    return specutils


def test_the_catalogue_by_plain_astropy(tree, paths):
    with fits.open(tree / RULES.allstar) as hdus:
        assert len(hdus[1].data) == 0 and hdus[2].header["INSTRMNT"] == "APOGEE"
        plain = Table(hdus[2].data)
    ours = read_astra(tree / RULES.allstar, ["TEFF", "MG_FE", "SI_FE"])
    assert np.array_equal(ours["SDSS_ID"], plain["sdss_id"]) and len(ours) == 19
    assert np.allclose(ours["TEFF"], plain["teff"])
    assert np.allclose(ours["MG_FE"], plain["mg_h"] - plain["fe_h"])
    assert np.isnan(ours["SI_FE"]).all()  # nobody measured it
    assert np.array_equal(ours["FLAG_BAD"], plain["flag_bad"]) and ours["FLAG_BAD"].sum() == 1


def test_same_seed_same_bytes(tmp_path):
    sums = []
    for name in "ab":
        write_sdssv(tmp_path / name, stars=[3, 5], progress=False)
        files = sorted(path for path in (tmp_path / name).rglob("*.fits*"))
        sums.append([sha256_of(path) for path in files])
    assert sums[0] == sums[1] and len(sums[0]) == 3


def test_fetching_by_number(tree, paths, tmp_path):
    numbers = [path.rpartition("-")[2].removesuffix(".fits") for path in paths[:3]]
    (tmp_path / "mine.txt").write_text("\n".join(numbers[:2]) + " # two stars\n")
    with serve(tree) as url:
        some = fetch(tmp_path / "some", url, sdss_ids=tmp_path / "mine.txt", progress=False)
    assert some.ok and some.fetched == 4  # archive.json, catalogue, two stars
    again = fetch(tmp_path / "some", tree, sdss_ids=numbers, progress=False)
    assert again.ok and again.fetched == 1 and again.already_there == 4
    gone = fetch(tmp_path / "some", tree, sdss_ids="7", catalogue=False, progress=False)
    assert gone.failed == 1 and not gone.ok
    every = fetch(tmp_path / "all", tree, progress=False, dry_run=True)
    assert every.found == 22
    table = Table({"SDSS_ID": [int(number) for number in numbers]})
    table.write(tmp_path / "mine.fits")
    assert read_sdss_ids(tmp_path / "mine.fits") == tuple(map(int, numbers))


def test_another_star_under_a_name_is_refused(tree, paths, tmp_path):
    rotten = tmp_path / "server" / RULES.path("mwmstar", "00/07", "7")
    rotten.parent.mkdir(parents=True)
    rotten.write_bytes(open(paths[0], "rb").read())
    found = fetch(
        tmp_path / "home", tmp_path / "server", "dr19", sdss_ids=7, progress=False, catalogue=False
    )
    assert "holds another star" in str(found)


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"fields": "4230"}, "has no fields"),
        ({"sdss_ids": "2M"}, "is no file, and no list of sdss_ids"),
        ({"sdss_ids": []}, "no sdss_id was given"),
        ({"sdss_ids": 7, "release": "dr17"}, "DR17 knows no sdss_id"),
        ({"products": "apstar"}, "choose from mwmstar, mwmvisit"),
    ],
)
def test_wishes_that_cannot_be(tree, tmp_path, wish, said):
    with pytest.raises(LabError, match=said):
        fetch(tmp_path / "x", tree, progress=False, **wish)


def test_train_and_label(tree, paths, run, tmp_path):
    report = train(tree, tmp_path / "m.asdf", ["teff"], order=1, refusal=False, progress=False)
    rules = {
        rule
        for rule, count in zip(report.ledger.table["rule"], report.ledger.table["dropped"])
        if count
    }
    assert {"no spectrum of APOGEE", "no row in the catalogue", "bad labels"} <= rules
    model = load_model(tmp_path / "m.asdf")
    assert model.metadata_["catalogue_sha256"] == sha256_of(tree / RULES.allstar)
    assert report.facts["archive"]["catalogue_sha256"] == model.metadata_["catalogue_sha256"]
    words = ("label", "--model", tmp_path / "m.asdf", tree, "--out", tmp_path / "l.fits")
    code, out, err = run(*words)
    labels = Table.read(tmp_path / "l.fits")
    assert code == 1 and "optical spectra" in err and len(labels) == 19
    for wish, said in ((("--fields", "4230"), "has no fields"), (("--row", "1"), "have no rows")):
        code, _, err = run("train", tree, "--model", tmp_path / "n.asdf", *wish)
        assert code == 2 and said in err


def test_a_folder_of_many_kinds(paths, good_files, tmp_path):
    from stellar_lab.visits import made_visit

    grid = 10 ** (4.179 + 6e-6 * np.arange(8575))
    made_visit(grid, np.ones(8575), 0.01, 0).writeto(tmp_path / "apVisit-r8-1-2-3.fits")
    (tmp_path / "mwmStar-0.6.0-1.fits").symlink_to(paths[0])
    (tmp_path / "apStar-r8-2M21334193-0048169.fits").symlink_to(good_files[0][0])
    kinds = [kind for _, kind in find_spectra(tmp_path)]
    assert sorted(kinds) == ["apstar", "apvisit", "mwmstar"]
