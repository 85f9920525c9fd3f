"""The scoreboard of an archive in the full profile: hours on two cores. Every training is kept, so an interrupted run goes on where it was.

  scoreboard.py [--archive FOLDER] [--profile full|quick] [--products apstar,aspcapstar] [--contests "one split,five folds"] [--cache FOLDER] [--out FILE] [--remark TEXT]

Trainings belong to parameters and stars, not to code: after a change of a model's code, remove the cache."""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).resolve().parents[1]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--archive", type=Path, help="root; by default the embedded archive, or STELLAR_LAB_ARCHIVE"
    )
    parser.add_argument("--profile", default="full", choices=("quick", "full"))
    parser.add_argument(
        "--products", help="comma-separated; the lab's networks run on the first only"
    )
    parser.add_argument(
        "--contests",
        help="comma-separated; by default all of the archive, its first one (one split, or five folds) before the others",
    )
    parser.add_argument("--cache", type=Path, default=ROOT / "data" / "archives" / "scoreboard")
    parser.add_argument(
        "--out", type=Path, help="by default data/scoreboard_<name of the archive>.ecsv"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--remark", default="", help="goes into the file: what else the machine did, say"
    )
    options = parser.parse_args()
    from stellar_lab.results import against_truth, readable, run_scoreboard
    from stellar_lab.survey import LabError, archive_record, archive_root

    try:
        root = options.archive or archive_root()
        out = options.out or ROOT / "data" / f"scoreboard_{archive_record(root).name}.ecsv"
        products, only = (
            text.split(",") if text else None for text in (options.products, options.contests)
        )
        table = run_scoreboard(
            root, out, options.cache, options.profile, products, options.seed, options.remark, only
        )
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for product, contest in dict.fromkeys(zip(table["product"], table["contest"])):
        part = table[(table["product"] == product) & (table["contest"] == contest)]
        print(f"\n{contest} ({product})")
        readable(part).pprint_all()
        if not any(part["true_rmse"] != part["true_rmse"]):  # no NaN: a truth is known
            print("against the truth")
            readable(against_truth(part)).pprint_all()
    print(f"\nwrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
