"""Drives the fuzz targets for longer than tests do: `make fuzz`.

With atheris, inputs are led by what of the code they reach; where it is not installed, hypothesis makes them. A corpus
has a folder for each target, of inputs that are worth keeping, and grows. What a target fails with is printed, and the
input is in a file `crash-...` in its folder, or, by hypothesis, in what it prints.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import subprocess
import sys
import time
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

from fuzz.target import TARGETS, Target, target_of

_LONGEST = 8192
"""Bytes of an input."""
_SLOWEST_S, _MOST_MIB = 20, 4096
"""Of one input: a target that takes longer, or more memory, has failed."""
_BATCH = 500
_LOOKED_AT = ["freestep", "freestep_service"]
"""Whose code leads atheris."""


def main() -> int:
    command = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    command.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all without")
    command.add_argument("--seconds", type=int, default=60, help="for each target")
    command.add_argument("--corpus", type=Path, default=Path("fuzz-corpus"), help="the folder of inputs")
    command.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = command.parse_args()
    if unknown := set(given.targets) - set(TARGETS):
        command.error(f"there is no target {', '.join(sorted(unknown))}")
    if given.alone:
        (name,) = given.targets
        return _drive(name, given.seconds, given.corpus / name)
    by = "atheris, led by coverage" if find_spec("atheris") else "hypothesis, since atheris is not installed"
    print(f"inputs are made by {by}; {given.seconds} s for each target; corpus in {given.corpus}", flush=True)
    failed = []
    for name in given.targets or TARGETS:
        print(f"--- {name}", flush=True)
        options = ["--alone", name, "--seconds", str(given.seconds), "--corpus", str(given.corpus)]
        if subprocess.run([sys.executable, "-m", "fuzz", *options]).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "no target failed")
    return 1 if failed else 0


def _drive(name: str, seconds: int, corpus: Path) -> int:
    corpus.mkdir(parents=True, exist_ok=True)
    logging.disable()
    if find_spec("atheris") is None:
        return _by_hypothesis(target_of(name), seconds, corpus)
    import atheris

    # It says of each module that it is looked at.
    with redirect_stderr(StringIO()), atheris.instrument_imports(_LOOKED_AT, _compiled()):
        target = target_of(name)
    for seed in target.seeds:
        _keep(corpus, seed)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={_LONGEST}",
        f"-timeout={_SLOWEST_S}",
        f"-rss_limit_mb={_MOST_MIB}",
        f"-artifact_prefix={corpus}/",
        f"-dict={_dictionary(corpus, target)}",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], target.check)
    atheris.Fuzz()
    return 0


def _compiled() -> list[str]:
    """The modules in which there is code that numba compiles, and atheris therefore must not change."""
    spec = find_spec("freestep_service")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    files = (file.relative_to(root.parent).with_suffix("") for file in (root / "optimizers").rglob("*.py"))
    return [".".join(file.parts).removesuffix(".__init__") for file in files]


def _keep(corpus: Path, data: bytes) -> None:
    (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)


def _dictionary(corpus: Path, target: Target) -> Path:
    """The words of a target as a file of libFuzzer's, beside its corpus."""
    file = corpus.with_suffix(".dict")
    file.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in target.words))
    return file


def _by_hypothesis(target: Target, seconds: int, corpus: Path) -> int:
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis.database import DirectoryBasedExampleDatabase

    for file in sorted(corpus.iterdir()):
        if file.is_file():
            target.check(file.read_bytes())
    ends, number = time.monotonic() + seconds, 0
    while time.monotonic() < ends:
        number += 1
        run = given(target.inputs)(target.check)
        run = settings(
            max_examples=_BATCH,
            deadline=1000 * _SLOWEST_S,
            database=DirectoryBasedExampleDatabase(corpus / "hypothesis"),
            phases=[Phase.reuse, Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )(run)
        seed(time.time_ns())(run)()
    print(f"{number * _BATCH} inputs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
