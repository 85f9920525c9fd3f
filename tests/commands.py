"""Commands as processes of their own, forked from one that has loaded the package.

`with loaded() as run:` starts that one; `run(words, stdout=…, stderr=…)` is a process that ran
`stellar-lab` with these words, and says its exit code, output and error output. A process that
begins with nothing takes three seconds to load what a command needs, and these tests are not about
that: what they are about, streams, folders and exit codes, is a process's own here, too.
"""

import gc
import io
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

CLOSED = "closed"  # in place of a path: as after `>&-`


@contextmanager
def loaded():
    "A function that runs commands, each in a process of its own."
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run(*words, stdin=os.devnull, stdout=None, stderr=None, gone=None):
        """Run a command; streams are paths or CLOSED, and are read where no path is given. It works
        in the folder `gone`, if one is named, which is removed before the command begins."""
        with TemporaryDirectory() as folder:
            kept = [Path(folder, name) for name in ("stdout", "stderr")]
            streams = [stdin, stdout or str(kept[0]), stderr or str(kept[1])]
            task = {"words": [str(word) for word in words], "streams": streams}
            task["gone"] = gone and str(gone)
            server.stdin.write(json.dumps(task) + "\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
            said = [path.read_text() if path.exists() else None for path in kept]
        return SimpleNamespace(returncode=code, stdout=said[0], stderr=said[1])

    try:
        yield run
    finally:
        server.communicate(timeout=30)


def _serve():
    "Answer each line with the exit code of the command that it describes."
    import astropy.coordinates  # noqa: F401  (by the writers of tables)

    import stellar_lab.labelling
    import stellar_lab.training  # noqa: F401

    gc.freeze()  # what is loaded stays: no command looks through it at its end
    # The pipes that tasks and answers go through, where no command looks for its streams.
    tasks = os.fdopen(os.dup(0), buffering=1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in iter(tasks.readline, ""):
        child = os.fork()
        if child == 0:
            tasks.close()
            answers.close()
            return _be_command(**json.loads(line))
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
    return 0


def _be_command(words, streams, gone):
    "What the script `stellar-lab` does, in a process whose streams are these."
    from stellar_lab.cli import main

    if gone:
        os.chdir(gone)
        os.rmdir(gone)
    for number, path in enumerate(streams):
        os.close(number)
        if path != CLOSED:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY
            given = os.open(path, flags)
            os.dup2(given, number)
            if given != number:
                os.close(given)
    sys.stdin, sys.stdout, sys.stderr = map(_stream, range(3))
    sys.argv = ["stellar-lab", *words]
    return main()


def _stream(number):
    "The stream that Python makes of a file that it is given when it starts; None for none."
    try:
        os.fstat(number)
    except OSError:
        return None
    file = open(number, "wb" if number else "rb", closefd=False)
    errors = "backslashreplace" if number == 2 else "strict"
    return io.TextIOWrapper(file, errors=errors, line_buffering=number == 2)


if __name__ == "__main__":
    sys.exit(_serve())
