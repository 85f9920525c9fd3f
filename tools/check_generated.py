"""Do package, text twins and notebooks agree? Regenerates all three in a copy, so that the work
tree is never touched, and compares."""

import difflib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from notebooks import ROOT, environment

COPIED = (
    "settings.ini",
    "jupytext.toml",
    "tools/sync.sh",
    "tools/kernelspec.py",
    "nbs",
    "stellar_lab",
)
COMPARED = ("nbs", "stellar_lab")
BY_HAND = ("__init__.py", "__main__.py")  # the front door; nbdev writes but the version into it


def contents(root):
    "Notebooks, twins and modules of a project: relative path -> text."
    files = [
        path
        for part in COMPARED
        for path in sorted((root / part).rglob("*"))
        if path.suffix in (".py", ".ipynb")
    ]
    kept = [path for path in files if not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)]
    return {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in kept}


def regenerate(root, folder):
    "The same files as the notebooks make them, in an empty folder."
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy2
        copy(root / name, folder / name)
    for generated in [*folder.glob("nbs/text/*.py"), *folder.glob("stellar_lab/*.py")]:
        if generated.name not in BY_HAND:
            generated.unlink()  # a twin or module without its notebook shall not survive
    # nbdev also reads settings from the user's configuration folder; the check shall not.
    made = subprocess.run(
        ["sh", "tools/sync.sh"],
        cwd=folder,
        env=environment(XDG_CONFIG_HOME=str(folder)),
        capture_output=True,
        text=True,
    )
    if made.returncode:
        raise SystemExit(f"make sync failed:\n{made.stdout}{made.stderr}")
    return contents(folder)


def differences(root=ROOT):
    "A unified diff for each file on which notebooks and generated files disagree."
    with tempfile.TemporaryDirectory() as folder:
        made = regenerate(root, Path(folder))
    found = contents(root)
    for name in sorted(found.keys() | made.keys()):
        old, new = found.get(name, ""), made.get(name, "")
        if old != new:
            yield "".join(
                difflib.unified_diff(
                    old.splitlines(True),
                    new.splitlines(True),
                    name,
                    f"{name} (from its notebook)",
                    n=1,
                )
            )


def main():
    wrong = list(differences())
    for diff in wrong:
        print(diff[:2000])
    if wrong:
        print(
            f"{len(wrong)} file(s) do not agree with the notebooks: "
            "run 'make sync', look at the difference, commit it"
        )
    else:
        print("package, text twins and notebooks agree")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
