"""Whether a text reports that memory ran out, and what it says.

A text is judged in this order. Its words: the first grammar that finds its own in it is the one.
What stands before them: code and assertions quote a message, they do not report it. Whether the
text itself goes on: about a retry, or as a record below an error; where a test shows it as its
error that does not count. Figures make a message then, behind any head, in any carrier. Without
them it needs a context that says error, unless nobody but a framework writes such words, and none
that is prose.

Where no grammar finds its words, the class of an exception, or a beginning that was cut short, may
still say whose they were.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.forensics import grammars
from pytest_gpumem.forensics.grammars.language import size
from pytest_gpumem.records.findings import GpuProcess

if TYPE_CHECKING:
    from pytest_gpumem.forensics.grammars.language import Grammar

_CLASS = re.compile(
    r"(?!cudaError[A-Z])(?:[A-Za-z_]\w{0,80}(?:\.|::)){0,12}\w{0,80}?"
    r"(?:Error|Exception|Exhausted|Exit|Failure|OutOfMemory|EnforceNotMet|\bFailed\b)\w{0,80}"
    r"(?: ?\([^()]{1,60}\))?: ?"
)
_OOM_CLASS = re.compile(
    r"(?<![\w.])(?P<module>(?:[A-Za-z_]\w{0,80}(?:\.|::)){0,12})OutOfMemoryError\b(?![.(]\w)"
)
# Words of an error before the message, whoever wrote them.
_ERROR_HEAD = re.compile(
    r"(?i:error|exception|fail(?:ed|ure|s)?\b|fatal|panic|abort|critical|crash|terminat|\berr\b"
    r"|could not|cannot|unable)|\[[EF]\b|\b[EF]\d{4} |\b[EF] [\w./-]+:\d+\]"
)
_STATED = re.compile(r"(?i)\b(?:error|exception|failed|fatal): $")
_CALL = re.compile(r"\w\([^()\"']*$")
"""A name among the arguments of a call is code."""
_SEPARATED = re.compile(r"(?:^|[:=>|\]})\"'`(,.;!*-]|\\n)\s*$")
# Code and documents speak of the message; they do not report it.
_CODE = re.compile(
    r"\s*(?:>\s+|\d+\s+)?(?:(?:raise|return|assert|def|class|import|case|throw|grep|echo)\s"
    r"|from\s+\S+\s+import|[\w.]+(?: = [rfb(]{0,2}[\"\x27]| ?= ?\()"
    r"|(?:el)?if\s.{0,120}?\bin\b|except\s+[\w.(]|with\s+[\w.]+\("
    r"|print\(|logg?(?:er|ing)?\.\w+\(|self\.\w+\(|pytest\.|#+(?:\s|[^\W\d])|//|/?\*(?!\*)|\"\"\"|\x27{3})"
    r"|.*(?:\b(?:raises|match|compile|search|skip|warns|print|Error)\s?\(|\bmatch\s?=|==)"
    r"\s?[rfb]?[\"'][^\"')]*$",
    re.DOTALL,
)
QUOTING = re.compile(
    r"\bassert\b|\bAssertionError\b|DID NOT RAISE|Regex pattern|Expected regex|Actual message"
    r"|does not match|^\s*(?:Input|Regex|Pattern|Expected|Actual): |^\s*[-+?] +['\"]"
)
"""An assertion about a message: it quotes one, and what follows it compares."""
_PROSE_HEAD = re.compile(
    r"(?i)\b(?:if|when(?:ever)?|avoid\w*|prevent\w*|you|your|in case of|to fix|how to|see also|"
    r"hint|note|tip|e\.g\.|may|might|can|would|likely)\b[^:\]]{0,80}$"
)
_ASIDE = re.compile(r"\([^()]*\)")
_PROSE_TAIL = re.compile(
    r"(?i)[\"'`]?\s*(?:,? ?(?:errors?|issues?|problems?|exceptions?|conditions?|handling|handler|"
    r"situations?|crash(?:es)?|tests?|or|and|if|when(?! calling)|can|may|might|will|should|is|are|"
    r"try|consider)\b)"
)
HANDLED = re.compile(
    r"(?i)\b(?:retrying|retried|will retry|fall(?:ing|s)?[ -]?back|recover(?:ed|ing|y)?|"
    r"(?<!\d )skipped|skipping|reducing|halving|will try|trying again|not a failure|handled|"
    r"(?<!\d )ignored|ignoring|moving to cpu|using cpu|switching to cpu|on cpu instead|"
    r"clearing (?:the )?cache|caught (?:an? )?(?:cuda )?(?:oom|out)|oom caught|caught:|"
    r"as expected|expected error)"
)
_BELOW_ERROR = re.compile(
    r"(?<![=\w])(?:WARN(?:ING)?|INFO|DEBUG|TRACE|NOTICE)\b(?![=/.])|(?i:level\W{1,4}(?:warn|info|debug|"
    r"trace|notice))|\b\w*Warning: |^\[[WI]\d{3,4} |\[[WI]:onnxruntime|^I[ \d][\w/. :]{3,80}\]"
)
_ERROR_LEVEL = re.compile(r"\b(?:ERROR|CRITICAL|FATAL|[\w.]+(?:Error|Exception))\b|(?i:level\W{1,4}"
                          r"(?:error|fatal|crit))")  # fmt: skip
_PROCESS = re.compile(
    r"\b(?:Process (?P<pid>\d{1,10})|[Tt]his process) has "
    r"(?P<size>\d[\d,]{0,24}\.?\d{0,6}\s?(?:bytes|[KMGT]iB)) memory in use"
)
_SHAPE = re.compile(
    r"shape ?(?:\[([\d,]{1,200})\]|((?:dim ?\{ ?size: \d{1,12} ?\} ?){1,16}))(?: and type (\w+))?"
)
_DTYPES = {"half": 2, "bfloat16": 2, "float": 4, "double": 8, "int32": 4, "int64": 8, "bool": 1}
ENDS = re.compile(
    r"but unallocated\b|reserved in total by PyTorch\)|cached\)|unoccupied cached memory"
)
"""Where PyTorch's message has given its figures."""
_PACKAGES = {"": "cuda", "torch": "cuda", "c10": "cuda", "cupy": "cupy", "ray": "host"}
"""Whose memory an exception named OutOfMemoryError is about, by the package it comes from."""
_CUT_CLASSES = ("torch.OutOfMemoryError", "torch.cuda.OutOfMemoryError", "cupy.cuda.memory.Out")
_CUT_CLASS = len("torch.OutOf")
_CUT_WORDS = 8
"""Fewer characters could begin anything."""
_AROUND = 200
"""How far from a message what is said of it stands."""
_DIMENSIONS = 16


class Message(NamedTuple):
    """What one message says; sizes in bytes."""

    backend: str
    kind: str
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
    def complete(self) -> bool:
        """Whether nothing of the message is missing that could stand on further lines."""
        return self.whole or ENDS.search(self.text) is not None


def parse(text: str, *, raised: bool = False) -> Message | None:
    """Return what ``text`` says if it is a message that memory ran out, else None.

    Args:
        text: a line, or the lines of one message, with whatever stands before it.
        raised: whether the carrier shows it as the error of a test; elsewhere a text that goes
            on about a retry or a fallback, or a log record below an error, was survived.

    """
    for grammar in grammars.vocabulary():
        if not any(needle in text for needle in grammar.needles):
            continue
        match = grammar.head.search(text)
        if match is None or "cudaErrorIllegal" in text:
            continue
        found = _message(grammar, text, match)
        if _reported(text, match.span(), found, raised=raised):
            return found
    return _by_class(text, raised=raised) or _cut_short(text)


def _reported(text: str, span: tuple[int, int], found: Message, *, raised: bool) -> bool:
    """Tell whether the text reports the message, rather than speaks of it or of its end."""
    start, end = span
    head = text[max(0, start - 2 * _AROUND) : start]
    if QUOTING.search(head) or _CODE.match(head):
        return False
    if found.kind == "kill":
        # At whatever level somebody logs it.
        return not (HANDLED.search(head) or HANDLED.search(text[end:]) or _PROSE_HEAD.search(head))
    if not raised and _survived(text, end, head):
        return False
    if found.figures:
        return True
    if _PROSE_HEAD.search(_ASIDE.sub("", head)) or _quoted(head, text[end:]):
        return False
    return _STATED.search(head) is not None or not _PROSE_TAIL.match(text[end : end + _AROUND])


def _quoted(head: str, tail: str) -> bool:
    """Tell whether words without figures are shown as code within a text."""
    before = head.rpartition("`")[0]
    return bool(before.strip()) and before.count("`") % 2 == 0 and tail.count("`") % 2 == 1


def _survived(text: str, end: int, head: str) -> bool:
    """Tell whether the line itself says that the program went on."""
    last = ENDS.search(text, end)
    after = text[end : (last.end() if last else end) + 2 * _AROUND]
    if HANDLED.search(head[-_AROUND:]) or HANDLED.search(after):
        return True
    return _BELOW_ERROR.search(head) is not None and _ERROR_LEVEL.search(head) is None


def _named(head: str, tail: str) -> bool:
    """Tell whether what stands around words without figures says that they are an error."""
    if not head.strip():
        return not tail.strip(" .!\"'")
    return _SEPARATED.search(head) is not None and _ERROR_HEAD.search(head) is not None


def _by_class(text: str, *, raised: bool) -> Message | None:
    """Recognise the exception's name where the message is cut off or missing."""
    match = _OOM_CLASS.search(text) if "OutOfMemoryError" in text else None
    if match is None:
        return None
    backend = _PACKAGES.get(re.split(r"\.|::", match["module"])[0])
    grammar = next((each for each in grammars.GRAMMARS if each.backend == backend), None)
    head, tail = text[: match.start()], text[match.end() : match.end() + 1]
    if grammar is None or not _SEPARATED.search(head) or tail.isalnum() or _CALL.search(head):
        return None
    found = _message(grammar, text, match)._replace(named=True)
    return found if _reported(text, match.span(), found, raised=raised) else None


def _cut_short(text: str) -> Message | None:
    """Recognise a message that the summary cut within its first words."""
    start = text.rstrip().removesuffix("...").removesuffix("\N{HORIZONTAL ELLIPSIS}")
    if len(start) == len(text.rstrip()) or QUOTING.search(start):
        return None
    if len(start) >= _CUT_CLASS and any(each.startswith(start) for each in _CUT_CLASSES):
        return _message(grammars.GRAMMARS[0], text, None)
    words = start[max((match.end() for match in _CLASS.finditer(start)), default=len(start)) :]
    grammar = next((each for each in grammars.GRAMMARS if each.words.startswith(words)), None)
    return _message(grammar, text, None) if grammar and len(words) >= _CUT_WORDS else None


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
    if "tried" not in sizes and (tensor := _tensor(rest)):
        sizes["tried"] = tensor
    processes = tuple(
        GpuProcess(int(each["pid"]) if each["pid"] else None, taken, each["pid"] is None)
        for each in _PROCESS.finditer(rest)
        if (taken := size(each["size"])) is not None
    )
    if "reserved_unallocated" not in sizes and {"reserved", "allocated"} <= set(sizes):
        sizes["reserved_unallocated"] = max(0, sizes["reserved"] - sizes["allocated"])
    head = text[max(0, start - 2 * _AROUND) : start]
    return Message(
        grammar.backend,
        grammar.kind,
        grammar.limit,
        match is None or grammar.distinct or _named(head, text[end:]),
        sizes,
        {name: groups[name] for name in sizes if name in groups},
        None if device is None else int(device),
        processes,
        None if pid is None else int(pid),
        not missing,
        text,
        start,
    )


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
