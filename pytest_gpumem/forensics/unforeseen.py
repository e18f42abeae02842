"""Says that memory ran out in words that no grammar has.

A program says so in one of five ways, whatever its words: memory is lacking ("not enough device
memory"), a request is refused ("failed to allocate 12 bytes"), an allocation fails ("malloc of 12
bytes failed"), more is asked for than there is ("exceeds the available memory"), or a process was
killed for it ("terminated due to memory pressure"). The first is also what a status is called
(``XY_OUT_OF_MEMORY``), which counts where an error ends with it. A request or an allocation must be
one of memory: a size or a noun of memory stands beside it.

Since nobody has vouched for these words, they count only where a program states them: not in code,
which has quotes or placeholders around them, and not within a longer sentence, unless that tells a
size or an error.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.forensics import prose
from pytest_gpumem.forensics.grammars.language import compile_figures, size

if TYPE_CHECKING:
    from collections.abc import Iterator

_BETWEEN = r"(?:[a-z]{1,14}[ _-]?){0,3}?"
_STORE = r"(?:memory|v?ram\b|mem\b)"
_REFUSED = (
    r"(?:fail(?:ed|ure|s)? to|unable to|not able to|impossible to|(?:could|can) ?n[o']t"
    r"|can(?:not|'t)) "
)
_ENOUGH = (
    r"(?:insufficient|(?:not|n't) (?:[a-z]{3,10} )?(?:sufficient|enough)|too little|lack(?:s|ing)?"
    rf"|{_REFUSED}[a-z]{{3,10}} (?:sufficient|enough)"
    r"|\bno (?:[a-z]{1,12} )?(?:gpu|device|card|adapter|accelerator|node|machine|worker)s?"
    r" with (?:sufficient|enough))"
)
_ALLOCATE = r"(?<![a-z])(?:(?:pre|re)-?|m|c)?alloc(?:at(?:e|ing|ions?))?"
_CALL = r"(?<![a-z])(?:[a-z]{0,12}(?:[mc]alloc|allocatememory|memalloc)\w{0,12}|alloc_\w{1,20})"
_GOES_ON = (
    r"(?! (?!in|at|on|for|to|while|when|during|by|with|of|left|free|available|resources|or|and|from"
    r"|after|because|due|is|was|errors?|condition|exception|as|[a-z]+ing)[a-z])(?![:=] ?0\b)"
)
"""No other noun follows: a pool may be out of memory pages. Nor that it happened 0 times."""
_LACKING = (
    rf"(?:out(?:[ _-]of[ _-]{_BETWEEN}memory\b|of[a-z]{{0,12}}memory(?!error|exception))"
    rf"|{_ENOUGH} ?{_BETWEEN}{_STORE}){_GOES_ON}"
    rf"|(?:{_STORE}|\bheaps?) (?:is |are |was |has been )?(?:exhausted|insufficient"
    r"|full(?! ?[a-z]))\b"
    r"|\boom (?:on (?:gpu|cuda|device|card|rank|worker)|while|during|when (?:trying to )?alloc)"
    rf"|\bno (?:available |free |more |enough ){{1,2}}{_BETWEEN}{_STORE}{_GOES_ON}"
    rf"|{_STORE} (?:is |was )?not available\b(?! (?:in|on|for) (?:this|your|the))"
    r"|\bbad[_ ]alloc(?:ation)?\b"
    r"|(?:the )?paging file is too small"
    r"|\bus(?:ing|ed) (?:up )?all (?:of )?(?:the |its )?(?:available )?(?:memory|v?ram)\b"
    # What statuses are called.
    r"|\b[a-z]\w{1,40}_(?:mem(?:ory)?(?:manager)?_(?:err(?:or)?|exhausted|full)"
    r"|alloc(?:ation)?_fail(?:ed|ure)?|(?:no|not_enough|insufficient)_(?:\w{2,8}_)?memory)\b"
    r"|\b[a-z]{2,8}errormemoryallocation\b"
    # Windows' number for it.
    r"|(?:(?<=[=\[])|\b0x)8007000e\b|\b0xC0000017\b"
)
_REFUSAL = (
    rf"(?:{_REFUSED}(?:[a-z]{{1,14}} ){{0,2}}?|(?:errors?:?|failed) (?:when |while |in )?)"
    rf"{_ALLOCATE}\b"
    rf"|{_REFUSED}(?:reserve|m?map|commit|grow)\b(?=.{{0,40}}\d\s?(?:bytes|[kmg]i?b)\b)"
    rf"|{_REFUSED}(?:get|obtain|acquire) {_BETWEEN}{_STORE}(?: buffer| block)?(?= for\b| of size"
    rf"|\W*$)"
)
_FAILURE = (
    rf"(?:{_CALL}|{_ALLOCATE}(?![a-z]))(?:_|(?:[^.;!?]|\.\d){{0,60}}?\b)"
    r"(?<!not )(?:fail(?:ed|ure|s)?|refused|denied|rejected)(?![a-z])"
    rf"|{_STORE} allocation error"
)
_EXCESS = (
    rf"\b(?:requested|requires?|needs?|wants?|tried to allocate) more {_BETWEEN}{_STORE}"
    r"(?:[^.;!?]|\.\d){0,40}?\bthan\b(?: (?:is|are)\b)?"
    rf"|\b(?:exceed(?:s|ed|ing)?|reached|hit) (?:the |its )?{_BETWEEN}{_STORE}(?: limit\b|(?!\w))"
    r"|\b(?:larger|bigger|greater|more) than (?:the )?(?:available|free|allowed|total) "
    rf"{_BETWEEN}{_STORE}"
    rf"|\bexceeded \d{{1,3}}% (?:of )?(?:the |its )?{_BETWEEN}{_STORE} (?:limit|budget)"
    r"|\bv?mem(?:ory)? (?:\w{1,20} )?exceeded limit\b"
    rf"|\b(?:killed|terminated|evicted) (?:\S{{1,200}} ){{0,4}}?"
    rf"(?:due to|because of|for exceeding|by) {_BETWEEN}{_STORE}(?: (?:pressure|usage|limit))?"
    rf"|{_STORE} limit (?:of [\d.]{{1,12}} ?[kmgt]i?b? )?(?:was |has been |is )?exceeded\b"
    rf"|{_STORE} quota vastly exceeded\b"
)
_SAID = re.compile(rf"{_LACKING}|(?P<request>{_REFUSAL}|{_FAILURE})|{_EXCESS}", re.IGNORECASE)
_RAW_STORE = r"(?:\w+[ _-]){0,4}(?:memory|v?ram\b)"
_RAW_ALLOCATE = r"alloc(?:at(?:e|ing|ions?))?\b"
ANCHORS = (
    r"(?i:(?:insufficient|(?:not |n't )(?:\w+ )?(?:sufficient|enough)|with enough|too little) "
    rf"{_RAW_STORE}|with sufficient memory|[=x[]8007000e|0xc0000017"
    r"|(?:memory|ram) (?:limit|quota) (?:of|was|has|is|ex|re|vastly)"
    r"|\b(?:get|find|obtain|acquire) (?:sufficient|enough) "
    r"|(?:memory|vram|ram|heaps?) (?:is |are |was |has been )?"
    r"(?:exhausted|insufficient|full|not available)"
    r"|file is too small|out of (?:[\w-]+ ){1,2}memory|outof\w{0,12}memory"
    r"|(?: to|[\"'( ]not|n't|annot|error|when|while|failed) (?:\w+ ){0,2}(?:(?:pre|re)-?|m|c)?"
    rf"{_RAW_ALLOCATE}"
    r"|(?:fail\w* to|unable to|could not|couldn't|cannot|can't) (?:reserve|m?map|commit|grow) "
    rf"|(?:{_RAW_ALLOCATE}|[mc]alloc|alloc_|allocatememory|memalloc)[^.;!?\n]{{0,60}}"
    r" (?:fail|refused|denied|rejected)"
    r"|[\w.]oom: |oom(?:error|exception): |\boom (?:on|while|during|when) "
    r"|allocation(?:_fail| error)|_alloc_fail|bad[_ ]alloc|errormemoryalloc"
    r"|_(?:no|enough|insufficient)_(?:\w+_)?memory|_mem(?:ory)?(?:manager)?_(?:err|exh|full)"
    rf"|us(?:ing|ed) (?:up )?all {_RAW_STORE}|\bno (?:available|free|more|enough) {_RAW_STORE}"
    rf"| more {_RAW_STORE}|exceed\w* (?:\d+% )?{_RAW_STORE}"
    rf"|than (?:the )?(?:available|free|allowed|total) {_RAW_STORE}"
    r"|mem(?:ory)? \w{0,20} ?exceeded limit"
    r"|(?:killed|terminated|evicted) (?:\S+ ){0,4}?(?:due to|because of|for exceeding|by) "
    rf"{_RAW_STORE})"
).encode()
"""What a log is searched for: what each way begins with, in bytes."""
_OF_MEMORY = re.compile(
    r"(?i)memory|\bpage\b|v?ram\b|(?<![a-z])[dgv]?mem(?![a-z])|buffer|tensor|texture|surface|\bdag\b"
    r"|workspace"
    r"|\bheap|\bgem\b|[mc]alloc|\d\s?bytes\b"
)
_OF_NOTHING = re.compile(
    r"(?i)static TLS|limit at some point|\b0 [^.;:]{1,40}(?:killed|terminated|evicted)"
    r"|shared[ _]memory|\bsmem\b|illegal|unknown error|leak|\bdisk\b|descriptor"
    r"|invalid argument|given parameters"
    r"|not (?:currently )?supported|unsupported|\bport\b|\btty\b|permission|no such"
    r"|version is|no \w+ memory pool|memory (?:address|info|access|clock|pressure limit)"
    r"|socket, malloc|nodes (?:are )?available|constant memory|\bstack\b|within provided limit"
    r"|pinned (?:\w+ ){0,2}memory|\btactics?\b|Perhaps out of memory"
)
_REASON = re.compile(
    r"(?:<[^<>]{0,300}>|[^:.;,<]){0,60}: ([A-Za-z][a-z]+(?: [a-z-]+){1,6})(?! ?[\w=])"
)
"""Words alone that follow a failure behind a colon."""
_SPEAKS_OF_MEMORY = re.compile(
    r"(?i)memory|\bram\b|alloc|\boom\b|resource|exhaust|enough|insufficient|space|size|large|big"
    r"|limit|quota|full"
)
_HOSTS = re.compile(
    r"(?i)\b(?:host|system|cpu)[ _](?:\w+[ _])?(?:memory|ram)\b|\bcpu OutOfMemory"
    r"|OutOfMemory\(Host\)|paging file"
)
_HOST = re.compile(
    r"(?i)\bhost\b|(?<![a-z])cpu(?![a-z])|\bram\b|heap|virtual memory|paging|mmap|java|jvm|errno"
    r"|error=12|\bswap|opencv|numpy|\bmalloc\b"
)
ERRNO = re.compile(
    r"(?::|->) ?Cannot allocate memory(?: \(12\))?\W*$|not enough space\W*$|\bENOMEM\b"
    r"|\berror code is 12\b",
    re.I,
)
"""The system's own words for it, which are the host's, whatever asked."""
_CARD = re.compile(
    r"(?i)gpu|cuda|cudnn|cudf|\bgdf_|(?<![a-z])hip|rocm|vulkan|metal\b|opencl|device|vram|video|graphics"
    r"|accelerator|(?<![a-z])[nxh]pu(?![a-z])|habana|devmem|synhelper|\bdrm\b|nvidia|nvenc"
    r"|(?<![a-z])d3d|\bdx1[12]|dderr|dxvk|texture"
    r"|\.cuh?\b|directml|\bnv(?:buf|map)|\bgl_|cublas|thrust::|\bhbm\b|(?-i:\b(?:cl|vk)[A-Z])"
)
_PLACEHOLDER = re.compile(
    r"%[-+ #\d.]*(?:l|ll|z|h)?[dsufxpgi](?![a-z%])|%\d%|\$?\{[^{}\s]{0,40}\}|\\n[\"']"
    r"|\\[01]\b(?!\\)|\[[a-z]\](?= ?[KMG]?i?B\b)|\bX{3,}\b| \.{3} \("
    r"|<(?:pid|name|n|x|id|size|bytes|victim|process|number|amount)>"
)
"""What a program fills in before it prints, or a writer leaves open: it was never printed."""
_KEY = re.compile(
    r"(?:(?i:err|message|msg|reason|log|text|detail|status|what|description|stderr|output)[\"']?"
    r"(?:=|: ?)|(?i:error|exception|description)[\"']?(?:=|: ?| )|[\w)\]](?::|\uff1a) ?"
    # What Rust shows of an error.
    r"|(?:[Ee]rror: |\bpanicked at |`Err` value: ).{0,80}\w\("
    # What C and C++ assert, with what it means.
    r"|\.\w{1,4}:\d+: .{0,120}&& )[\"'`(]*$"
)
"""What stands before a text that a record or an error quotes."""
_CALLED = re.compile(
    r"(?:(?<!:): ?|\w(?:Error|Exception)\(|\b(?i:error|exception) )b?[\"']?(?:\w+ )?\w*$"
    r"|\b(?i:failed|fails|returned|returns|exited) (?:(?:with|code|error|status|result) )*\w*$"
)
DEFINED = re.compile(r"\w*[\"']?\s*(?:=|[,)\]}]+:?(?:\s*\\)?$|, \w+,)")
"""What follows a name in code: where it is assigned, listed, or an argument."""
_LISTED = re.compile(
    r"\s*E[A-Z]{3,10} \d+ "
    rf"|\s*(?:[-*|>]|#(?!\w+:\w+: )|\d+[.)])\s*(?!{prose.OF_ONE})"
    r"\S(?!.{0,80}(?:(?:Error|Exception)\b.{0,3}|\b(?i:error)): )"
)
"""A row of a table of numbers, an item of a list, a comment or a heading, unless it names an error
or says which card."""
_WORD = re.compile(r"\w")
_STATUS = re.compile(
    r"(?:[A-Z][A-Z\d]*(?:_[A-Z\d]+)+|[a-z]+Error[A-Z]\w*|ErrorOut\w+)"
    r"(?=[)\]\"'`]{0,3}(?:$|[!.:;] ?|,? ?[(\[\"]| [a-z]))"
)
"""The name of a status, and what follows it where a program prints it."""
_COMPARED = re.compile(
    r"(?:[=!]=|\breturn|&&|\|\||\bcase|: Final =|^\s*[A-Z][A-Z_\d]* =|\w,|\(\w+) ?$"
)
_COMMENT = re.compile(r"/\*|\*/")
_ROW = re.compile(r".*\|\s*$")
"""A row of a table that somebody wrote."""
_NEAR, _BEHIND = 60, 100
_AFTER = 200
_SIZE = compile_figures(
    r"<tried>|(?i:\b(?:size|bytes)\W{1,3}|\bmemory: (?=\d{4}))<other#>(?![\d.]*\s?[KMGT])"
    r"|\bof <before#>(?= size\b)|\b(?:[Rr]equire[sd]?|[Nn]eed(?:s|ed)?):? <needed>"
)
_REQUESTED = compile_figures(r"<tried> (?:was |were )?requested\b")
_NOT_ASKED = re.compile(
    r"(?i)(?:free|available|only|have|has|left|used?|total|capacity|limit|budget)(?: of)?\W{0,3}"
    r"(?:is\W)?$"
)
_NOT_ASKED_AFTER = re.compile(
    r"(?i)\)?,? (?:is |are |of memory )?(?:found|free|available|left|remain|in use|used|total)(?!:)"
)


class Unforeseen(NamedTuple):
    """What a text in nobody's words says."""

    start: int
    end: int
    memory: str
    """``card``, ``host``, or empty where it does not say whose."""
    tried: str
    """The size that was asked for, as printed; empty where none is told."""


def find(text: str) -> Unforeseen | None:
    """Return what ``text`` says of memory that ran out; None if it says nothing of the kind."""
    return next(find_all(text), None)


def find_all(text: str) -> Iterator[Unforeseen]:
    """Return each thing that ``text`` says of memory that ran out."""
    for match in _SAID.finditer(text):
        start, end = match.span()
        around = text[max(0, start - _NEAR) : end + _BEHIND]
        if _OF_NOTHING.search(around):
            return
        if match["request"] and (
            not _of_memory(text, around, start) or _for_another_reason(text, end)
        ):
            continue
        memory = "" if ERRNO.search(text) else whose(around)
        yield Unforeseen(start, end, memory, _asked(text, start))


def _of_memory(text: str, around: str, start: int) -> bool:
    """Tell whether it is memory that is asked for: a size alone is one of files, too."""
    if _OF_MEMORY.search(around):
        return True
    if "esource alloc" in around and _CARD.search(around):
        return prose.ERROR.search(text, 0, start) is not None
    return _SIZE.search(around) is not None and bool(
        _CARD.search(around) or prose.ERROR.search(text, 0, start)
    )


def _for_another_reason(text: str, end: int) -> bool:
    """Tell whether the reason that is given for a failure is not memory."""
    reason = _REASON.match(text, end)
    return reason is not None and _SPEAKS_OF_MEMORY.search(reason[1]) is None


def whose(text: str) -> str:
    """Tell whose memory a text is about: ``card``, ``host``, or empty."""
    if _HOSTS.search(text):
        return "host"
    return "card" if _CARD.search(text) else "host" if _HOST.search(text) else ""


def _asked(text: str, start: int) -> str:
    """Return the first size behind the words that is not one of what there is.

    Before them only one that is said to be requested.
    """
    if requested := _REQUESTED.search(text, max(0, start - _NEAR), start):
        return requested["tried"]
    for match in _SIZE.finditer(text, start, start + _AFTER):
        before, after = text[start : match.start()], text[match.end() :]
        free = _NOT_ASKED.search(before) or _NOT_ASKED_AFTER.match(after)
        if match["needed"] or not free:
            return match["tried"] or match["other"] or match["before"] or match["needed"]
    return ""


def stated(text: str, found: Unforeseen) -> bool:
    """Tell whether a program states the words, rather than holds them as text or is described."""
    head, tail = text[: found.start], text[found.end :]
    if _PLACEHOLDER.search(text) or _COMMENT.search(text) or _in_text(head, tail):
        return False
    if tail.endswith("("):
        return False
    if _named(text, found) or _LISTED.match(text) or _ROW.match(text):
        return False
    if (
        size(found.tried) is None
        and head.endswith("(")
        and not (tail.startswith(")") and prose.ERROR.search(head))
    ):
        return False
    return not prose.within(head, tail)


def _named(text: str, found: Unforeseen) -> bool:
    """Tell whether the words are a name in code, rather than one that an error is called by."""
    if " " in text[found.start : found.end] or text[found.start].isdigit():
        return False
    if _reported(text, found):
        return False
    return not _CALLED.search(text, 0, found.start) or DEFINED.match(text, found.end) is not None


def _reported(text: str, found: Unforeseen) -> bool:
    """Tell whether the words are the name of a status that an error ends with."""
    begin = found.start
    while begin and _WORD.match(text[begin - 1]):
        begin -= 1
    status = _STATUS.match(text, begin)
    if status is None or status.end() < found.end or _COMPARED.search(text, 0, begin):
        return False
    return prose.ERROR.search(text, 0, begin) is not None


def _in_text(head: str, tail: str) -> bool:
    """Tell whether the words are within quotation marks that no key stands before.

    Marks around a whole line are somebody's who pasted it, but for those of printed text.
    """
    for mark in '"`':
        before, found, after = head.rpartition(mark)
        pasted = not before.strip() and mark not in tail.rstrip()[:-1]
        pasted = pasted or (mark == "`" and not before.strip() and ": " in after)
        if found and head.count(mark) % 2 and not pasted and not _KEY.search(before):
            return True
    before, found, after = head.rpartition("\u201c")
    return bool(found) and "\u201d" not in after and not _KEY.search(before)
