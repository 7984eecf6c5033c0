"""Runs a command as if the CPU had AVX-VNNI, on one that has AVX2 only: slow, but with the numbers of such a CPU.

Without VNNI raysq takes other branches (7-bit activations, fewer data types), so on such a machine those for VNNI would
never run. Here torch's and IPEX's oneDNN believe in AVX-VNNI, and its four instructions are emulated (`vnni.c`):

    python tests/vnni/run.py -m pytest -p no:faulthandler tests/kernels/test_backends.py -m "not slow"

The environment is copied by hard links, but for the libraries in which `cpuid` is replaced. Needs a C compiler and
`unshare`. Left out: AVX-512's own kernels, FBGEMM, OpenVINO (its tests fail: it doesn't see VNNI), and all times.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARIES = ("torch/lib/libtorch_cpu.so", "intel_extension_for_pytorch/lib/libintel-ext-pt-cpu.so")
CPUID, UD2 = b"\x0f\xa2", b"\x0f\x0b"
# mov eax, 7; xor ecx, ecx or mov ecx, 1; cpuid; then what Xbyak does with the result
SITES = re.compile(
    rb"\xb8\x07\x00\x00\x00(?:\x31\xc9\x0f\xa2(?:\xf7|\x48\x8b\x07)|\xb9\x01\x00\x00\x00\x0f\xa2\xa8\x01)", re.DOTALL
)


def patched(library: Path) -> None:
    """Replace cpuid in a library where oneDNN asks for leaf 7; the file is written anew, its twin stays."""
    code = bytearray(library.read_bytes())
    sites = [code.index(CPUID, match.start()) for match in SITES.finditer(code)]
    if not sites:
        raise SystemExit(f"{library}: no cpuid found where oneDNN has it; another version of it needs other SITES.")
    for site in sites:
        code[site : site + 2] = UD2
    library.unlink()
    library.write_bytes(code)
    library.chmod(0o755)


def main(arguments: list[str]) -> int:
    """Run Python with these arguments."""
    original = Path(sys.prefix).resolve()  # the copy of a link would be a link, and the original be patched
    # beside the environment, since hard links need one file system
    with tempfile.TemporaryDirectory(dir=original.parent, prefix=".venv-vnni-") as scratch:
        environment, preloaded, cpuinfo = (Path(scratch) / name for name in ("venv", "vnni.so", "cpuinfo"))
        subprocess.run(["cp", "-al", original, environment], check=True)
        for library in LIBRARIES:
            for found in environment.glob(f"lib/python*/site-packages/{library}"):
                patched(found)
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", preloaded, HERE / "vnni.c"], check=True)
        cpuinfo.write_text(re.sub(r"(?m)^flags.*$", r"\g<0> avx_vnni", Path("/proc/cpuinfo").read_text()))
        mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount --bind "$0" /proc/cpuinfo && exec "$@"']
        command = [*mount, cpuinfo, "env", f"LD_PRELOAD={preloaded}", environment / "bin/python", *arguments]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(HERE.parent.parent)}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
