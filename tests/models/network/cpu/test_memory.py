import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from tercet.models.network.cpu.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if {kept}:
    keep_freed_memory()
for turn in range(20):
    if turn == 15:
        before = faults()
    held = [torch.ones((1 << 20) + 1024 * turn) for _ in range(3)]  # 4 MiB, and a page more a turn
    del held
print(faults() - before)
"""


def faults(kept: bool) -> int:
    """Pages that the system hands out to a new process in the last five turns."""
    code = COUNT.format(kept=kept)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these limits")
def test_freed_memory_is_not_fetched_from_the_system_again():
    assert faults(kept=True) < 500 < faults(kept=False)
