"""Whether a text reports that memory ran out, and what it says.

A text is judged in this order. Its words: the first grammar that finds its own in it is the one,
whatever else is in it. What stands before them: code and assertions quote a message, they do not
report it. Whether the text itself goes on: about a retry, or as a record below an error; where a
test shows it as its error that does not count. Figures make a message then, behind any head, in any
carrier. Without them it needs a context that says error, unless nobody but a framework writes such
words, and none that is prose. What is code says ``spoken.py``, what is prose ``prose.py``.

Where no grammar finds its words, the class of an exception, or a beginning that was cut short, may
still say whose they were; and what is said in nobody's words is judged by ``unforeseen.py``.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.forensics import grammars, prose, spoken, unforeseen
from pytest_gpumem.forensics.grammars.cuda import STICKY
from pytest_gpumem.forensics.grammars.language import compile_figures, size
from pytest_gpumem.records.findings import GpuProcess

if TYPE_CHECKING:
    from pytest_gpumem.forensics.grammars.language import Grammar

_CLASS = re.compile(
    r"(?!cudaError[A-Z])(?:[A-Za-z_]\w{0,80}(?:\.|::)){0,12}\w{0,80}?"
    r"(?:Error|Exception|Exhausted|Exit|Failure|OutOfMemory|EnforceNotMet|\bFailed\b)\w{0,80}"
    r"(?: ?\([^()]{1,60}\))?: ?"
)
_OOM_CLASS = re.compile(
    r"(?<![\w.])(?P<module>(?:[A-Za-z_]\w{0,80}(?:\.|::)){0,12})"
    r"(?P<name>OutOfMemoryError\b(?![.(]\w)"
    r"|\w{0,40}(?:OutOf[A-Z]?\w{0,12}Memory|[a-z]OOM|\bOOM(?=E))(?:Error|Exception)?(?=: )"
    r"|(?:_?Array|[A-Z]\w{0,12})?MemoryError(?=: ))"
    r"(?!: (?:std::bad_alloc: CUDA error|int\b|[Ii]f\b|[Ww]hen\b|[Rr]aised\b))"
)
_BUILTIN = {"MemoryError": "host"}
"""Python's own, and whose memory it is about."""
_OF_CLASS = re.compile(r"OutOf|OOM|MemoryError: ")
_CALL = re.compile(
    r"\w(?<!Error)(?<!Exception)\([^()\"']*$|\bis(?:instance|subclass)\(|\bfunction [\"']$"
)
"""A name among the arguments of a call, or of a function, is code."""
_SEPARATED = re.compile(r"(?:^|[:=>|\]})\"'`(,.;!*-]|\\n)\s*$")
_CELL = re.compile(r"\s*\|")
"""What follows the name of an error that a table has, and nothing of what it said."""
_STATED = re.compile(r"\w\)?: $")
_BLANKS = re.compile(r"\s{2,}")
_PROCESS = re.compile(
    r"\b(?:Process (?P<pid>\d{1,10})|[Tt]his process) has "
    r"(?P<size>\d[\d,]{0,24}\.?\d{0,6}\s?(?:bytes|[KMGT]iB)) memory in use"
)
_SHAPE = re.compile(
    r"shape ?(?:\[([\d,]{1,200})\]|((?:dim ?\{ ?size: \d{1,12} ?\} ?){1,16}))(?: and type (\w+))?"
)
_ASKED = compile_figures(
    r"(?i:alloc(?:at(?:e|ing))?|allocation of|(?:buffer|block) of|requested:?"
    r"|(?<!allowed memory )size:?) (?:size |of )?<tried>"
)
"""How an allocation's size stands in words that no grammar foresaw."""
_DTYPES = {
    **dict.fromkeys(("bool", "int8", "uint8"), 1),
    **dict.fromkeys(("half", "bfloat16", "int16"), 2),
    **dict.fromkeys(("float", "int32"), 4),
    **dict.fromkeys(("double", "int64"), 8),
}
_PACKAGES = {
    **dict.fromkeys(("", "torch", "c10"), "cuda"),
    "cupy": "cupy",
    **dict.fromkeys(("ray", "java"), "host"),
}
"""Whose memory an exception named OutOfMemoryError is about, by the package it comes from."""
_CUT_CLASSES = ("torch.OutOfMemoryError", "torch.cuda.OutOfMemoryError", "cupy.cuda.memory.Out")
_CUT_CLASS = len("torch.OutOf")
_CUT_WORDS = 8
"""Fewer characters could begin anything."""
_DIMENSIONS = 16
_SAYINGS = 4
"""Ways to say it in one text that are looked at; a long line has many."""


class Message(NamedTuple):
    """What one message says; sizes in bytes."""

    backend: str
    kind: str
    """Of its grammar; ``unforeseen`` where none has its words, ``unsaid`` where these do not even
    say whose memory it was."""
    limit: bool
    named: bool
    """Whether its context says that it is an error, or its words are nobody else's."""
    sizes: dict[str, int]
    printed: dict[str, str]
    device: int | None
    processes: tuple[GpuProcess, ...]
    pid: int | None
    whole: bool
    """Whether each figure of its grammar was there."""
    text: str
    start: int
    """Where in ``text`` the framework's own words begin."""

    @property
    def figures(self) -> int:
        """How much it tells."""
        return len(self.sizes) + len(self.processes)

    @property
    def foreseen(self) -> bool:
        """Whether a grammar has its words."""
        return self.kind not in ("unforeseen", "unsaid")

    @property
    def complete(self) -> bool:
        """Whether nothing of the message is missing that could stand on further lines."""
        return self.whole or spoken.ENDS.search(self.text) is not None


def parse(text: str, *, raised: bool = False) -> Message | None:
    """Return what ``text`` says if it is a message that memory ran out, else None.

    Args:
        text: a line, or the lines of one message, with whatever stands before it.
        raised: whether the carrier shows it as the error of a test; elsewhere a text that goes
            on about a retry or a fallback, or a log record below an error, was survived.

    """
    text = _BLANKS.sub(" ", text)
    if STICKY.search(text):
        return None
    for grammar in grammars.speaking(text):
        match = grammar.head.search(text)
        if match is None:
            continue
        found = _stated(_message(grammar, text, match))
        told = spoken.reports(text, match.span(), found.kind, found.figures, raised=raised)
        return found if told else None
    return _by_class(text, raised=raised) or _cut_short(text) or _unforeseen(text, raised=raised)


def worded(text: str) -> bool:
    """Tell whether ``text`` has the words of a message, reported or only spoken of."""
    known = any(each.head.search(text) for each in grammars.speaking(text))
    return known or unforeseen.find(text) is not None


def _named(head: str, words: str, tail: str) -> bool:
    """Tell whether what stands around words without figures says that they are an error."""
    if not head.strip():
        return not tail.strip(" .!\"'")
    if _SEPARATED.search(head) is None:
        return False
    if prose.ERROR.search(head):
        return True
    # A program that names no error still ends with it.
    return (
        prose.MACHINE.search(f"{head}{words}") is not None
        and _STATED.search(head) is not None
        and not tail.strip(" .!`")
    )


def _by_class(text: str, *, raised: bool) -> Message | None:
    """Recognise the exception's name where the message is cut off, missing or in nobody's words."""
    match = _OOM_CLASS.search(text) if _OF_CLASS.search(text) else None
    if match is None:
        return None
    head, tail = text[: match.start()], text[match.end() : match.end() + 1]
    if not _SEPARATED.search(head) or tail.isalnum() or _CALL.search(head):
        return None
    if unforeseen.DEFINED.match(text, match.end()) or _CELL.match(text, match.end()):
        return None
    package = re.split(r"\.|::", match["module"])[0]
    backend = _PACKAGES.get(package) if match["name"] == "OutOfMemoryError" else None
    grammar = next((each for each in grammars.GRAMMARS if each.backend == backend), None)
    if grammar is not None:
        found = _message(grammar, text, match)._replace(named=True)
    elif said := _unforeseen(text, raised=raised):
        return said
    else:
        asked = _ASKED.search(text, match.end())
        memory = _BUILTIN.get(match[0]) or unforeseen.whose(match[0]) or unforeseen.whose(text)
        found = _in_own_words(text, match.start(), memory, asked["tried"] if asked else "")
    told = spoken.reports(text, match.span(), "error", found.figures, raised=raised)
    return found if told else None


def _cut_short(text: str) -> Message | None:
    """Recognise a message that the summary cut within its first words."""
    start = text.rstrip().removesuffix("...").removesuffix("\N{HORIZONTAL ELLIPSIS}")
    if len(start) == len(text.rstrip()) or spoken.QUOTING.search(start):
        return None
    if len(start) >= _CUT_CLASS and any(each.startswith(start) for each in _CUT_CLASSES):
        return _message(grammars.GRAMMARS[0], text, None)
    words = start[max((match.end() for match in _CLASS.finditer(start)), default=len(start)) :]
    grammar = next((each for each in grammars.GRAMMARS if each.words.startswith(words)), None)
    return _message(grammar, text, None) if grammar and len(words) >= _CUT_WORDS else None


def _stated(message: Message) -> Message:
    """Return a message whose words need a context, with what the text around them tells."""
    if message.named or message.figures:
        return message
    found = unforeseen.find(message.text)
    if found is None or not unforeseen.stated(message.text, found):
        return message
    tried = size(found.tried)
    if tried is None:
        return message._replace(named=True)
    told = {"tried": tried}, {"tried": found.tried}
    return message._replace(named=True, sizes=told[0], printed=told[1], whole=False)


def _unforeseen(text: str, *, raised: bool) -> Message | None:
    """Recognise words that no grammar has, where a program states them."""
    for found in itertools.islice(unforeseen.find_all(text), _SAYINGS):
        span = found.start, found.end
        told = spoken.reports(text, span, "error", 0, raised=raised)
        if told and unforeseen.stated(text, found):
            return _in_own_words(text, found.start, found.memory, found.tried)
    return None


def _in_own_words(text: str, start: int, memory: str, asked: str) -> Message:
    """Return what a text says that no grammar has, of whose memory as far as it is told."""
    tried = size(asked)
    return Message(
        backend="host" if memory == "host" else "unknown",
        kind="unforeseen" if memory else "unsaid",
        limit=False,
        named=True,
        sizes={} if tried is None else {"tried": tried},
        printed={} if tried is None else {"tried": asked},
        device=None,
        processes=(),
        pid=None,
        whole=False,
        text=text,
        start=start,
    )


def _message(grammar: Grammar, text: str, match: re.Match[str] | None) -> Message:
    start, end = match.span() if match else (0, len(text))
    rest = text[start:]
    groups: dict[str, str] = dict(match.groupdict()) if match else {}
    missing = 0
    for pattern in grammar.figures:
        found = pattern.search(rest)
        missing += found is None
        for name, value in found.groupdict().items() if found else ():
            groups.setdefault(name, value)
    groups = {name: value for name, value in groups.items() if value is not None}
    over = groups.pop("free_over", None)
    if over and "total" in groups:
        # vLLM prints "(7.34/15.49 GiB)": one unit for both.
        groups["free"] = f"{over} {groups['total'].split()[-1]}"
    device = groups.pop("device", None)
    pid = groups.pop("pid", None) or groups.pop("victim", None)
    sizes = {name: value for name in groups if (value := size(groups[name])) is not None}
    head = text[max(0, start - spoken.AROUND) : start]
    named = match is None or grammar.distinct or _named(head, text[start:end], text[end:])
    if "tried" not in sizes and (asked := _tensor(rest) or (named and _asked(text, grammar))):
        sizes["tried"] = asked
    processes = tuple(
        GpuProcess(int(each["pid"]) if each["pid"] else None, taken, each["pid"] is None)
        for each in _PROCESS.finditer(rest)
        if (taken := size(each["size"])) is not None
    )
    if "reserved_unallocated" not in sizes and {"reserved", "allocated"} <= set(sizes):
        sizes["reserved_unallocated"] = max(0, sizes["reserved"] - sizes["allocated"])
    return Message(
        grammar.backend,
        grammar.kind,
        grammar.limit,
        named,
        sizes,
        {name: groups[name] for name in sizes if name in groups},
        None if device is None else int(device),
        processes,
        None if pid is None else int(pid),
        not missing,
        text,
        start,
    )


def _asked(text: str, grammar: Grammar) -> int | None:
    """Return the size of an allocation that stands beside words without one, if it is one."""
    if grammar.kind != "error":
        return None
    found = {each["tried"] for each in _ASKED.finditer(text)}
    return size(found.pop()) if len(found) == 1 else None


def _tensor(text: str) -> int | None:
    """Return the bytes of the tensor that TensorFlow names by its shape and type."""
    match = _SHAPE.search(text)
    if match is None:
        return None
    dims = re.findall(r"\d{1,12}", match[1] or match[2])
    size_of_one = _DTYPES.get(match[3] or "")
    if size_of_one is None or len(dims) > _DIMENSIONS:
        return None
    product = size_of_one
    for dim in dims:
        product *= int(dim)
    return product
