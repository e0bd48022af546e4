"""The memory of a run's process."""

from __future__ import annotations

import platform
import subprocess
import sys
import textwrap

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library, which is left as it is")
def test_the_heap_keeps_the_memory_of_freed_tensors_until_it_is_trimmed() -> None:
    lines = """
    import resource, torch
    from cosa.training.memory import keep_heap, trim_heap

    torch.set_num_threads(1)

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(2):
            torch.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def resident():
        pages = int(open("/proc/self/statm").read().split()[1])
        return pages * resource.getpagesize() // 2**20

    before = faults()
    keep_heap()
    torch.ones(2**26)  # room for both, though malloc may put the second one beside the hole of the first
    kept = faults()
    holes = [torch.ones(2**20) for _ in range(64)]
    del holes[::2]
    full = resident()
    trim_heap()
    print(before, kept, full, resident())
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(lines)], capture_output=True, text=True, check=True
    )
    before, kept, full, trimmed = map(int, ran.stdout.split())
    assert kept < before / 100
    assert trimmed < full - 100  # 128 MiB lie in holes
