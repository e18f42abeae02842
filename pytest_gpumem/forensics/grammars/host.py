"""The host's memory, and who kills for it."""

import re

from pytest_gpumem.forensics.grammars.language import grammar

_HOST = r"(?:anon-rss|total-vm):<tried>"

GRAMMARS = (
    grammar(
        "host",
        "nable to allocate",
        r"Unable to allocate .{1,40} for an array with shape",
        r"Unable to allocate <tried>",
        words="Unable to allocate ",
    ),
    grammar(
        "host",
        "low on memory|NODE_OUT_OF_MEMORY|due to memory pressure",
        r"Task was killed due to the node running low on memory|NODE_OUT_OF_MEMORY"
        r"|\b[1-9]\d* Workers? \(tasks / actors\) killed due to memory pressure",
        distinct=True,
    ),
    grammar(
        "host",
        "is killed by signal",
        r"DataLoader worker \(pid (?P<pid>\d{1,10})\) is killed by signal: Killed",
        kind="weak",
        distinct=True,
    ),
    grammar(
        "host",
        "Cannot allocate memory",
        r"(?:Errno 12\]|fork:) Cannot allocate memory",
        distinct=True,
    ),
    grammar("host", "MemoryError", r"^(?:\w+\.)*_?(?:Array)?MemoryError:?$", distinct=True),
    grammar("host", "std::bad_alloc", r"std::bad_alloc(?=['\"]?$)", distinct=True),
    grammar(
        "host",
        "ut of memory: Kill|illed process",
        r"(?:Memory cgroup )?[Oo]ut of memory: Kill(?:ed)? process (?P<pid>\d{1,10})"
        r"|\bKilled process (?P<victim>\d{1,10}),? \(.{1,40}?\).{0,40}(?:total-vm|anon-rss)",
        _HOST,
        distinct=True,
        kind="kill",
    ),
    grammar("host", "invoked oom", r"\S+ invoked oom-killer:", distinct=True, kind="kill"),
    grammar(
        "host",
        "oom-kill|oom_kill|oom_reaper",
        r"\boom-kill:|oom_reaper: reaped process (?P<pid>\d{1,10})|Detected \d+ oom[_-]kill",
        distinct=True,
        kind="kill",
    ),
    grammar(
        "host",
        "Out Of Memory",
        r"srun: error: \S+: tasks? [\d,-]+: Out Of Memory",
        distinct=True,
        kind="kill",
    ),
    grammar(
        "host",
        "OOMKilled",
        r"\bOOMKilled\b(?!\W{0,3}(?:false|FALSE|False|0|null))",
        distinct=True,
        kind="kill",
    ),
)

PROBABLE_KILL = re.compile(
    r"(?:\S+: line \d+: +(?P<pid>\d{1,10}) [Kk]illed\b.*|\[\d+\]\+? +(?:\d+ )?Killed\b.*"
    r"|(?:zsh: )?[Kk]illed(?: {2,}\S.*)?|make(?:\[\d+\])?: \*\*\* .{0,200}(?:Killed|Error 137)"
    r"|(?:.{0,120}\b)?(?i:exit(?:ed)?(?: with)?(?: exit)?(?: (?:code|status|exit)|code){0,2})"
    r" ?[:=]? *\"?137\b.*)"
)
"""A process ended by SIGKILL; whoever sent it, memory is the likeliest reason."""
SHELL_KILL = re.compile(r"\S+: line \d+: +(?P<pid>\d{1,10}) [Kk]illed\b")
"""The shell's form of it, which needs no line of its own: it interrupts what others print."""
