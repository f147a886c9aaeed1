"""Plants sixty faults, one at a time, and tells which of them the tests see.

Each is a small wrong edit: an end off by one, a sign, a NaN that is missed, a step that is left
out. Whoever makes the tests faster runs this before and after: what was seen before is to be seen
after. It is no part of ``make test``.

The faults go into copies of the working tree. A fault is known by its text, which the files of a
room have once in all, so that it stays known where files move. The script says which ones it does
not find. A fault counts as seen where a test fails that passes without it.

Usage: python tests/planted_faults.py [WORDS THAT A FAULT HAS, SUCH AS kernels ...]
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
COPIED = ("gradstat", "kernels", "tests", "examples", "bench", "docs", "pyproject.toml")
# All tests that .ci/run has: those of a browser, of interrupts and forks too.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
PYTEST += ["-m", "not slow"]
TIMEOUT_S = 900  # with a fault a test may wait for ever
COPIES = int(os.environ.get("JOBS", "2"))


class Fault(NamedTuple):
    """A wrong edit.

    Args:
        room: file or folder whose files have the text once in all.
        old: the text.
        new: what takes its place.
        tests: files and folders of tests, of which one is to fail.
    """

    room: str
    old: str
    new: str
    tests: str


ENGINES = "tests/engines/test_engines.py tests/engines/test_bit_patterns.py"
TRITON = f"tests/engines/test_triton.py {ENGINES} tests/engines/test_engine_properties.py"
CPU = f"tests/engines/test_cpu_engine.py {ENGINES} tests/engines/test_engine_properties.py"
FORMATS = "tests/engines/test_format_engines.py tests/test_quantized.py tests/test_formats.py"
BINS = "tests/test_bins.py tests/test_ops.py tests/engines/test_engines.py"
RESULTS = "tests/test_results.py tests/test_fourth_moment.py tests/test_quantized.py"
TABLES = "tests/test_tables.py tests/test_tables_opened.py"

FAULTS = [
    # The kernels, in Triton's interpreter.
    Fault(
        "kernels",
        "tl.where(positive, slot + LOG2_MAGNITUDES, 2 * LOG2_MAGNITUDES - 1 - slot)",
        "tl.where(positive, slot + LOG2_MAGNITUDES, 2 * LOG2_MAGNITUDES - slot)",
        TRITON,
    ),
    Fault("kernels", "tl.where(scale < 1.0, 0, n_aligned)", "n_aligned", TRITON),
    Fault(
        "kernels",
        "tl.where(x <= high, t.to(tl.int32),",
        "tl.where(x < high, t.to(tl.int32),",
        TRITON,
    ),
    Fault("kernels", "kept = slots <= BINS", "kept = slots < BINS", TRITON),
    Fault(
        "kernels",
        "squares += tl.where(is_finite, away * away, 0.0)",
        "squares += away * away",
        TRITON,
    ),
    Fault("kernels", "((q >= SAFE_SQUARES) & centered)", "(q >= SAFE_SQUARES)", TRITON),
    Fault("kernels", " + part * away * away", "", TRITON),
    Fault(
        "kernels",
        "(slots == 0).to(tl.int32) - (slots == LOG2_MAGNITUDES).to(tl.int32)",
        "(slots == 0).to(tl.int32)",
        TRITON,
    ),
    Fault("kernels", "(bits + 0x7FFF + ((bits >> 16) & 1))", "(bits + 0x8000)", FORMATS),
    Fault("kernels", "is_used & (stored > 0.0)", "is_used", FORMATS),
    Fault("kernels", "x_ptr + (at - row * pad)", "x_ptr + at", FORMATS),
    # Work items, plans and launches.
    Fault(
        "gradstat/engines",
        "width * middle * np.minimum(planes, outer - plane)",
        "width * middle * planes",
        TRITON,
    ),
    Fault("gradstat/engines", "tuple([(x.shape, x.stride()) for x in tensors])", "0", TRITON),
    Fault("gradstat/engines", "% triton_engine.ALIGNMENT == 0 else 0", "> 0 else 0", TRITON),
    # The definitions, and how memory is read.
    Fault(
        "gradstat/engines", "merged[-1][1] == size * step", "merged[-1][1] >= size * step", ENGINES
    ),
    Fault("gradstat/engines", "(squared_deviation / (n - 1))", "(squared_deviation / n)", ENGINES),
    Fault(
        "gradstat/engines", "(x / step).round() * step", "(x / step + 0.5).floor() * step", FORMATS
    ),
    # The CPU engine.
    Fault(
        "gradstat/engines/cpu",
        "most if most >= sign else least",
        "most if most > sign else least",
        CPU,
    ),
    Fault("gradstat/engines/cpu", "(n * (m / (n + m)))", "(m * (m / (n + m)))", CPU),
    Fault("gradstat/engines/cpu", "infinite - n - posinf", "infinite - n", CPU),
    Fault(
        "gradstat/engines/cpu",
        "np.int64(total[partials.NAN] + total[partials.POSINF])",
        "np.int64(total[partials.POSINF])",
        CPU,
    ),
    Fault("gradstat/engines/cpu", "rows[8 * row] >= 1 << 32", "rows[8 * row] > 1 << 33", CPU),
    Fault("gradstat/engines/cpu", "partial[EMPTY] += empty", "partial[EMPTY] = empty", FORMATS),
    # Bins, operations, results, formats, tables.
    Fault("gradstat/bins.py", "torch.where(x == high, self.bins - 1, inside)", "inside", BINS),
    Fault("gradstat/bins.py", "torch.where(constant, lo - half, lo)", "lo", BINS),
    Fault("gradstat/bins.py", "summed[:, 0] -= zeros", "pass", "tests/test_bins.py tests/plot"),
    Fault(
        "gradstat/ops.py", "bucketize(values, edges, right=True)", "bucketize(values, edges)", BINS
    ),
    Fault(
        "gradstat/ops.py",
        "torch.where(values.isfinite(), at, 0)",
        "torch.where(values.isnan(), 0, at)",
        BINS,
    ),
    Fault("gradstat/results.py", "squares = (n - 1).clamp(min=0)", "squares = n", RESULTS),
    Fault("gradstat/results.py", "2 * centre2 * half2", "centre2 * half2", RESULTS),
    Fault("gradstat/results.py", "parts[..., least].amin(0)", "parts[..., least].amax(0)", RESULTS),
    Fault(
        "gradstat/formats.py",
        "-(-rows // down) * -(-columns // across)",
        "-(-rows // down) * (columns // across)",
        FORMATS,
    ),
    Fault("gradstat/tables.py", "np.tile(kinds, n)", "np.repeat(kinds, n)", TABLES),
    Fault(
        "gradstat/tables.py", "finite = np.isfinite(values)", "finite = ~np.isnan(values)", TABLES
    ),
    # What watches a training.
    Fault(
        "gradstat/recording",
        "n_before % self._period == self.accumulation_steps - 1",
        "n_before % self._period == 0",
        "tests/recording",
    ),
    Fault(
        "gradstat/engines/reference.py",
        "torch.maximum(x.amax(others), -x.amin(others))",
        "x.amax(others)",
        "tests/engines/test_cpu_engine.py",
    ),
    Fault(
        "gradstat/recording",
        "if kind in unfinished.scales:",
        "if False:",
        "tests/recording",
    ),
    Fault(
        "gradstat/recording",
        "if plan is None or not plan.fits(*listed):",
        "if plan is None:",
        "tests/recording",
    ),
    Fault(
        "gradstat/recording",
        "self._delivery.forget_other_threads()",
        "pass",
        "tests/recording",
    ),
    # What reads a run: findings, the page, figures, the command line, viewers.
    Fault(
        "gradstat/util.py",
        "np.maximum(count - 1, 0)[None] // 2",
        "count[None] // 2",
        "tests/diagnosis",
    ),
    Fault(
        "gradstat/diagnosis",
        "bad &= ~(harmless & harmless[well].any(0))",
        "bad &= ~harmless",
        "tests/diagnosis",
    ),
    Fault("gradstat/diagnosis", "growth[:3] = 0", "growth[:1] = 0", "tests/diagnosis"),
    Fault("gradstat/diagnosis", "is_out[-APART:].any(0)", "is_out[-1:].any(0)", "tests/diagnosis"),
    Fault(
        "gradstat/report",
        '"least": np.fmin',
        '"least": np.fmax',
        "tests/report",
    ),
    Fault("gradstat/report", "counts[:, 0] -= zeros", "pass", "tests/report"),
    Fault(
        "gradstat/report",
        "meta.steps[t][0] <= step",
        "meta.steps[t][0] < step",
        "tests/report",
    ),
    Fault(
        "gradstat/report",
        "version if version < self._version else 0",
        "version",
        "tests/report tests/cli",
    ),
    Fault(
        "gradstat/report",
        "return [row - 127, row - 126];",
        "return [row - 126, row - 125];",
        "tests/report",
    ),
    Fault(
        "gradstat/plot",
        "np.append(epoch[1:] != epoch[:-1], True)",
        "np.append(True, epoch[1:] != epoch[:-1])",
        "tests/plot",
    ),
    Fault("gradstat/plot", "-max(-low, high), max(-low, high)", "low, high", "tests/plot"),
    Fault(
        "gradstat/cli",
        'return _SEVERE if any(each.severity == "severe" for each in found) else 0',
        "return 0",
        "tests/cli",
    ),
    Fault(
        "gradstat/cli",
        "len(hosts) == 1 and hosts[0].lower() in own",
        "len(hosts) == 1",
        "tests/cli",
    ),
    Fault(
        "gradstat/integrations",
        "bucket_counts=[0, *counts.tolist()]",
        "bucket_counts=[*counts.tolist(), 0]",
        "tests/integrations/test_tensorboard.py",
    ),
    # Records, files, ranks.
    Fault(
        "gradstat/record.py",
        "edges[0], edges[-1]",
        "0, edges[-1]",
        "tests/test_record.py tests/history",
    ),
    Fault(
        "gradstat/history",
        "records, stride = records[::2], 2 * stride",
        "records, stride = records[1::2], 2 * stride",
        "tests/history tests/recording/test_watch_long.py",
    ),
    Fault(
        "gradstat/history",
        "if zlib.crc32(data) != self.of_block.checksums[self.place]:",
        "if False:",
        "tests/history",
    ),
    Fault(
        "gradstat/history",
        "if start + n_head + n_bytes > self.file.size:",
        "if start + n_head > self.file.size:",
        "tests/history",
    ),
    Fault("gradstat/history", "file.truncate()", "pass", "tests/history"),
    Fault(
        "gradstat/history",
        "if holder != at:",
        "if holder > at:",
        "tests/history tests/recording/test_shards.py",
    ),
    Fault(
        "gradstat/history",
        "until = int(min([reached, *(bound - 1 for bound in bounds if bound > start)]))",
        "until = int(reached)",
        "tests/history",
    ),
]


def find(fault: Fault, root: Path) -> Path | None:
    """The file that has the text of a fault, if one has it, and once."""
    room = root / fault.room
    files = [room] if room.is_file() else sorted(room.rglob("*"))
    texts = {each: each.read_text() for each in files if each.suffix in (".py", ".js")}
    found = [path for path, text in texts.items() for _ in range(text.count(fault.old))]
    return found[0] if len(found) == 1 else None


def see(fault: Fault, root: Path) -> str:
    """What the tests say of a fault, which is planted in a copy and taken out again."""
    path = find(fault, root)
    if path is None:
        return "NOT THERE"
    original = ROOT / path.relative_to(root)
    path.write_text(path.read_text().replace(fault.old, fault.new))
    try:
        code, said = run(["-x", *fault.tests.split()], root)
    finally:
        shutil.copy2(original, path)  # with its time, by which Python and Numba know what is cached
    if code == 0:
        return "NOT SEEN"
    failed = re.search(r"^FAILED (\S+\.py::.*?)(?: - .*)?$", said, re.MULTILINE)
    if code is None:
        return "seen: a test waits for ever"
    if failed is None:
        return f"NO RUN, exit {code}: {said[-2000:]}"
    if run([failed[1]], root)[0] != 0:
        return f"NO WONDER: {failed[1]} fails without it"
    return f"seen by {failed[1]}"


def run(arguments: list[str], root: Path) -> tuple[int | None, str]:
    """Exit status of pytest in a copy, ``None`` if it took too long, and what it printed."""
    command = [*PYTEST, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout


def copy_tree(root: Path) -> None:
    """Copy what tests need, with what is cached beside it."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, symlinks=True)
        else:
            shutil.copy2(ROOT / name, root / name)


def main(words: list[str]) -> int:
    chosen = [fault for fault in FAULTS if all(word in " ".join(fault) for word in words)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(COPIES) as pool:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(COPIES):
            root = Path(folder, str(number))
            root.mkdir()
            copy_tree(root)
            copies.put(root)

        def try_one(fault: Fault) -> str:
            root, start_s = copies.get(), time.monotonic()
            said = see(fault, root)
            copies.put(root)
            took_s = time.monotonic() - start_s
            print(f"{said} ({took_s:.0f} s)\n    {fault.room}: {fault.old}\n    -> {fault.new}")
            sys.stdout.flush()
            return said

        seen = [each.startswith("seen") for each in pool.map(try_one, chosen)]
    print(f"{sum(seen)} of {len(seen)} faults seen")
    return 0 if all(seen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
