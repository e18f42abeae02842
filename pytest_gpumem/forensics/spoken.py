"""Whether a text reports a message, or only speaks of one: code, documents, and who goes on.

A message that carries its figures is a report unless code, a comment or an assertion holds it.
Words without figures are none in prose either.
"""

from __future__ import annotations

import re

from pytest_gpumem.forensics import prose

AROUND = 400
"""How far from a message what is said of it stands."""
_CLOSE = 200
TELLING = 3
"""Figures that make a card's state (tried, total, free): who quotes a message for its words gives
fewer."""
ENDS = re.compile(
    r"but unallocated\b|reserved in total by PyTorch\)|cached\)|unoccupied cached memory"
)
"""Where PyTorch's message has given its figures."""

# What stands before words in code, in whatever language.
_CODE = re.compile(
    r"\s*(?:>\s+|\d+\s+|\+{1,4} |-\s+(?=(?:raise|throw|except)\b)|\S+\.\w{1,4}[:-]\d+[:-]\s*)?"
    r"(?:r[bf]?[\"\x27]|(?:\|\||&&)\s|(?:raise|return|def|class|import|case"
    r"|throw|grep|echo|REM|or|and)\s"
    r"|@[a-z]\w*\s+\w+\(|[\w.]+\.\w+ ?= ?$|.*\(\w+ ?= ?$"
    r"|from\s+\S+\s+import|[\w.]+(?: = [rfb(]{0,2}[\"\x27]| ?= ?\()"
    r"|(?:el)?if\s.{0,120}?\bin\b|except\s+[\w.(]|\}?\s*catch\s*\(|with\s+[\w.]+\("
    r"|print\(|logg?(?:er|ing)?_?(?:\.|->)\w+\(|self\.\w+\(|pytest\.|assert\b|#+(?!\w+:\w+: )(?:\s"
    r"|[^\W\d])|//|/\*"
    r"|[\"\x27]?(?:pattern|regexp?|expr)[\"\x27]?\s*[:=]|(?:-\s+)?(?:title|name|label|summary|alert)\s*[:=]\s*[\"\x27]?(?!.*\b(?:error|Error|exception|Exception)\b)"
    r"|\*?\s*(?:[@\\](?:throws|exception|raises|returns?|retval|param)|:raises)\b"
    r"|_?[A-Z][A-Z\d_]*=[\"\x27]|\{ ?[A-Za-z_]\w*: [\"\x27`]|(?:el)?if\s+(?:!\s+)?\[|(?:test"
    r"|while)\s+\["
    r"|\"\"\"|\x27{3}|.* = [\w:.<>]+\([\"\x27]$"
    r"|(?:(?:public|private|protected|internal|export|pub|inline|constexpr)\s+){0,2}(?:let|const|var|val|auto|static|final|local|my|string|String|char)\s[^=\"\x27]{0,120}="
    r"[^=\"\x27]{0,80}[\"\x27`])"
    r"|.*(?:\b(?:raises|match|compile|search|skip|warns|print|Error)\s?\(|\bmatch\s?=|==)"
    r"\s?[rfb]?[\"'][^\"')]*$"
    r"|.*(?:\.|->)(?!\w*(?:Error|Exception))\w+\([\"']?$"
    r"|.*\{`[^`]*$|(?:.*[|;&(]\s*|\s*(?:if|while|until|!)\s+)?(?:\w*grep|rg|ag|awk|echo|trap"
    r"|sed)\s[^|]*[\"'][^\"']*$"
    r"|.*<<\s*\"[^\"]*$|(?:.*(?:&&|\|\||;|\bthen|\{))?\s*exit $|\S+\.(?:md|rst):\d+:",
    re.DOTALL,
)
COMMENT = re.compile(r"\s*(?:#+\s|//|/\*|--\s|;;|REM\s)|.*[;{})] ?//")
"""What stands in the same line before words that somebody has commented out."""
_BEHIND_CODE = re.compile(
    r"\s*[A-Z][A-Z_\d]+ ?// |.*(?:[;,{}()\]] ?// ?|; ?%+ |[)\]}\"'] # )[^\"']*$", re.DOTALL
)
"""A comment behind a statement, up to the words that it holds."""
LITERAL = re.compile(
    r"\s*\(?[rbfu]{0,2}([\"\x27]).*\1\s*\)+[:,;]?$|\s*[\w:.]+!?\(([\"\x27]).*\2\)(?:[\])]+[,:]?|,)$"
    r"|\s*([\"\x27]).*\3;$|\s*[@\[][\w.:]+\(.*[\"\x27].*\)\]?,?$"
    r"|.*\w\s?\(.*[\"\x27][^\"\x27]*\);$|\s*[A-Za-z_][\w.:]*\(.*\);$|\s*([\"\x27]).*\4 ?\+$"
    r"|\s*/[^/\s].*/[gimsuy]*,?$",
    re.DOTALL,
)
"""A line that is a text within a call, whose brackets close behind it, a whole statement, or a
regular expression between slashes."""
_ALTERNATIVE = re.compile(
    r"[/|(]\0\||\|\0[/|)]|/\0/|[\w\])]\[[\"\x27]\0[\"\x27]\]"
    r"|[\"\x27]\0[\"\x27](?: (?:not )?in [A-Za-z_]|, [\w.]+[,)])"
)
"""One of several in a regular expression, a key, or an argument before others; ``\\0`` stands for
the words."""
_ARGUMENT = re.compile(
    r".*(?<![\w.])[a-z_]\w*\([\"\x27][^\"\x27]*\0[^\"\x27]*[\"\x27]\)", re.DOTALL
)
"""A text that a function is called with; errors have names in capitals."""
_DEFINED = re.compile(r"[)}\]]+(?:;$| (?:if|when)\b)")
_CHECKED = re.compile(r"(?i)\b(?:fail\w*|error|assertion)\b[^=]*: ")
"""Before a comparison that a program prints since it did not hold."""
_LISTED = re.compile(
    r", [A-Z\d_]{6,}\b|[\"\x27]?(?:\s*=\s*\S+)?[,;]$|\s*=\s*-?\w+$|\s*=\s(?:.*;|[\w.]+\(.*\))$"
)
"""What follows a name where it is defined, listed or returned, rather than printed."""
_STARRED = re.compile(rf"\s*\*(?!\*)(?!{prose.OF_ONE})")
"""A line of a comment, or an item of a list."""
QUOTING = re.compile(
    r"\bassert\b|\bAssertionError\b|DID NOT RAISE|Regex pattern|Expected regex|Actual message"
    r"|does not match|^\s*(?:Input|Regex|Pattern|Expected|Actual): |^\s*[-+?] +['\"]"
)
"""An assertion about a message: it quotes one, and what follows it compares."""
_PASSED = re.compile(
    r"\s*(?:[\u2713\u2714\u221a]|[-*] \[[ xX]\] |ok \d+ |--- PASS: |\[ +(?:OK|PASSED|RUN) +\])"
)
"""What stands before the name of a test that passed, in no pytest's output, or of a task."""
_NONE = re.compile(r"(?:(?:^|[,;(|] ?)0|\b(?:[Nn]ot?|[Nn]ever|[Ww]ithout)) $")
_EMPHASIS = re.compile(r"\*\*[^*]+\*\*|</t[dh]>|\b128 ?\+ ?\w|\b137 = ")
"""What somebody who writes for readers sets off, puts into a table, or reckons for them."""
_OPEN = re.compile(
    r"\[\.\.\.\]|=<[a-z-]{1,14}>|/<[a-z-]{1,14}>|=\.{3},|,\.{3},|\{\{|^\s*--[a-z][\w-]*[ =,]"
)
"""What a writer leaves open, or out, in a line that he shows."""
_BLANK = re.compile(r"\b(?:[XN]{1,3}(?:\.[XY]{1,2})?|\.{3}) ?(?:[KMG]i?B|bytes)\b|^\\\.|\\d\+")
"""A figure that a writer left open, or a pattern has."""
_SYMPTOM = re.compile(r"(?i)\W*sympt\w+\W{0,4}:")
_STATE = re.compile(
    r"(?:^|[:=(\[{>|\"`-]\W{0,3}|\d/\d+ |\b(?i:was|been|got|terminated|error|status|state|reason"
    r"|due to"
    r"|with|by|is|as) \W?)$"
)
"""What stands before the name of a container's state where a program tells of it."""
_SELECTED = re.compile(r"\"[^{}]*\}\s*(?:[=!<>]|\[|\))")
"""What stands behind it in a query."""
HANDLED = re.compile(
    r"(?i)\b(?:retrying|retried|will retry|fall(?:ing|s)?[ -]?back|recover(?:ed|ing|y)?|"
    r"(?<!\d )skipped|skipping|reducing|halving|will try|trying again|not a failure|handled|"
    r"(?<!\d )ignored|ignoring|moving to cpu|reserving\b|using cpu|switching to cpu"
    r"|on cpu instead|"
    r"clearing (?:the )?cache|caught (?:an? )?(?:cuda )?(?:oom|out)|oom caught|"
    r"(?<!unhandled exception )caught:|as expected|expected error(?! ?[!=]=)"
    r"|(?:use|using|reading) .{1,40}\binstead\b|suboptimal)"
)
ADVICE = re.compile(
    r"(?i)(?:(?<=[.!?;:] )|^\s*)"
    r"(?:consider|try|please|hint|tip|note|you (?:can|may|should))\b[^.!?]*"
)
"""What a program tells its user to do, rather than that it does it."""
_BELOW_ERROR = re.compile(
    r"(?<![=\w])(?:WARN(?:ING)?|INFO|DEBUG|TRACE|NOTICE)\b(?![=/.])|(?i:level\W{1,4}(?:warn|info"
    r"|debug|"
    r"trace|notice))|\b\w*Warning: |^\[[WI]\d{3,4} |\[[WI]\] |\[[WI]:onnxruntime"
    r"|^I[ \d][\w/. :]{3,80}\]"
)
_ERROR_LEVEL = re.compile(
    r"\b(?:ERROR|CRITICAL|FATAL|[\w.]+(?:Error|Exception)|Lost task \d+)\b"
    r"|(?i:level\W{1,4}(?:error|fatal|crit))"
    r"|\b(?:INFO|DEBUG)\W{1,4}(?:Error|Exception)\b"
)


def reports(
    text: str, span: tuple[int, int], kind: str, figures: int, *, raised: bool = False
) -> bool:
    """Tell whether the text reports the message in it, rather than speaks of it or of its end.

    Args:
        text: a line, or the lines of one message.
        span: where in it the message's own words stand.
        kind: of its grammar.
        figures: how many figures it carries.
        raised: whether the carrier shows it as the error of a test.

    """
    start, end = span
    head, tail = text[max(0, start - AROUND) : start], text[end:]
    if QUOTING.search(head) or _NONE.search(head) or _PASSED.match(head) or _code(text, span, head):
        return False
    if _BLANK.search(tail[:_CLOSE]):
        return False
    if kind == "kill":
        # At whatever level somebody logs it.
        handled = HANDLED.search(head) or HANDLED.search(tail)
        told = prose.told(head, tail, figures) or prose.EXPLAINED.match(tail)
        return not (handled or told or _of_kills(text, span))
    if not raised and _survived(text, end, head):
        return False
    if figures >= TELLING:
        return True
    if figures:
        return not prose.told(head, tail, figures)
    if _named_only(text, span, head) or prose.told(head, tail, 0):
        return False
    return raised or not prose.within(head, tail)


def _of_kills(text: str, span: tuple[int, int]) -> bool:
    """Tell whether somebody writes of killed processes, rather than a program of one."""
    if _EMPHASIS.search(text) or _SYMPTOM.match(text) or _OPEN.search(text):
        return True
    if text[slice(*span)] != "OOMKilled":
        return False
    if text[span[1] :].startswith("?"):
        return True
    return _STATE.search(text[: span[0]]) is None or _SELECTED.match(text, span[1]) is not None


def _code(text: str, span: tuple[int, int], head: str) -> bool:
    """Tell whether the words are a text or a pattern in somebody's code."""
    around = f"{text[: span[0]][-3:]}\0{text[span[1] :][:40]}"
    return (
        _CODE.match(head) is not None
        or _BEHIND_CODE.match(head) is not None
        or LITERAL.match(text) is not None
        or _ALTERNATIVE.search(around) is not None
        or _ARGUMENT.match(f"{head}\0{text[span[1] :]}") is not None
    )


def _named_only(text: str, span: tuple[int, int], head: str) -> bool:
    """Tell whether a name without figures is one of a list, of a comment or of a definition."""
    alone = " " not in text[slice(*span)]
    if alone and (
        _DEFINED.match(text, span[1])
        or (head.rstrip().endswith(("==", "!=")) and not _CHECKED.search(head))
        or (head.endswith(" = ") and text[span[1] :] in ("", ";"))
    ):
        return True
    if prose.ERROR.search(head):
        return False
    return _STARRED.match(head) is not None or (alone and _LISTED.match(text, span[1]) is not None)


def _survived(text: str, end: int, head: str) -> bool:
    """Tell whether the line itself says that the program went on."""
    last = ENDS.search(text, end)
    after = ADVICE.sub("", text[end : (last.end() if last else end) + AROUND])
    if HANDLED.search(head[-_CLOSE:]) or HANDLED.search(after):
        return True
    return _BELOW_ERROR.search(head) is not None and _ERROR_LEVEL.search(head) is None
