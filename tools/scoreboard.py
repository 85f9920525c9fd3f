"""The scoreboard of an archive in the full profile: hours on two cores.

Every training is kept, so an interrupted run goes on where it was. Trainings belong to parameters
and stars, not to code: after a change of a model's code, remove the cache."""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).resolve().parents[1]


def comma_separated(text):
    return text.split(",")


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--archive", type=Path, help="root; by default the embedded one, or STELLAR_LAB_ARCHIVE")
    add("--profile", default="full", choices=("quick", "full"))
    add(
        "--products",
        type=comma_separated,
        help="such as apstar,aspcapstar; the two largest networks run on the first only",
    )
    add(
        "--contests",
        nargs="+",
        help='such as "one split" "five folds"; by default all of the archive. The table then '
        "holds these contests alone: give it another name with --out",
    )
    add(
        "--models",
        nargs="+",
        help='such as latents "hidden labels"; by default all. The table keeps its other models',
    )
    add("--cache", type=Path, default=ROOT / "data" / "archives" / "scoreboard")
    add("--out", type=Path, help="by default data/scoreboard_<name of the archive>.ecsv")
    add("--seed", type=int, default=0)
    add("--remark", default="", help="goes into the file: what else the machine did, say")
    return parser.parse_args()


def show(table):
    """Print each contest of each product, and the same against the truth where it is known."""
    from stellar_lab.results import against_truth, readable

    for product, contest in dict.fromkeys(table["product", "contest"].iterrows()):
        part = table[(table["product"] == product) & (table["contest"] == contest)]
        print(f"\n{contest} ({product})")
        readable(part).pprint_all()
        if not any(part["true_rmse"] != part["true_rmse"]):  # no NaN: a truth is known
            print("against the truth")
            readable(against_truth(part)).pprint_all()


def main():
    options = arguments()
    from stellar_lab.results import run_scoreboard
    from stellar_lab.survey import LabError, archive_record, archive_root

    try:
        root = options.archive or archive_root()
        out = options.out or ROOT / "data" / f"scoreboard_{archive_record(root).name}.ecsv"
        table = run_scoreboard(
            root,
            out,
            options.cache,
            options.profile,
            options.products,
            options.seed,
            options.remark,
            options.contests,
            models=options.models,
        )
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(table)
    print(f"\nwrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
