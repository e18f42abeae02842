"""The host's memory: who asks for it in vain, and who kills for it."""

import re

from pytest_gpumem.forensics.grammars.language import grammar

_HOST = r"(?:anon-rss|total-vm):<tried>"
# Nothing follows but what an exception is printed with; GoogleTest says where it was thrown.
_ENDS = r"(?=['\"`!.) ]*(?:$| thrown in ))"

GRAMMARS = (
    grammar(
        "host",
        "nable to allocate",
        r"Unable to allocate (?:.{1,40} for an )?array with shape",
        r"Unable to allocate <tried>",
        words="Unable to allocate ",
    ),
    grammar(
        "host",
        "low on memory|NODE_OUT_OF_MEMORY|due to memory pressure|RayOutOfMemoryError"
        "|to free up memory|address the out of memory issue",
        r"Task was killed due to the node running low on memory|NODE_OUT_OF_MEMORY"
        r"|RayOutOfMemoryError: More than \d+% of the memory"
        r"|\bRefer to the documentation on how to address the out of memory issue: http"
        r"|Killing worker .{0,80} to free up memory"
        r"|\b[1-9]\d* Workers? \(tasks / actors\) killed due to memory pressure",
        distinct=True,
    ),
    grammar(
        "host",
        "is killed by signal",
        r"DataLoader worker \(pid (?P<pid>\d{1,10})\) is killed by signal: (?:Killed|Bus error)",
        kind="weak",
        distinct=True,
    ),
    grammar(
        "host",
        "Cannot allocate memory",
        r"(?:Errno 12\]|fork:|exhausted:|mmap\w*:?) Cannot allocate memory",
        distinct=True,
    ),
    grammar("host", "Out of Host Memory", "", distinct=True),
    grammar("host", "MemoryError", r"^(?:\w+\.)*_?(?:Array)?MemoryError:?$", distinct=True),
    # What Microsoft's runtime calls the same.
    grammar("host", "bad allocation", rf"\bbad allocation{_ENDS}"),
    grammar("host", "std::bad_alloc", rf"std::bad_alloc{_ENDS}", distinct=True),
    grammar(
        "host",
        "ut of memory: Kill|illed process",
        # Old kernels say whom they chose, then whom they killed: perhaps a child.
        r"(?:Memory cgroup )?[Oo]ut of memory: Kill(?:ed process (?P<pid>\d{1,10})| process \d)"
        r"|\bKilled process (?P<victim>\d{1,10}),? \(.{1,40}?\).{0,40}(?:total-vm|anon-rss)",
        _HOST,
        distinct=True,
        kind="kill",
    ),
    # The kernel shows a group's usage only when it is about to kill in it.
    grammar(
        "host",
        "failcnt",
        r"memory: usage \d+kB, limit \d+kB, failcnt [1-9]",
        distinct=True,
        kind="kill",
    ),
    grammar("host", "invoked oom", r"\S+ invoked oom-killer:", distinct=True, kind="kill"),
    grammar(
        "host",
        "oom-kill|oom_kill|oom_reaper",
        r"\boom-kill:|result '?oom-kill|oom_reaper: reaped process (?P<pid>\d{1,10})"
        r"|Detected [1-9]\d* oom[_-]kill",
        distinct=True,
        kind="kill",
    ),
    grammar(
        "host",
        "as a result of limit of|low on resource: memory|OOM encountered|by the OOM killer"
        "|avoid running out of memory",
        r"\bTask in \S+ killed as a result of limit of|\blow on resource: memory"
        r"|\b(?:System|Cgroup) OOM encountered\b|killed by the OOM killer"
        r"|\bkilling .{0,300} to avoid running out of memory",
        distinct=True,
        kind="kill",
    ),
    # What Java's error says of, where its package is not named.
    grammar(
        "host",
        "OutOfMemoryError: ",
        r"\bOutOfMemoryError: (?:Java heap|GC overhead|Metaspace|PermGen|Compressed class"
        r"|Direct buffer|Cannot reserve|Map failed|Requested array size|[Uu]nable to create)",
        distinct=True,
    ),
    # The frames of V8, the engine of Node.js, where its own words were lost.
    grammar(
        "host",
        "FatalProcessOutOfMemory|OOMErrorHandler|ReportOOMFailure|Ineffective mark-c",
        r"\bIneffective mark-compacts near heap limit\b"
        r"|\b(?:0x)?[\da-f]{6,16} (?:node|v8)::.{0,80}\b(?:FatalProcessOutOfMemory|OOMErrorHandler"
        r"|ReportOOMFailure)\b",
        distinct=True,
    ),
    # A Java machine's last words, which it writes as a warning, or behind the sign of a comment.
    grammar(
        "host",
        "memory for the Java Runtime|os::commit_memory(|Native memory allocation (",
        r"(?:^# +(?:There is )?)?insufficient memory for the Java Runtime"
        r"|os::commit_memory\([^()]{1,80}\) failed"
        r"|(?:^# +)?Native memory allocation \(\w+\) failed",
        r"commit_memory\(\w+, <tried#>",
        r"failed to (?:map|allocate) <tried>",
        distinct=True,
        kind="kill",
    ),
    # earlyoom and nohang.
    grammar(
        "host",
        "SIGKILL to |SIGTERM to ",
        r"[Ss]end(?:ing)? SIG(?:KILL|TERM) to (?:the victim\b|process \d+ .{0,200}\boom_score)",
        distinct=True,
        kind="kill",
    ),
    grammar(
        "host",
        "systemd-oomd killed|due to memory pressure for|due to memory used (|due to swap used (",
        r"systemd-oomd killed [1-9]"
        r"|\bKilled \S+ due to (?:memory pressure for|(?:memory|swap) used \()",
        distinct=True,
        kind="kill",
    ),
    # Those who watch memory themselves: Dask, YARN, AWS Batch, Slurm, LSF, PBS.
    grammar(
        "host",
        "memory budget|ceeding memory limits|to memory usage|job memory limit|step memory limit"
        "|ed memory limit (|TERM_MEMLIMIT"
        "|job killed: ",
        r"\bWorker (?:\S+ \(pid=\d+\) )?exceeded \d+% memory budget"
        r"|killed .{0,20}for exceeding memory limits"
        r"|killed due to memory usage|[Ee]xceeded (?:job|step) memory limit\b(?! at some point)"
        r"|\bexceeded memory limit \(\d+ > \d+\), being killed|\bTERM_MEMLIMIT\b"
        r"|job killed: v?mem \d+",
        distinct=True,
        kind="kill",
    ),
    grammar(
        "host",
        "Out Of Memory|OUT_OF_ME",
        r"srun: error: \S+: tasks? [\d,-]+: Out Of Memory|\bState: OUT_OF_MEMORY\b|\bOUT_OF_ME\+",
        distinct=True,
        kind="kill",
    ),
    # What Docker and Nomad tell of a container.
    grammar(
        "host",
        "container oom |oom_killed:true",
        r"\bcontainer oom [\da-f]{12,64}\b|\boom_killed:true\b",
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

KILL_ONCE = re.compile(
    r"\binvoked oom-killer:|: internal compiler error: Killed\b|\(signal: 9, SIGKILL: kill\)$"
)
"""Printed once for each process: another line of the kind tells of another one."""
PROBABLE_KILL = re.compile(
    r"(?:\S+: line \d+: +(?P<pid>\d{1,10}) [Kk]illed\b.*|\[\d+\]\+? +(?:\d+ )?Killed\b.*"
    r"|(?:zsh: )?[Kk]illed(?: {2,}\S.*)?|.{1,200}: Killed(?: \(program \w+\))?"
    r"|make(?:\[\d+\])?: \*\*\* .{0,200}(?:Killed|Error 137)"
    r"|(?:.{0,120}\b)?(?i:exit(?:ed)?(?: with)?(?: exit)?(?: (?:code|status|value|exit)|code){0,2})"
    r"[\"']? ?[:=]? *[\"'(]?137\b(?!/\d).*|.*\bKilled signal terminated program .*"
    r"|.{0,200}(?:[\u7801\u78bc]|\u30b3\u30fc\u30c9|\ucf54\ub4dc|\u043a\u043e\u0434\w*)"
    r"[ :=\uff1a]*[\u4e3a\u70ba]?[ \"']*137\b.*"
    # torchrun, torch's and Python's own multiprocessing, subprocess, joblib, Celery, Dask,
    # gunicorn, time.
    r"| *exitcode +: -9\b.*"
    r"|npm (?:ERR!|error) (?:code|errno) 137|.{0,400}\breturned a non-zero code: 137\b.*"
    r"|.{0,1000}\(exitcode: -9\).*|.{0,200}(?:\b(?:exit|return)[_ ]?code ?[=:] ?-9\b"
    r"|\bSignal 9 \(SIGKILL\) received"
    r"|\bdied with <Signals\.SIGKILL: 9>|\bsignal: killed\b|\bcode=killed, status=9/KILL\b"
    r"|\b(?:died|killed|terminated|ended|exited) (?:with|by|from|due to|on) SIGKILL\b(?!/)"
    r"|\bprematurely: signal 9 \(SIGKILL\)"
    r"|\bexit codes of the workers are \{.{0,80}SIGKILL\(-9\)|\bwas killed by signal 9\b"
    r"|\b(?:died|killed|terminated|ended|exited)\b.{0,30}\bsignal:? (?:9\b|(?:SIG)?KILL\b)"
    r"|\bprocess \d+ terminated with signal SIGKILL|\bWorker \(pid:\d+\) was sent SIGKILL!"
    r"|\b[Cc]ommand terminated by signal 9\b).*)"
)
"""A process ended by SIGKILL; whoever sent it, memory is the likeliest reason."""
SHELL_KILL = re.compile(
    r"\S: line \d+: +(?P<pid>\d{1,10}) [Kk]illed\b|\(signal: 9, SIGKILL: kill\)$"
    r"|\] exits with return code = -9$"
)
"""The shell's form of it, which needs no line of its own: it interrupts what others print; and
those of cargo and DeepSpeed, behind a command of any length.

One character of the script's name will do: more of them would be tried from each one on.
"""
