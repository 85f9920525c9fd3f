"""Names the kernel in each notebook, so that JupyterLab opens it without asking for one."""

import json
from pathlib import Path

KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}


def main(folder=Path("nbs")):
    for path in sorted(folder.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if notebook["metadata"].get("kernelspec") != KERNEL:
            notebook["metadata"]["kernelspec"] = KERNEL
            text = json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")  # in the form that nbdev writes


if __name__ == "__main__":
    main()
