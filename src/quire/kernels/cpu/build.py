"""Compile the C kernels with the machine's own compiler, once per machine.

The library's file name is a hash of everything that determines its content: sources, flags, compiler version,
CPU. So a changed source gives a new file, and no file is ever out of date. A file is written under another
name and renamed, so if two processes compile at once, both get a complete file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger("quire.kernels")
compiling = threading.Event()
"""Set while this process compiles."""

SOURCES = Path(__file__).parent
UNITS = ("quire_kernels.c", "attention.c", "float8.c")
"""Compiled in parallel, because a first start waits for it; the longest first."""
# No -ffast-math and no contraction: a fused multiply-add is used only where the source says so.
# Reproducible bits are worth more than the compiler's gain.
FLAGS = (
    "-O2",
    "-pthread",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-Wno-psabi",
    "-Werror=implicit-function-declaration",  # kernels.h must declare the functions of the other unit
)
EXTRA_FLAGS_VARIABLE = "QUIRE_KERNEL_CFLAGS"
"""More compiler flags, for the sanitizers (scripts/sanitize) and a debugger's -g."""
TIMEOUT_SECONDS = 120


class BuildError(Exception):
    """The kernels could not be compiled; the message says why in one line."""


def cache_dir() -> Path:
    if explicit := os.environ.get("QUIRE_CACHE_DIR"):
        return Path(explicit) / "kernels"
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "quire" / "kernels"
    return Path.home() / ".cache" / "quire" / "kernels"


def find_compiler() -> list[str]:
    """$CC if it is set, else the first of cc, gcc, clang on the path."""
    if chosen := os.environ.get("CC"):
        command = shlex.split(chosen)
        if not command or shutil.which(command[0]) is None:
            raise BuildError(f"CC={chosen!r} is not a program")
        return command
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise BuildError(
        "no C compiler (cc, gcc or clang) on the path; Debian: apt install gcc libc6-dev"
    )


def build(march: str = "native") -> Path:
    """The path of the compiled library; compiles it the first time. Raises BuildError."""
    extra = shlex.split(os.environ.get(EXTRA_FLAGS_VARIABLE, ""))
    compiler = [*find_compiler(), *FLAGS, machine_flag(march), *extra]
    directory = cache_dir()
    library = directory / f"quire-kernels-{_fingerprint(compiler)}.so"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_private(directory)
        if library.exists():
            return library
        with _announced(), tempfile.TemporaryDirectory(dir=directory, prefix="build-") as scratch:
            built = Path(scratch) / library.name
            _compile(compiler, built)
            os.replace(built, library)
    except OSError as error:
        raise BuildError(f"cannot write {directory}: {error.strerror}") from error
    return library


@contextmanager
def _announced() -> Iterator[None]:
    """Logs that the kernels are being compiled: the only long wait of a first start."""
    compiling.set()
    report_compiling()
    try:
        yield
    finally:
        compiling.clear()


def report_compiling() -> None:
    """Log that kernels are being compiled, if they are: called when logging is set up after compiling
    began."""
    if compiling.is_set():
        logger.info("compiling the CPU kernels, once for this machine: about ten seconds")


def machine_flag(march: str) -> str:
    """The flag for the target processor: on Arm -mcpu, because clang has no -march=native there."""
    arm = platform.machine() in ("aarch64", "arm64")
    return "-mcpu=native" if march == "native" and arm else f"-march={march}"


def _require_private(directory: Path) -> None:
    """Code is loaded from this directory, so other users must not be able to write to it."""
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise BuildError(f"{directory} is not ours alone; chmod 700 it or set QUIRE_CACHE_DIR")


def _compile(compiler: list[str], output: Path) -> None:
    objects = [str(output.with_name(f"{unit}.o")) for unit in UNITS]
    with ThreadPoolExecutor(len(UNITS)) as pool:
        commands = [
            [*compiler, "-DQUIRE_UNITS", "-c", str(SOURCES / unit), "-o", made]
            for unit, made in zip(UNITS, objects, strict=True)
        ]
        for done in [pool.submit(_run, command) for command in commands]:
            done.result()
    _run([*compiler, "-shared", *objects, "-o", str(output), "-lm"])


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if "error" in line.lower()]
        if "No space left on device" in result.stderr:
            raise BuildError(
                f"no space left to compile them in {cache_dir()} (QUIRE_CACHE_DIR) or "
                f"{tempfile.gettempdir()} (TMPDIR)"
            )
        raise BuildError(f"{command[0]} failed: {(lines or ['no message'])[0]}")


def hash_of_sources() -> hashlib._Hash:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest


def _fingerprint(compiler: list[str]) -> str:
    digest = hash_of_sources()
    digest.update("\0".join(compiler).encode())
    digest.update(_compiler_version(compiler))
    digest.update(_cpu_identity().encode())
    return digest.hexdigest()[:32]


def _compiler_version(compiler: list[str]) -> bytes:
    try:
        result = subprocess.run(
            [*compiler, "--version"], capture_output=True, timeout=TIMEOUT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler[0]} did not run: {error}") from error
    if result.returncode != 0:
        raise BuildError(f"{compiler[0]} --version failed")
    return result.stdout


def _cpu_identity() -> str:
    """The facts that -march=native depends on: machines with other CPUs may share the cache through a
    home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
