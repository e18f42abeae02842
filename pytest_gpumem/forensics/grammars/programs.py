"""Compilers and the runtimes of other languages, which run out of the host's memory."""

from pytest_gpumem.forensics.grammars.language import grammar

GRAMMARS = (
    # HeavyDB, which says so of a query after it has tried to make room.
    grammar(
        "unknown",
        "entire working set of columns in GPU|throwing out of memory GPU",
        r"Query couldn't keep the entire working set of columns in GPU memory"
        r"|ALLOCATION failed to find \d+B? .{0,20}throwing out of memory GPU",
        r"failed to find <tried>",
        distinct=True,
    ),
    grammar(
        "host",
        "heap out of memory|C1060",
        r"Allocation failed - JavaScript heap out of memory"
        r"|\bC1060: compiler is out of heap space",
        distinct=True,
    ),
    grammar(
        "host",
        "OutOfMemory",
        r"\bSystem\.OutOfMemoryException|-?4:Insufficient memory\)"
        r".{0,40} to allocate|\bOutOfMemoryError: Container killed",
        r"ailed to allocate <tried>",
        distinct=True,
    ),
    grammar(
        "host",
        "bytes exhausted",
        r"Allowed memory size of \d+ bytes exhausted\b",
        r"tried to allocate <tried>",
        distinct=True,
    ),
    grammar(
        "host",
        "exceeded: would use",
        r"Memory limit \(.{1,40}\) exceeded: would use",
        r"chunk of <tried>",
        distinct=True,
    ),
    grammar("host", "runtime: out of memory", r"\bruntime: out of memory", distinct=True),
    grammar(
        "host",
        "emory allocation of",
        r"\bmemory allocation of \d+ bytes failed",
        r"allocation of <tried>",
        distinct=True,
    ),
    grammar(
        "host",
        "annot allocate vector|vector memory limit of",
        r"cannot allocate vector of size|\bvector memory limit of [\d.]+ ?[KMGT]b reached",
        r"vector of size <tried>",
        distinct=True,
    ),
    grammar(
        "host",
        "out of memory allocating|LLVM ERROR: out of|rror : out of memory|Memory allocation fail",
        r"\b(?:cc1(?:plus)?|collect2|ld|as|lto1): .{0,20}out of memory allocating"
        r"|LLVM ERROR: out of memory|catastrophic error : out of memory"
        r"|\bptxas fatal +: Memory allocation failure",
        r"memory allocating <tried>",
        distinct=True,
    ),
)
