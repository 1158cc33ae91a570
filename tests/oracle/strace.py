"""What a program asks of the kernel, as strace tells it; and faults of the kernel's, made by strace."""

import re

# What `calls` knows.
TRACE = ["-e", "trace=open,openat,fsync,fdatasync,renameat2,linkat,sendto"]
KNOWN = [
    # The descriptor, and the file: one that was opened anew.
    ("opened", re.compile(r'open(?:at)?\(.*"/proc/self/fd/\d+", .*\) += (\d+)<(.*)>$')),
    ("synced", re.compile(r"f(?:data)?sync\((\d+)<(.*)>\) += 0$")),
    # From one name to another.
    ("named", re.compile(r'(?:renameat2|linkat)\(.*?, "(.*)", .*, "(.*)", .*\) += 0$')),
    # A command of QMP's.
    ("asked", re.compile(r'sendto\(.*\\"execute\\":\\"([\w-]+)\\"')),
]
RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)")


def traced(command, log, *options):
    """The command that does the same, and tells of it in `log`."""
    strace = ["strace", "-f", "-y", "-qq", "-s", "65536", "-e", "signal=none", "-o", str(log)]
    return [*strace, *options, *command]


def calls(log):
    """What succeeded, in the order of its end: ("opened", descriptor, file), ..."""
    found, begun = [], {}
    for line in log.read_text().splitlines():
        thread, _, call = line.partition(" ")
        call = call.lstrip()
        if call.endswith("<unfinished ...>"):
            begun[thread] = call.removesuffix("<unfinished ...>").rstrip()
            continue
        if match := RESUMED.match(call):
            call = begun.pop(thread) + match[1]
        found += [(kind, *match.groups()) for kind, known in KNOWN if (match := known.match(call))]
    return found
