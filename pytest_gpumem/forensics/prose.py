"""Whether words stand in somebody's sentence, rather than in a program's message.

A program puts few words before its own: who it is, or that this is an error. Who writes of an error
has begun a sentence, or goes on with it behind the words.
"""

from __future__ import annotations

import re

_CLOSE = 200
ERROR = re.compile(
    r"(?i:error|exception|fail(?:ed|ure|s)?\b|fatal|panic|abort|critical|crash|terminat|\bdied\b|\berr\b"
    r"|could not|cannot|unable|non-?zero)|\[[EF]\b|\b[EF]\d{4} |\b[EF] [\w./-]+:\d+\]"
)
"""Words of an error before the message, whoever wrote them."""
MACHINE = re.compile(
    r"\w\s?\(|\w::\w|[a-z\d]_[a-z\d]|\b[a-z]+[A-Z]\w|\.\w{1,4}:\d|\b0x[\da-f]|\d:\d\d:\d\d"
    r"|\b[A-Z]{2,}_[A-Z]|\w=\S"
)
"""What nobody writes in a sentence: a call, a name or a place in code, a time, a setting."""
_STATED = re.compile(r"(?i)\b(?:error|exception|failed|fatal): $")
_PROSE_HEAD = re.compile(
    r"(?i)\b(?:if|when(?:ever)?|causes|avoid\w*|prevent\w*|you|(?<=\s)your|in case of|to fix|how to"
    r"|see also|hint|note|tip|e\.g|such as|(?:is|are|called) (?:the|an?)|may|might|can(?!')|likely"
    r"|(?:this|it|which|code \d+|\w+[`\"')]) (?:\w+ )?(?:indicates|means))\b[^:\]]{0,80}$"
    r"|(?:^|[.!?] )(?:if|when|while|without)\b[^.:!?\"]*$"
    r"|^[-*#\s]*(?:[\da-f]{7,10} )?(?:(?:fix(?:e[sd])?|resolve[sd]?|close[sd]?|catch(?:es)?"
    r"|explains?|documents?|handles?) |(?:fixed|added|changed|removed|subject"
    r"|(?:fix|feat|docs|chore|refactor)(?:\([\w./-]+\))?!?): )"
    r"|^\W*(?:(?:q\d*|faq)[:.] )?(?:what|why|how|does)\b(?!\(|:)"
)
"""How a sentence begins that tells of an error, or a remark on a change."""
_CLASS = re.compile(r"[\w.]{1,80}(?:Error|Exception): ?$")
"""The name of an exception, with which somebody may begin to quote."""
_ASIDE = re.compile(r"\([^()]*\)")
_PROSE_TAIL = re.compile(
    r"(?i)[\"'`*]*\s*(?:,? ?(?:(?:errors?|exceptions?)(?!: \w)|issues?|problems?|conditions?"
    r"|handling|handler|situations?|crash(?:es)?|tests?|or|and|if|when(?! calling)|can|may|might"
    r"|do(?:es)? not|do(?:es)?n't"
    r"|will|should)\b|:? ?(?:triggered|raised|thrown|occurs|happens) (?:if|when)\b"
    r"|[-\u2013\u2014=]+>? ?(?:to )?(?:fix|try|reduc|lower|solv|increas|decreas)|[\"'`]?\? "
    r"|[\"'`]\?| [\u0400-\ud7ff])"
)
"""How a sentence goes on behind the words that it tells of."""
EXPLAINED = re.compile(
    r"[^,.;:]{0,12}? (?:\w+ )?(?:means|indicates)\b|.{0,16}?[,(] ?which (?:is|means?|usually|often"
    r"|indicates?|typically)\b"
)
_SUPPOSED = re.compile(
    r"(?i)\b(?:if|when(?:ever)?|may|might|can|could|would|should|avoid|prevent|fix(?:es)?|like"
    r"|such as|e\.g|how|why|examples?|typical(?:ly)?|common)\b"
)
_TOLD_OF = re.compile(
    r" (?:was|were|is|are|has been|can be|may be) (?:raised|thrown|caused|seen|returned|reported"
    r"|printed|shown|displayed|fixed|avoided|handled)\b"
)
_MENTIONED = re.compile(
    r"[A-Za-z]{2,}, $|\b(?i:shows?|showed|showing|says?|said|saying|reads|gets?|got|getting|sees?"
    r"|saw|gives?|gave)(?: (?:an?|the|me|us|this))?(?: (?:error|message))? $"
)
"""What stands before a quotation in somebody's sentence."""
_ITALIC = re.compile(r"(?:^|.*\s)([_*]{1,3})(?=\w)[^_*]*\0[^_*]*\1 \w")
"""Words set off in a sentence that goes on."""
_PLACE = re.compile(r"\.(?:c|cc|cpp|cu|cuh|h|hpp|py|rs)\W{1,3}(?:line )?\d")
"""Where in a program it was: nobody but the program says that."""
_GOES_ON = re.compile(r"[.,;)]| (?:[a-z]|\| )")
_BREAK = re.compile(r"[:;\])>!=,(|]|\. |\.{3}|\s-+\s|\"|'(?![a-z]\b)")
_LAST = re.compile(
    r"(?i)(?:^|\s)(?:that|the|an?|any|such|because|where|(?:in|under|for) which|whether|handles?"
    r"|will|would|can|could|may|might|(?:to|from|of|before|without|about|is|are) running"
    r"|(?P<plain>to|of|by|from|and|or|with|for|as|is|are|be|was|were)) $"
)
"""The last word before words that somebody's sentence tells of; with an error before, some may."""
_PERSON = re.compile(
    r"\b[Ii](?:'m|'ve|'d)? (?:am|was|get|got|have|had|see|saw|think|run|ran|tried|try|used?|can"
    r"|need|found|often|still|also|just|keep|believe|guess|know|want|set|did|do|don't)\b"
    r"|\b(?i:we|our|my|they|their|who|how|why|these|those|typically|usually|often|maybe|probably"
    r"|sometimes|always|very|really|just|also|many|several|should|would|known?)\b"
)
"""What no program says beside an error."""
_RECORD = re.compile(r"\[?(?:ERROR|FATAL|CRITICAL)\b\]?:? ")
_SEVERAL = re.compile(r"(?i)(?<![.\w])(?:errors|exceptions|failures|messages)\b(?!\.\w)[^:]*$")
"""A program tells of one error at a time."""
_AMONG = re.compile(r"[ a-z]{0,20}(?:, (?:and|or|nor) |\) )[a-z]")
"""What follows one of several things that a sentence lists, where a comma stands before it."""
_MEASURED = re.compile(
    r"(?:\d{6,} +bytes\b|\d\.\d\d ?[MG]iB\b).{1,60}?(?:\d{6,} +bytes\b|\d [MG]iB\b)"
)
"""Two sizes as exact as a program prints them."""
_THEN = re.compile(r", (?:the|an?|it|this|that|these|they|we|so|then|which|but) [a-z]")
"""How a sentence goes on that has begun with what may happen."""
_WIDTH = 40
_UNFINISHED = re.compile(r"(?:[\"'(]?\b[A-Za-z'-]+[\"'),.]{0,2} ){2}[\"']?[A-Za-z'-]+,?$")
"""How a line of prose ends within a sentence: words, and no end of it."""
_PLACED = re.compile(r"[`\"']?[\w./\\-]+\.\w{1,4}:\d+: |\w+: ")
"""Where in a program it was, or who speaks, before what it says: no sentence goes on so."""
_CLOSED = re.compile(r"[.!]?[*_`]{0,2}[\"\u201d] ?,? ?[a-z]")
"""What ends a quotation within a sentence."""
_MARKUP = re.compile(r"</?[a-z]{1,6}>")
_SUBJECT = 3
"""Words that a program puts before its own: who it is, or for whom it asked."""


OF_ONE = r".{0,40}(?i:device|gpu|card|worker|rank)\W{0,2}\d+: "
"""An item of a list that says which card it is of, as programs list what each did."""


def runs_on(above: str, body: str) -> bool:
    """Tell whether a line goes on with a sentence that was wrapped within it."""
    return (
        len(above) >= _WIDTH
        and len(body.split()) > _SUBJECT
        and _PLACED.match(body) is None
        and _UNFINISHED.search(above) is not None
        and (
            body.startswith("`")
            or ERROR.search(above) is None
            or _PROSE_HEAD.search(f"{above} ") is not None
        )
    )


def supposes(head: str) -> bool:
    """Tell whether a sentence begins as one of what may happen, rather than of what has."""
    return _SUPPOSED.search(head) is not None


def told(head: str, tail: str, figures: int) -> bool:
    """Tell whether somebody's own sentence goes on about the words.

    A program that says whose error it is may go on, too.
    """
    said = _CLASS.sub("", head)
    if said != head:
        said = said.rstrip(": ")
    if _PROSE_HEAD.search(_ASIDE.sub("", said)) or quoted(head, tail, figures):
        return True
    if head.endswith("... ") and tail.startswith(" ..."):
        return True
    if not figures and _TOLD_OF.match(tail):
        return True
    # A program's own record of an error may guess, too.
    said = "" if tail.startswith(": ") else tail[:_CLOSE]
    if not _RECORD.match(head) and (_PERSON.search(head) or _PERSON.search(said)):
        return True
    return not figures and not _STATED.search(head) and bool(_PROSE_TAIL.match(tail[:_CLOSE]))


def quoted(head: str, tail: str, figures: int) -> bool:
    """Tell whether words are shown as a quotation, or as code, within a sentence.

    With a figure they may be all that an item of a list has, pasted.
    """
    head, tail = head.replace("``", "`"), tail.replace("``", "`")
    said, mark, _ = head.rpartition('"')
    goes_on = tail.partition('"')[2]
    if mark and head.count('"') % 2 and (_MENTIONED.search(said) or _TOLD_OF.match(goes_on)):
        return True
    if _ITALIC.match(f"{head}\0{tail[:_CLOSE]}"):
        return True
    before = head.rpartition("`")[0]
    if "`" not in head or before.count("`") % 2 or tail.count("`") % 2 == 0:
        return False
    if _PLACE.search(tail.partition("`")[0]):
        return False
    return (
        bool(before.strip(" -*+" if figures else None))
        or _GOES_ON.match(tail.partition("`")[2]) is not None
    )


def within(head: str, tail: str) -> bool:
    """Tell whether words stand within a sentence that leads up to them, or lists them."""
    head = _MARKUP.sub("", head)
    if head.endswith(", ") and _AMONG.match(tail):
        return True
    if _CLOSED.match(tail) and head.count('"') % 2 == 0:
        return True
    last = _LAST.search(head)
    if last is not None and not last["plain"]:
        return True
    if _SEVERAL.search(head):
        return True
    if ERROR.search(head) or _MEASURED.search(tail[:_CLOSE]):
        return False
    if last is not None or _THEN.match(tail):
        return True
    return len(_BREAK.split(head)[-1].split()) > _SUBJECT
