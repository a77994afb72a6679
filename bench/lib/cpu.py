"""CPU seconds of a process and of all that it has started, from /proc."""
import os

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def read(pid):
    """Its parent, and the CPU seconds of itself and of its children that have ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The name, in brackets, may have spaces of its own.
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[1]), sum(int(field) for field in fields[11:15]) / TICKS_PER_SECOND


def seconds(root):
    """0 for no process."""
    processes = {int(name): read(name) for name in os.listdir("/proc") if name.isdigit()}
    processes = {pid: found for pid, found in processes.items() if found}
    total = 0
    for pid, (parent, used) in processes.items():
        ancestor = pid
        while ancestor != root and ancestor in processes:
            ancestor = processes[ancestor][0]
        if ancestor == root:
            total += used
    return total


def peak_memory_mb(pid):
    """The most that it has had resident; of itself only."""
    with open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0
