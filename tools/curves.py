"""Learning curves of all models on synthetic stars, with the photon limit: over an hour, two cores.

Every training is kept, so an interrupted run goes on where it was. Trainings belong to parameters
and stars, not to code: after a change of a model's code, remove the cache."""

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).resolve().parents[1]
SIZES = (50, 100, 200, 400, 800, 2000)
LEARNERS = 3000  # of whom the cuts leave more than 2,000
JUDGED = 600  # of whom some 550 are single giants


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", help='such as "Cannon" "hidden labels"')
    add("--cache", type=Path, default=ROOT / "data" / "archives" / "curves")
    add("--out", type=Path, default=ROOT / "data" / "curves_mock.ecsv")
    return parser.parse_args()


def limits(judged, truth, names):
    "SNR -> photon limits (N, K) of the catalogue's labels, a hundred stars at a time."
    import numpy as np

    from stellar_lab.curves import label_slopes, photon_errors
    from stellar_lab.mock import GIANT_STEPS, true_spectra

    columns = [list(GIANT_STEPS).index(name) for name in names]
    found = {snr: [] for snr in judged}
    for start in range(0, len(truth), 100):
        rows = np.arange(start, min(start + 100, len(truth)))
        slopes = label_slopes(true_spectra, truth[rows], GIANT_STEPS)
        for snr, stars in judged.items():
            found[snr].append(photon_errors(slopes, stars.ivar[rows])[:, columns])
    return {snr: np.concatenate(parts) for snr, parts in found.items()}


def main():
    options = arguments()
    from stellar_lab.curves import BRIGHTNESS, learning_curves, with_photon_limit
    from stellar_lab.mock import judged_giants, learning_stars
    from stellar_lab.results import contestants
    from stellar_lab.survey import ARCHIVES, LabError, write_table

    names = ARCHIVES["mock"].labels
    known = contestants(names)
    unknown = sorted(set(options.models or ()) - set(known))
    if unknown:
        print(
            f"error: no model {', '.join(map(repr, unknown))}: choose from "
            f"{', '.join(map(repr, known))}",
            file=sys.stderr,
        )
        return 2
    train = learning_stars(LEARNERS)
    judged = {snr: judged_giants(JUDGED, snr)[0] for snr in BRIGHTNESS}
    truth = judged_giants(JUDGED, BRIGHTNESS[0])[1]

    def models(stars):
        found = contestants(names, "quick", stars)
        return {name: found[name] for name in options.models or found}

    try:
        table = learning_curves(models, train, judged, SIZES, folder=options.cache)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table = with_photon_limit(table, judged, limits(judged, truth, names))
    table.meta = {"date": datetime.now(UTC).date().isoformat(), "judged": len(truth)}
    write_table(table, options.out)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
