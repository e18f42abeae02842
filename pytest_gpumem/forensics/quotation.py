"""What the lines around a message take away from it: code, a comment or a manual that holds it."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from pytest_gpumem.forensics import prose
from pytest_gpumem.forensics.continuation import following, preceding

if TYPE_CHECKING:
    from pytest_gpumem.forensics.cursor import Cursor
    from pytest_gpumem.forensics.lines import Line

_LIST, _TEXTS = 12, 100
"""Lines that are searched for what encloses a text: in general, and as long as all are texts."""
_TEXT = re.compile(r"\s*[rbfu]{0,2}[\"']")
_NAMED = re.compile(r"\s*[A-Za-z_]\w*(?::|\s?=)\s*")
_ARGUMENT = re.compile(_NAMED.pattern + r"[rfbu]?([\"']).*\1,?\s*$")
"""A text that is given by name: in a call or, before a comma, in a record that code makes."""
_STARRED = re.compile(r"\s+\*(?:[\s/]|$)|\s*/\*")
_STAR_ALONE = re.compile(r"\s+\*/?\s*$|\s*/\*")
_FENCE = re.compile(r"`{3,}|~{3,}")
_MEANS = re.compile(
    r"(?:indicates?|means|implies|suggests|tells|says)\b"
    r"|(?i:(?:#+ )?(?:what (?:this|the|it)(?: error)? means"
    r"|why (?:this|it) happens|quick fix|meaning)\b)"
)
"""How a sentence goes on below the message that it has been set apart for."""
_EXAMPLES = re.compile(
    r"\W*(?i:(?:examples?|samples?)(?: of)? (?:errors?|(?:error )?messages?))\W*"
)
_MANUAL = re.compile(
    r"\W*(?i:(?:common|typical)(?: \w+)? errors?(?:,? (?:and )?(?:solutions?|fix(?:es)?|causes?))*"
    r"|what (?:the|this|an) error looks like)\W*"
)
"""The heading of what a manual shows, whatever figures that has, and of how far below it."""
_SECTION = 24
_OR = re.compile(r"O[Rr][:,]?|or:")
"""What stands alone between two messages of which a reader may have either."""
_RAW_MANUAL = re.compile(
    rf"{_FENCE.pattern}|\n\s*(?:\.\. \w|{_MEANS.pattern}|(?:O[Rr][:,]?|or:)\s*\n)"
    r"|(?i:example|sample|looks? like|appears? (?:as|like)) ?".encode()
)
"""A sign of a manual, in bytes, for most messages have none around them."""
_RAW_SECTION = re.compile(rb"(?i:(?:^|\n)\W*(?:common |typical |what (?:the|this|an) error ))")
_DIRECTIVE = re.compile(r"\.\. (?:code|code-block|sourcecode|parsed-literal)::.*")
"""What opens a block whose end its indentation shows."""
_FENCE_OPENS = re.compile(_FENCE.pattern.replace("|", "\\w*|") + rf"\w*|{_DIRECTIVE.pattern}")
_LIKE = re.compile(
    r"(?i)^(?!.*\b(?:I|my)\b).*\b(?:of the form|(?:looks?|something|lines?|errors?|messages?) like"
    r"(?: this| the following)?|such as"
    r"|similar to)\W*$|^if\b(?!.*\b(?-i:I)\b).*:$"
    r"|^(?:if|when) you (?:see|get|encounter|receive|face)\b"
)
_LOOKS = re.compile(
    r"(?i)^(?!.*\b(?:I|my|we|our|me)\b).*\b(?:(?:will |should |may |would )?looks? like"
    r"|appears? (?:as|like))(?: this| the following)?:?$"
)
"""What a manual says above what its reader will see."""
_REMEDY = re.compile(
    r"(?i)[^\w\s]{0,6} ?(?:(?:quick|possible|common|likely|root) )?(?:solutions?|soluci[oó]n(?:es)?"
    r"|fix(?:es)?|causes?|diagnosis|resolution|workarounds?|remed(?:y|ies)|l[oö]sung(?:en)?"
    r"|giải pháp|\ud574\uacb0\w*|solu[cç][aã]o|\u89e3[\u51b3\u6c7a][\u4e00-\u9fff]{0,2}"
    r"|\u0440\u0435\u0448\u0435\u043d\u0438\w)\b.{0,20}[:\uff1a]"
)
_BLOCK_ENDS = 12
"""Lines within which a block of a manual ends and its advice begins."""
_MARK = re.compile("\"{3}|'{3}")
_RAW_MARK = re.compile(_MARK.pattern.encode())
_NEAR = 1 << 11
"""Bytes above a message, or below it, in which the text that holds it may begin or end."""
_BLOCK = re.compile(
    rf"[=(,]\s*[rfbu]{{0,2}}(?:{_MARK.pattern})\\?\s*$"
    rf"|[rfbu]{{0,2}}(?:{_MARK.pattern})(?=\S)(?!\w*\s*$)"
)
"""Where a text over several lines begins; three marks before a word alone are somebody's fence.

So are they alone, except below what they document.
"""
_RAW_TEXT = re.compile(r"[=(,]\s*`[^`]*$")
"""Where a text over several lines begins in Go or JavaScript."""
_CLOSES = re.compile(r"\s*(?:[\]}]*\)|\};)")
_LIST_CLOSES = re.compile(_CLOSES.pattern + r"|\s*\}")
_KEYED = re.compile(r"\s*\"[^\"]*\"\s*:")
"""In JSON a brace closes what has keys, and a bracket what has none."""
_JSON_OPENS = re.compile(r"\s*\{?\s*(?:\"[^\"]*\"\s*:\s*)?[\[{]$")
_NAME = re.compile(r"\s*[A-Za-z_][\w.:]*[,;]?")
_ELEMENT = re.compile(r"\s*(?!true|false|null)[A-Za-z_][\w.]*,")
"""A name among texts, which JSON does not have."""
_STATUS = re.compile(r"\s*([A-Z][A-Z\d]*|[a-z]+(?=[A-Z]))(?:_[A-Z\d]+)*[A-Za-z\d]*\s*")
"""The name of a status that has a line of its own, and what those of its library begin with."""
_COMMENTED = re.compile(r"\s*(?:#|//|/\*|--|;;|%)")
_STATEMENT = re.compile(
    r"\s*(?:(?:def|class|if|else|elif|for|while|try|except|catch|import|from|func|fn|let|const|var"
    r"|val"
    r"|public|private|protected|static|switch|case|assert\w*|with|raise|throw|return|await|async"
    r"|export"
    r"|auto|void|struct|enum|namespace|using|describe|it|test)\b(?! *:? *$"
    r"|.*\.\s*$).*[\w)\]}\"';:,({]\s*$"
    r"|#(?:include|define|if|endif)\b|@\w+\b|[\w.\[\]\"']+ (?:=|:=|\+=) \S|.*[\w)\]\"'];\s*$"
    r"|.*[\w)] \{\s*$"
    r"|\}(?: else.*)?;?$|.*\w\(.*\)(?:;|:|,| \{)?\s*$|[\w.]+\([\[{(]*$"
    r"|[)\]}]*\)[;,]?$|.*: (?:None|True|False),?$|.*(?: == | != | && | \|\| | => |->\w))"
)
"""A line of a program, in most languages; what programs print has few, one below the other."""
_CHANGED, _HUNK = re.compile(r"[-+](?![-+])"), re.compile(r"@@ -\d|diff --git |`{3,}diff\b")
"""A line that a diff adds or takes away, and what stands above it."""
_AROUND, _ENOUGH = 4, 4
"""Lines on either side that are looked at, and how many of them make it code."""


def coded(at: Cursor, line: Line, body: str, head: str) -> bool:
    """Tell whether lines of code stand around words in quotation marks or in a comment.

    Or whether a diff has them, or they are a name that has a line of its own.

    Args:
        at: where the reader is.
        line: that has the words.
        body: its text.
        head: what stands before them.

    """
    if _CHANGED.match(body):
        if any(_HUNK.match(text.body) for text in preceding(line, _LIST, at.carrier)):
            return True
        sides = preceding(line, _AROUND, at.carrier), following(line, _AROUND, at.carrier)
        marks = [text.body[:1] for side in sides for text in side if text.body]
        return len(marks) >= _ENOUGH and set(marks) == {body[0]}
    quoted = any(head.count(mark) % 2 for mark in "\"'`")
    if not (quoted or _COMMENTED.match(head) or _NAME.fullmatch(body)):
        return False
    sides = preceding(line, _AROUND, at.carrier), following(line, _AROUND, at.carrier)
    around = (text.body for side in sides for text in side)
    return sum(_STATEMENT.match(text) is not None for text in around) >= _ENOUGH


def advised(at: Cursor, line: Line) -> bool:
    """Tell whether a manual shows the line: as an example, or above what it means.

    Or in a block, below which it says what to do.
    """
    start = line.end - len(line.raw)
    if not _RAW_MANUAL.search(line.buffer, max(0, start - _NEAR), line.end + _NEAR):
        return False
    below = [text.body.strip() for text in following(line, _BLOCK_ENDS, at.carrier)]
    above = [text.body.strip() for text in preceding(line, _BLOCK_ENDS, at.carrier)]
    said = next((text for text in below if text and not _FENCE.fullmatch(text)), "")
    if _MEANS.match(said) or _OR.fullmatch(said) or any(map(_EXAMPLES.fullmatch, above)):
        return True
    before = next((text for text in above if text and not _FENCE_OPENS.fullmatch(text)), "")
    if _LOOKS.search(before) or _OR.fullmatch(before):
        return True
    after = iter(below)
    if any(map(_FENCE.fullmatch, after)):
        if _REMEDY.match(next(filter(None, after), "")):
            return True
    elif not any(map(_DIRECTIVE.fullmatch, above)):
        return False
    opened = iter(above)
    if not any(map(_FENCE_OPENS.fullmatch, opened)):
        return False
    return _LIKE.search(next(filter(None, opened), "")) is not None


def shown(at: Cursor, line: Line) -> bool:
    """Tell whether the heading of a section says that a manual shows errors in it."""
    start = line.end - len(line.raw)
    if not _RAW_SECTION.search(line.buffer, max(0, start - _NEAR), start):
        return False
    above = preceding(line, _SECTION, at.carrier)
    return any(_MANUAL.fullmatch(text.body) for text in above)


def wrapped(at: Cursor, line: Line, body: str) -> bool:
    """Tell whether a line is one of a paragraph, within whose sentence its words stand."""
    if not line.raw.lstrip(b" \t`")[:1].islower():
        return False
    above = next(preceding(line, 1, at.carrier), None)
    return (
        above is not None
        and above.body == above.whole
        and prose.runs_on(above.body.rstrip(), body.strip())
    )


def listed(at: Cursor, line: Line, body: str) -> bool:
    """Tell whether a line is one of several texts in brackets that code has opened above it.

    Or in one text that goes over several lines.

    The same in a JSON file is no code: there a key, or nothing, stands before the bracket.
    """
    if _ARGUMENT.match(body):
        rest = (text.body for text in following(line, _LIST, at.carrier))
        after = next((text for text in rest if not _NAMED.match(text)), "")
        return body.rstrip().endswith(",") or _CLOSES.match(after) is not None
    above = (text.body for text in preceding(line, _TEXTS, at.carrier))
    if body.count("`") % 2:
        near = itertools.islice(above, _LIST)
        return any(map(_RAW_TEXT.search, near))
    if not _TEXT.match(body):
        start = line.end - len(line.raw)
        if not _RAW_MARK.search(line.buffer, max(0, start - _NEAR), start):
            return False
        near = itertools.islice(above, _LIST)
        marked = next((text for text in near if len(_MARK.findall(text)) % 2), "")
        if _MARK.fullmatch(marked.strip()):
            return next(filter(str.strip, near), "").rstrip().endswith(":")
        return _BLOCK.search(marked) is not None
    opener = next((text for text in above if not _TEXT.match(text)), "").rstrip()
    if opener.endswith(("(", "[", "{")):
        # JSON knows no other quotation marks.
        return body.lstrip()[:1] == "'" or not _JSON_OPENS.match(opener)
    if (
        opener.endswith("=")
        or _ELEMENT.fullmatch(opener)
        or (opener.endswith(",") and opener.count("(") > opener.count(")"))
    ):
        return True
    below = (text.body for text in following(line, _TEXTS, at.carrier))
    closes = _CLOSES if _KEYED.match(body) else _LIST_CLOSES
    return closes.match(next((text for text in below if not _TEXT.match(text)), "")) is not None


def enumerated(at: Cursor, line: Line, body: str) -> bool:
    """Tell whether a line is the name of a status among others of its library, each alone.

    Or what such a name means, below it.
    """
    above = tuple(preceding(line, _LIST, at.carrier))
    name = _STATUS.fullmatch(body) or (above and _STATUS.fullmatch(above[0].body))
    if not name:
        return False
    sides = above, following(line, _LIST, at.carrier)
    return all(any(_another(name, text.body) for text in side) for side in sides)


def _another(name: re.Match[str], body: str) -> bool:
    other = _STATUS.fullmatch(body)
    return other is not None and other[1] == name[1] and other[0].strip() != name[0].strip()


def commented(at: Cursor, line: Line, body: str) -> bool:
    """Tell whether a line is within a comment each of whose lines begins with a star."""
    if not _STARRED.match(body):
        return False
    above = [text.body for text in preceding(line, _LIST, at.carrier)]
    below = [text.body for text in following(line, _LIST, at.carrier)]
    if not all(side and _STARRED.match(side[0]) for side in (above, below)):
        return False
    # The items of a list have stars, too, but none alone.
    return any(_STAR_ALONE.match(text) for text in (*above, *below))
