"""What the campaign of faults damages, and who judges what became of it.

A judge compares what came out with the undisturbed result: the same labels, the same bytes. What
differs and says so is reported or flagged; what differs without a word is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stellar_lab import archives
from stellar_lab.labelling import label
from stellar_lab.models import LabelModel
from stellar_lab.survey import ARCHIVE_FILE, ARCHIVES
from stellar_lab.training import describe, load_model, train

OUTCOMES = {  # in the order of the table
    "reported": "refused, or a line in a report or ledger, in our words",
    "harmless": "the answer is that of the undamaged file",
    "flagged": "another answer, and a flag or a count says so",
    "slight": "labels moved by less than half an error bar, without a word",
    "traceback": "an exception, or words that are not ours",
    "hang": "no answer in time, or a process that stays behind",
    "file": "a wrong file under a final name, a user's file replaced, something left behind",
    "wrong": "another answer without a word",
}
MUST_NOT_BE = ("traceback", "hang", "file")  # of any kind
LABELS = ["teff", "m_h"]
GUARDED = 110  # stars of the larger archive
LONGEST = 60  # seconds that an answer may take; TensorFlow alone needs ten to be loaded
SLIGHT = 0.5  # error bars

# what only a program would say of its own inside
FOREIGN = re.compile(
    r"Traceback|\[Errno|has no attribute|not subscriptable|ufunc|broadcast|unsupported operand|"
    r"not supported between|invalid literal|could not convert|memmap|\.verify\(|codec can't|"
    r"out of bounds|out of range|must be real number|mistake of stellar_lab|cannot be labelled|"
    r"Error\(|unhashable|not iterable|positional argument|keyword argument|cannot unpack|NoneType|"
    r"OpenBLAS|dtype\(|while scanning|while parsing|<class |\b0x[0-9a-f]{8}|Warning\b|"
    r"[\x00-\x08\x0b-\x1f\x7f]"
)


class Found(NamedTuple):
    "What became of a fault, and what was said."

    outcome: str
    said: str = ""


def told(text):
    "Something was refused: in our words?"
    text = str(text)
    one_line = "\n" not in text.strip() or "rule" in text  # a ledger has several lines
    return Found("traceback" if FOREIGN.search(text) or not one_line else "reported", text)


def processor_seconds():
    "Of this process, and of those that it started and that have ended."
    return sum(os.times()[:4])


class Hang(BaseException):
    "The answer did not come in time."


IDLE = 0.02  # of a processor: who uses less waits for something, and not for a turn


@contextmanager
def deadline(seconds):
    """Raise Hang in this thread after so many seconds of work, or so many without any.

    On a busy machine a clock runs on while nobody works: a library of a gigabyte may take minutes
    to be loaded. So what counts is the time of the processor, children included; who has used next
    to none of it in all that time waits for what does not come."""
    used = begun = processor_seconds()

    def look(*_):
        nonlocal used
        now = processor_seconds()
        if now - begun >= seconds or now - used <= IDLE * seconds:
            raise Hang
        used = now

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Bench:
    "A small archive, models of it, and the undisturbed answers."

    def __init__(self, folder, stars=40):
        self.folder = Path(folder)
        self.root = self.folder / "archive"
        names = ("cannon", "ridge", "hidden", "guarded")
        self.models = {name: self.folder / f"{name}.asdf" for name in names}
        if not self.models["guarded"].exists():  # a folder that was kept has all of it
            self._make(stars)
        self.report = train(self.root, labels=LABELS, scatter=True, progress=False)
        self.model = load_model(self.models["guarded"])
        whole = label(self.model, self.root, progress=False).table
        good = whole[whole["flags"] == 0]
        self.stars = [Path(str(file)) for file in good["file"]]
        self.record = json.loads(self.models["cannon"].with_suffix(".json").read_text())
        self._answers = {}
        self._described = {}
        self._undisturbed = {}

    def _make(self, stars):
        "Write the archive and the models."
        archives.write_clusters(self.root, stars=stars, flaws={}, workers=2, progress=False)
        model = self.models["cannon"]
        train(self.root, model, labels=LABELS, scatter=True, progress=False)
        for kind in ("ridge", "hidden"):
            train(self.root, self.models[kind], labels=LABELS, kind=kind, progress=False)
        self._train_guarded()

    def _train_guarded(self):
        "A model of so many stars that it has a guard, as those of users have."
        many = self.folder / "many"
        stars = archives.real_stars(with_mask=True)
        spread = np.linspace(0, len(stars) - 1, GUARDED).round().astype(int)
        record = replace(ARCHIVES["clusters"], products=("apstar",))
        archives.write_archive(many, stars[spread], record, flaws={}, workers=2, progress=False)
        options = {"labels": LABELS, "scatter": True, "test_size": 0.2, "progress": False}
        report = train(many, self.models["guarded"], **options)
        if not hasattr(report.model, "refusal_"):
            raise RuntimeError(f"{GUARDED} stars are too few for a guard")
        shutil.rmtree(many)

    def place(self):
        "An empty folder for one fault."
        place = self.folder / "fault"
        if place.is_dir():
            for path in place.rglob("*"):
                if path.is_dir() and not path.is_symlink():
                    path.chmod(0o755)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place

    def answer(self, star, kind="guarded"):
        "The row of an undamaged star, labelled alone as the damaged one is."
        key = (star, kind)
        if key not in self._answers:
            model = self.model if kind == "guarded" else self.models[kind]
            self._answers[key] = label(model, star, progress=False).table[0]
        return self._answers[key]

    def described(self, kind):
        "What is said of an undamaged model without a record."
        if kind not in self._described:
            lone = self.folder / "lone.asdf"
            shutil.copy(self.models[kind], lone)
            self._described[kind] = _about(lone)
        return self._described[kind]

    def copy(self, place, sealed=True):
        "The archive again, of links to its files; without its checksums unless it is `sealed`."
        root = place / "archive"
        shutil.copytree(self.root, root, copy_function=os.link)
        if not sealed:
            facts = json.loads((root / ARCHIVE_FILE).read_text())
            facts.pop("sha256", None)
            rewrite(root / ARCHIVE_FILE, json.dumps(facts).encode())
        return root

    def undisturbed(self, what, make):
        "What a command writes when nothing disturbs it, made once."
        if what not in self._undisturbed:
            self._undisturbed[what] = make()
        return self._undisturbed[what]


def rewrite(path, content):
    "Other bytes in a file that may be a link to another file."
    path.unlink()
    path.write_bytes(content)


# --- judges of answers


def judge_star(bench, path, original, model=None):
    "Label a file, and compare with the labels of the undamaged one."
    summary = label(bench.model if model is None else model, path, progress=False)
    if summary.problems:
        return told(summary.problems[0].reason)
    return judge_row(summary.table[0], bench.answer(original))


FACTS = ("snr", "ra", "dec", "field", "telescope")


def _same(one, other):
    one, other = (getattr(value, "value", value) for value in (one, other))
    return np.array_equal(one, other, equal_nan=np.asarray(one).dtype.kind == "f")


def _unknown(value):
    value = getattr(value, "value", value)
    return str(value).strip() in ("", "nan")


def judge_row(row, expected, facts=FACTS):
    "The row of a damaged star, compared with that of the undamaged one."
    if not _same(row["apogee_id"], expected["apogee_id"]):
        return Found("wrong", f"{row['apogee_id']} instead of {expected['apogee_id']}")
    for name in facts:
        if not _same(row[name], expected[name]) and not _unknown(row[name]):
            return Found("wrong", f"{name} {row[name]} instead of {expected[name]}")
    columns = [*LABELS, *(f"{name}_err" for name in LABELS), "covariance", "n_good"]
    if all(_same(row[name], expected[name]) for name in columns):
        return Found("harmless")
    strange = "strange_pixels" in row.colnames and row["strange_pixels"] > 0
    if row["flags"] or strange:
        return Found("flagged")
    off = max(float(abs(row[name] - expected[name]) / expected[f"{name}_err"]) for name in LABELS)
    ratio = max(float(row[f"{name}_err"] / expected[f"{name}_err"]) for name in LABELS)
    slight = off <= SLIGHT and 1 / 1.5 < ratio < 1.5
    return Found("slight" if slight else "wrong", f"{off:.2f} error bars off, errors x {ratio:.2f}")


def _about(path):
    "What is said of a model, without the names of its files."
    said = describe(path).replace(str(path), "MODEL")
    return said.replace(str(path.with_suffix(".json")), "RECORD")


def judge_model(bench, path, kind):
    "Read a file of a model, describe it, label with it."
    model = load_model(path)
    said = _about(path)
    if FOREIGN.search(said):
        return Found("traceback", said)
    if not isinstance(model, LabelModel):
        return Found("wrong", f"a {type(model).__name__}")
    star = bench.stars[0]
    table = label(model, star, progress=False).table
    if not all(name in table.colnames for name in LABELS):
        return Found("wrong", f"labels {table.meta['labels']}")
    found = judge_row(table[0], bench.answer(star, kind))
    if found.outcome == "harmless" and said != bench.described(kind):
        return Found("wrong", said)
    return found


def judge_record(bench, path):
    "What is said of a model whose record is damaged: that, or what was said before."
    said = _about(path)
    if FOREIGN.search(said):
        return Found("traceback", said)
    whole = bench.undisturbed("record", lambda: _described_whole(bench, path.parent))
    if said == whole:
        return Found("harmless")
    doubts = ("is not the record", "of another training", "no record", "was changed since")
    return Found("reported" if any(map(said.__contains__, doubts)) else "wrong", said)


def _described_whole(bench, place):
    "What is said of an undamaged model and its record."
    path = place / "whole.asdf"
    shutil.copy(bench.models["cannon"], path)
    path.with_suffix(".json").write_text(json.dumps(bench.record))
    return _about(path)


def _plain(report, root):
    "What a training says, without the name of the folder."
    plain = json.dumps(report.to_dict(), sort_keys=True, default=str)
    return plain.replace(str(root), "ROOT")


def _trained(bench):
    "What the undisturbed training says."
    return _plain(train(bench.root, labels=LABELS, scatter=True, progress=False), bench.root)


def judge_training(bench, root):
    "Train, and compare with the undamaged training."
    report = train(root, labels=LABELS, scatter=True, progress=False)
    expected = bench.undisturbed("training", lambda: _trained(bench))
    said = str(report)
    if FOREIGN.search(said):
        return Found("traceback", said)
    steps = [report.ledger.table, bench.report.ledger.table]
    if _plain(report, root) == expected:
        return Found("harmless")
    if not all(
        _same(np.asarray(steps[0][n]), np.asarray(steps[1][n])) for n in ("dropped", "counted")
    ):
        return Found("reported", said)  # by a rule of the ledger
    if "count as unusable" in said:
        return Found("reported", said)
    model = report.model
    before = bench.report.model
    labels = model.training_labels_, before.training_labels_
    if labels[0].shape == labels[1].shape and np.allclose(*labels, rtol=1e-6):
        drawn = [one.predict(labels[1]) for one in (model, before)]
        if np.allclose(*drawn, rtol=0, atol=1e-5, equal_nan=True):
            return Found("harmless")  # a converted unit rounds the labels
    same = model.training_digest_ == before.training_digest_
    return Found("wrong", f"digest {'the same' if same else 'another'}: {said}")


def whole_folder(folder, but=()):
    "Name -> bytes of all files below a folder, but for some."
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in but
    }


# --- commands: processes of their own


SCRIPT = Path(sys.executable).with_name("stellar-lab")


class Process:
    "A command in a session of its own, so that we see whom it leaves behind."

    def __init__(self, *words, shell=None, cwd=None):
        settings = os.environ | {"SOURCE_DATE_EPOCH": "1000000000"}
        self.output = shell is None
        command = ["sh", "-c", shell] if shell else [SCRIPT, *map(str, words)]
        self.process = subprocess.Popen(
            command,
            env=settings,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def end(self, seconds=120):
        """Exit code, output and error output; a process that does not end is ended, and is a hang.

        As with `deadline`, who works on a busy machine may take longer."""
        used = 0.0
        while True:
            try:
                out, err = self.process.communicate(timeout=seconds)
                break
            except subprocess.TimeoutExpired:
                now = sum(map(_seconds_of, _members(self.process.pid)))
                if now < seconds and now - used > IDLE * seconds:
                    used = now
                    continue
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.communicate()
                raise Hang from None
        return self.process.returncode, out.decode(errors="replace"), err.decode(errors="replace")

    def catches(self, number):
        "Whether the process has asked to be told of a signal, and has not ended."
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return False
        caught = re.search(r"SigCgt:\s*(\w+)", status)
        return bool(caught) and bool(int(caught[1], 16) >> (number - 1) & 1)

    def left_behind(self, patience=10):
        "Processes of the session that still run after a while."
        until = time.monotonic() + patience
        while time.monotonic() < until:
            alive = _members(self.process.pid)
            if not alive:
                return []
            time.sleep(0.05)
        os.killpg(self.process.pid, signal.SIGKILL)
        return alive


def _members(session):
    "Numbers of the processes in a session that still run."
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(entry))
    return found


def _seconds_of(process):
    "Processor time of a process and of its children that have ended."
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def judge_words(code, out, err):
    "A command that ended by itself: did it say what it did, in our words? None if all was well."
    if FOREIGN.search(out) or FOREIGN.search(err):
        return Found("traceback", out + err)
    if code not in (0, 1, 2, 129, 130, 141, 143):
        return Found("traceback", f"exit code {code}: {err}")
    return Found("reported", err or out) if code else None


@contextmanager
def recorded_warnings():
    "Warnings that would reach a user's terminal."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = []
        yield found
        found += [f"{w.category.__name__}: {w.message}" for w in caught if _shown(w.category)]


def _shown(kind):
    "Python shows no DeprecationWarning of a library, nor a ResourceWarning."
    return not issubclass(kind, (DeprecationWarning, PendingDeprecationWarning, ResourceWarning))
